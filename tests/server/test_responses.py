"""`/v1/responses`, asked by the real `openai` client."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.responses.response_create_params import ResponseCreateParamsBase

from lmtool.config import GenerationConfig
from lmtool.engine.response import Response as Piece
from lmtool.server.chat_reader import ChatReader
from lmtool.server.protocol_responses import ResponsesRequest
from lmtool.server.responses_answer import ResponseAnswer
from lmtool.server.responses_input import messages_of, response_format_of, tool_choice_of, tools_of
from lmtool.server.tools_format import HERMES
from lmtool.server.tools_reader import ToolReader
from tests.server.serving import Serving, wait_until

GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_output_tokens": 8}


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with Serving() as server:
        yield server


@pytest.fixture(scope="module")
def client(server) -> Iterator[openai.OpenAI]:
    with server.openai() as client:
        yield client


def test_an_answer_is_the_chats(server, client) -> None:
    response = client.responses.create(input="hello", instructions="Be brief.", metadata={"a": "b"}, **GREEDY)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    chat = client.chat.completions.create(messages=messages, model="tiny", temperature=0, max_completion_tokens=8)
    assert response.output_text == chat.choices[0].message.content
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.usage.input_tokens == chat.usage.prompt_tokens == len(server.context.tokenizer.chat_ids(messages))
    assert response.usage.output_tokens == 8
    assert (response.temperature, response.top_p) == (0, 1)
    assert (response.instructions, response.metadata, response.model) == ("Be brief.", {"a": "b"}, "tiny")


def test_a_conversation_of_ten_computes_only_what_is_new(client) -> None:
    response, length = None, 0
    for turn in range(10):
        previous = response.id if response else openai.omit
        response = client.responses.create(input=f"question {turn}", previous_response_id=previous, **GREEDY)
        usage = response.usage
        if turn:
            assert usage.input_tokens_details.cached_tokens >= length - 1  # the last token was only chosen
            assert usage.input_tokens > length
        length = usage.total_tokens
    assert length > 150


def test_two_may_go_on_from_one(client) -> None:
    first = client.responses.create(input="one", **GREEDY)
    second, third = (
        client.responses.create(input=text, previous_response_id=first.id, **GREEDY) for text in ("two", "two")
    )
    assert second.output_text == third.output_text
    assert second.id != third.id
    assert second.previous_response_id == first.id


def test_a_response_is_found_again_and_can_be_forgotten(client) -> None:
    made = client.responses.create(input="hello", **GREEDY)
    found = client.responses.retrieve(made.id)
    assert found.model_dump() == made.model_dump()
    client.responses.delete(made.id)
    for again in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError):
            again(made.id)
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(input="more", previous_response_id=made.id, **GREEDY)
    assert refused.value.param == "previous_response_id"


def test_what_is_not_to_be_stored_is_not(client) -> None:
    made = client.responses.create(input="hello", store=False, **GREEDY)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_a_stream_says_the_same(client) -> None:
    whole = client.responses.create(input="hello", **GREEDY)
    events = list(client.responses.create(input="hello", stream=True, **GREEDY))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    names = [event.type.removeprefix("response.") for event in events]
    deltas = names.count("output_text.delta")
    assert names == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * deltas,
        *("output_text.done", "content_part.done", "output_item.done", "incomplete"),
    ]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    last = events[-1].response
    assert (last.output_text, last.usage.output_tokens) == (whole.output_text, 8)
    assert client.responses.retrieve(last.id).output_text == whole.output_text


def test_the_clients_own_stream_helper_understands_it(client) -> None:
    with client.responses.stream(input="hello", **GREEDY) as stream:
        events = {event.type: event for event in stream}
    said = client.responses.create(input="hello", **GREEDY).output_text
    assert events["response.output_text.delta"].snapshot == events["response.output_text.done"].text == said


def test_who_goes_away_frees_the_engine(server, client) -> None:
    settings = {**GREEDY, "max_output_tokens": 450}
    with client.responses.create(input="hello", stream=True, **settings) as stream:
        for event in stream:
            if event.type == "response.output_text.delta":
                break
        with server.engine.held():
            stream.close()
            wait_until(lambda: server.context.engine.num_open == 0)
    wait_until(lambda: not server.engine.core.has_work)
    assert client.responses.create(input="x", **GREEDY).usage.output_tokens == 8


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"truncation": "auto"}, "truncation"),
        ({"reasoning": {"effort": "low"}}, "reasoning_effort"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].image_url",
        ),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "x"}]}]}, None),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [5]}, "input[0]"),
        ({"input": "x" * 4000}, "input"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"temperature": -1}, "temperature"),
        ({"unheard_of": 1}, "unheard_of"),
    ],
)
def test_what_is_not_there_is_refused_by_name(client, given, param) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(**{"model": "tiny", "input": "hello"}, extra_body=given)
    assert param is None or refused.value.param == param, refused.value


def test_every_field_of_openais_is_known_and_on_the_page() -> None:
    fields = set(ResponsesRequest.model_fields)
    assert set(ResponseCreateParamsBase.__annotations__) | {"stream"} == fields
    page = (Path(__file__).parents[2] / "docs" / "conversations.md").read_text()
    assert [name for name in fields if not re.search(rf"`{name}[`.]", page)] == []


def test_another_model_is_not_found(client) -> None:
    with pytest.raises(openai.NotFoundError):
        client.responses.create(input="hello", model="gpt-5")


def test_another_key_does_not_find_it() -> None:
    with Serving(api_keys=("one", "two")) as server, server.openai("one") as one, server.openai("two") as two:
        made = one.responses.create(input="hello", **GREEDY)
        assert one.responses.retrieve(made.id).id == made.id
        with pytest.raises(openai.NotFoundError):
            two.responses.retrieve(made.id)
        with pytest.raises(openai.NotFoundError):
            two.responses.delete(made.id)
        with pytest.raises(openai.BadRequestError):
            two.responses.create(input="more", previous_response_id=made.id, **GREEDY)


# ------------------------------------------------------------------ thoughts and calls
def answered(*texts: str) -> tuple[ResponseAnswer, list[dict[str, Any]]]:
    """An answer whose text came in these pieces, and its events as they are sent."""
    reader = ChatReader(tools=ToolReader(HERMES, {"add"}))
    answer = ResponseAnswer(ResponsesRequest(input="x"), "tiny", GenerationConfig(), reader)
    events = [*map(answer.encoded, answer.begin())]
    for i, text in enumerate(texts):
        over = i == len(texts) - 1
        piece = Piece(text=text, token_ids=[1], num_generated_tokens=i + 1, finish_reason="stop" if over else None)
        events += map(answer.encoded, answer.push(piece))
    events += map(answer.encoded, answer.end())
    events.append(answer.encoded(answer.last_event()))
    return answer, [json.loads(event.partition(b"data: ")[2]) for event in events]


def test_thoughts_messages_and_calls_are_items() -> None:
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    answer, events = answered("<think>", "well", "</think>\n\n", "I add. ", call, call)
    kinds = ["reasoning", "message", "function_call", "function_call"]
    assert [item["type"] for item in answer.output.items] == kinds
    assert [event["item"]["type"] for event in events if event["type"].endswith("output_item.added")] == kinds
    done = [event["item"] for event in events if event["type"].endswith("output_item.done")]
    assert done == answer.output.items == events[-1]["response"]["output"]
    assert all(item["status"] == "completed" for item in done)
    assert (done[0]["content"][0]["text"], done[1]["content"][0]["text"]) == ("well", "I add.")
    assert json.loads(done[2]["arguments"]) == {"a": 1}
    assert done[2]["call_id"] != done[3]["call_id"]
    assert events[-1]["type"] == "response.completed"
    assert events[-1]["response"]["usage"]["output_tokens_details"]["reasoning_tokens"] == 1


def test_items_given_back_are_messages() -> None:
    answer, _ = answered("<think>", "well", "</think>", "I add. ", '<tool_call>{"name": "add"}', "</tool_call>")
    result = {"type": "function_call_output", "call_id": answer.output.items[-1]["call_id"], "output": "3"}
    items = [{"role": "user", "content": [{"type": "input_text", "text": "1+2?"}]}, *answer.output.items, result]
    user, said, tool = messages_of(ResponsesRequest.model_validate({"input": items}))
    assert (user.role, user.content) == ("user", "1+2?")
    assert (said.content, said.reasoning_content, said.tool_calls[0].function.name) == ("I add.", "well", "add")
    assert (tool.role, tool.tool_call_id, tool.content) == ("tool", said.tool_calls[0].id, "3")


def test_tools_and_forms_are_said_in_the_words_of_chat() -> None:
    body = ResponsesRequest.model_validate(
        {
            "input": "x",
            "tools": [{"type": "function", "name": "add", "parameters": {}, "strict": True}],
            "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "add"}]},
            "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}},
        }
    )
    assert tools_of(body) == [{"type": "function", "function": {"name": "add", "parameters": {}, "strict": True}}]
    named = {"type": "function", "function": {"name": "add"}}
    assert tool_choice_of(body) == {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named]}}
    schema = {"name": "n", "schema": {"type": "object"}, "strict": True}
    assert response_format_of(body) == {"type": "json_schema", "json_schema": schema}
