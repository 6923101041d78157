"""The cluster's machines, and whether replicas fit on them: what nobody could ever give is refused before anything is
started, because Ray would wait for it. Says what would fit instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from lmtool.cluster.spec import ClusterSpec, ModelSpec
from lmtool.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Machine:
    """What Ray may give away there."""

    address: str
    cpus: float
    gpus: float

    def __str__(self) -> str:
        return f"{self.address}: {self.cpus:g} CPUs, {self.gpus:g} GPUs"


def machines() -> list[Machine]:
    import ray

    return [
        Machine(one["NodeManagerAddress"], one["Resources"].get("CPU", 0.0), one["Resources"].get("GPU", 0.0))
        for one in ray.nodes()
        if one["Alive"]
    ]


def check_fit(spec: ClusterSpec, there: Sequence[Machine]) -> None:
    """Of as many replicas as there are at least. Raises ConfigError where there is no place for them."""
    has_gpus = any(one.gpus for one in there)
    cpus = gpus = 0.0
    for model in spec.models:
        num_gpus = model.num_gpus(cluster_has_gpus=has_gpus)
        if not _fits(model, num_gpus, there):
            raise _no_place(model, num_gpus, there)
        cpus += model.bounds[0] * model.nnodes * model.cpus
        gpus += model.bounds[0] * num_gpus
    all_cpus, all_gpus = sum(one.cpus for one in there), sum(one.gpus for one in there)
    if cpus > all_cpus or gpus > all_gpus:
        raise ConfigError(
            f"all replicas together need {cpus:g} CPUs and {gpus:g} GPUs, and the cluster has {all_cpus:g} and "
            f"{all_gpus:g}",
            "lower replicas, cpus or gpus",
        )


def _fits(model: ModelSpec, num_gpus: int, there: Sequence[Machine]) -> bool:
    """Whether there are machines enough, each with its part."""
    each = num_gpus // model.nnodes
    return sum(one.cpus >= model.cpus and one.gpus >= each for one in there) >= model.nnodes


def _no_place(model: ModelSpec, num_gpus: int, there: Sequence[Machine]) -> ConfigError:
    each = num_gpus // model.nnodes
    wanted = f"{model.cpus:g} CPUs and {each} GPUs"
    who = "no machine has" if model.nnodes == 1 else f"there are no {model.nnodes} machines with"
    more = f"; {fitting}" if (fitting := _what_fits(model, num_gpus, there)) else ""
    return ConfigError(
        f"{who} {wanted} for a replica of {model.name}",
        f"lower cpus or gpus{more}; there is {'; '.join(map(str, there))}",
    )


def _what_fits(model: ModelSpec, num_gpus: int, there: Sequence[Machine]) -> str:
    """The same GPUs on more machines, or else the most that there are place for; '' where CPUs are what is missing."""
    if not num_gpus:
        return ""
    sizes = [tp for tp in (64, 32, 16, 8, 4, 2, 1) if tp < model.tp]
    for tp, nnodes in product([model.tp, *sizes], range(1, len(there) + 1)):
        if tp % nnodes == 0 and _fits(replace(model, tp=tp, nnodes=nnodes, gpus=None), tp, there):
            return f"tp={tp}{f',nnodes={nnodes}' if nnodes > 1 else ''} would fit"
    return ""
