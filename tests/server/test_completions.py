"""`/v1/completions`, asked by OpenAI's own client and as lm-eval asks it."""

import pytest

from lmtool.engine.detokenizer import Detokenizer
from lmtool.engine.response import Answer
from tests.server.serving import Serving
from tests.server.support import alone, smollm2_tokenizer
from tests.support import request

TEXT = "The whale is a mammal"


@pytest.fixture(scope="module")
def tokenizer():
    return smollm2_tokenizer()


def ask(serving: Serving, **settings):
    return serving.openai().completions.create(
        **{"model": "tiny", "prompt": TEXT, "max_tokens": 8, "temperature": 0, **settings}
    )


def test_a_text_and_its_ids_are_answered_alike(serving, tokenizer):
    ids = tokenizer.encode(TEXT)
    expected = tokenizer.decode([output.token_id for output in alone(ids, max_new_tokens=8)])
    for prompt in (TEXT, ids, [TEXT], [ids]):
        answer = ask(serving, prompt=prompt)
        assert answer.choices[0].text == expected
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 8)
    assert (answer.object, answer.choices[0].finish_reason) == ("text_completion", "length")


def test_several_prompts_with_several_choices(serving):
    prompts = [TEXT, "Once upon a time", "def f(x):"]
    together = ask(serving, prompt=prompts, n=2, temperature=1, seed=1)
    assert [choice.index for choice in together.choices] == list(range(6))
    for i, prompt in enumerate(prompts):
        own = ask(serving, prompt=prompt, n=2, temperature=1, seed=1)
        assert [c.text for c in own.choices] == [c.text for c in together.choices[2 * i : 2 * i + 2]]
    texts, reasons = [""] * 6, [None] * 6
    for chunk in ask(serving, prompt=prompts, n=2, temperature=1, seed=1, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in together.choices]
    assert reasons == ["length"] * 6


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs_is_what_lm_eval_reads(serving, tokenizer, stream):
    ids = tokenizer.encode(TEXT)
    answer = ask(serving, prompt=ids, echo=True, logprobs=2, max_tokens=1, stream=stream)
    parts = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    text = "".join(part.text for part in parts)
    found = {
        name: [one for part in parts if part.logprobs for one in getattr(part.logprobs, name)]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    }
    (output,) = alone(ids, max_new_tokens=1, logprobs=2, prompt_logprobs=2)
    assert text == TEXT + tokenizer.decode([output.token_id])
    assert found["tokens"] == [tokenizer.token_text(i) for i in [*ids, output.token_id]]
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    expected = [*output.prompt_logprobs, output.logprob]
    assert found["token_logprobs"][1:] == pytest.approx([one.logprob for one in expected], abs=1e-4)
    for top, one in zip(found["top_logprobs"][1:], expected, strict=True):
        likeliest = dict(sorted(top.items(), key=lambda item: -item[1])[:2])
        assert list(likeliest) == [tokenizer.token_text(i) for i, _ in one.top]
        assert top[tokenizer.token_text(one.token_id)] == pytest.approx(one.logprob, abs=1e-4)
    for offset, token in zip(found["text_offset"], found["tokens"], strict=True):
        assert text[offset:].startswith(token)


def test_what_came_with_the_first_token_stays_where_others_came_with_it(tokenizer):
    ids = tokenizer.encode(TEXT)
    outputs = alone(ids, max_new_tokens=3, logprobs=2, prompt_logprobs=2)
    answer = Answer(0, request(0, ids), Detokenizer(tokenizer), 0.0)
    piece = answer.take(outputs)
    assert (len(piece.token_ids), piece.finish_reason) == (3, "length")
    assert piece.prompt_logprobs == outputs[0].prompt_logprobs is not None


def test_nothing_is_generated_where_nothing_is_asked_for(serving, tokenizer):
    answer = ask(serving, max_tokens=0, echo=True, logprobs=0)
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason, answer.usage.completion_tokens) == (TEXT, "length", 0)
    assert choice.logprobs.tokens == [tokenizer.token_text(i) for i in tokenizer.encode(TEXT)]
    (chunk,) = list(ask(serving, max_tokens=0, echo=True, stream=True))
    assert (chunk.choices[0].text, chunk.choices[0].finish_reason) == (TEXT, "length")


def test_half_a_character_has_a_name_of_its_own(serving, tokenizer):
    ids = tokenizer.encode("🐳", add_special=False)
    assert len(ids) > 1
    choice = ask(serving, prompt=ids, max_tokens=0, echo=True, logprobs=1).choices[0]
    named = [name for name in choice.logprobs.tokens if name.startswith("bytes:")]
    assert named
    assert b"".join(bytes.fromhex(name[6:].replace("\\x", "")) for name in named) == "🐳".encode()
    assert choice.text == "🐳"
    assert choice.logprobs.text_offset == [0] * len(ids)


def test_names_of_special_tokens_are_those_tokens(serving, tokenizer):
    answer = ask(serving, prompt="<|im_start|>user")
    assert answer.usage.prompt_tokens == 2


def test_the_default_length_is_openais(serving):
    body = {"model": "tiny", "prompt": TEXT, "ignore_eos": True}
    with serving.http() as client:
        assert client.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] == 16


def test_a_stream_ends_with_done(serving):
    body = {"prompt": TEXT, "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}
    with serving.http() as client:
        response = client.post("/v1/completions", json=body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert '"choices":[],"usage":{"prompt_tokens"' in events[-3]
