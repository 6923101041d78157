"""Who may start ranks on another machine: whoever proves to know the same key. Knows no ranks.

The host says which lmtool it is, and a number; the engine answers with its own number and a HMAC of both, then the host
with another. Nothing of the key crosses the network, and what was heard there is of no use a second time. What follows
is neither encrypted nor signed: the network between the machines is to be trusted, as NCCL trusts it.
"""

import hmac
import os
import secrets
import socket
from importlib.metadata import version

import msgspec

from lmtool import __version__
from lmtool.config import split_address
from lmtool.engine.frames import Frames
from lmtool.engine.silence import watch
from lmtool.errors import ConfigError, LmtoolError

KEY = "LMTOOL_RANKS_KEY"
_LEAST_KEY = 16
_NUMBER_BYTES = 32
_HELLO_S = 10.0  # for what is said before anything is started
_HELLO_BYTES = 1 << 12


class Hello(msgspec.Struct, tag=True, frozen=True):
    """From the host."""

    versions: dict[str, str]
    number: bytes


class Proof(msgspec.Struct, tag=True, frozen=True):
    """From the engine."""

    number: bytes
    digest: bytes


class Welcome(msgspec.Struct, tag=True, frozen=True):
    """From the host, which knows the key as well."""

    digest: bytes


class WrongKey(msgspec.Struct, tag=True, frozen=True):
    """From the host, and its last word."""


def checked_key(text: str | None) -> bytes:
    """Raises ConfigError for a key that is missing, or so short that it could be guessed."""
    if not text:
        raise ConfigError(f"{KEY} is not set", "set it to one text on all machines, such as `openssl rand -hex 16`")
    if len(text) < _LEAST_KEY:
        raise ConfigError(f"{KEY} has {len(text)} characters", f"give {_LEAST_KEY} or more: `openssl rand -hex 16`")
    return text.encode()


def versions() -> dict[str, str]:
    """What must be the same on all machines."""
    return {"lmtool": __version__, "torch": version("torch").partition("+")[0]}


# ------------------------------------------------------------------ the engine's side
def connect(address: str, key: bytes) -> socket.socket:
    """A connection to the rank host at HOST:PORT, which has the key. Raises ConfigError where there is none."""
    try:
        connection = socket.create_connection(split_address(address), timeout=_HELLO_S)
    except OSError as error:
        raise ConfigError(
            f"--rank-hosts: {address} cannot be reached: {error.strerror or error}",
            "start `lmtool serve ranks` there",
        ) from error
    try:
        _introduce(Frames(connection, Hello | Welcome | WrongKey, _HELLO_BYTES), address, key)
    except LmtoolError:
        connection.close()
        raise
    except (OSError, EOFError, msgspec.MsgspecError) as error:
        connection.close()
        raise ConfigError(
            f"--rank-hosts: what listens at {address} is no rank host of this lmtool",
            "give the address that `lmtool serve ranks` says, and install the same lmtool on all machines",
        ) from error
    _keep(connection)
    connection.settimeout(None)
    return connection


def _introduce(frames: Frames, address: str, key: bytes) -> None:
    hello = frames.receive()
    if not isinstance(hello, Hello):
        raise EOFError
    for name, ours in versions().items():
        theirs = hello.versions.get(name)
        if theirs != ours:
            raise ConfigError(
                f"--rank-hosts: {address} has {name} {theirs or 'of none'}, this machine has {ours}",
                "install the same on all machines",
            )
    number = secrets.token_bytes(_NUMBER_BYTES)
    frames.send(Proof(number, _digest(key, b"engine", hello.number, number)))
    answer = frames.receive()
    proven = isinstance(answer, Welcome) and hmac.compare_digest(
        answer.digest, _digest(key, b"host", hello.number, number)
    )
    if not proven:
        raise ConfigError(f"--rank-hosts: {address} has another {KEY}", "set the same on all machines")


# ------------------------------------------------------------------ the host's side
def admit(connection: socket.socket, key: bytes) -> bool:
    """Hear whether whoever connected has the key. Raises OSError, EOFError or msgspec.MsgspecError where it is nobody
    who speaks like this."""
    connection.settimeout(_HELLO_S)
    frames = Frames(connection, Proof, _HELLO_BYTES)
    number = secrets.token_bytes(_NUMBER_BYTES)
    frames.send(Hello(versions(), number))
    proof = frames.receive()
    if not hmac.compare_digest(proof.digest, _digest(key, b"engine", number, proof.number)):
        frames.send(WrongKey())
        return False
    frames.send(Welcome(_digest(key, b"host", number, proof.number)))
    _keep(connection)
    return True


def key_here() -> bytes:
    """Of this process's environment. Raises ConfigError."""
    return checked_key(os.environ.get(KEY))


def _keep(connection: socket.socket) -> None:
    """Both have proven to know the key: this is a rank's connection now."""
    watch(connection)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _digest(key: bytes, whose: bytes, hosts_number: bytes, engines_number: bytes) -> bytes:
    return hmac.digest(key, b"|".join((whose, hosts_number, engines_number)), "sha256")
