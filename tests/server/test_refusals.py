"""What cannot be is refused as OpenAI refuses: an error object, one line of cause and fix, and the field's name."""

import json
import re
from pathlib import Path

import openai
import pytest
from hypothesis import given
from hypothesis.strategies import dictionaries, integers, lists, recursive, text
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParams
from pydantic import ValidationError

from lmtool.server.config import ServerConfig
from lmtool.server.errors import Refusal
from lmtool.server.json_body import MAX_DEPTH, MAX_LISTS, MAX_MEMBERS, parse, without_texts
from lmtool.server.protocol import SENTENCES
from lmtool.server.protocol_chat import ChatRequest
from lmtool.server.protocol_completion import CompletionRequest
from lmtool.server.protocol_interactive import InteractiveRequest
from lmtool.server.protocol_responses import ResponsesRequest
from tests.server.serving import Serving

HELLO = [{"role": "user", "content": "Hello"}]


def refused(serving: Serving, path: str, body, status: int = 400):
    with serving.http() as client:
        response = client.post(path, json=body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    return error


@pytest.mark.parametrize(
    ("given", "param", "said"),
    [
        ({"foo": 1}, "foo", "there is no field foo"),
        ({"temperature": "warm"}, "temperature", 'temperature is "warm"; give a number'),
        ({"temperature": -1}, "temperature", "at least 0"),
        ({"temperature": True}, "temperature", "give a number"),
        ({"temperature": 1e-40}, "temperature", "0 (greedy), or a millionth to 100"),
        ({"top_p": 0}, "top_p", "more than 0"),
        ({"stop": 5}, "stop", "give a text or a list"),
        ({"stop": ["a", 1]}, "stop[1]", "give a text"),
        ({"stop": [""]}, "stop", "empty text"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"stop": "x" * 257}, "stop", "at most 256"),
        ({"n": 17}, "n", "at most 16"),
        ({"n": 0}, "n", "at least 1"),
        ({"seed": -1}, "seed", "at least 0"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "differ"),
        ({"max_tokens": 2, "min_tokens": 3}, "min_tokens", "at most max_tokens"),
        ({"top_logprobs": 1}, "top_logprobs", "logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "at most 20"),
        ({"logit_bias": {"the": 1}}, "logit_bias", "no token id"),
        ({"logit_bias": {"49152": 1}}, "logit_bias", "outside the vocabulary"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "at most 100"),
        ({"stop_token_ids": [49152]}, "stop_token_ids", "outside the vocabulary"),
        ({"bad_words": [""]}, "bad_words[0]", "at least 1"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": None}, "messages", "give a list"),
        ({"messages": [{"content": "a"}]}, "messages[0].role", "missing"),
        ({"messages": [*HELLO, {"role": "user"}]}, "messages[1].content", "no content"),
        ({"messages": [{"role": "narrator", "content": "a"}]}, "messages[0].role", "'system'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]},
            "messages[0].content[0].image_url",
            "this model takes no pictures",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
            "messages[0].content[0].type",
            "models do not hear",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "image_url": {"url": "a"}}]}]},
            "messages[0].content[0].image_url",
            "there is no field",
        ),
        (
            {"messages": [{"role": "user", "content": [{"text": "a"}]}]},
            "messages[0].content[0].type",
            "missing",
        ),
        ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs", "not read by this model's template"),
        ({"chat_template_kwargs": {"bos_token": "x"}}, "chat_template_kwargs", "not read by"),
        ({"chat_template_kwargs": {"enable_thinking": [1]}}, "chat_template_kwargs.enable_thinking", "is a list"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "cannot ask for"),
        ({"functions": [{"name": "f"}]}, "functions", "use tools"),
        ({"function_call": "auto"}, "function_call", "use tool_choice"),
        ({"audio": {"voice": "x"}}, "audio", "answers are text"),
        ({"modalities": ["audio"]}, "modalities[0]", "give 'text'"),
        ({"prediction": {"type": "content", "content": "a"}}, "prediction", "leave it out"),
        ({"store": True}, "store", "leave it out or give false"),
        ({"service_tier": "priority"}, "service_tier", "'auto'"),
        ({"web_search_options": {}}, "web_search_options", "does not search"),
        ({"verbosity": "low"}, "verbosity", "ask for it in a message"),
        ({"guided_json": {}}, "guided_json", "response_format"),
        ({"messages": [{"role": "user", "content": "word " * 600}]}, "messages", "the context holds 512"),
    ],
)
def test_what_a_chat_cannot_have(serving, given, param, said):
    error = refused(serving, "/v1/chat/completions", {"model": "tiny", "messages": HELLO, "max_tokens": 2, **given})
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert said in error["message"]


@pytest.mark.parametrize(
    ("given", "param", "said"),
    [
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "at least 1"),
        ({"prompt": [[]]}, "prompt[0]", "at least 1"),
        ({"prompt": [1, "a"]}, "prompt[1]", "whole number"),
        ({"prompt": None}, "prompt", "give a text or a list"),
        ({"prompt": [49152]}, "prompt", "outside the vocabulary"),
        ({"prompt": [-1]}, "prompt[0]", "at least 0"),
        ({"prompt": ["a"] * 129}, "prompt", "at most 128"),
        ({"prompt": ["a"] * 65, "n": 2}, "prompt", "at most 128"),
        ({"prompt": [5] * 512}, "prompt", "the context holds 512"),
        ({"suffix": "x"}, "suffix", "into the prompt"),
        ({"best_of": 2}, "best_of", "the value of n"),
        ({"logprobs": 21}, "logprobs", "at most 20"),
        ({"max_tokens": -1}, "max_tokens", "at least 0"),
    ],
)
def test_what_a_completion_cannot_have(serving, given, param, said):
    error = refused(serving, "/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 2, **given})
    assert error["param"] == param
    assert said in error["message"]


def test_every_field_of_openais_is_known():
    """Those of the installed client: honoured, of no effect, or refused with a sentence of what to do."""
    theirs = ChatParams.__annotations__.keys() | {"stream"}
    assert not theirs - ChatRequest.model_fields.keys()
    theirs = CompletionParams.__annotations__.keys() | {"stream"}
    assert not theirs - CompletionRequest.model_fields.keys()
    for kind in (ChatRequest, CompletionRequest):
        never = {name for name, field in kind.model_fields.items() if field.annotation is type(None)}
        assert not never - SENTENCES.keys()


def test_openais_client_sees_its_own_errors(serving):
    client = serving.openai()
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny", messages=HELLO, temperature=101)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt=[5] * 600)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.InternalServerError) as none:
        client.embeddings.create(model="tiny", input="a")
    assert none.value.status_code == 501


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "empty"),
        (b"{", "not valid JSON"),
        (b'{"prompt": NaN}', "not valid JSON"),
        (b'{"prompt": "\xff"}', "not valid JSON"),
        (b'{"prompt": "\\ud800"}', "not valid JSON"),
        (b'{"prompt": 1e999}', "not valid JSON"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"prompt": ' + b"[" * 65 + b"]" * 65 + b"}", "nested deeper"),
        (b"[" * 40_000, "not valid JSON"),
        (b"[" * 100_000, "more than 50000 lists"),
        (b"[1]", "give an object"),
        (b"null", "the body is"),
    ],
)
def test_bodies_that_are_none(serving, body, said):
    with serving.http() as client:
        response = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert said in response.json()["error"]["message"]


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_bodies_say_that_they_are_json(serving, kind):
    with serving.http() as client:
        headers = {"Content-Type": kind} if kind else {}
        response = client.post("/v1/completions", content=b'{"prompt": "a"}', headers=headers)
    assert response.status_code == 400
    assert "application/json" in response.json()["error"]["message"]


def test_paths_and_methods_that_there_are_not(serving):
    with serving.http() as client:
        missing = client.get("/v1/files")
        wrong = client.get("/v1/completions")
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found_error")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["error"]["code"] == "method_not_allowed"


def test_a_long_list_of_wrong_things_is_one_thing():
    """Telling of each would take half a minute of everybody's time."""
    for kind, body in (
        (CompletionRequest, {"prompt": [0.5] * 10_000}),
        (CompletionRequest, {"prompt": [[1, "a"]] * 10_000}),
        (CompletionRequest, {"prompt": "a", "stop": [1] * 10_000}),
        (ChatRequest, {"messages": [{"rol": "user"}] * 10_000}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{"type": "image_url"}] * 10_000}]}),
        (ResponsesRequest, {"input": [{"rol": "user"}] * 10_000}),
        (InteractiveRequest, {"prompt": [{"rol": "user"}] * 10_000}),
    ):
        with pytest.raises(ValidationError) as refused:
            kind(**body)
        assert refused.value.error_count() < 100
    with pytest.raises(Refusal, match="more than 50000 fields"):
        parse(json.dumps({str(i): 1 for i in range(50_001)}).encode())
    with pytest.raises(Refusal, match="more than 50000 lists"):
        parse(b"[" + b"[]," * 50_001 + b"[]]")


@given(recursive(text('ab"\\[]{}:,\n/é'), lambda inner: lists(inner) | dictionaries(text(), inner)), integers(1, 9))
def test_what_looks_like_json_inside_a_text_is_text(value, piece_bytes):
    """However the body is cut into pieces to be looked through."""
    data = json.dumps(value).encode()
    texts = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
    assert without_texts(data, piece_bytes) == texts.sub(b"", data)


def test_what_is_refused_costs_the_others_nothing(serving):
    for body in ({"prompt": "a", "foo": 1}, {"prompt": [5] * 600}, {"prompt": "a", "seed": -1}):
        refused(serving, "/v1/completions", body)
    assert serving.context.engine.num_open == 0
    answer = serving.openai().completions.create(model="tiny", prompt="a", max_tokens=2)
    assert answer.usage.completion_tokens == 2


def test_every_field_is_documented():
    page = (Path(__file__).parents[2] / "docs" / "http.md").read_text()
    for kind in (ChatRequest, CompletionRequest):
        for name in kind.model_fields:
            assert re.search(rf"`[^`]*\b{name}\b[^`]*`", page), name
    bounds = ServerConfig()
    assert f"at most {bounds.max_n} choices and {bounds.max_stop} stop texts of {bounds.max_stop_chars}" in page
    assert f"{bounds.max_images} pictures (`--max-images`)" in page
    assert f"{bounds.max_prompts} prompts times choices, and {MAX_MEMBERS:,} fields" in page
    assert f"{MAX_LISTS:,} lists and objects" in page
    assert f"nested {MAX_DEPTH} deep" in page
