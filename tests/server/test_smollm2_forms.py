"""SmolLM2 behind the server, held to a form: calls of functions and JSON, asked by OpenAI's own client."""

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import openai
import pytest

from lmtool.checkpoint.hub import resolve_model
from lmtool.config import EngineConfig
from lmtool.engine.grammar_frames import GrammarVocabulary
from lmtool.engine.setup import load_engine
from tests.server.serving import Serving
from tests.server.support import EngineInThread, smollm2_tokenizer

QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
WEATHER = {"name": "get_weather", "description": "The weather in a city.", "parameters": PARAMETERS}
TIME = {"name": "get_time", "description": "What time it is."}
TOOLS: Any = [{"type": "function", "function": function} for function in (WEATHER, TIME)]
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0}


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    config = EngineConfig(session_len=1024, cache_gb=0.2, dtype="float32")
    loaded = load_engine(resolve_model("smollm2-135m"), config, None)
    tokenizer = smollm2_tokenizer()
    loaded.core.give_vocabulary(partial(GrammarVocabulary.of, tokenizer, tokenizer.vocab_size))
    engine = EngineInThread(loaded.core)
    with Serving(engine) as server, server.openai() as client:
        yield client
    engine.close()


def check_weather(name: str, arguments: str) -> None:
    assert name == "get_weather"
    found = json.loads(arguments)
    assert found.keys() == {"city", "unit"}
    assert found["unit"] in ("C", "F")
    assert "Paris" in found["city"]


def test_a_call_that_is_required(client) -> None:
    choice = client.chat.completions.create(
        messages=QUESTION, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, max_tokens=100, **GREEDY
    ).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls
    check_weather(call.function.name, call.function.arguments)
    # and its result is understood
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": "21 degrees", "sky": "clear"}'}
    said = client.chat.completions.create(
        messages=[*QUESTION, choice.message, result], tools=TOOLS, tool_choice="none", max_tokens=60, **GREEDY
    )
    assert "21" in said.choices[0].message.content
    assert said.choices[0].message.tool_calls is None


def test_a_call_is_streamed_as_it_is_written(client) -> None:
    choice: Any = {"type": "function", "function": {"name": "get_weather"}}
    settings = {"messages": QUESTION, "tools": TOOLS, "tool_choice": choice, "max_tokens": 100, **GREEDY}
    chunks = list(client.chat.completions.create(stream=True, **settings))
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert deltas[0].id
    assert all(delta.index == 0 for delta in deltas)
    assert len(deltas) > 3
    check_weather(deltas[0].function.name, "".join(delta.function.arguments for delta in deltas))
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    whole = client.chat.completions.create(**settings).choices[0].message.tool_calls[0].function
    assert whole.arguments == "".join(delta.function.arguments for delta in deltas)


def test_the_model_may_also_answer(client) -> None:
    messages: Any = [{"role": "user", "content": "Say hello."}]
    choice = client.chat.completions.create(messages=messages, tools=TOOLS, max_tokens=200, **GREEDY).choices[0]
    for call in choice.message.tool_calls or ():  # a small model may call all the same: then as it should
        if call.function.name == "get_weather":
            assert json.loads(call.function.arguments).keys() == {"city", "unit"}
        else:
            assert (call.function.name, json.loads(call.function.arguments)) == ("get_time", {})
    assert choice.message.content or choice.message.tool_calls


def test_a_response_calls_and_gets_its_result(client) -> None:
    tools: Any = [{"type": "function", **WEATHER, "strict": True}]
    first = client.responses.create(
        input="What is the weather in Paris?",
        tools=tools,
        tool_choice="required",
        parallel_tool_calls=False,
        max_output_tokens=100,
        **GREEDY,
    )
    (call,) = first.output[:1]
    assert (first.status, call.type) == ("completed", "function_call")
    check_weather(call.name, call.arguments)
    output = [{"type": "function_call_output", "call_id": one.call_id, "output": "21 degrees"} for one in first.output]
    second = client.responses.create(
        input=output, previous_response_id=first.id, tools=tools, tool_choice="none", max_output_tokens=60, **GREEDY
    )
    assert "21" in second.output_text


def test_a_response_streams_a_call(client) -> None:
    tools: Any = [{"type": "function", **WEATHER, "strict": True}]
    with client.responses.stream(
        input="What is the weather in Paris?", tools=tools, tool_choice="required", parallel_tool_calls=False, **GREEDY
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()
    check_weather(final.output[0].name, final.output[0].arguments)


def test_a_response_is_json_of_a_schema(client) -> None:
    form: Any = {"type": "json_schema", "name": "weather", "schema": PARAMETERS, "strict": True}
    response = client.responses.create(
        input="The weather in Paris, in JSON.", text={"format": form}, max_output_tokens=100, **GREEDY
    )
    assert response.status == "completed"
    assert json.loads(response.output_text).keys() == {"city", "unit"}


def test_a_schema_that_cannot_be_is_refused_by_name(client) -> None:
    bad = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": 3}}}
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(messages=QUESTION, tools=[bad], tool_choice="required", **GREEDY)
