"""Figures that several processes share, and ones that are observed many at a time."""

import json
import os
import subprocess
import sys

from prometheus_client.parser import text_string_to_metric_families

from lmtool.engine.response import Response
from lmtool.server.metrics import Metrics
from lmtool.server.wire import EngineInfo, Stats

INFO = EngineInfo("", 512, 100, 4, 65, 64, 0.0, {})
STATS = Stats(1, 2, 48, 3, {"num_prompt_tokens": 100, "num_cached_tokens": 25, "num_preemptions": 1})

# one answer of three tokens, the last two of which came together 0.08 s after the first
PIECES = [
    Response(token_ids=[1], num_prompt_tokens=9, num_generated_tokens=1, time_to_first_token_s=0.3, duration_s=0.3),
    Response(
        token_ids=[2, 3],
        num_prompt_tokens=9,
        num_generated_tokens=3,
        time_to_first_token_s=0.3,
        duration_s=0.38,
        finish_reason="length",
    ),
]


def answered(metrics: Metrics) -> None:
    before = None
    for piece in PIECES:
        metrics.take(piece, before)
        before = piece


def samples(metrics: Metrics) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            rest = [value for key, value in sample.labels.items() if key != "model_name"]
            name = "/".join([sample.name.removeprefix("lmtool:"), *rest])
            assert name not in found, "exported twice"
            found[name] = sample.value
    return found


def test_tokens_that_came_together_are_as_many_observations():
    metrics = Metrics("m", lambda: (INFO, STATS))
    assert samples(metrics)["request_success_total/length"] == 0, "a rate begins at a row that is there"
    answered(metrics)
    found = samples(metrics)
    assert found["inter_token_latency_seconds_count"] == 2
    assert abs(found["inter_token_latency_seconds_sum"] - 0.08) < 1e-9
    assert found["inter_token_latency_seconds_bucket/0.03"] == 0
    assert found["inter_token_latency_seconds_bucket/0.05"] == 2
    assert found["time_to_first_token_seconds_sum"] == 0.3
    assert found["e2e_request_latency_seconds_sum"] == 0.38
    assert found["request_success_total/length"] == 1


def test_tokens_that_came_with_the_first_are_gaps_too():
    metrics = Metrics("m", lambda: (INFO, STATS))
    metrics.take(
        Response(
            token_ids=[1, 2, 3],
            num_prompt_tokens=9,
            num_generated_tokens=3,
            time_to_first_token_s=0.3,
            duration_s=0.3,
            finish_reason="length",
        ),
        None,
    )
    found = samples(metrics)
    assert found["time_to_first_token_seconds_count"] == 1
    assert found["inter_token_latency_seconds_count"] == 2
    assert found["inter_token_latency_seconds_bucket/0.001"] == 2


def test_a_bound_belongs_to_its_bucket():
    metrics = Metrics("m", lambda: None)
    metrics._next_token.observe_many(0.05, 3)
    metrics._next_token.observe(0.05)
    metrics._next_token.observe_many(1000.0, 1)
    found = samples(metrics)
    assert found["inter_token_latency_seconds_bucket/0.05"] == 4
    assert found["inter_token_latency_seconds_bucket/5.0"] == 4
    assert found["inter_token_latency_seconds_bucket/+Inf"] == 5


def test_the_engines_figures_are_its_heartbeats():
    metrics = Metrics("m", lambda: (INFO, STATS))
    found = samples(metrics)
    assert (found["num_requests_running"], found["num_requests_waiting"]) == (1, 2)
    assert found["kv_cache_usage_perc"] == 0.25  # 48 of 64 are free: one of the 65 is nobody's
    assert (found["prefix_cache_queries_total"], found["prefix_cache_hits_total"]) == (100, 25)
    assert found["num_preemptions_total"] == 1
    away = samples(Metrics("m", lambda: None))
    assert "num_requests_running" not in away


def test_processes_share_their_latencies(tmp_path):
    program = (
        "from tests.server.test_metrics import Metrics, INFO, STATS, answered, samples\n"
        "import json\n"
        "metrics = Metrics('m', lambda: (INFO, STATS))\n"
        "answered(metrics)\n"
        "print(json.dumps(samples(metrics)))\n"
    )
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    found = {}
    for _ in range(2):
        run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, timeout=120)
        assert run.returncode == 0, run.stderr.decode()
        found = json.loads(run.stdout)
    assert found["inter_token_latency_seconds_count"] == 4
    assert found["inter_token_latency_seconds_bucket/0.05"] == 4
    assert found["request_success_total/length"] == 2
    assert found["num_requests_running"] == 1  # the engine's, and there is one
