"""An engine that was ready and says nothing any more is killed, and another one put in its place."""

import logging
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx

from lmtool.server import supervisor
from lmtool.server.config import ServerConfig
from lmtool.server.supervisor import Launch
from tests.quant.models import tiny_folder
from tests.server.process import TIMEOUT_S
from tests.server.serving import wait_until

# the first one is ready and then stands; those after it speak
ENGINE = """
import json, socket, sys, time
from pathlib import Path
from lmtool.engine.frames import Frames
from lmtool.server.wire import EngineInfo, Stats

lives = Path(sys.argv[1])
is_first = not lives.exists()
lives.touch()
there, _ = socket.socket(fileno=json.loads(sys.stdin.readline())["listener_fd"]).accept()
frames = Frames(there, None)
frames.send(EngineInfo("a model", 64, 300, 4, 8, 64, 0.0, {}))
while not is_first:
    frames.send(Stats(0, 0, 64, 0, {}))
    time.sleep(0.02)
time.sleep(1000)
"""


def test_an_engine_that_stands_still_is_replaced(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(supervisor, "_STILL_S", 3.0)
    monkeypatch.setattr(supervisor, "_LOOK_S", 0.5)
    monkeypatch.setattr(supervisor, "_END_S", 0.1)
    monkeypatch.setattr(supervisor, "module_command", lambda _: [sys.executable, "-c", ENGINE, str(tmp_path / "lives")])
    path = tiny_folder(tmp_path / "m", "Qwen2ForCausalLM")
    launch = Launch(name="m", path=path, chat_template=None, engine={}, config=ServerConfig(port=0))

    def ask(url: str) -> str:
        try:
            with httpx.Client(base_url=url, timeout=TIMEOUT_S) as client:
                wait_until(lambda: client.get("/stats").status_code == 200)  # it has spoken
                return client.get("/health").json()["status"]
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    with ThreadPoolExecutor(1) as pool, caplog.at_level(logging.WARNING):
        asking = []
        supervisor.serve(launch, lambda said: asking.append(pool.submit(ask, said.split()[-1])))
        assert asking[0].result() == "ready"
    assert "the engine's process stands still: it said nothing for 3 s" in caplog.text
    assert "the engine is started again: its process ended, SIGKILL" in caplog.text
