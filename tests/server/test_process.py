"""The server as a process: its start, a killed engine, its end, its flags, several HTTP processes."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.quant.models import tiny_folder
from tests.server.process import TIMEOUT_S, Process, run_to_its_end, until

STORY = {"model": "smollm2-135m", "prompt": "Once upon a time", "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def server():
    with Process("--max-batch-size", "8") as process:
        yield process


async def _stream(client: httpx.AsyncClient, num_tokens: int) -> tuple[str, float]:
    """What the last event said, and when it came."""
    last = ""
    async with client.stream("POST", "/v1/completions", json={**STORY, "stream": True, "max_tokens": num_tokens}) as r:
        async for line in r.aiter_lines():
            last = line or last
    return last, time.monotonic()


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


# ---------------------------------------------------------------------- one server for the first tests
def test_it_says_where_and_answers(server):
    assert [line for line in server.said if "serving on" in line]
    with server.client() as client:
        answer = client.post("/v1/completions", json={**STORY, "prompt": "The capital of France is", "max_tokens": 2})
        assert answer.json()["choices"][0]["text"] == " Paris."
        assert client.get("/health").json() == {"status": "ready"}


def test_the_http_process_has_no_tensors(server):
    assert "libtorch" not in Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "libtorch" in Path(f"/proc/{server.engine_pid()}/maps").read_text()


def test_a_killed_engine_leaves_nobody_waiting_and_comes_back(server):
    async def main() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT_S) as client:
            waiting = [asyncio.create_task(_stream(client, 2000)) for _ in range(12)]  # more than there are slots
            async with asyncio.timeout(TIMEOUT_S):
                while "lmtool:num_requests_running{" not in (text := (await client.get("/metrics")).text) or (
                    'num_requests_running{model_name="smollm2-135m"} 8.0' not in text
                ):
                    await asyncio.sleep(0.05)
            killed_s = time.monotonic()
            os.kill(server.engine_pid(), signal.SIGKILL)
            for last, came_s in await asyncio.gather(*waiting):
                assert json.loads(last.removeprefix("data: "))["error"]["type"] == "service_unavailable_error"
                assert came_s - killed_s < 5
            answer = await client.post("/v1/completions", json={**STORY, "max_tokens": 2})
            assert answer.status_code == 503
            assert (await client.get("/health")).status_code in (200, 503)

    asyncio.run(main())
    server.wait_until_ready()
    with server.client() as client:
        assert client.post("/v1/completions", json={**STORY, "max_tokens": 2}).status_code == 200
    assert [line for line in server.said if "SIGKILL" in line and "started again" in line]


def test_at_its_end_answers_are_finished_and_new_ones_refused(server):
    """The last test of this server."""
    children = server.children()
    with server.client() as client, server.client() as other:
        with client.stream("POST", "/v1/completions", json={**STORY, "stream": True, "max_tokens": 40}) as response:
            events = response.iter_lines()
            next(events)
            with stopped(server.engine_pid()):  # an answer that is whole would be the server's end
                server.process.send_signal(signal.SIGTERM)
                until(lambda: other.get("/ready").status_code == 503)
                refused = other.post("/v1/completions", json={**STORY, "max_tokens": 1})
            assert refused.status_code == 503
            assert "shutting down" in refused.json()["error"]["message"]
            rest = [line.removeprefix("data: ") for line in events if line]
        assert rest[-1] == "[DONE]"
        assert json.loads(rest[-2])["choices"][0]["finish_reason"] == "length"
    assert server.wait() == 0
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


# ---------------------------------------------------------------------- servers of their own
def test_what_is_not_done_in_time_ends_with_an_error():
    with Process("--drain-timeout", "0") as server, server.client() as client:
        with client.stream("POST", "/v1/completions", json={**STORY, "stream": True, "max_tokens": 5000}) as response:
            events = response.iter_lines()
            next(events)
            server.process.send_signal(signal.SIGTERM)
            rest = [line.removeprefix("data: ") for line in events if line]
        assert "shutting down" in json.loads(rest[-1])["error"]["message"]
        assert server.wait() == 0


def test_two_http_processes_are_one_server(tmp_path):
    config = tmp_path / "server.toml"
    config.write_text('http-processes = 2\nmodel_name = ["file", "another"]\nmax-batch-size = 4\n')
    with Process("--config", str(config), LMTOOL_MODEL_NAME="environment") as server:
        assert len([words for words in server.children().values() if "http_process" in words]) == 1
        server.wait_until_listening(2)
        answers = []
        for turn in range(6):  # each on a connection of its own: some come to either process
            with server.client(headers={"Connection": "close"}) as client:
                assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["environment"]
                body = {"prompt": f"Number {turn}?", "session_id": 7, "interactive_mode": True, "request_output_len": 4}
                answers.append(client.post("/v1/chat/interactive", json=body).json())
        history = [answer["history_tokens"] for answer in answers]
        assert history[0] == 0
        assert all(later > earlier for earlier, later in zip(history, history[1:], strict=False))
        with server.client() as client:
            text = client.get("/metrics").text
        assert 'lmtool:e2e_request_latency_seconds_count{model_name="environment"} 6.0' in text
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0


def test_https(tmp_path):
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "1",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True,
    )  # fmt: skip
    flags = ("--ssl-keyfile", key, "--ssl-certfile", certificate, "--api-keys", "secret", "--device", "cpu")
    with Process(*flags, model=str(tiny_folder(tmp_path / "m"))) as server:
        assert server.url.startswith("https://")
        with server.client(verify=certificate) as client:
            assert client.get("/health").status_code == 200
            assert client.get("/v1/models").status_code == 401
            assert client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200


# ---------------------------------------------------------------------- what is refused at the start
def refusal(*flags: str, **environment: str) -> str:
    done = run_to_its_end(*flags, **environment)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = [line for line in done.stderr.splitlines() if "warning" not in line]
    return line


def test_a_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for processes in ("1", "2"):
            line = refusal("smollm2-135m", "--port", port, "--http-processes", processes)
            assert line.startswith(f"lmtool: error: cannot listen on 127.0.0.1 port {port}: ")


def test_what_the_engine_refuses_is_the_servers_one_line_and_a_public_address_without_keys_is_said_loudly():
    done = run_to_its_end("smollm2-135m", "--port", "0", "--host", "0.0.0.0", "--session-len", "999999")
    assert (done.returncode, done.stdout) == (2, "")
    warning, line = done.stderr.splitlines()
    assert "warning" in warning
    assert "give --api-keys" in warning
    assert line.startswith("lmtool: error: --session-len")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["nowhere/at-all"], "nowhere/at-all"),
        (["smollm2-135m", "--tp", "2"], "--tp 2 does not divide the model's 9 attention heads; give 1 or 3"),
        (["smollm2-135m", "--server-port", "70000"], "--server-port is 70000"),
        (["smollm2-135m", "--ssl-keyfile", "x"], "--ssl-certfile"),
        (["smollm2-135m", "--quant-policy", "3"], "--quant-policy is 3"),
        (["smollm2-135m", "--max-queue", "-1"], "--max-queue is -1"),
    ],
)
def test_flags_are_refused_by_name(flags, words):
    assert words in refusal(*flags, HF_HUB_OFFLINE="1")


def test_a_settings_file_is_read_as_flags_are(tmp_path):
    config = tmp_path / "server.toml"
    for text, words in (
        ("max-quee = 3", "'max-quee' is no setting"),
        ("max-queue = -3", "--max-queue is -3"),
        ('max-queue = "many"', "--max-queue"),
        ("[max-queue]\na = 1", "is a table"),
        ("max-queue", "cannot be read"),
    ):
        config.write_text(text)
        assert words in refusal("smollm2-135m", "--config", str(config))
    config.write_text("max-queue = -3")
    assert "--max-queue is -4" in refusal("smollm2-135m", "--config", str(config), LMTOOL_MAX_QUEUE="-4")
    assert "--max-queue is -5" in refusal(
        "smollm2-135m", "--config", str(config), "--max-queue", "-5", LMTOOL_MAX_QUEUE="-4"
    )
