"""An engine whose ranks are on several machines: processes that listen on one, and two network namespaces."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmtool.child import module_command, module_environment
from lmtool.engine import rank_key, ranks
from lmtool.engine.async_engine import AsyncEngine
from lmtool.engine.frames import Codec
from lmtool.engine.rank_host import RankHost
from lmtool.engine.setup import LoadedEngine
from lmtool.errors import CheckpointError, ConfigError, InputError
from tests.engine.test_ranks import (
    ON_CARDS,
    PROMPTS,
    WAIT_S,
    Waiting,
    answers_of,
    be_impatient,
    decoder_of,
    engine,
    requests,
    two_cards,
    until,
)
from tests.processes import children, is_gone
from tests.quant.models import tiny_folder
from tests.support import check_equal, request, run_all

KEY = secrets.token_hex(16)
SILENT_S = 20.0  # both ends of a cut link notice after 8 s, who waits in a sum after 10; and the machine is shared


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(rank_key.KEY, KEY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With fewer key/value heads than there are ranks."""
    return tiny_folder(tmp_path_factory.mktemp("model"), "InternLM2ForCausalLM", max_position_embeddings=100_000)


# ---------------------------------------------------------------------- a rank host on this machine
@contextlib.contextmanager
def host_process(
    *before: str, address: str = "127.0.0.1", **environment: str
) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """As another program starts one: its key comes on stdin, its address on stdout. before: in front of the command."""
    with subprocess.Popen(
        [*before, *module_command("lmtool.engine.rank_host"), "--host", address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**module_environment(), "OMP_NUM_THREADS": "1", **environment},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{KEY}\n")
        process.stdin.flush()
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.stdin.close()
            assert process.wait(WAIT_S) in (0, -signal.SIGKILL)


def lost_in_a_request(loaded: LoadedEngine, pid: int, number: int = signal.SIGKILL) -> str:
    """What is said when this process gets a signal under a running request."""
    running, waiting = AsyncEngine(loaded.core), Waiting(lambda: os.kill(pid, number))
    running.submit(request(0, [1, 2, 3], max_new_tokens=90_000), waiting)
    assert waiting.over.wait(WAIT_S), "nobody was told"
    running.close()
    return str(waiting.outputs[-1].error)


def test_answers_and_what_dies(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One host serves one engine after the other; each that loses a rank says so, and leaves none. One that stands
    still is killed there, too."""
    alone = answers_of(engine(folder), requests())
    with host_process() as (host, address):
        loaded = engine(folder, tp=2, rank_hosts=(address,))
        assert len(children(host.pid)) == 1
        check_equal(alone, answers_of(loaded, requests()), decoder_of(folder), PROMPTS)
        assert children(host.pid) == []

        loaded = engine(folder, tp=4, rank_hosts=(address,))
        check_equal(alone, run_all(loaded.core, requests()), decoder_of(folder), PROMPTS)
        pids = children(host.pid)
        assert len(pids) == 2
        with monkeypatch.context() as patch:
            be_impatient(patch, loaded)
            said = lost_in_a_request(loaded, pids[1], signal.SIGSTOP)
        assert f"of 4, on {address}, stands still" in said
        until(lambda: children(host.pid) == [])

        loaded = engine(folder, tp=2, rank_hosts=(address,))
        pids = children(host.pid)
        assert f"rank 1 of 2, on {address}, has ended" in lost_in_a_request(loaded, host.pid)
        until(lambda: all(map(is_gone, pids)))
    with pytest.raises(ConfigError, match=f"{address} cannot be reached: Connection refused; start `lmtool serve"):
        engine(folder, tp=2, rank_hosts=(address,))


@pytest.mark.gpu
@two_cards
def test_a_card_of_another_machine(folder: Path) -> None:
    """Its machine has but the second card; NCCL between, over the loopback."""
    alone = answers_of(engine(folder, **ON_CARDS), requests())
    with host_process(CUDA_VISIBLE_DEVICES="1") as (_, address):
        loaded = engine(folder, tp=2, rank_hosts=(address,), **ON_CARDS)
        check_equal(alone, answers_of(loaded, requests()), decoder_of(folder), PROMPTS)


# ---------------------------------------------------------------------- what is refused
@pytest.fixture
def listening() -> Iterator[RankHost]:
    host = RankHost("127.0.0.1", 0, KEY.encode())
    serving = threading.Thread(target=host.serve)
    serving.start()
    yield host
    host.close()
    serving.join()


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("0123456789abcdeg", "has another LMTOOL_RANKS_KEY; set the same on all machines"),
        ("short", "LMTOOL_RANKS_KEY has 5 characters; give 16 or more"),
        ("", "LMTOOL_RANKS_KEY is not set; set it to one text on all machines"),
    ],
)
def test_a_key_that_is_not_the_host_s(
    folder: Path, listening: RankHost, monkeypatch: pytest.MonkeyPatch, key: str, said: str
) -> None:
    monkeypatch.setenv(rank_key.KEY, key)
    with pytest.raises(ConfigError, match=said):
        engine(folder, tp=2, rank_hosts=(listening.address,))


def test_a_model_that_is_not_on_the_host(folder: Path, tmp_path: Path, listening: RankHost) -> None:
    """Nor another one at its place: they would answer together what neither would."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    said = f"rank 1 of 2, on {listening.address}, cannot start: "
    moved = tmp_path / "moved"
    digest = ranks.model_digest

    def moving(path: Path) -> str:
        found = digest(path)
        copy.rename(moved)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "model_digest", moving)
        with pytest.raises(CheckpointError, match=f"{said}there is no {copy}; every machine reads its own copy"):
            engine(copy, tp=2, rank_hosts=(listening.address,))
    moved.rename(copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "model_digest", lambda path: "0" * 64)
        with pytest.raises(CheckpointError, match=f"{said}{copy} is another model, or another copy"):
            engine(copy, tp=2, rank_hosts=(listening.address,))


@contextlib.contextmanager
def listener(says: bytes) -> Iterator[str]:
    """Something else that listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(says)
                with contextlib.suppress(ConnectionError):
                    connection.recv(1000)

        serving = threading.Thread(target=serve)
        serving.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        serving.join()


@pytest.mark.parametrize(
    ("says", "said"),
    [
        (b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n", "is no rank host of this lmtool; give the address"),
        (
            Codec(None).encode(rank_key.Hello({"lmtool": "0.0.1"}, b"")),
            r"has lmtool 0\.0\.1, this machine has \S+; install the same",
        ),
    ],
)
def test_what_is_no_rank_host_of_this_lmtool(folder: Path, says: bytes, said: str) -> None:
    with listener(says) as address, pytest.raises(ConfigError, match=f"--rank-hosts: .*{address} {said}"):
        engine(folder, tp=2, rank_hosts=(address,))


def test_who_has_no_key_starts_nothing(listening: RankHost) -> None:
    """Nor by sending much, nor by leaving."""
    for says in (b"\xff" * 4, b"GET / HTTP/1.1\r\n\r\n", b""):
        with socket.create_connection(rank_key.split_address(listening.address)) as connection:
            connection.settimeout(WAIT_S)
            heard = b""
            with contextlib.suppress(ConnectionError):
                connection.sendall(says)
                with contextlib.suppress(OSError):  # it may have hung up already
                    connection.shutdown(socket.SHUT_WR)
                while data := connection.recv(1000):
                    heard += data
            assert len(heard) < 200


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tp": 3}, "--tp 3 cannot be shared out evenly among 2 machines, this one and 1 of --rank-hosts; give a --tp"),
        ({"tp": 2, "rank_hosts": ("somewhere",)}, "--rank-hosts: 'somewhere' is no address; give HOST:PORT"),
        ({"tp": 2, "rank_hosts": ("::1:5",)}, "'::1:5' is no address"),
        ({"tp": 3, "rank_hosts": ("a:1", "a:1")}, "--rank-hosts names one twice"),
    ],
)
def test_addresses_that_cannot_be(folder: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        engine(folder, **{"rank_hosts": ("127.0.0.1:1",), **settings})


# ---------------------------------------------------------------------- two machines
def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def machines() -> Iterator[tuple[str, str]]:
    """Two network namespaces, 10.211.7.1 and .2, joined by a cable: `far` is its end in both."""
    names = tuple(f"lmtool-{os.getpid()}-{i}" for i in (1, 2))
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", "far", "netns", names[0], "type", "veth", "peer", "name", "far", "netns", names[1])
            for i, name in enumerate(names):
                ip("-n", name, "addr", "add", f"10.211.7.{i + 1}/24", "dev", "far")
                for link in ("lo", "far"):
                    ip("-n", name, "link", "set", link, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        yield names
    finally:
        for name in names:
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                ip("netns", "del", name)


ENGINE = """
import json
import sys
import time
from pathlib import Path
from lmtool.config import EngineConfig
from lmtool.engine.setup import load_engine
from lmtool.errors import RanksLost
from tests.support import request, run_all

folder, address = sys.argv[1:]
core = load_engine(Path(folder), EngineConfig(
    dtype="float32", device="cpu", cache_gb=0.02, max_batch_size=8, tp=2, rank_hosts=(address,))).core
print(json.dumps(run_all(core, [request(0, [1, 2, 3], max_new_tokens=8)])[0]), flush=True)
core.add(request(1, [1, 2, 3], max_new_tokens=90_000))
try:
    while True:
        core.step()
except RanksLost as error:
    print(json.dumps(str(error)), flush=True)
begun = time.monotonic()
core.close()
print(json.dumps(time.monotonic() - begun), flush=True)
"""


def test_a_link_that_is_cut(folder: Path, machines: tuple[str, str]) -> None:
    """Nobody says goodbye then: both ends have to notice by themselves."""
    first, second = (["ip", "netns", "exec", name] for name in machines)
    alone = answers_of(engine(folder), [request(0, [1, 2, 3], max_new_tokens=8)])[0]
    with host_process(*second, address="10.211.7.2") as (host, address), contextlib.ExitStack() as stack:
        process = subprocess.Popen(
            [*first, sys.executable, "-c", ENGINE, str(folder), address],
            stdout=subprocess.PIPE,
            text=True,
            env={**module_environment(), "OMP_NUM_THREADS": "1"},
        )
        stack.enter_context(process)
        stack.callback(process.kill)
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == alone
        (pid,) = children(host.pid)
        ip("-n", machines[0], "link", "set", "far", "down")
        begun = time.monotonic()
        said = json.loads(process.stdout.readline())
        assert time.monotonic() - begun < SILENT_S
        assert f"rank 1 of 2, on {address}, was silent for 8 s" in said
        until(lambda: is_gone(pid), SILENT_S - (time.monotonic() - begun))
        assert json.loads(process.stdout.readline()) < SILENT_S
        assert process.wait(WAIT_S) == 0
