"""The models of one proxy on Ray, from when it claims them to when they are withdrawn; and changes of them meanwhile.

Calls of Ray: they take their time, and are not for an event loop. Knows no HTTP.
"""

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import ray

from lmtool.cluster import deployment
from lmtool.cluster.directory import directory
from lmtool.cluster.machines import check_fit, machines
from lmtool.cluster.spec import ClusterSpec
from lmtool.errors import ConfigError

_log = logging.getLogger(__name__)
_RELEASE_S = 1.0


@dataclass(frozen=True, slots=True)
class Change:
    """Names. changed: whose settings are others now: their replicas are replaced, unless only their number changed."""

    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]

    def __str__(self) -> str:
        words = {"starting": self.added, "replacing or scaling replicas": self.changed, "ending": self.removed}
        said = [f"{what} of {', '.join(names)}" for what, names in words.items() if names]
        return "; ".join(said) or "nothing differs"


class Served:
    """``with Served(spec, owner, loopback=True) as served``. owner: of the models, for the directory.

    loopback: of `Replica`. Raises ConfigError where there is no place for the models, or they are another proxy's.
    """

    def __init__(self, spec: ClusterSpec, owner: str, *, loopback: bool) -> None:
        self.spec = spec
        self._owner = owner
        self._loopback = loopback

    def __enter__(self) -> "Served":
        check_fit(self.spec, machines())
        self._claim(self.spec.names)
        try:
            deployment.deploy(self.spec, loopback=self._loopback)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.withdraw(self.spec.names)

    def update(self, wanted: ClusterSpec) -> Change:
        """Start what is new, and replace replicas of what differs, one after another. What is to end goes on until
        `withdraw`. Raises ConfigError as at the start; then nothing was changed."""
        before = {model.name: model for model in self.spec.models}
        added = tuple(name for name in wanted.names if name not in before)
        removed = tuple(name for name in before if name not in wanted.names)
        differ = tuple(model for model in wanted.models if before.get(model.name) != model)
        check_fit(wanted, machines())
        self._claim(added)
        if differ:
            deployment.deploy(ClusterSpec(differ), loopback=self._loopback)
        self.spec = wanted
        return Change(added, tuple(model.name for model in differ if model.name in before), removed)

    def withdraw(self, names: Sequence[str]) -> None:
        """Their replicas end when what is under way there is done."""
        deployment.withdraw(names)
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(directory().release.remote(self._owner, tuple(names)), timeout=_RELEASE_S)

    def _claim(self, names: Sequence[str]) -> None:
        taken = ray.get(directory().claim.remote(self._owner, tuple(names)))
        if taken:
            raise ConfigError(
                f"{taken[0]} is served by another proxy on this cluster", "end that one, or give another name"
            )
