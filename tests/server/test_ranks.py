"""A server whose model is shared with `lmtool serve ranks`: it answers, and comes back when a rank is killed."""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import pytest

from lmtool import EngineConfig, GenerationConfig, pipeline
from lmtool.errors import ConfigError
from lmtool.server import supervisor
from lmtool.server.config import ServerConfig
from lmtool.server.supervisor import Launch
from tests.processes import children
from tests.quant.models import tiny_folder
from tests.server.process import LMTOOL, TIMEOUT_S, Process
from tests.server.serving import wait_until

MESSAGES = [{"role": "user", "content": "one two three"}]
ASKED = {"messages": MESSAGES, "max_tokens": 6, "temperature": 0}
KEY = secrets.token_hex(16)


@contextlib.contextmanager
def serving_ranks() -> Iterator[tuple[int, str]]:
    """`lmtool serve ranks` → its pid, and where it listens."""
    environment = {**os.environ, "LMTOOL_RANKS_KEY": KEY, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [LMTOOL, "serve", "ranks", "--port", "0"], env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        try:
            said = process.stderr.readline().split()
            assert said[:3] == ["lmtool:", "for", "--rank-hosts"]
            yield process.pid, said[3]
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(TIMEOUT_S) == 0


def test_a_rank_that_is_killed_costs_its_requests_and_no_more(tmp_path):
    folder = tiny_folder(tmp_path / "m", "Qwen2ForCausalLM")
    config = EngineConfig(device="cpu", dtype="float32", cache_gb=0.02, max_batch_size=4)
    with pipeline(folder, config) as pipe:
        alone = pipe(MESSAGES, GenerationConfig(max_new_tokens=6)).text
    flags = ("--device", "cpu", "--dtype", "float32", "--cache-gb", "0.02", "--max-batch-size", "4", "--tp", "2")
    with (
        serving_ranks() as (host, address),
        Process(*flags, "--rank-hosts", address, model=str(folder), LMTOOL_RANKS_KEY=KEY) as server,
        server.client() as client,
    ):

        def answer() -> str | None:
            try:
                heard = client.post("/v1/chat/completions", json=ASKED)
            except httpx.HTTPError:
                return None
            assert heard.status_code in (200, 500, 503), heard.text
            return heard.json()["choices"][0]["message"]["content"] if heard.status_code == 200 else None

        assert any("in 2 parts" in line for line in server.said)
        assert answer() == alone
        engine_pid, (rank,) = server.engine_pid(), children(host)
        os.kill(rank, signal.SIGKILL)
        wait_until(lambda: children(host) not in ([], [rank]) and answer() == alone)
        assert server.engine_pid() != engine_pid
        assert [line for line in server.said if line.startswith(f"lmtool: error: rank 1 of 2, on {address}, has ended")]


ENGINE = """
import json, socket, sys
from pathlib import Path
from lmtool.engine.frames import Frames
from lmtool.errors import ConfigError
from lmtool.server.wire import EngineInfo, Failure, Refused

lives = Path(sys.argv[1])
number = len(lives.read_bytes())
lives.write_bytes(bytes(number + 1))
there, _ = socket.socket(fileno=json.loads(sys.stdin.readline())["listener_fd"]).accept()
if number in (0, 6):
    Frames(there, None).send(EngineInfo("a model", 64, 300, 4, 8, 64, 0.0, {}))
    if number:
        sys.stdin.read()
else:
    Frames(there, None).send(Refused(Failure.of(ConfigError("10.0.0.2:23334 cannot be reached"))))
"""


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """Of an engine that is ready, cannot start five times, and is ready again."""
    monkeypatch.setattr(supervisor, "_AGAIN_S", 0.02)
    monkeypatch.setattr(supervisor, "module_command", lambda _: [sys.executable, "-c", ENGINE, str(tmp_path / "lives")])
    (tmp_path / "lives").touch()
    path = tiny_folder(tmp_path / "m", "Qwen2ForCausalLM")
    return Launch(name="m", path=path, chat_template=None, engine={}, config=ServerConfig(port=0))


def test_where_another_machine_is_away_for_long_the_server_stays_and_says_why(launch):
    def ask(url: str) -> str:
        try:
            with httpx.Client(base_url=url, timeout=TIMEOUT_S) as client:

                def away() -> str | None:
                    said = client.get("/health")
                    return said.json()["message"] if said.status_code == 503 and "reached" in said.text else None

                said = wait_until(away)
                wait_until(lambda: client.get("/health").json() == {"status": "ready"})
                return said
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    with ThreadPoolExecutor(1) as pool:
        asking = []
        machines = {"tp": 2, "rank_hosts": ["10.0.0.2:23334"]}
        supervisor.serve(
            replace(launch, engine=machines), lambda said: asking.append(pool.submit(ask, said.split()[-1]))
        )
        assert asking[0].result() == "10.0.0.2:23334 cannot be reached"


def test_on_one_machine_it_ends_after_three_starts_in_vain(launch):
    with pytest.raises(ConfigError, match="cannot be reached"):
        supervisor.serve(launch, lambda _: None)


@pytest.mark.parametrize(("key", "said"), [({}, "is not set"), ({"LMTOOL_RANKS_KEY": "123"}, "has 3 characters")])
def test_nobody_listens_without_a_key(key, said):
    environment = {name: value for name, value in os.environ.items() if name != "LMTOOL_RANKS_KEY"}
    heard = subprocess.run(
        [LMTOOL, "serve", "ranks", "--port", "0"],
        env=environment | key,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert heard.returncode == 2
    assert heard.stderr.count("\n") == 1
    assert f"LMTOOL_RANKS_KEY {said}" in heard.stderr
