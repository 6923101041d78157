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
        self._models: tuple[str, ...] = ()

        def counter(name: str, text: str) -> Counter:
            return Counter(f"lmtool:proxy_{name}", text, ["model_name"], registry=self._registry)

        self._requests = counter("requests", "Requests that were sent to a replica")
        self._retries = counter("retries", "Times that a request was sent to another replica")
        self._broken = counter("broken_answers", "Streams that ended with an error because their replica was gone")
        self._registry.register(_Gauges(self, gauges))
        self.set_models(models)

    @property
    def models(self) -> tuple[str, ...]:
        return self._models

    def set_models(self, models: tuple[str, ...]) -> None:
        """Those of others end."""
        for counter in (self._requests, self._retries, self._broken):
            for model in models:
                counter.labels(model)  # 0 is a figure, too
            for model in set(self._models) - set(models):
                counter.remove(model)
        self._models = models

    def asked(self, model: str, *, is_retry: bool) -> None:
        (self._retries if is_retry else self._requests).labels(model).inc()

    def broken(self, model: str) -> None:
        self._broken.labels(model).inc()

    def exposition(self) -> bytes:
        """Prometheus's text."""
        return generate_latest(self._registry)


class _Gauges(Collector):
    def __init__(self, figures: Figures, gauges: Gauges) -> None:
        self._figures = figures
        self._gauges = gauges

    def collect(self) -> Iterator[Metric]:
        found = {model: self._gauges(model) for model in self._figures.models}
        for name, text in _GAUGES.items():
            family = GaugeMetricFamily(f"lmtool:proxy_{name}", text, labels=["model_name"])
            for model, values in found.items():
                family.add_metric([model], values[name])
            yield family
