"""Clusters that cannot be joined are told at once; Ray itself would try for minutes."""

import socket

import pytest

pytest.importorskip("ray", reason="pip install '.[cluster]'")

from lmtool.cluster.ray_cluster import cannot_join, joined
from lmtool.errors import ConfigError


def refusal(address: str) -> str:
    with pytest.raises(ConfigError) as refused, joined(address, print):
        pass
    return str(refused.value)


def test_where_nobody_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]  # nobody else's meanwhile
        assert refusal(f"127.0.0.1:{port}").startswith(f"--ray-address 127.0.0.1:{port} cannot be reached: ")


@pytest.mark.parametrize("address", ["", "x", "host:", ":1", "host:port", "host:65536", "::1:6379"])
def test_what_is_no_address(address):
    assert (
        refusal(address)
        == f"--ray-address: {address!r} is no address; give auto or HOST:PORT, as `ray start --head` says it"
    )


def test_versions_that_differ_are_named():
    """As Ray 2.60 says it of a head with 2.55."""
    said = """Version mismatch: The cluster was started with:
    Ray: 2.55.0
    Python: 3.11.7
This process on node 10.231.7.1 was started with:
    Ray: 2.60.0
    Python: 3.11.7
"""
    assert str(cannot_join("10.231.7.1:6379", said)) == (
        "--ray-address 10.231.7.1:6379 cannot be joined: Version mismatch: The cluster was started with: Ray: 2.55.0 "
        "Python: 3.11.7 This process on node 10.231.7.1 was started with: Ray: 2.60.0 Python: 3.11.7; "
        "install the same versions on all machines, and start Ray again"
    )


def test_another_token_is_thought_of():
    """Ray 2.60 says no more than that it failed."""
    said = "Failed to connect to Ray cluster at 10.231.7.1:6379"
    assert str(cannot_join("10.231.7.1:6379", said)).endswith("and RAY_AUTH_TOKEN are the same here as there")
