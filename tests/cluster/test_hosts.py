"""Two machines with a Ray node each, and one proxy: what serves where, and what a cut link does.

They are network namespaces, so these tests need root and `ip`.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="pip install '.[cluster]'")

from tests.cluster.hosts import Hosts, two_hosts
from tests.cluster.proxy import KEY, PROMPT, Load, Proxy, end_of, until
from tests.quant.models import tiny_folder

pytestmark = pytest.mark.timeout(900)  # several things are waited for, each of which may take minutes
SMALL = "device=cpu,dtype=float32,cache-gb=0.05"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "a")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with two_hosts(tmp_path_factory.mktemp("hosts")) as made:
        yield made


@pytest.fixture(scope="module")
def proxy(hosts: Hosts, model: Path) -> Iterator[Proxy]:
    """On the first host. A replica of a takes most of a host's two CPUs, so there is one on each; b's is on both."""
    flags = ["--host", hosts.address(1), "--ray-address", hosts.ray_address]
    flags += ["--model", f"{model},name=a,replicas=2,cpus=1.5,{SMALL}"]
    flags += ["--model", f"{model},name=b,tp=2,nnodes=2,cpus=0.4,{SMALL}"]
    with Proxy(*flags, before=hosts.command(1), env=hosts.env) as server:
        until(lambda: server.has_replicas(a=2, b=1))
        yield server


def num_running(hosts: Hosts, module: str) -> list[int]:
    """On each host."""
    return [sum(module in words for words in hosts.processes(number).values()) for number in (1, 2)]


def test_each_host_has_a_replica_and_both_serve(hosts: Hosts, proxy: Proxy) -> None:
    assert sorted(num_running(hosts, "lmtool.cluster.replica_process")) == [1, 2]  # and b's first half
    with Load(proxy, "a") as load:
        until(lambda: load.num("a") > 20 and sum(number > 5 for number in proxy.answered("a").values()) == 2)
    assert {end for _, end in load.ends} == {"whole"}


def test_a_replica_on_both_hosts_answers_as_one_on_one(hosts: Hosts, proxy: Proxy) -> None:
    assert sorted(num_running(hosts, "lmtool.engine.rank_host")) == [0, 1]
    with proxy.client(headers=KEY) as client:
        for prompt in ("The lighthouse", "and then?", "numbers such as 20,000"):
            ask = {"prompt": prompt, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
            alone, shared = (client.post("/v1/completions", json={**ask, "model": model}).json() for model in "ab")
            assert shared["choices"] == alone["choices"]
            assert shared["usage"]["completion_tokens"] == 40


def test_a_cut_link_costs_only_what_was_streaming_there_and_comes_back(hosts: Hosts, proxy: Proxy) -> None:
    """Shorter than Ray takes to give the machine up."""
    with Load(proxy, "a") as load:
        until(lambda: load.num("a") > 5)
        hosts.cut(2)
        until(lambda: proxy.metrics()["replicas_ready", "a"] == 1)
        seen = load.num("a")
        with proxy.client(headers=KEY) as client:  # of the replica that lost half of itself
            assert client.post("/v1/completions", json={**PROMPT, "model": "b"}).status_code == 503
        until(lambda: load.num("a") > seen + 10)
        hosts.mend(2)
        until(lambda: proxy.has_replicas(a=2, b=1))
        before = proxy.answered_by(2, "a")
        until(lambda: all(number > before[name] + 3 for name, number in proxy.answered_by(2, "a").items()))
        with proxy.client(headers=KEY) as client:
            assert end_of(client.post("/v1/completions", json={**PROMPT, "model": "b"})) == "whole"
    load.check()
    print(f"the longest waited {load.longest_s:.1f} s")
    assert load.longest_s < 20
