"""Chat templates: where they come from, what the built-in ones write, and what the sandbox refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from lmtool.errors import RequestError, TokenizerError
from lmtool.tokenizer import Tokenizer, load_tokenizer
from lmtool.tokenizer.chat_template import BUILT_IN, built_in, built_in_name
from tests.tokenizer_files import byte_level_json, folder_with

TALK = [
    {"role": "system", "content": "SYS"},
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "Q2"},
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
EXPECTED = {
    "chatml": "<|im_start|>system\nSYS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
    "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n",
    "internlm": "<s><|System|>:SYS\n<|User|>:Q1<eoh>\n<|Bot|>:A1<eoa>\n<|User|>:Q2<eoh>\n<|Bot|>:",
    "llama2": "<s>[INST] <<SYS>>\nSYS\n<</SYS>>\n\nQ1 [/INST] A1 </s><s>[INST] Q2 [/INST]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nSYS<|eot_id|><|start_header_id|>user<|end_header_id|>"
    "\n\nQ1<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA1<|eot_id|><|start_header_id|>user"
    "<|end_header_id|>\n\nQ2<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] SYS\n\nQ1 [/INST]A1</s>[INST] Q2 [/INST]",
    "llava": "<s>SYS USER: Q1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:",
    "llava-chatml": "<|im_start|>system\nSYS<|im_end|><|im_start|>user\nQ1<|im_end|><|im_start|>assistant\nA1<|im_end|>"
    "<|im_start|>user\nQ2<|im_end|><|im_start|>assistant\n",
    "vicuna": "<s>SYS USER: Q1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:",
}
EXPECTED |= {"qwen": EXPECTED["chatml"], "internlm2": "<s>" + EXPECTED["chatml"]}


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_templates(name: str) -> None:
    template = built_in(name)
    assert template.render(TALK, True, TOKENS, {}) == EXPECTED[name]
    shown = template.render(TALK[1:2], True, TOKENS, {})
    assert "Q1" in shown
    assert "SYS" not in shown
    with_braces = template.render([{"role": "user", "content": "{{ 1 + 1 }} {% raw %}"}], True, TOKENS, {})
    assert "{{ 1 + 1 }} {% raw %}" in with_braces  # a message is data, not template


@pytest.mark.parametrize("name", ["llama2", "llava", "mistral", "vicuna"])
def test_built_in_templates_refuse_what_their_models_never_saw(name: str) -> None:
    with pytest.raises(TokenizerError, match="the roles must alternate user, assistant"):
        built_in(name).render([TALK[1], TALK[1]], True, TOKENS, {})


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("internlm-chat-7b", "internlm"),
        ("internlm2-chat-20b", "internlm2"),
        ("internlm2-chat-1_8b", "internlm2"),
        ("qwen-7b", "qwen"),
        ("Llama-2-7b-chat", "llama2"),
        ("llama2", "llama2"),
        ("vicuna-v1.5", "vicuna"),
        ("llava-v1.5-7b", "llava"),
        ("gpt", None),
    ],
)
def test_names_of_models_are_names_of_templates(given: str, name: str | None) -> None:
    assert built_in_name(given) == name


def model(path: Path, **settings: Any) -> Path:
    path.mkdir(exist_ok=True)
    byte_level_json().save(str(path / "tokenizer.json"))
    defaults = {"bos_token": "<|begin|>", "eos_token": "<|im_end|>"}
    return folder_with(path, {"tokenizer_config.json": defaults | settings})


def shown(tokenizer: Tokenizer, text: str = "Hi", **options: Any) -> str:
    return tokenizer.render_chat([{"role": "user", "content": text}], options=options)


def test_the_checkpoint_s_own_template(tmp_path: Path) -> None:
    assert shown(load_tokenizer(model(tmp_path, chat_template="a{{ bos_token }}"))) == "a<|begin|>"
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    folder = model(tmp_path, chat_template=named)
    assert shown(load_tokenizer(folder)) == "d"
    assert shown(load_tokenizer(folder, chat_template="tool_use")) == "t"
    (folder / "chat_template.jinja").write_text("file")
    assert shown(load_tokenizer(folder)) == "file"
    assert shown(load_tokenizer(folder, chat_template="chatml")).startswith("<|im_start|>user\nHi")


def test_several_templates_without_a_default_are_a_question(tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "d"}, {"name": "tool_use", "template": "t"}]
    with pytest.raises(TokenizerError, match="several chat templates and no default; --chat-template rag|tool_use"):
        load_tokenizer(model(tmp_path, chat_template=named))


def test_a_template_from_a_file(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    jinja, stored = tmp_path / "mine.jinja", tmp_path / "mine.json"
    jinja.write_text("J {{ messages[0].content }}")
    stored.write_text(json.dumps({"chat_template": "S {{ messages[0].content }}"}))
    assert shown(load_tokenizer(folder, chat_template=str(jinja))) == "J Hi"
    assert shown(load_tokenizer(folder, chat_template=str(stored))) == "S Hi"
    stored.write_text('{"template": 1}')
    with pytest.raises(TokenizerError, match="mine.json cannot be read"):
        load_tokenizer(folder, chat_template=str(stored))
    with pytest.raises(TokenizerError, match="--chat-template nothing is neither a name nor a file; .* chatml, "):
        load_tokenizer(folder, chat_template="nothing")


def test_a_base_model_encodes_but_does_not_chat(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(model(tmp_path))
    assert tokenizer.encode("the fox")
    assert tokenizer.chat_template is None
    with pytest.raises(TokenizerError, match="no chat template.*--chat-template NAME|FILE .*vicuna"):
        shown(tokenizer)


def test_what_templates_may_use(tmp_path: Path) -> None:
    source = (
        "{%- for m in messages %}\n"
        "  {%- if loop.index > 1 %}{% break %}{% endif %}\n"
        "{{ m | tojson }} {{ strftime_now('%Y')[:2] }} {{ tools is none }} {{ enable_thinking }}\n"
        "{%- endfor %}"
    )
    tokenizer = load_tokenizer(model(tmp_path, chat_template=source))
    text = tokenizer.render_chat([{"role": "user", "content": "<é>"}] * 2, options={"enable_thinking": False})
    assert text == '{"role": "user", "content": "<é>"} 20 True False'


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('only\nusers') }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{% set _ = messages.append(1) %}{{ messages[0].content.nothing.more }}",
        "{{ ''.__class__.__base__ }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
        "{{ range(10**9) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_s_complaint_is_one_line(tmp_path: Path, source: str) -> None:
    tokenizer = load_tokenizer(model(tmp_path, chat_template=source))
    with pytest.raises(TokenizerError, match="refuses this conversation") as caught:
        shown(tokenizer)
    assert "\n" not in str(caught.value)


def test_a_template_that_is_not_jinja_is_named(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(model(tmp_path, chat_template="{% if %}"))
    assert tokenizer.encode("the")
    with pytest.raises(TokenizerError, match=f"the chat template of {tmp_path} is not valid Jinja"):
        shown(tokenizer)


@pytest.mark.parametrize("messages", [[], [{"content": "x"}], ["text"], [{"role": 1, "content": "x"}]])
def test_malformed_messages_are_refused(tmp_path: Path, messages: Any) -> None:
    tokenizer = load_tokenizer(model(tmp_path, chat_template="x"))
    with pytest.raises(RequestError):
        tokenizer.render_chat(messages)
    with pytest.raises(RequestError):
        tokenizer.chat_ids(messages)


def test_a_template_that_cuts_messages_still_keeps_special_tokens_out(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(model(tmp_path, chat_template="{{ messages[0].content[:9] }}<|im_end|>"))
    end = tokenizer.token_id("<|im_end|>")
    for content in ("<|im_end|>", "x <|im_end|> y", "<|im_end|><|im_end|>"):
        assert tokenizer.chat_ids([{"role": "user", "content": content}]).count(end) == 1
