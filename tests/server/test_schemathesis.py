"""Bodies made from the OpenAPI document, good and bad, by the hundred: no 5xx, no hang, answers as documented, and
nothing of them is left in the engine.
"""

from collections import Counter
from functools import partial
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import booleans
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from lmtool.engine.grammar_frames import GrammarVocabulary
from tests.server.serving import TIMEOUT_S, Serving, wait_until
from tests.server.support import smollm2_tokenizer, tiny_engine

NUM_CASES = 150  # of each operation in each mode
WITH_BODY = (
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /v1/responses",
    "POST /v1/chat/interactive",
    "POST /tokenize",
    "POST /detokenize",
    "POST /v1/encode",
)
WITHOUT = (
    "GET /v1/models",
    "GET /v1/models/{model}",
    "GET /v1/responses/{response_id}",
    "DELETE /v1/responses/{response_id}",
    "GET /health",
    "GET /ready",
    "GET /version",
    "GET /metrics",
    "GET /stats",
    "POST /v1/embeddings",
)
LENGTHS = {  # fields that bound an answer
    "POST /v1/chat/completions": "max_completion_tokens",
    "POST /v1/completions": "max_tokens",
    "POST /v1/responses": "max_output_tokens",
    "POST /v1/chat/interactive": "request_output_len",
}
HONEST = {501}  # what it says it does not do
CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance, negative_data_rejection]


@pytest.fixture(scope="module")
def server():
    engine = tiny_engine(session_len=128)
    engine.core.give_vocabulary(partial(GrammarVocabulary.of, smollm2_tokenizer(), 49152))
    with Serving(engine) as server:
        wait_until(lambda: server.context.engine.stats)  # until then /stats is honest: 503
        yield server
    engine.close()


@pytest.fixture(scope="module")
def operations(server):
    load_all_checks()
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    return {found.ok().label: found.ok() for found in schema.get_all_operations()}


def aimed(body: Any, label: str) -> Any:
    """A good body that also keeps the rules between fields, which the document cannot say: so that answers are made,
    and short ones."""
    if not isinstance(body, dict):
        return body
    if length := LENGTHS.get(label):
        body[length] = 1 + (body.get(length) or 0) % 4
        if length != "max_tokens":
            body.pop("max_tokens", None)
        if body.get("min_tokens"):
            body["min_tokens"] = 1
    body.pop("model", None)
    for message in body.get("messages") or ():
        content = message.get("content") or "and then?"
        if isinstance(content, list) and any(part.get("type") == "image_url" for part in content):
            content = "and then?"  # this model sees nothing
        message["content"] = content
        message.pop("tool_calls", None)
    if not body.get("logprobs"):
        body.pop("top_logprobs", None)
    if not body.get("stream"):
        body.pop("stream_options", None)
    for name in (
        "best_of",
        "reasoning_effort",
        "chat_template_kwargs",
        "tools",
        "tool_choice",
        "response_format",
        "text",
    ):
        body.pop(name, None)
    if body.get("n"):
        body["n"] = 1 + body["n"] % 3
    for name in ("prompt", "tokens", "stop_token_ids"):
        if body.get(name):
            body[name] = _known_ids(body[name])
    return body


def _known_ids(value: Any) -> Any:
    if isinstance(value, list):
        return [_known_ids(one) for one in value]
    return value % 49152 if isinstance(value, int | float) else value


def run(operation: Any, mode: GenerationMode, num_cases: int, server: Serving) -> Counter[int]:
    """How often each status came."""
    statuses: Counter[int] = Counter()

    @given(case=operation.as_strategy(generation_mode=mode), aim=booleans())
    @settings(
        max_examples=num_cases,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    def ask(case: Any, aim: bool) -> None:
        if mode is GenerationMode.POSITIVE and aim:
            case.body = aimed(case.body, operation.label)
        response = case.call(timeout=TIMEOUT_S)
        statuses[response.status_code] += 1
        assert response.status_code < 500 or response.status_code in HONEST, (response.text, case.body)
        case.validate_response(response, checks=CHECKS)

    ask()
    assert not server.context.engine.num_open
    wait_until(lambda: not server.engine.core.has_work)
    return statuses


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("label", WITH_BODY)
def test_bodies(server, operations, label, mode):
    statuses = run(operations[label], mode, NUM_CASES, server)
    assert statuses.total() >= NUM_CASES
    if mode is GenerationMode.POSITIVE:
        assert statuses[200] >= NUM_CASES // 10, "hardly any reached the engine"
    else:
        assert set(statuses) <= {400, 404}


@pytest.mark.parametrize("label", WITHOUT)
def test_paths(server, operations, label):
    run(operations[label], GenerationMode.POSITIVE, 20, server)


def test_no_operation_is_left_out(operations):
    assert set(operations) == {*WITH_BODY, *WITHOUT}
    assert 2 * NUM_CASES * len(WITH_BODY) >= 2000
