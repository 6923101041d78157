"""Ray itself: one of our own on this machine, or a cluster that there is."""

import contextlib
import logging
import os
import secrets
import socket
from collections.abc import Callable, Iterator

from lmtool.cluster.directory import NAMESPACE
from lmtool.config import split_address
from lmtool.errors import ConfigError

_STORE_BYTES = 100 << 20  # nothing of ours goes through Ray's object store; this is about the least that it takes

_REACH_S = 5.0
_TRIES = "6"  # a second each, of Ray's own at a head that has another token; it has been seen to listen
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
    else:
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", _TRIES)
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
            raise cannot_join(address, str(error)) from error
    try:
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})  # the front is ours
        yield
    finally:
        ray.shutdown()  # of our own all of it; of another Serve goes on, with what others have there


def cannot_join(address: str, said: str) -> ConfigError:
    """said: by Ray, in lines; of a version that differs it says both."""
    if "Version mismatch" in said:
        fix = "install the same versions on all machines, and start Ray again"
    else:
        fix = "see that Ray runs there, and that RAY_AUTH_MODE and RAY_AUTH_TOKEN are the same here as there"
    return ConfigError(f"--ray-address {address} cannot be joined: {' '.join(said.split())[:_MOST_CHARS]}", fix)


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes. Raises ConfigError."""
    if address == "auto":
        return
    place = split_address(address, "--ray-address", "auto or HOST:PORT, as `ray start --head` says it")
    try:
        socket.create_connection(place, timeout=_REACH_S).close()
    except OSError as error:
        raise ConfigError(
            f"--ray-address {address} cannot be reached: {error}", "start Ray there: ray start --head"
        ) from error
