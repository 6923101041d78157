"""The models as applications of Ray Serve: one for each, with its replicas. Knows no HTTP.

A replica asks Ray for what `ModelSpec` says; whether that can be had is for `machines` to say, before.
"""

import logging
import re
from collections.abc import Sequence
from typing import Any
from zlib import crc32

import msgspec
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from lmtool import __version__
from lmtool.cluster.machines import machines
from lmtool.cluster.orders import ReplicaOrders
from lmtool.cluster.replica import END_S, Replica
from lmtool.cluster.scaling import by_requests
from lmtool.cluster.spec import ClusterSpec, ModelSpec

_log = logging.getLogger(__name__)
_HEALTH_PERIOD_S, _HEALTH_TIMEOUT_S = 2.0, 10.0  # a killed replica is noticed within the first
_GRACE_S = 5.0  # that Ray waits for longer than a replica itself does
_LOAD_S = 2.0  # between two words of a replica about its load, of which Serve takes the mean of three
_LOOK_S = 1.0  # between two looks of Serve for requests of its own, of which there are none


def deploy(spec: ClusterSpec, *, loopback: bool) -> None:
    """Returns before replicas are ready. Replicas that run already under these names, with other settings than how
    many there are, are replaced one after another.

    loopback: of `Replica`.
    """
    has_gpus = any(machine.gpus for machine in machines())
    targets = []
    for model in spec.models:
        orders = msgspec.json.encode(_orders(model))
        deployment = _deployment(model, orders, model.num_gpus(cluster_has_gpus=has_gpus))
        bound = deployment.bind(model.name, orders, loopback=loopback)
        targets.append(serve.RunTarget(bound, name=application_name(model.name), route_prefix=None))
    serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def withdraw(models: Sequence[str]) -> None:
    """By name. What is under way may finish, as long as each model lets it. Where Ray is gone, so are they."""
    for model in models:
        try:
            serve.delete(application_name(model))
        except Exception as error:
            _log.warning("%s could not be withdrawn from Ray: %s", model, error)


def application_name(model: str) -> str:
    """Ray names files after it."""
    sound = re.sub(r"[^A-Za-z0-9_.-]", "_", model)
    return f"lmtool-{sound}" if sound == model else f"lmtool-{sound}-{crc32(model.encode()):08x}"


def _deployment(model: ModelSpec, orders: bytes, num_gpus: int) -> Any:
    least, most = model.bounds
    on_each = {"CPU": model.cpus, "GPU": num_gpus // model.nnodes}
    bundles = [on_each] * model.nnodes
    spread = {"placement_group_bundles": bundles, "placement_group_strategy": "STRICT_SPREAD"}
    return serve.deployment(Replica).options(
        name="replica",
        version=f"{__version__} {crc32(orders):08x}",  # as long as it is the same, a new deployment keeps replicas
        _internal=True,  # which a version asks for: Serve's own is another one each time
        autoscaling_config=AutoscalingConfig(  # of one whose number is fixed, too: so its bounds can be changed
            min_replicas=least,
            max_replicas=most,
            target_ongoing_requests=model.target_requests,
            upscale_delay_s=model.scale_up_delay,
            downscale_delay_s=model.scale_down_delay,
            metrics_interval_s=_LOAD_S,
            look_back_period_s=_LOAD_S * 3,
            policy=AutoscalingPolicy(policy_function=by_requests),
        ),
        ray_actor_options={"num_cpus": on_each["CPU"], "num_gpus": on_each["GPU"]},
        **(spread if model.nnodes > 1 else {}),
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
