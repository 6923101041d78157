"""Ray itself: one of our own on this machine, or a cluster that there is."""

import contextlib
import logging
import os
import secrets
import socket
from collections.abc import Callable, Iterator

from lmtool.cluster.directory import NAMESPACE
from lmtool.errors import ConfigError

_STORE_BYTES = 100 << 20  # nothing of ours goes through Ray's object store; this is about the least that it takes

_REACH_S = 5.0
_MOST_CHARS = 300  # of what Ray says is wrong


@contextlib.contextmanager
def joined(address: str | None, say: Callable[[str], None]) -> Iterator[None]:
    """While this process is one of the cluster's. address: 'auto' or HOST:PORT; None: a Ray of our own, which ends with
    the block.

    Our own asks for a token that nobody else on the machine has: Ray's ports run what they are sent. Raises ConfigError
    for a cluster that cannot be joined.
    """
    if address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ["RAY_AUTH_MODE"] = "token"  # before Ray is imported; its processes inherit it
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": NAMESPACE}
    if address is None:
        say("starting a Ray of its own")
        own = {"include_dashboard": False, "object_store_memory": _STORE_BYTES, "_node_ip_address": "127.0.0.1"}
        ray.init(address="local", **quiet, **own)  # and not one that RAY_ADDRESS or a file names
    else:
        _check_reachable(address)
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:_MOST_CHARS]  # of a version that differs it says both, in lines
            raise ConfigError(
                f"--ray-address {address} cannot be joined: {reason}",
                "start Ray there (ray start --head) with the version and the token of this machine",
            ) from error
    try:
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})  # the front is ours
        yield
    finally:
        ray.shutdown()  # of our own all of it; of another Serve goes on, with what others have there


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes. Raises ConfigError."""
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    if not host or not port.isdecimal():
        raise ConfigError(f"--ray-address is {address!r}", "give auto or HOST:PORT, as `ray start --head` says it")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--ray-address {address} cannot be reached: {error}", "start Ray there: ray start --head"
        ) from error
