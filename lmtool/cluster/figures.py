"""The front's own figures for Prometheus, each with its model. What engines measure is at their replicas."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

Gauges = Callable[[str], dict[str, float]]
_GAUGES = {
    "replicas": "Replicas that were heard of lately",
    "replicas_ready": "Replicas that take requests",
    "queued_tokens": "Tokens of requests that are not answered yet, by the front's reckoning",
}


class Figures:
    """gauges: of a model, by the names of `_GAUGES`."""

    def __init__(self, models: tuple[str, ...], gauges: Gauges) -> None:
        self._registry = CollectorRegistry()

        def counter(name: str, text: str) -> Counter:
            made = Counter(f"lmtool:proxy_{name}", text, ["model_name"], registry=self._registry)
            for model in models:
                made.labels(model)  # 0 is a figure, too
            return made

        self._requests = counter("requests", "Requests that were sent to a replica")
        self._retries = counter("retries", "Times that a request was sent to another replica")
        self._broken = counter("broken_answers", "Streams that ended with an error because their replica was gone")
        self._registry.register(_Gauges(models, gauges))

    def asked(self, model: str, *, is_retry: bool) -> None:
        (self._retries if is_retry else self._requests).labels(model).inc()

    def broken(self, model: str) -> None:
        self._broken.labels(model).inc()

    def exposition(self) -> bytes:
        """Prometheus's text."""
        return generate_latest(self._registry)


class _Gauges(Collector):
    def __init__(self, models: tuple[str, ...], gauges: Gauges) -> None:
        self._models = models
        self._gauges = gauges

    def collect(self) -> Iterator[Metric]:
        found = {model: self._gauges(model) for model in self._models}
        for name, text in _GAUGES.items():
            family = GaugeMetricFamily(f"lmtool:proxy_{name}", text, labels=["model_name"])
            for model, values in found.items():
                family.add_metric([model], values[name])
            yield family
