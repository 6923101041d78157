"""A server whose model is shared by two processes: it answers, and comes back when one of them is killed."""

import os
import signal
from pathlib import Path

import httpx

from tests.quant.models import tiny_folder
from tests.server.process import Process
from tests.server.serving import wait_until

ASKED = {"messages": [{"role": "user", "content": "one two three"}], "max_tokens": 6, "temperature": 0}


def rank_pid(engine_pid: int) -> int:
    children = Path(f"/proc/{engine_pid}/task/{engine_pid}/children").read_text().split()
    return next(
        int(pid) for pid in children if b"lmtool.engine.rank_process" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )


def test_a_rank_that_is_killed_costs_its_requests_and_no_more(tmp_path):
    folder = tiny_folder(tmp_path / "m", "Qwen2ForCausalLM")
    flags = ("--device", "cpu", "--dtype", "float32", "--cache-gb", "0.02", "--max-batch-size", "4")
    with Process(*flags, model=str(folder)) as server, server.client() as client:
        alone = client.post("/v1/chat/completions", json=ASKED).json()["choices"][0]["message"]
    with Process(*flags, "--tp", "2", model=str(folder)) as server, server.client() as client:
        assert any("in 2 parts" in line for line in server.said)
        assert client.post("/v1/chat/completions", json=ASKED).json()["choices"][0]["message"] == alone
        engine_pid = server.engine_pid()
        os.kill(rank_pid(engine_pid), signal.SIGKILL)

        def is_back() -> bool:
            try:
                again = client.post("/v1/chat/completions", json=ASKED)
            except httpx.HTTPError:
                return False
            assert again.status_code in (200, 500, 503), again.text
            return again.status_code == 200

        wait_until(is_back)
        assert server.engine_pid() != engine_pid
        assert client.post("/v1/chat/completions", json=ASKED).json()["choices"][0]["message"] == alone
