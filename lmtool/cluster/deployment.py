"""The models as applications of Ray Serve: one for each, with its replicas. Knows no HTTP.

A replica asks Ray for what `ModelSpec` says. What no machine could ever give is refused before anything is started,
because Ray would wait for it.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import msgspec
import ray
from ray import serve

from lmtool.cluster.orders import ReplicaOrders
from lmtool.cluster.replica import END_S, Replica
from lmtool.cluster.spec import ClusterSpec, ModelSpec
from lmtool.errors import ConfigError

_log = logging.getLogger(__name__)
_HEALTH_PERIOD_S, _HEALTH_TIMEOUT_S = 2.0, 10.0  # a killed replica is noticed within the first
_GRACE_S = 5.0  # that Ray waits for longer than a replica itself does
_LOOK_S = 1.0  # between two looks of Serve for requests of its own, of which there are none


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster, by what Ray may give away there."""

    address: str
    cpus: float
    gpus: float


def nodes() -> list[Node]:
    return [
        Node(one["NodeManagerAddress"], one["Resources"].get("CPU", 0.0), one["Resources"].get("GPU", 0.0))
        for one in ray.nodes()
        if one["Alive"]
    ]


def check_fit(spec: ClusterSpec, machines: Sequence[Node]) -> None:
    """Raises ConfigError for replicas that there is no place for, saying what there is."""
    has_gpus = any(machine.gpus for machine in machines)
    there = "; ".join(f"{one.address}: {one.cpus:g} CPUs, {one.gpus:g} GPUs" for one in machines)
    cpus = gpus = 0.0
    for model in spec.models:
        num_gpus = model.num_gpus(cluster_has_gpus=has_gpus)
        if not any(one.cpus >= model.cpus and one.gpus >= num_gpus for one in machines):
            raise ConfigError(
                f"no machine has {model.cpus:g} CPUs and {num_gpus} GPUs for a replica of {model.name}",
                f"lower cpus or gpus; there is {there}",
            )
        cpus += model.replicas * model.cpus
        gpus += model.replicas * num_gpus
    all_cpus, all_gpus = sum(one.cpus for one in machines), sum(one.gpus for one in machines)
    if cpus > all_cpus or gpus > all_gpus:
        raise ConfigError(
            f"all replicas together need {cpus:g} CPUs and {gpus:g} GPUs, and the cluster has {all_cpus:g} and "
            f"{all_gpus:g}",
            "lower replicas, cpus or gpus",
        )


def deploy(spec: ClusterSpec, *, loopback: bool) -> None:
    """Returns before replicas are ready. Replicas that run already under these names are replaced, one after another.

    loopback: of `Replica`.
    """
    has_gpus = any(machine.gpus for machine in nodes())
    targets = [
        serve.RunTarget(
            _deployment(model, model.num_gpus(cluster_has_gpus=has_gpus)).bind(
                model.name, msgspec.json.encode(_orders(model)), loopback=loopback
            ),
            name=application_name(model.name),
            route_prefix=None,
        )
        for model in spec.models
    ]
    serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def withdraw(spec: ClusterSpec) -> None:
    """Answers that are under way may finish, as long as each model lets them. Where Ray is gone, so are they."""
    for model in spec.models:
        try:
            serve.delete(application_name(model.name))
        except Exception as error:
            _log.warning("%s could not be withdrawn from Ray: %s", model.name, error)


def application_name(model: str) -> str:
    """Ray names files after it."""
    sound = re.sub(r"[^A-Za-z0-9_.-]", "_", model)
    return f"lmtool-{sound}" if sound == model else f"lmtool-{sound}-{crc32(model.encode()):08x}"


def _deployment(model: ModelSpec, num_gpus: int) -> Any:
    return serve.deployment(Replica).options(
        name="replica",
        num_replicas=model.replicas,
        ray_actor_options={"num_cpus": model.cpus, "num_gpus": num_gpus},
        health_check_period_s=_HEALTH_PERIOD_S,
        health_check_timeout_s=_HEALTH_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=_LOOK_S,
        graceful_shutdown_timeout_s=model.server_config().drain_timeout_s + END_S + _GRACE_S,
    )


def _orders(model: ModelSpec) -> ReplicaOrders:
    return ReplicaOrders(
        model.model,
        model.revision,
        model.download_dir,
        model.chat_template,
        model.engine_settings(),
        model.server_config(),
    )
