"""Prometheus's figures of all replicas as one text: each sample says which replica it is of. Knows no HTTP."""

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families


def merged(texts: Mapping[str, str]) -> bytes:
    """texts: by the replica's name; what one says that is no such text is left out."""
    families: dict[str, Metric] = {}
    for replica, text in sorted(texts.items()):
        for family in _parsed(text):
            known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                labels = {**sample.labels, "replica": replica}
                known.samples.append(sample._replace(labels=labels))
    return generate_latest(_Families(families.values()))  # which only collects


def _parsed(text: str) -> list[Metric]:
    try:
        return list(text_string_to_metric_families(text))
    except ValueError:
        return []


class _Families:
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families
