"""`lmtool serve proxy` as users start it: a Ray of its own on the CPU, two tiny models with two replicas each. The
second one's second comes when the load asks for it, and goes when it does not any more.
"""

import contextlib
import os
import re
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

pytest.importorskip("ray", reason="pip install '.[cluster]'")

from lmtool.cluster.deployment import application_name
from lmtool.cluster.spec import ModelSpec
from tests.cluster.proxy import KEY, PROMPT, Load, Proxy, command_line, end_of, processes, refusal, until
from tests.quant.models import tiny_folder
from tests.server.process import TIMEOUT_S

pytestmark = pytest.mark.timeout(900)  # several things are waited for, each of which may take minutes


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    folder = tmp_path_factory.mktemp("models")
    a, b = tiny_folder(folder / "a"), tiny_folder(folder / "b", "Qwen2ForCausalLM")
    config = folder / "models.toml"
    small = 'cpus = 0.1\ndevice = "cpu"\ndtype = "float32"\ncache-gb = 0.05\n'
    config.write_text(
        f'[[models]]\nmodel = "{a}"\nreplicas = 2\n{small}[[models]]\nmodel = "{b}"\n{small}'
        "min-replicas = 1\nmax-replicas = 2\nscale-up-delay = 0\ntarget-requests = 100\n"
    )
    with Proxy("--config", str(config)) as server:
        server.config = config
        yield server


@pytest.fixture(scope="module")
def client(proxy: Proxy) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="secret", timeout=TIMEOUT_S, max_retries=0) as made:
        yield made


# ---------------------------------------------------------------------- one proxy for all of these, in this order
def test_both_models_answer(proxy: Proxy, client: openai.OpenAI) -> None:
    assert [one.id for one in client.models.list()] == ["a", "b"]
    texts = []
    for model in "ab":
        whole = client.completions.create(model=model, prompt="Hello", max_tokens=12, temperature=0)
        streamed = client.completions.create(model=model, prompt="Hello", max_tokens=12, temperature=0, stream=True)
        texts.append(whole.choices[0].text)
        assert "".join(part.choices[0].text for part in streamed) == texts[-1]
    assert texts[0] != texts[1]
    chat = client.chat.completions.create(model="a", messages=[{"role": "user", "content": "Hi"}], max_tokens=3)
    assert chat.choices[0].message.content
    with pytest.raises(openai.NotFoundError, match="there is no model 'c'; here is a, b"):
        client.completions.create(model="c", prompt="Hello")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="a", prompt="Hello", temperature=-1)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="other").models.list()


def test_replicas_are_alone_with_the_front(proxy: Proxy) -> None:
    """They listen on this machine only, and want a key that is nowhere to be read."""
    words = processes(proxy.process.pid)
    [first, *_] = [pid for pid, line in words.items() if "lmtool.cluster.replica_process" in line]
    inodes = {
        found[1] for fd in Path(f"/proc/{first}/fd").iterdir() if (found := re.match(r"socket:\[(\d+)\]", _target(fd)))
    }
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    [door] = [row[1] for row in rows if row[9] in inodes and row[3] == "0A"]
    address, port = door.split(":")
    assert address == "0100007F"  # 127.0.0.1
    answer = httpx.get(f"http://127.0.0.1:{int(port, 16)}/v1/models", headers=KEY)
    assert answer.status_code == 401


def _target(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return ""


def actors(proxy: Proxy, model: str) -> set[int]:
    words = processes(proxy.process.pid)
    return {pid for pid, line in words.items() if line.startswith(f"ray::ServeReplica:lmtool-{model}:")}


def reread(proxy: Proxy, *tables: str, says: str) -> None:
    proxy.config.write_text("".join(f"[[models]]\n{table}" for table in tables))
    before = len(proxy.said)
    proxy.process.send_signal(signal.SIGHUP)
    until(lambda: any(says in line for line in proxy.said[before:]))


def tables(proxy: Proxy) -> list[str]:
    return proxy.config.read_text().split("[[models]]\n")[1:]


def test_a_load_that_asks_for_more_replicas_gets_them(proxy: Proxy) -> None:
    a, b = tables(proxy)
    [first] = actors(proxy, "b")
    with Load(proxy, "b") as load:
        reread(
            proxy,
            a,
            b.replace("target-requests = 100", "target-requests = 0.1"),
            says="replacing or scaling replicas of b",
        )
        until(lambda: proxy.has_replicas(a=2, b=2))
    assert {end for _, end in load.ends} == {"whole"}
    assert first in actors(proxy, "b")


def test_a_killed_engine_costs_only_what_was_streaming_there(proxy: Proxy) -> None:
    def engines() -> set[int]:
        words = processes(proxy.process.pid)
        return {pid for pid, line in words.items() if "lmtool.server.engine_process" in line}

    before = engines()
    assert len(before) == 4
    with Load(proxy) as load:
        until(lambda: load.num("a") > 5 and load.num("b") > 5)
        os.kill(min(before), signal.SIGKILL)
        until(lambda: not proxy.has_replicas(a=2, b=2))
        seen = load.num("a"), load.num("b")
        until(lambda: engines() - before and proxy.has_replicas(a=2, b=2))  # a replica may be quiet for other reasons
        assert load.num("a") > seen[0]  # both went on meanwhile
        assert load.num("b") > seen[1]
    assert len(engines() - before) == 1  # a new one, by itself
    load.check()


def test_a_killed_replica_costs_only_what_was_streaming_there_and_another_takes_its_place(proxy: Proxy) -> None:
    before = actors(proxy, "a")
    assert len(before) == 2
    broken_before, known = proxy.metrics()["broken_answers_total", "a"], set(proxy.answered_by(2, "a"))

    def newcomers() -> set[str]:
        """That have answered somebody."""
        return {name for name, number in proxy.answered("a").items() if number} - known

    with Load(proxy) as load:
        until(lambda: load.num("a") > 5 and load.num("b") > 5)
        os.kill(min(before), signal.SIGKILL)
        until(newcomers)
        until(lambda: len(actors(proxy, "a")) == 2)
    assert len(actors(proxy, "a") - before) == 1
    others = {end for model, end in load.ends if model == "b"}
    assert others == {"whole"}  # the other model's were untouched
    load.check()
    assert proxy.metrics()["broken_answers_total", "a"] - broken_before == load.num(
        "a", "broken: service_unavailable_error"
    )


def test_models_change_come_and_go_without_a_lost_request(proxy: Proxy) -> None:
    def names() -> dict[str, int]:
        with proxy.client(headers=KEY) as client:
            return {one["id"]: one["max_model_len"] for one in client.get("/v1/models").json()["data"]}

    a, b = tables(proxy)
    c = a.replace("replicas = 2", "replicas = 1") + 'name = "c"\n'
    before = actors(proxy, "a"), actors(proxy, "b")
    reread(proxy, a, b + "replicas = 3", says="nothing was changed: --config")
    with Load(proxy) as load:
        narrow = b + "session-len = 100\n"
        wrong = c + "session-len = 999999\n"
        reread(proxy, a, narrow, wrong, says="starting of c; replacing or scaling replicas of b")
        refused = "a replica of c cannot start, and is tried again: --session-len 999999 is longer than the model's 128"
        until(lambda: any(refused in line for line in proxy.said))
        reread(proxy, a, narrow, c, says="replacing or scaling replicas of c")
        until(lambda: not actors(proxy, "b") & before[1] and proxy.has_replicas(a=2, b=2, c=1))
        until(lambda: names() == {"a": 128, "b": 100, "c": 128})
        after = actors(proxy, "b")
        idle = b.replace("target-requests = 0.1", "target-requests = 100\nscale-down-delay = 0")
        reread(proxy, a, idle + "session-len = 100\n", says="replacing or scaling replicas of b; ending of c")
        until(lambda: not actors(proxy, "c"))
        assert list(names()) == ["a", "b"]
        until(lambda: len(actors(proxy, "b")) == 1 and proxy.has_replicas(a=2, b=1))
        assert actors(proxy, "b") < after  # of which one stayed
    assert {end for _, end in load.ends} == {"whole"}
    assert actors(proxy, "a") == before[0]


@contextlib.contextmanager
def standing_still(pids: list[int]) -> Iterator[None]:
    """Engines: their answers are not over before the block is."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def test_at_its_end_answers_are_finished_and_nothing_is_left(proxy: Proxy) -> None:
    """The last test of this proxy."""
    started = processes(proxy.process.pid)
    asked = {**PROMPT, "model": "a", "stream": True}
    with proxy.client(headers=KEY) as client, proxy.client(headers=KEY) as other, ThreadPoolExecutor(1) as pool:
        with standing_still([pid for pid, words in started.items() if "lmtool.server.engine_process" in words]):
            answer = pool.submit(client.post, "/v1/completions", json=asked)
            until(lambda: proxy.metrics()["queued_tokens", "a"] > 0)
            proxy.process.send_signal(signal.SIGTERM)
            until(lambda: other.get("/ready").status_code == 503)
            refused = other.post("/v1/completions", json=asked)
            assert (refused.status_code, "shutting down" in refused.text) == (503, True)
        assert end_of(answer.result(TIMEOUT_S)) == "whole"
    assert proxy.wait() == 0
    assert not [line for line in proxy.said if "Traceback" in line or line.startswith("lmtool: error")]
    until(lambda: not [pid for pid, words in started.items() if words and words == command_line(Path(f"/proc/{pid}"))])


# ---------------------------------------------------------------------- what is refused
def test_what_is_wrong_is_said_before_ray_is_started(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
        assert f"cannot listen on 127.0.0.1 port {port}" in refusal("--port", port, "--model", "a")
    assert "give one of the two" in refusal()
    assert "give one of the two" in refusal("--model", "a", "--config", "x.toml")
    assert "replicas is 0" in refusal("--model", "a,replicas=0")
    assert "give one of prefix, least-queued, random" in refusal("--model", "a", "--routing", "by-name")
    assert "cannot be read" in refusal("--config", str(tmp_path / "none.toml"))


def test_rays_names_of_models_are_sound_and_differ() -> None:
    names = [application_name(name) for name in ("a", "org/a", "org_a")]
    assert names[0] == "lmtool-a"
    assert len(set(names)) == 3
    assert all(re.fullmatch(r"[\w.-]+", name) for name in names)
    assert ModelSpec(model="x", name="org/a").name == "org/a"
