"""A client that goes away takes its work along, at every moment of a request."""

import json
import socket
import threading

import pytest

from tests.server.serving import TIMEOUT_S, Serving, wait_until


@pytest.fixture(scope="module")
def server():
    with Serving() as server:
        yield server


def sent(server: Serving, path: str, body: dict, num_bytes: int | None = None) -> socket.socket:
    """A request on its way; num_bytes: of its body only the first."""
    host, port = server.url.removeprefix("http://").split(":")
    there = socket.create_connection((host, int(port)), timeout=TIMEOUT_S)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(data)}\r\n\r\n"
    there.sendall(head.encode() + data[:num_bytes])
    return there


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    ("path", "prompt"),
    [
        ("/v1/completions", {"prompt": list(range(100, 200))}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello " * 50}]}),
    ],
)
def test_who_leaves_frees_the_blocks(server, path, prompt, n, stream):
    core = server.engine.core
    free = core.scheduler.blocks.num_free
    before = core.scheduler.counters.num_generated_tokens
    there = sent(server, path, {**prompt, "n": n, "max_tokens": 380, "ignore_eos": True, "stream": stream})
    wait_until(lambda: core.scheduler.running)
    if stream:
        data = b""
        while b"data: " not in data:
            data += there.recv(4096)
    with server.engine.held():
        there.close()
        wait_until(lambda: server.context.engine.num_open == 0)
    wait_until(lambda: not core.has_work)
    wait_until(lambda: core.scheduler.blocks.num_free == free)
    assert core.scheduler.counters.num_generated_tokens - before < n * 380, "it was not cut short"


def test_who_leaves_in_the_middle_of_a_body(server, caplog):
    there = sent(server, "/v1/completions", {"prompt": "a" * 500}, num_bytes=50)
    there.close()
    answer = server.openai().completions.create(model="tiny", prompt="a", max_tokens=1)
    assert answer.usage.completion_tokens == 1
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


def test_an_engine_that_goes_away_is_told_in_the_stream():
    with Serving() as server:
        client = server.http()
        body = {"prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            closing = threading.Thread(target=server.engine.close)
            with server.engine.held():  # else the answer may be whole before that
                closing.start()
                *_, last = [line for line in lines if line]
            closing.join()
        assert json.loads(last.removeprefix("data: "))["error"]["type"] == "service_unavailable_error"
        client.close()


def test_a_deadline_is_told():
    with Serving(request_timeout_s=0.2) as server, server.http() as client:
        body = {"prompt": "a", "max_tokens": 500, "ignore_eos": True}
        response = client.post("/v1/completions", json=body)
        assert (response.status_code, response.json()["error"]["type"]) == (504, "timeout_error")
        wait_until(lambda: not server.engine.core.scheduler.has_work)
