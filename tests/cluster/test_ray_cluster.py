"""Clusters that cannot be joined are told at once; Ray itself would try for minutes."""

import socket

import pytest

pytest.importorskip("ray", reason="pip install '.[cluster]'")

from lmtool.cluster.ray_cluster import joined
from lmtool.errors import ConfigError


def refusal(address: str) -> str:
    with pytest.raises(ConfigError) as refused, joined(address, print):
        pass
    return str(refused.value)


def test_where_nobody_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert refusal(f"127.0.0.1:{port}").startswith(f"--ray-address 127.0.0.1:{port} cannot be reached: ")


@pytest.mark.parametrize("address", ["", "x", "host:", ":1", "host:port"])
def test_what_is_no_address(address):
    assert refusal(address) == f"--ray-address is {address!r}; give auto or HOST:PORT, as `ray start --head` says it"
