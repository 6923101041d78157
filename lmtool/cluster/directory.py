"""Where replicas say how they are, and where the front reads it: one small actor with a name, on Ray.

It holds nothing that is not said again within a second, so it may die and be made again. Knows no route.
"""

import time
from dataclasses import dataclass, field
from typing import Any

NAMESPACE = "lmtool"
_NAME = "directory"
LIVE_S = 20.0  # who was silent for as long is gone, or its machine cannot be reached


@dataclass(frozen=True, slots=True)
class Record:
    """How a replica is. name: of this life of it. beat: counts what it says. num_starts: of its engine; each begins
    with an empty cache.

    card: what /v1/models says of the model. cache_tokens: that its cache holds. Both as its engine said when it became
    ready.
    """

    name: str
    model: str
    url: str
    key: str = field(repr=False)
    beat: int = 0
    is_ready: bool = False
    num_starts: int = 0
    cache_tokens: int = 0
    card: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class FailedStart:
    """Why a replica could not start, as an error of ours: its kind by name, and its two halves."""

    model: str
    kind: str
    cause: str
    fix: str | None


@dataclass(frozen=True, slots=True)
class Listing:
    """replicas: those heard of lately. failed: the last failed start of each model that has had one, and none since."""

    replicas: list[Record]
    failed: list[FailedStart]


class Directory:
    """The actor's insides. No call of it waits for anything."""

    def __init__(self) -> None:
        self._heard: dict[str, tuple[Record, float]] = {}
        self._failed: dict[str, FailedStart] = {}

    def put(self, record: Record) -> None:
        self._heard[record.name] = (record, time.monotonic())
        if record.is_ready:
            self._failed.pop(record.model, None)

    def drop(self, name: str) -> None:
        self._heard.pop(name, None)

    def fail(self, failed: FailedStart) -> None:
        self._failed[failed.model] = failed

    def forget_failures(self, models: tuple[str, ...]) -> None:
        for model in models:
            self._failed.pop(model, None)

    def listing(self) -> Listing:
        oldest_s = time.monotonic() - LIVE_S
        self._heard = {name: found for name, found in self._heard.items() if found[1] >= oldest_s}
        return Listing([record for record, _ in self._heard.values()], list(self._failed.values()))


def directory() -> Any:
    """A handle of the actor, which is made where there is none."""
    import ray  # the front's other parts read what it says, and do not need it

    options = {"name": _NAME, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
    return ray.remote(Directory).options(num_cpus=0, max_restarts=-1, **options).remote()
