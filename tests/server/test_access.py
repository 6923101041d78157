"""Who is let in, how much is read, and what is told of a request."""

import asyncio
import json
import socket
from pathlib import Path

import httpx
import openai
import pytest

from lmtool.server.app import create_app
from lmtool.server.config import ServerConfig
from lmtool.server.context import ServerContext
from lmtool.server.engine_client import EngineClient
from lmtool.server.envelope import escaped
from lmtool.server.sse import EventStream
from tests.server.serving import Serving
from tests.server.support import smollm2_tokenizer

ASK = {"prompt": "a", "max_tokens": 1}


@pytest.fixture(scope="module")
def locked():
    with Serving(api_keys=("first", "zweiter-schlüssel"), allow_origins=("https://page.example",)) as server:
        yield server


def test_a_key_opens_every_path(locked):
    for key in ("first", "zweiter-schlüssel"):
        with locked.http() as client:
            headers = {"Authorization": f"Bearer {key}".encode()}
            assert client.post("/v1/completions", json=ASK, headers=headers).status_code == 200
            assert client.get("/openapi.json", headers=headers).status_code == 200


@pytest.mark.parametrize("key", ["", "Bearer", "Bearer firs", "Bearer first2", "Basic first", "first"])
def test_no_other_does(locked, key):
    with locked.http() as client:
        for path in ("/v1/models", "/metrics", "/docs", "/openapi.json", "/nothing", "/health/", "//health", "/Health"):
            response = client.get(path, headers={"Authorization": key} if key else {})
            assert response.status_code == 401, path
            assert response.json()["error"]["code"] == "invalid_api_key"
        assert client.post("/v1/completions", json=ASK, headers={"Authorization": key}).status_code == 401


def test_openais_client_is_told(locked):
    with pytest.raises(openai.AuthenticationError):
        locked.openai("wrong").models.list()
    assert [model.id for model in locked.openai("first").models.list()] == ["tiny"]


def test_how_it_is_may_be_asked_by_everybody(locked):
    with locked.http() as client:
        assert client.get("/health").json() == {"status": "ready"}
        assert client.get("/ready").status_code == 200


@pytest.mark.parametrize(
    "target", ["/v1/models?x=/health", "/%2e%2e/v1/models", "http://h/v1/models", "/health/../v1/models"]
)
def test_no_spelling_of_a_path_is_a_way_in(locked, target):
    host, port = locked.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as there:
        there.sendall(f"GET {target} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: there.recv(65536), b""))
    assert answer.split(b" ")[1] in (b"401", b"400"), answer


@pytest.mark.parametrize("host", ["evil.example", "evil.example:23333", "localhost.evil.example", "", "1.2.3.4.evil"])
def test_a_page_cannot_come_in_by_a_name_of_its_own(serving, locked, host):
    with serving.http() as client:
        refused = client.post("/v1/completions", json=ASK, headers={"Host": host})
        assert (refused.status_code, refused.json()["error"]["type"]) == (403, "permission_error")
        assert client.get("/health", headers={"Host": host}).status_code == 200
    with locked.http() as client:  # who has a key does not come from a page
        headers = {"Host": host, "Authorization": "Bearer first"}
        assert client.post("/v1/completions", json=ASK, headers=headers).status_code == 200


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:23333", "[::1]:80", "[::1]", "a.localhost:1"])
def test_names_of_this_machine(serving, host):
    with serving.http() as client:
        assert client.get("/version", headers={"Host": host}).status_code == 200


def test_pages_elsewhere_only_where_it_was_said(locked, serving):
    asked = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    with locked.http() as client:
        before = client.options("/v1/completions", headers=asked)
        assert (before.status_code, before.headers["access-control-allow-origin"]) == (200, "https://page.example")
        other = client.options("/v1/completions", headers={**asked, "Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
        refused = client.get("/v1/models", headers={"Origin": "https://page.example"})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://page.example")
    with serving.http() as client:
        answer = client.get("/v1/models", headers={"Origin": "https://page.example"})
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_have_a_limit(chunked):
    with Serving(max_body_bytes=2048) as server, server.http() as client:
        body = b'{"prompt": "' + b"a" * 4000 + b'"}'
        content = iter([body[:1000], body[1000:]]) if chunked else body
        response = client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"
        assert client.post("/v1/completions", json=ASK).status_code == 200


def test_a_request_has_an_id(serving):
    with serving.http() as client:
        assert client.get("/version", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
        for bad in ("", "a" * 129, "a b", "ü".encode()):
            made = client.get("/nothing", headers={"X-Request-Id": bad}).headers["x-request-id"]
            assert len(made) == 32
        refused = client.post("/v1/completions", json={}, headers={"X-Request-Id": "mine-2"})
        assert (refused.status_code, refused.headers["x-request-id"]) == (400, "mine-2")


def test_log_lines_are_one_line():
    assert escaped("/a\nb\x1b[31m\u202e") == "/a\\nb\\x1b[31m\\u202e"


def test_too_many_are_told_to_come_back():
    with Serving(max_queue=0) as server:
        client = server.openai()
        stream = client.completions.create(
            model="tiny", prompt=["a", "b", "c", "d"], max_tokens=400, stream=True, extra_body={"ignore_eos": True}
        )
        next(stream)
        with server.engine.held(), pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(model="tiny", prompt="e", max_tokens=1)
        assert refused.value.response.headers["retry-after"] == "1"
        stream.close()


def broken(path: str) -> httpx.Response:
    """What the application says where something of ours breaks, without a server."""
    context = ServerContext(ServerConfig(), EngineClient(Path("/nowhere")), smollm2_tokenizer())
    app = create_app(context)

    @app.get("/at-once")
    async def at_once() -> None:
        raise ZeroDivisionError("a secret")

    async def events():
        yield b"data: {}\n\n"
        raise ZeroDivisionError("a secret")

    @app.get("/later")
    async def later() -> EventStream:
        return EventStream(events())

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get(path, headers={"X-Request-Id": "mine"})

    return asyncio.run(ask())


def test_what_breaks_is_told_and_logged_but_not_what_it_was(caplog):
    response = broken("/at-once")
    assert (response.status_code, response.headers["x-request-id"]) == (500, "mine")
    error = response.json()["error"]
    assert (error["type"], error["message"]) == ("server_error", "the server failed; its log says more about mine")
    assert "a secret" in caplog.text


def test_a_stream_that_breaks_ends_with_an_error(caplog):
    response = broken("/later")
    assert response.status_code == 200
    first, last, rest = response.text.split("\n\n")
    assert (first, rest) == ("data: {}", "")
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
    assert "a secret" not in response.text
    assert "a secret" in caplog.text
