"""`/v1/chat/completions`, asked by OpenAI's own client: what comes back is what the engine itself says."""

import openai
import pytest

from tests.server.serving import Serving
from tests.server.support import alone, smollm2_tokenizer

HELLO = [{"role": "user", "content": "Hello, who are you?"}]


@pytest.fixture(scope="module")
def tokenizer():
    return smollm2_tokenizer()


@pytest.fixture(scope="module")
def prompt_ids(tokenizer):
    return tokenizer.chat_ids(HELLO)


def ask(serving: Serving, **settings):
    return serving.openai().chat.completions.create(
        **{"model": "tiny", "messages": HELLO, "max_completion_tokens": 12, "temperature": 0, **settings}
    )


def test_an_answer_is_the_engines_own(serving, tokenizer, prompt_ids):
    answer = ask(serving)
    ids = [output.token_id for output in alone(prompt_ids, max_new_tokens=12)]
    (choice,) = answer.choices
    assert choice.message.content == tokenizer.decode(ids)
    assert (choice.message.role, choice.finish_reason, choice.index) == ("assistant", "length", 0)
    assert (answer.object, answer.model, answer.id[:9]) == ("chat.completion", "tiny", "chatcmpl-")
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt_ids), 12)
    assert usage.total_tokens == len(prompt_ids) + 12


def test_a_stream_is_the_same_text(serving):
    chunks = list(ask(serving, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ask(serving).choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_ends_a_stream_where_it_is_asked_for(serving, prompt_ids):
    *chunks, last = ask(serving, stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(prompt_ids), 12)
    assert all(chunk.usage is None for chunk in chunks)


def test_a_conversations_beginning_is_computed_once(serving):
    long = [{"role": "user", "content": "Tell me about whales. " * 40}]
    first = ask(serving, messages=long).usage
    second = ask(serving, messages=long).usage
    assert first.prompt_tokens_details.cached_tokens < 64  # what the template begins every conversation with
    assert second.prompt_tokens_details.cached_tokens >= second.prompt_tokens - 64


def test_choices_differ_and_come_again_with_their_seed(serving):
    def choices(**settings):
        return [choice.message.content for choice in ask(serving, n=3, temperature=1, **settings).choices]

    first = choices(seed=5)
    assert len(set(first)) == 3
    assert choices(seed=5) == first
    assert choices(seed=6)[0] == first[1]  # choice i has seed + i
    assert len(set(choices())) == 3


def test_choices_of_a_stream(serving):
    texts = ["", "", ""]
    reasons = {}
    for chunk in ask(serving, n=3, temperature=1, seed=5, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason
    whole = ask(serving, n=3, temperature=1, seed=5)
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == dict.fromkeys(range(3), "length")
    assert whole.usage.completion_tokens == 36
    assert whole.usage.prompt_tokens == ask(serving).usage.prompt_tokens  # counted once


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_the_engines_own(serving, tokenizer, prompt_ids, stream):
    answer = ask(serving, logprobs=True, top_logprobs=3, stream=stream)
    if stream:
        found = [entry for chunk in answer for entry in chunk.choices[0].logprobs.content]
    else:
        found = answer.choices[0].logprobs.content
    expected = [output.logprob for output in alone(prompt_ids, max_new_tokens=12, logprobs=3)]
    assert len(found) == len(expected) == 12
    for entry, one in zip(found, expected, strict=True):
        assert bytes(entry.bytes) == tokenizer.token_bytes(one.token_id)
        assert entry.token == tokenizer.token_text(one.token_id)
        assert entry.logprob == pytest.approx(one.logprob, abs=1e-4)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx([p for _, p in one.top], abs=1e-4)
        assert [bytes(top.bytes) for top in entry.top_logprobs] == [tokenizer.token_bytes(i) for i, _ in one.top]


def test_stop_texts_end_an_answer_before_them(serving):
    whole = ask(serving).choices[0].message.content
    stop = whole[len(whole) // 2 :][:3]
    for settings in ({"stop": stop}, {"stop": ["never said", stop]}):
        choice = ask(serving, **settings).choices[0]
        assert (choice.message.content, choice.finish_reason) == (whole[: whole.index(stop)], "stop")
    streamed = list(ask(serving, stop=stop, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == whole[: whole.index(stop)]
    assert streamed[-1].choices[0].finish_reason == "stop"


def test_stop_tokens_bans_and_biases_reach_the_engine(serving, tokenizer, prompt_ids):
    ids = [output.token_id for output in alone(prompt_ids, max_new_tokens=12)]
    stopped = ask(serving, extra_body={"stop_token_ids": [ids[3]]}).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (tokenizer.decode(ids[:3]), "stop")
    later = ask(serving, extra_body={"stop_token_ids": [ids[3]], "min_tokens": 6}).usage
    assert later.completion_tokens >= 6
    biased = ask(serving, logit_bias={str(1234): 100}).choices[0].message.content
    assert biased == tokenizer.decode([1234] * 12)
    banned = ask(serving, extra_body={"bad_words": [tokenizer.decode(ids[:1])]}).choices[0].message.content
    assert not banned.startswith(tokenizer.decode(ids[:1]))


@pytest.mark.parametrize(
    ("name", "value"),
    [("presence_penalty", 2.0), ("frequency_penalty", 2.0), ("repetition_penalty", 1.5), ("min_p", 0.9), ("top_k", 1)],
)
def test_each_sampling_value_is_the_engines(serving, tokenizer, prompt_ids, name, value):
    settings = {"temperature": 0.9, "seed": 3, name: value}
    ids = [output.token_id for output in alone(prompt_ids, max_new_tokens=12, **settings)]
    own = {key: settings.pop(key) for key in ("repetition_penalty", "min_p", "top_k") if key in settings}
    answer = ask(serving, **settings, extra_body=own)
    assert answer.choices[0].message.content == tokenizer.decode(ids)


def test_parts_of_text_and_developers(serving):
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello, who are you?"}]}]
    assert ask(serving, messages=parts).choices == ask(serving).choices
    told = [ask(serving, messages=[{"role": role, "content": "Be brief."}, *HELLO]) for role in ("system", "developer")]
    assert told[0].choices == told[1].choices


def test_what_has_no_effect_by_its_nature(serving):
    answer = ask(
        serving,
        user="me",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        safety_identifier="x",
        prompt_cache_key="y",
        modalities=["text"],
    )
    assert answer.choices == ask(serving).choices


def test_without_a_temperature_it_is_openais(serving):
    answers = {ask(serving, temperature=openai.omit).choices[0].message.content for _ in range(3)}
    assert len(answers) == 3
    assert len({ask(serving).choices[0].message.content for _ in range(2)}) == 1


def test_the_default_length_is_the_contexts(serving):
    answer = ask(serving, max_completion_tokens=openai.omit, extra_body={"ignore_eos": True})
    assert answer.usage.total_tokens == 512
    assert answer.choices[0].finish_reason == "length"


def test_an_answer_may_be_sent_back_as_it_came(serving):
    first = ask(serving).choices[0].message
    for again in (first, first.model_dump(), first.to_dict()):
        answer = ask(serving, messages=[*HELLO, again, {"role": "user", "content": "And?"}])
        assert answer.usage.completion_tokens == 12
