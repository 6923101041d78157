"""Which addresses of the network anybody may be sent to, and which hosts an operator has named.

A URL comes from a stranger, and the machine that follows it sees more than the stranger does: its own services, those
of its network, a cloud's metadata.
"""

import socket
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from queue import Empty, SimpleQueue
from threading import Thread
from urllib.parse import urlsplit

from lmtool.errors import ConfigError

_UNICAST = IPv6Network("2000::/3")  # all that has been given out of IPv6
_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address
_TUNNELS = (IPv6Network("2001::/32"), IPv6Network("2002::/16"))  # Teredo, 6to4: they lead to an IPv4 address


def is_public(address: str) -> bool:
    """Whether anybody on the internet could connect to it, whatever form hides it; never a group's address."""
    try:
        found = ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, IPv6Address):
        if found.ipv4_mapped is not None:
            found = found.ipv4_mapped
        elif found in _NAT64:
            found = IPv4Address(int(found) & 0xFFFFFFFF)
        elif found not in _UNICAST or any(found in tunnel for tunnel in _TUNNELS):
            return False
    return found.is_global and not (found.is_multicast or found.is_reserved or found.is_private)


def is_named(host: str, port: int, is_default_port: bool, names: Sequence[str]) -> bool:
    """Whether an operator has named it.

    names: 'example.org' on its scheme's own port, 'example.org:8000', '*.example.org' for all below it, '[::1]:80'.
    Raises ConfigError for one of another form.
    """
    host = host.lower().rstrip(".")

    def means(name: str) -> bool:
        try:
            parts = urlsplit(f"//{name.lower()}")
            known, own_port = (parts.hostname or "").rstrip("."), parts.port
        except ValueError:
            raise ConfigError(f"{name!r} is no host", "give example.org, example.org:8000 or *.example.org") from None
        of_port = is_default_port if own_port is None else own_port == port
        return of_port and (known == host or (known.startswith("*.") and host.endswith(known[1:])))

    return any(map(means, names))


def resolve(host: str, port: int, timeout_s: float) -> list[str]:
    """Every address of a name, each once. Raises OSError where it has none, TimeoutError where nobody says."""
    answers: SimpleQueue[list[str] | OSError] = SimpleQueue()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            answers.put(list(dict.fromkeys(str(entry[4][0]) for entry in found)))
        except (OSError, UnicodeError) as error:  # a name may be too long to be asked for
            answers.put(error if isinstance(error, OSError) else OSError(str(error)))

    Thread(target=ask, name="lmtool-resolve", daemon=True).start()  # the system's question cannot be taken back
    try:
        answer = answers.get(timeout=timeout_s)
    except Empty:
        raise TimeoutError from None
    if isinstance(answer, OSError):
        raise answer
    return answer
