"""Where replicas say how they are, and where the front reads it: one small actor with a name, on Ray.

It holds nothing that is not said again within a second, so it may die and be made again. Knows no route.
"""

import time
from dataclasses import dataclass, field
from typing import Any

from lmtool.cluster.orders import FailedStart

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
class Listing:
    """replicas: those heard of lately. failed: the last failed start of each model that has had one, and none since."""

    replicas: list[Record]
    failed: list[FailedStart]


class Directory:
    """The actor's insides. No call of it waits for anything."""

    def __init__(self) -> None:
        self._heard: dict[str, tuple[Record, float]] = {}
        self._failed: dict[str, FailedStart] = {}
        self._owners: dict[str, tuple[str, float]] = {}

    # ------------------------------------------------------------------ by replicas
    def put(self, record: Record) -> None:
        self._heard[record.name] = (record, time.monotonic())
        if record.is_ready:
            self._failed.pop(record.model, None)

    def drop(self, name: str) -> None:
        self._heard.pop(name, None)

    def fail(self, failed: FailedStart) -> None:
        self._failed[failed.model] = failed

    # ------------------------------------------------------------------ by fronts
    def claim(self, owner: str, models: tuple[str, ...]) -> list[str]:
        """The models are this front's from now on, and how earlier starts of them failed is forgotten; unless some
        belong to another one that is alive, which are named.
        """
        now_s = time.monotonic()
        taken = [model for model in models if self._owners.get(model, (owner, 0.0))[0] != owner]
        taken = [model for model in taken if now_s - self._owners[model][1] < LIVE_S]
        if not taken:
            for model in models:
                self._owners[model] = (owner, now_s)
                self._failed.pop(model, None)
        return taken

    def release(self, owner: str, models: tuple[str, ...]) -> None:
        """Those of them that are this front's are nobody's from now on."""
        self._owners = {model: one for model, one in self._owners.items() if model not in models or one[0] != owner}

    def listing(self, owner: str) -> Listing:
        """The owner is alive: it asks again and again."""
        now_s = time.monotonic()
        self._owners = {model: (one, now_s if one == owner else at) for model, (one, at) in self._owners.items()}
        self._heard = {name: found for name, found in self._heard.items() if now_s - found[1] < LIVE_S}
        return Listing([record for record, _ in self._heard.values()], list(self._failed.values()))


def directory() -> Any:
    """A handle of the actor, which is made where there is none."""
    import ray  # the front's other parts read what it says, and do not need it

    options = {"name": _NAME, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
    at_head = {"node:__internal_head__": 0.001}  # where Ray's own memory is: another machine may go without it
    return ray.remote(Directory).options(num_cpus=0, resources=at_head, max_restarts=-1, **options).remote()
