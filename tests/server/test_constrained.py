"""Answers of a prescribed form, and calls of functions, as OpenAI's own client asks for them and reads them. The model
is a random one: whatever is well-formed is so because it was held to it."""

import json
import re
from functools import partial
from typing import Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from lmtool.engine.grammar_frames import GrammarVocabulary
from tests.server.serving import Serving, wait_until
from tests.server.support import smollm2_tokenizer, tiny_engine

HELLO = [{"role": "user", "content": "What is the weather in Paris?"}]


class Weather(BaseModel):
    model_config = ConfigDict(extra="forbid")
    city: Literal["Paris", "Rome"]
    degrees: int = Field(ge=0, le=9)


TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "Tells it", "parameters": Weather.model_json_schema()},
    },
    {"type": "function", "function": {"name": "stop"}},
]


@pytest.fixture(scope="module")
def server():
    engine = tiny_engine()
    engine.core.give_vocabulary(partial(GrammarVocabulary.of, smollm2_tokenizer(), 49152))
    with Serving(engine) as server:
        yield server
    engine.close()


def ask(server: Serving, form=None, **settings):
    body = {} if form is None else {"extra_body": {"response_format": form}}
    return server.openai().chat.completions.create(
        **{"model": "tiny", "messages": HELLO, "max_tokens": 400, "seed": 1, **body, **settings}
    )


def joined(stream) -> tuple[str, list[dict], str]:
    """Content, calls and the reason to finish, as a client puts them together."""
    content, calls, reason = "", [], ""
    for chunk in stream:
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        for piece in choice.delta.tool_calls or ():
            if piece.index == len(calls):
                calls.append({"id": piece.id, "name": piece.function.name, "arguments": ""})
            calls[piece.index]["arguments"] += piece.function.arguments
        reason = choice.finish_reason or reason
    return content, calls, reason


def test_openais_client_parses_an_answer_by_a_schema(server):
    answer = server.openai().chat.completions.parse(
        model="tiny", messages=HELLO, response_format=Weather, max_tokens=400, seed=2, n=2
    )
    for choice in answer.choices:
        assert isinstance(choice.message.parsed, Weather)
        assert choice.finish_reason == "stop"


def test_a_stream_follows_the_schema_too(server):
    form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": Weather.model_json_schema()}}
    content, _, reason = joined(ask(server, form, stream=True))
    assert Weather.model_validate_json(content)
    assert reason == "stop"


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"type": "choice", "choice": ["red", "green"]}, r"red|green"),
        ({"type": "regex_schema", "regex_schema": "[a-c]{3}"}, r"[a-c]{3}"),
        ({"type": "grammar", "grammar": 'root ::= "a" | "b" "c"'}, r"a|bc"),
    ],
)
def test_other_forms(server, form, pattern):
    assert re.fullmatch(pattern, ask(server, form).choices[0].message.content)
    text = server.openai().completions.create(
        model="tiny", prompt="a", max_tokens=20, extra_body={"response_format": form}
    )
    assert re.fullmatch(pattern, text.choices[0].text)


def test_text_is_no_form(server):
    settings = {"max_tokens": 8}
    assert ask(server, {"type": "text"}, **settings).choices == ask(server, **settings).choices


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({}, "type is None"),
        ({"type": "xml"}, "give text, json_object"),
        ({"type": "json_schema"}, "json_schema is missing"),
        ({"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}, "nonsense"),
        ({"type": "regex_schema", "regex_schema": "("}, "parenthesis"),
        ({"type": "choice", "choice": []}, "choice"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_forms_that_are_none(server, form, said, stream):
    with pytest.raises(openai.BadRequestError, match=said) as refused:
        ask(server, form, stream=stream)
    assert refused.value.param == "response_format"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_must_be(server, choice):
    message = ask(server, tools=TOOLS[:1], tool_choice=choice).choices[0]
    assert message.finish_reason == "tool_calls"
    assert message.message.content is None
    calls = message.message.tool_calls
    for call in calls:
        assert call.function.name == "weather"
        assert Weather.model_validate_json(call.function.arguments)
    content, streamed, reason = joined(ask(server, tools=TOOLS[:1], tool_choice=choice, stream=True))
    assert (content, reason) == ("", "tool_calls")
    assert [(call["name"], call["arguments"]) for call in streamed] == [
        (call.function.name, call.function.arguments) for call in calls
    ]
    assert len({call["id"] for call in streamed}) == len(streamed)


def test_a_conversation_goes_on_after_its_calls(server):
    message = ask(server, tools=TOOLS[:1], tool_choice="required", parallel_tool_calls=False).choices[0].message
    (call,) = message.tool_calls
    told = {"role": "tool", "tool_call_id": call.id, "content": json.dumps({"degrees": 5})}
    answer = ask(server, messages=[*HELLO, message, told], tools=TOOLS, max_tokens=5)
    assert answer.usage.completion_tokens == 5
    assert answer.usage.prompt_tokens > ask(server, max_tokens=5).usage.prompt_tokens


def test_none_is_no_call(server):
    answer = ask(server, tools=TOOLS, tool_choice="none", max_tokens=8)
    assert answer.choices == ask(server, max_tokens=8).choices


def test_two_forms_of_one_answer(server):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(server, {"type": "json_object"}, tools=TOOLS, tool_choice="required")
    assert refused.value.param == "response_format"


def test_a_form_that_is_refused_leaves_nothing_behind(server):
    with pytest.raises(openai.BadRequestError):
        ask(server, {"type": "regex_schema", "regex_schema": "("}, n=3)
    assert server.context.engine.num_open == 0
    wait_until(lambda: not server.engine.core.has_work)
