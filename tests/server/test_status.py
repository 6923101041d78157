"""What a server says about itself, and to Prometheus."""

import time
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from lmtool import __version__
from lmtool.server.app import create_app
from lmtool.server.config import ServerConfig
from lmtool.server.context import ServerContext
from lmtool.server.engine_client import EngineClient
from lmtool.server.status_routes import SILENCE_S
from lmtool.server.wire import EngineInfo, Failure, Loading, Refused
from tests.server.serving import Serving, wait_until
from tests.server.support import alone, smollm2_tokenizer


def test_models(serving):
    client = serving.openai()
    (model,) = client.models.list()
    assert (model.id, model.owned_by, model.max_model_len) == ("tiny", "lmtool", 512)
    assert client.models.retrieve("tiny") == model


def test_every_name_is_understood_and_the_first_is_said():
    with Serving(model_names=("org/first", "second")) as server:
        client = server.openai()
        assert [model.id for model in client.models.list()] == ["org/first", "second"]
        assert client.models.retrieve("org/first").id == "org/first"
        assert client.completions.create(model="second", prompt="a", max_tokens=1).model == "org/first"


def test_version_and_documents(serving):
    with serving.http() as client:
        assert client.get("/version").json() == {"version": __version__}
        paths = client.get("/openapi.json").json()["paths"]
        assert "422" not in str(paths)
        assert "/v1/chat/completions" in paths
        assert client.get("/docs").status_code == 200
    with Serving(disable_docs=True) as server, server.http() as client:
        assert {client.get(path).status_code for path in ("/docs", "/redoc", "/openapi.json")} == {404}


INFO = EngineInfo("", 512, 49152, 4, 64, 64, 0.0, {})


def asked(context: ServerContext, path: str, method: str = "GET", **settings):
    """Without a server, and without an engine."""
    transport = httpx.ASGITransport(create_app(context))

    async def ask():
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **settings)

    import asyncio

    return asyncio.run(ask())


def test_health_says_what_is():
    engine = EngineClient(Path("/nowhere"))
    context = ServerContext(ServerConfig(), engine, smollm2_tokenizer())

    def said() -> tuple[int, int, str]:
        health, ready = asked(context, "/health"), asked(context, "/ready")
        assert health.json() == ready.json()
        return health.status_code, ready.status_code, health.json()["status"]

    assert said() == (200, 503, "loading")
    engine._take(Loading("weights", 1, 2))
    assert said() == (200, 503, "loading")
    refused = asked(context, "/v1/completions", "POST", json={"prompt": "a"})
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
    assert asked(context, "/v1/models").status_code == 200
    engine._take(Refused(Failure("CheckpointError", "the file is broken", "load it again")))
    assert said() == (503, 503, "down")
    assert asked(context, "/health").json()["message"] == "the file is broken; load it again"
    engine._take(INFO)
    assert said() == (200, 200, "ready")
    engine._lost("it was killed")
    assert said() == (503, 503, "down")


def test_health_of_an_engine_that_runs(serving):
    context = serving.context
    with serving.http() as client:
        assert client.get("/ready").json() == {"status": "ready"}
        context.draining = True
        try:
            assert (client.get("/health").status_code, client.get("/ready").status_code) == (200, 503)
            refused = client.post("/v1/completions", json={"prompt": "a"})
        finally:  # it is others' server as well
            context.draining = False
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "service_unavailable_error")
        assert client.get("/ready").status_code == 200


def test_an_engine_that_is_silent_is_not_healthy(serving):
    client = EngineClient(serving.engine.path)
    context = ServerContext(ServerConfig(), client, smollm2_tokenizer())
    client._take(serving.context.engine.info)
    client._heard_s = time.monotonic() - SILENCE_S - 1
    answer = asked(context, "/health")
    assert (answer.status_code, answer.json()["status"]) == (503, "silent")


def test_stats_are_the_engines_last_heartbeat(serving):
    before = serving.engine.core.scheduler.counters.num_generated_tokens
    with serving.http() as client:
        client.post("/v1/completions", json={"prompt": "a b c", "max_tokens": 3, "ignore_eos": True})

        def idle() -> dict[str, Any] | None:  # a heartbeat may fall between its last token and its end
            answer = client.get("/stats")
            if answer.status_code == 503:  # there was none yet
                return None
            found = answer.json()
            made = found["counters"]["num_generated_tokens"] - before
            return found if (made, found["num_running"]) == (3, 0) else None

        found = wait_until(idle)
    blocks = serving.engine.core.scheduler.blocks
    assert (found["num_blocks"], found["block_size"]) == (blocks.num_blocks, blocks.block_size)
    assert (found["num_running"], found["num_waiting"], found["num_free_blocks"]) == (0, 0, blocks.num_free)
    assert found["counters"]["host_copy_s"] == 0
    assert (
        asked(ServerContext(ServerConfig(), EngineClient(Path("/x")), smollm2_tokenizer()), "/stats").status_code == 503
    )


def figures(client) -> dict[str, float]:
    text = client.get("/metrics").text
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels["model_name"] == "tiny"
            rest = ",".join(value for key, value in sample.labels.items() if key != "model_name")
            found[f"{sample.name}{{{rest}}}" if rest else sample.name] = sample.value
    return found


def test_metrics_count_what_was_done():
    with Serving() as server, server.http() as client:
        ids = list(range(100, 170))
        body = {"prompt": ids, "max_tokens": 10, "temperature": 0, "stream": True}
        for _ in range(2):
            assert client.post("/v1/completions", json=body).status_code == 200

        def idle() -> dict[str, float] | None:  # the heartbeat after it, not one between its last token and its end
            found = figures(client)
            made, running = (
                found.get(f"lmtool:{name}") for name in ("generation_tokens_total", "num_requests_running")
            )
            return found if (made, running) == (20, 0) else None

        found = wait_until(idle)
        assert len(alone(ids, max_new_tokens=10)) == 10
        assert found["lmtool:prompt_tokens_total"] == found["lmtool:prefix_cache_queries_total"] == 140
        assert 64 <= found["lmtool:prefix_cache_hits_total"] < 70
        assert found["lmtool:request_success_total{length}"] == 2
        assert found["lmtool:num_requests_waiting"] == 0
        assert found["lmtool:time_to_first_token_seconds_count"] == 2
        assert found["lmtool:e2e_request_latency_seconds_count"] == 2
        assert found["lmtool:inter_token_latency_seconds_count"] == 18
        assert found["lmtool:request_prompt_tokens_sum"] == 140
        assert found["lmtool:request_generation_tokens_sum"] == 20
        assert 0 < found["lmtool:inter_token_latency_seconds_sum"] < found["lmtool:e2e_request_latency_seconds_sum"]
