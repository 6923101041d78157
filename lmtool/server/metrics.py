"""Figures for Prometheus, under vLLM's names with ``lmtool:`` before them. Knows no routes.

The engine's own figures come with its heartbeat and are the same in every HTTP process. Latencies are measured where
answers are read; several HTTP processes share theirs through files (prometheus_client's multiprocess mode, where
PROMETHEUS_MULTIPROC_DIR was set before the process began).
"""

import os
from bisect import bisect_left
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from lmtool.engine.response import Response
from lmtool.server.wire import EngineInfo, Stats

_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
_TOKEN_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000)
_FINISH_REASONS = ("stop", "length", "context", "abort")  # `Response`'s
_COUNTERS = {  # of the engine
    "num_prompt_tokens": ("prompt_tokens", "Tokens of prompts"),
    "num_generated_tokens": ("generation_tokens", "Tokens generated"),
    "num_preemptions": ("num_preemptions", "Sequences that had to make room and were computed again"),
    "num_host_hit_tokens": ("host_cache_hits", "Tokens found in the cache's tier in host memory"),
    "num_host_evictions": ("host_cache_evictions", "Blocks that the host tier has dropped"),
    "host_saved_bytes": ("host_cache_saved_bytes", "Bytes copied to the host tier"),
    "host_loaded_bytes": ("host_cache_loaded_bytes", "Bytes copied back from it"),
    "host_copy_s": ("host_cache_copy_seconds", "Time that copies took, either way"),
}

Engine = Callable[[], tuple[EngineInfo, Stats] | None]


class Metrics:
    """Of one HTTP process. engine: the engine's figures, None while there are none."""

    def __init__(self, model_name: str, engine: Engine) -> None:
        own = CollectorRegistry()

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> "_Histogram":
            return _Histogram(f"lmtool:{name}", text, ["model_name"], registry=own, buckets=buckets).labels(model_name)

        self._model_name = model_name
        self._first_token = histogram("time_to_first_token_seconds", "From a request to its first token", _SECONDS)
        self._next_token = histogram("inter_token_latency_seconds", "From a token to the next", _TOKEN_SECONDS)
        self._whole = histogram("e2e_request_latency_seconds", "From a request to its last token", _SECONDS)
        self._prompt_tokens = histogram("request_prompt_tokens", "Tokens of a request's prompt", _TOKENS)
        self._new_tokens = histogram("request_generation_tokens", "Tokens of a request's answer", _TOKENS)
        self._success = Counter(
            "lmtool:request_success", "Requests that came to their end", ["model_name", "finished_reason"], registry=own
        )
        for reason in _FINISH_REASONS:  # all rows are there from the start: a rate begins at what was 0
            self._success.labels(model_name, reason)
        self._image_seconds = histogram("image_preparation_seconds", "To fetch, read and cut a picture", _SECONDS)
        self._images = Counter("lmtool:images", "Pictures that were read", ["model_name"], registry=own)
        self._registry = own
        if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            self._registry = CollectorRegistry()
            MultiProcessCollector(self._registry)
        self._registry.register(_EngineCollector(model_name, engine))

    def take(self, piece: Response, before: Response | None) -> None:
        """A piece of an answer, and the one before it."""
        assert piece.duration_s is not None
        since = before.duration_s if before is not None and before.time_to_first_token_s is not None else None
        num_gaps = len(piece.token_ids)
        if since is None and piece.time_to_first_token_s is not None:
            since = piece.time_to_first_token_s
            self._first_token.observe(since)
            num_gaps -= 1  # others may have come with the first
        if since is not None and num_gaps > 0:
            self._next_token.observe_many((piece.duration_s - since) / num_gaps, num_gaps)
        if piece.finish_reason is not None:
            self._whole.observe(piece.duration_s)
            self._prompt_tokens.observe(piece.num_prompt_tokens)
            self._new_tokens.observe(piece.num_generated_tokens)
            self._success.labels(self._model_name, piece.finish_reason).inc()

    def take_image(self, seconds: float) -> None:
        """A picture that was read, and how long that took."""
        self._images.labels(self._model_name).inc()
        self._image_seconds.observe(seconds)

    def exposition(self) -> bytes:
        """Prometheus's text."""
        return generate_latest(self._registry)


class _Histogram(Histogram):
    def observe_many(self, amount: float, count: int) -> None:
        """As often the same, for the cost of once."""
        self._sum.inc(amount * count)
        self._buckets[bisect_left(self._upper_bounds, amount)].inc(count)


class _EngineCollector(Collector):
    def __init__(self, model_name: str, engine: Engine) -> None:
        self._model_name = model_name
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        found = self._engine()
        if found is None:
            return
        info, stats = found
        counters = stats.counters
        # block 0 belongs to nobody
        used = 1 - stats.num_free_blocks / max(info.num_blocks - 1, 1)
        yield self._gauge("num_requests_running", "Requests in the batch", stats.num_running)
        yield self._gauge("num_requests_waiting", "Requests that wait for a place in it", stats.num_waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of the K/V cache that is in use, 0 to 1", used)
        yield self._gauge("host_cache_used_blocks", "Blocks in the host tier", stats.num_host_blocks_used)
        for name, (shown, text) in _COUNTERS.items():
            yield self._counter(shown, text, counters.get(name, 0))
        queries = counters.get("num_prompt_tokens", 0)
        yield self._counter("prefix_cache_queries", "Tokens of prompts that were looked for", queries)
        yield self._counter(
            "prefix_cache_hits", "Tokens of prompts that were found", counters.get("num_cached_tokens", 0)
        )

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        return _with(GaugeMetricFamily(f"lmtool:{name}", text, labels=["model_name"]), self._model_name, value)

    def _counter(self, name: str, text: str, value: float) -> Metric:
        return _with(CounterMetricFamily(f"lmtool:{name}", text, labels=["model_name"]), self._model_name, value)


def _with(family: GaugeMetricFamily | CounterMetricFamily, model_name: str, value: float) -> Metric:
    family.add_metric([model_name], value)
    return family
