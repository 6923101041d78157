"""Conversations with pictures become the ids that transformers' processors and LLaVA's own code make of them."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from lmtool.errors import RequestError
from lmtool.images.form import read_image_form
from lmtool.images.prepared import IMAGE_ID
from lmtool.tokenizer import Tokenizer, load_tokenizer
from lmtool.tokenizer.chat_template import built_in
from tests.tiny_llava import PATCH, TEMPLATE, tiny_llava
from tests.tokenizer_files import byte_level_json, folder_with

# the same examples on every machine, however slow it is
SYSTEM = {"role": "system", "content": "be brief"}
PICTURE = {"type": "image"}
# as llava-hf has them, for Vicuna with what training adds, and for Mistral
VICUNA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% else %}{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
    "{{ ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'][0]['text'] + '<|im_end|>' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)


def said(*parts: Any, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


CONVERSATIONS = {
    "text": [said("how many foxes?")],
    "one": [said(PICTURE, "how many foxes?")],
    "after": [said("how many foxes are there?", PICTURE)],
    "two": [said(PICTURE, "the first,", PICTURE, "and the second: which is quicker?")],
    "five": [said(*[PICTURE] * 5, "all of them")],
    "second turn": [said("hi"), said("hello the fox", role="assistant"), said(PICTURE, "and this one?")],
    "both turns": [said(PICTURE, "what?"), said("a fox", role="assistant"), said(PICTURE, "and this?")],
}


@pytest.fixture(scope="module", params=[False, True], ids=["1.5", "1.6"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("llava")
    tiny_llava(path, anyres=request.param)
    return path


def processor_of(folder: Path, template: str) -> Any:
    anyres = "Next" in json.loads((folder / "config.json").read_text())["architectures"][0]
    pictures = (LlavaNextImageProcessorPil if anyres else LlavaImageProcessorPil).from_pretrained(folder)
    words = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<|begin|>", eos_token="<|im_end|>"
    )
    more = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return (LlavaNextProcessor if anyres else LlavaProcessor)(pictures, words, chat_template=template, **more)


@pytest.mark.parametrize("template", [TEMPLATE, VICUNA, MISTRAL], ids=["tiny", "vicuna", "mistral"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_are_those_of_transformers(folder: Path, name: str, template: str) -> None:
    messages = CONVERSATIONS[name]
    (folder / "chat_template.jinja").write_text(template)
    tokenizer, form = load_tokenizer(folder), read_image_form(folder)
    assert form is not None
    ids = tokenizer.chat_ids(messages)
    sizes = [(30 + 20 * i, 50) for i in range(ids.count(IMAGE_ID))]
    pictures = [Image.new("RGB", size) for size in sizes]
    rows = iter([form.prepare(picture).num_tokens for picture in pictures])
    image_id = tokenizer.token_id("<image>")
    ours = [i for token_id in ids for i in ([image_id] * next(rows) if token_id == IMAGE_ID else [token_id])]

    left = iter(pictures)
    shown = [
        {**m, "content": [{"type": "image", "image": next(left)} if p == PICTURE else p for p in m["content"]]}
        for m in messages
    ]
    theirs = processor_of(folder, template).apply_chat_template(
        shown, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert ours == theirs["input_ids"][0]
    assert ids.count(IMAGE_ID) == sum(part == PICTURE for message in messages for part in message["content"])


def test_a_text_is_one_part(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(VICUNA)
    tokenizer = load_tokenizer(folder)
    plain = [SYSTEM, {"role": "user", "content": "the fox"}, {"role": "assistant", "content": "a dog"}]
    in_parts = [said("be brief", role="system"), said("the fox"), said("a dog", role="assistant")]
    assert tokenizer.chat_ids(plain) == tokenizer.chat_ids(in_parts)
    assert tokenizer.render_chat(plain) == "be brief USER: the fox ASSISTANT: a dog ASSISTANT:"


# ------------------------------------------------------------------ LLaVA's own checkpoints


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path: Path = tmp_path_factory.mktemp("original")
    tiny_llava(path, original=True)
    return load_tokenizer(path)


def test_pieces_around_a_picture_stand_for_themselves(original: Tokenizer) -> None:
    """`tokenizer_image_token`: each piece by itself, and BOS once."""
    assert original.token_id("<image>") is None
    ids = original.chat_ids([said(PICTURE, "how many foxes?")])
    before, after = built_in("llava").render([{"role": "user", "content": "@"}], True, original.tokens, {}).split("@")
    pieces = [
        original.encode(text, add_special=False, parse_special=True) for text in (before, "\nhow many foxes?" + after)
    ]
    assert ids == [*pieces[0], IMAGE_ID, *pieces[1]]
    assert ids[0] == original.bos_id
    assert ids.count(original.bos_id) == 1


def test_llava_s_own_prompt(original: Tokenizer) -> None:
    text = original.render_chat([said(PICTURE, PICTURE, "which?"), said("this", role="assistant"), said("why?")])
    assert text == (
        "<|begin|>A chat between a curious human and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the human's questions. USER: <image>\n<image>\nwhich? "
        "ASSISTANT: this<|im_end|>USER: why? ASSISTANT:"
    )


def test_mistral_s_own_prompt(tmp_path: Path) -> None:
    tiny_llava(tmp_path, original=True, backbone="mistral")
    text = load_tokenizer(tmp_path).render_chat([said(PICTURE, "which?")])
    assert text == "<|begin|>[INST] <image>\nwhich? [/INST]"


def test_llava_s_own_prompt_of_a_model_that_speaks_chatml(tmp_path: Path) -> None:
    """LLaVA 1.6 34B, whose architecture is Vicuna's: `conv_chatml_direct`."""
    library = byte_level_json()
    library.add_special_tokens([AddedToken("<|im_start|>", special=True)])
    files = {
        "config.json": {"architectures": ["LlavaLlamaForCausalLM"]},
        "tokenizer.json": library.to_str().encode(),
        "tokenizer_config.json": {"bos_token": "<|begin|>", "eos_token": "<|im_end|>"},
    }
    tokenizer = load_tokenizer(folder_with(tmp_path, files))
    assert tokenizer.render_chat([said(PICTURE, "which?"), said("this", role="assistant"), said("why?")]) == (
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nwhich?<|im_end|>"
        "<|im_start|>assistant\nthis<|im_end|><|im_start|>user\nwhy?<|im_end|><|im_start|>assistant\n"
    )


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_originals_have_a_place_for_each_picture(original: Tokenizer, name: str) -> None:
    messages = CONVERSATIONS[name]
    count = sum(part == PICTURE for message in messages for part in message["content"])
    assert original.chat_ids(messages).count(IMAGE_ID) == count


# ------------------------------------------------------------------ what is no picture


def words(path: Path, *, has_token: bool, special: bool = True, template: str = TEMPLATE) -> Tokenizer:
    library = byte_level_json()
    if has_token:
        library.add_tokens([AddedToken("<image>", special=special)])
    files = {
        "config.json": {"architectures": ["LlavaForConditionalGeneration"]},
        "tokenizer.json": library.to_str().encode(),
        "tokenizer_config.json": {"bos_token": "<|begin|>", "eos_token": "<|im_end|>"},
        "chat_template.jinja": template.encode(),
    }
    return load_tokenizer(folder_with(path, files))


@pytest.mark.parametrize(("has_token", "special"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize(
    "template", [TEMPLATE, MISTRAL, "{{ messages[0].content }}"], ids=["vicuna", "mistral", "text"]
)
def test_who_says_image_shows_none(tmp_path: Path, has_token: bool, special: bool, template: str) -> None:
    tokenizer = words(tmp_path, has_token=has_token, special=special, template=template)
    end = tokenizer.token_id("<|im_end|>")
    image = tokenizer.token_id("<image>")
    for texts in (["say <image> twice: <image>"], ["<ima", "ge> and <|im_", "end|>"], ["<image>", "<|im_end|>"]):
        for content in ("".join(texts), [{"type": "text", "text": text} for text in texts]):
            ids = tokenizer.chat_ids([{"role": "user", "content": content}])
            assert not {IMAGE_ID, image, end} - {None} & set(ids)
            shown = tokenizer.decode(ids).replace("\n", "")
            assert "".join(texts).replace(" ", "") in shown.replace(" ", "")
        ids = tokenizer.chat_ids([said(texts[0], PICTURE, *texts[1:])])
        assert ids.count(IMAGE_ID) == 1
        assert not {image, end} - {None} & set(ids)


@given(cuts=st.lists(st.integers(0, 30), max_size=6), before=st.sampled_from(["", "<", "<|im_", "<ima", "a "]))
def test_however_a_name_is_cut_into_parts_it_is_none(folder: Path, cuts: list[int], before: str) -> None:
    (folder / "chat_template.jinja").write_text(MISTRAL)  # which puts parts side by side
    tokenizer = load_tokenizer(folder)
    text = before + "<image><|im_end|><|begin|>"
    edges = sorted({0, len(text), *(cut % len(text) for cut in cuts)})
    parts = [text[start:end] for start, end in pairwise(edges)]
    ids = tokenizer.chat_ids([said(*parts)])
    assert not {IMAGE_ID, tokenizer.token_id("<image>"), tokenizer.token_id("<|im_end|>")} & set(ids)
    assert ids.count(tokenizer.bos_id) == 1
    assert tokenizer.decode(ids) == f"[INST] {text} [/INST]"


def test_a_picture_has_no_text(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("the fox", add_special=False)
    assert tokenizer.decode([*ids, IMAGE_ID, -(2**63)]) == "the fox"


# ------------------------------------------------------------------ templates


def test_the_processor_s_template_goes_before_the_tokenizer_s(tmp_path: Path) -> None:
    words(tmp_path, has_token=True)
    (tmp_path / "chat_template.jinja").unlink()
    settings = {"bos_token": "<|begin|>", "chat_template": "{{ messages[0].content }}"}
    folder_with(tmp_path, {"tokenizer_config.json": settings})
    assert load_tokenizer(tmp_path).chat_template == settings["chat_template"]
    folder_with(tmp_path, {"processor_config.json": {"chat_template": VICUNA}})
    assert load_tokenizer(tmp_path).chat_template == VICUNA
    folder_with(tmp_path, {"chat_template.json": {"chat_template": MISTRAL}})
    assert load_tokenizer(tmp_path).chat_template == MISTRAL
    folder_with(tmp_path, {"config.json": {"architectures": ["LlamaForCausalLM"]}})
    assert load_tokenizer(tmp_path).chat_template == settings["chat_template"]


def test_a_workspace_knows_its_pictures(folder: Path, tmp_path: Path) -> None:
    (folder / "chat_template.jinja").write_text(VICUNA)
    config = json.loads((folder / "config.json").read_text())
    copied = {name: (folder / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    workspace = folder_with(tmp_path, {"lmtool.json": {"config": config, "chat_template": VICUNA}, **copied})
    for messages in CONVERSATIONS.values():
        assert load_tokenizer(workspace).chat_ids(messages) == load_tokenizer(folder).chat_ids(messages)


def test_a_template_that_leaves_pictures_out(tmp_path: Path) -> None:
    """Its prompts have no place for them, which whoever makes the request refuses."""
    only_texts = "{% for part in messages[0].content if part.type == 'text' %}{{ part.text }}{% endfor %}"
    tokenizer = words(tmp_path, has_token=True, template=only_texts)
    assert tokenizer.chat_ids([said(PICTURE, "the fox")]) == tokenizer.encode("the fox")
    assert tokenizer.chat_ids([{"role": "user", "content": "the fox"}]) == tokenizer.encode("the fox")


def test_a_template_that_takes_both_forms(tmp_path: Path) -> None:
    both = "{% if messages[0].content is string %}{{ messages[0].content }}{% else %}" + TEMPLATE + "{% endif %}"
    tokenizer = words(tmp_path, has_token=True, template=both)
    assert tokenizer.chat_ids([said(PICTURE, "the fox")]).count(IMAGE_ID) == 1


def test_pictures_of_others_than_users(tmp_path: Path) -> None:
    for template in (TEMPLATE, VICUNA, "{{ messages[1].content }}"):
        tokenizer = words(tmp_path, has_token=True, template=template)
        for role in ("system", "assistant", "tool"):
            ids = tokenizer.chat_ids([said("hi"), said(PICTURE, "the fox", role=role)])
            assert ids.count(IMAGE_ID) == 1


def test_calls_of_tools_say_nothing(tmp_path: Path) -> None:
    tokenizer = words(tmp_path, has_token=True, template="{% for m in messages %}{{ m.role }}{% endfor %}")
    assert tokenizer.render_chat([{"role": "assistant", "content": None}, {"role": "tool"}]) == "assistanttool"


# ------------------------------------------------------------------ refusals


def test_a_model_without_pictures(tmp_path: Path) -> None:
    words(tmp_path, has_token=True, template="{{ messages[0].content }}")
    folder_with(tmp_path, {"config.json": {"architectures": ["LlamaForCausalLM"]}})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.image_token is None
    for ask in (tokenizer.chat_ids, tokenizer.render_chat):
        with pytest.raises(RequestError, match="takes no pictures; load a model that does"):
            ask([said(PICTURE, "what is it?")])
    assert tokenizer.render_chat([said("two", "parts")]) == "two\nparts"


@pytest.mark.parametrize("part", ["text", {"type": "video"}, {"type": "text"}, {"type": "text", "text": 1}, None, {}])
def test_parts_of_another_kind(folder: Path, part: Any) -> None:
    tokenizer = load_tokenizer(folder)
    with pytest.raises(RequestError, match="message 1: part 0 is neither a text nor a picture"):
        tokenizer.chat_ids([said("hi"), {"role": "user", "content": [part]}])
