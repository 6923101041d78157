"""Pieces of text → OpenAI's messages and deltas: thoughts, calls of functions, and nothing lost however it is cut."""

import asyncio
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmtool.engine.response import Response
from lmtool.engine.sequence import TokenLogprob
from lmtool.server.chat_answer import ChatAnswer
from lmtool.server.chat_prompt import chat_prompt
from lmtool.server.chat_reader import ChatReader
from lmtool.server.errors import Refusal
from lmtool.server.template_options import template_options
from lmtool.server.tools_format import HERMES
from lmtool.server.tools_reader import ToolReader
from lmtool.tokenizer.chat_template import ChatTemplate
from tests.server.support import smollm2_tokenizer

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
THOUGHT = "<think>\nIt rains.\n</think>\n\nIt is wet."
# the same examples on every machine, however slow it is


@pytest.fixture(scope="module")
def tokenizer():
    return smollm2_tokenizer()


def reader(**settings) -> ChatReader:
    return ChatReader(tools=ToolReader(HERMES, {"weather"}), **settings)


def whole(text: str, reader: ChatReader, reason: str = "stop") -> dict:
    answer = ChatAnswer(None, "m", [reader]).whole([Response(text=text, finish_reason=reason)])
    return answer["choices"][0]


def streamed(pieces: list[str], reader: ChatReader, reason: str = "stop") -> dict:
    """The message and reason that a client puts together."""
    chunks = ChatAnswer(None, "m", [reader]).begin(include_usage=False)
    parts = [Response(text=piece) for piece in pieces[:-1]] + [Response(text=pieces[-1], finish_reason=reason)]
    events = [event for part in parts if (event := chunks.push(part))]
    message: dict = {"content": ""}
    for event in events:
        (choice,) = json.loads(event.removeprefix(b"data: "))["choices"]
        delta = choice["delta"]
        for name in ("content", "reasoning_content"):
            if name in delta:
                message[name] = message.get(name, "") + delta[name]
        for call in delta.get("tool_calls", ()):
            calls = message.setdefault("tool_calls", [])
            if call["index"] == len(calls):
                calls.append(call)
            else:
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    return {"message": message, "finish_reason": choice["finish_reason"]}


def test_a_thought_is_no_content():
    choice = whole(THOUGHT, reader())
    assert choice["message"]["content"] == "It is wet."
    assert choice["message"]["reasoning_content"] == "It rains.\n"
    opened = whole("It rains.\n</think>\n\nIt is wet.", reader(opens_thought=True))
    assert opened["message"] == choice["message"]
    assert "reasoning_content" not in whole("It is <think>wet</think>.", reader())["message"]


def test_a_call_is_no_content():
    choice = whole("Let me see.\n" + CALL, reader())
    (call,) = choice["message"]["tool_calls"]
    assert choice["message"]["content"] == "Let me see."
    assert choice["finish_reason"] == "tool_calls"
    assert call["id"].startswith("call_")
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Paris"}'}
    assert whole(CALL, reader())["message"]["content"] is None
    assert whole(CALL, ChatReader())["message"]["content"] == CALL
    assert whole(CALL, reader(), "length")["finish_reason"] == "length"


@given(text=st.sampled_from([THOUGHT, THOUGHT + CALL, CALL, "a" + CALL + CALL, "plain", ""]), data=st.data())
def test_a_stream_says_the_same_however_it_is_cut(text, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    found, expected = streamed(pieces, reader()), whole(text, reader())
    assert found["finish_reason"] == expected["finish_reason"]
    assert found["message"]["content"] == (expected["message"]["content"] or "")
    assert found["message"].get("reasoning_content") == expected["message"].get("reasoning_content")
    assert [call["function"] for call in found["message"].get("tool_calls", ())] == [
        call["function"] for call in expected["message"].get("tool_calls", ())
    ]


def test_a_piece_that_says_nothing_is_no_event(tokenizer):
    chunks = ChatAnswer(tokenizer, "m", [ChatReader()]).begin(include_usage=False)
    assert b'"role":"assistant"' in chunks.push(Response(text=""))
    assert chunks.push(Response(text="")) is None
    assert b'"logprobs":{"content"' in chunks.push(Response(text="", logprobs=[TokenLogprob(5, -1.0)]))
    assert b'"finish_reason":"length"' in chunks.push(Response(text="", finish_reason="context"))


def with_template(tokenizer, source: str):
    return replace(tokenizer, template=ChatTemplate(source, "a test"))


def test_a_template_may_open_the_thought(tokenizer):
    source = "{{ messages[0].content }}<|im_start|>assistant\n{% if enable_thinking %}<think>\n{% endif %}"
    thinking = with_template(tokenizer, source)
    messages = [{"role": "user", "content": "Hi"}]
    options = template_options(thinking, {"enable_thinking": True}, None)
    assert asyncio.run(chat_prompt(thinking, messages, options)).opens_thought
    assert not asyncio.run(chat_prompt(thinking, messages, {})).opens_thought
    assert template_options(thinking, None, "none") == {"enable_thinking": False}
    assert template_options(thinking, None, "high") == {"enable_thinking": True}
    with pytest.raises(Refusal, match="give 'none' or 'high'"):
        template_options(thinking, None, "low")


def test_a_request_sets_only_what_the_template_reads(tokenizer):
    source = (
        "{{ bos_token }}{{ date_string }}{% set own = 1 %}{{ own }}{{ tools }}{{ messages[0].content }}{{ pad_token }}"
    )
    template = with_template(tokenizer, source)
    assert template_options(template, {"date_string": "today"}, None) == {"date_string": "today"}
    for name in ("own", "tools", "messages", "bos_token", "pad_token", "other"):
        with pytest.raises(Refusal, match="there are date_string") as refused:
            template_options(template, {name: "x"}, None)
        assert refused.value.param == "chat_template_kwargs"


def test_a_template_that_refuses_is_the_requests_fault(tokenizer):
    template = with_template(tokenizer, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(Refusal, match="roles must alternate") as refused:
        asyncio.run(chat_prompt(template, [{"role": "user", "content": "Hi"}], {}))
    assert (refused.value.status, refused.value.param) == (400, "messages")


def test_what_is_said_stays_text(tokenizer):
    ids = asyncio.run(chat_prompt(tokenizer, [{"role": "user", "content": "<|im_end|>"}], {})).ids
    plain = asyncio.run(chat_prompt(tokenizer, [{"role": "user", "content": "x"}], {})).ids
    end = tokenizer.token_id("<|im_end|>")
    assert ids.count(end) == plain.count(end)
