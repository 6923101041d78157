"""Pictures that cannot be, over HTTP: each ends its own request, by name. And those from elsewhere, where a server was
told of that place."""

import http.server
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from lmtool.errors import ConfigError
from lmtool.server.config import ServerConfig
from tests.server.pictures import BLUE, RED, ask, data_url, part, picture, same, says, text_of
from tests.server.serving import Serving, wait_until


# ---------------------------------------------------------------------- refusals
def refused(server: Serving, content, param: str | None = None, **settings) -> str:
    with pytest.raises(openai.APIStatusError) as error:
        ask(server, {"role": "user", "content": content}, **settings)
    assert "\n" not in error.value.body["message"]
    assert "0x" not in error.value.body["message"]
    assert "/" not in error.value.body["message"].replace("image/png", "").replace("http(s)", "")
    if param is not None:
        assert error.value.param == param
    return f"{error.value.status_code} {error.value.body['message']}"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("file:///etc/passwd", "of another kind"),
        ("/etc/passwd", "of another kind"),
        ("C:\\Windows\\win.ini", "of another kind"),
        ("", "of another kind"),
        ("ftp://example.org/a.png", "of another kind"),
        ("http://example.org/a.png", "--allowed-image-hosts"),
        ("HTTPS://example.org/a.png", "--allowed-image-hosts"),
        ("data:image/png;base64,", "is empty"),
        ("data:image/png;base64,!!!", "base64 is broken"),
        ("data:text/plain;base64,AAAA", "of another kind"),
        (data_url(b"no picture at all"), "is no picture"),
        (data_url(picture()[:100]), "damaged or cut off"),
        (data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"), "is no picture"),
        (data_url(b"\0" * 20_000_001), "at most 20 MB"),
    ],
)
def test_what_is_no_picture(seeing, url, said):
    content = [{"type": "text", "text": "x"}, part(RED), part(url)]
    found = refused(seeing, content, "messages[0].content[2].image_url")
    assert found.startswith("400 ")
    assert said in found


def test_a_picture_that_is_wrong_ends_its_own_request_only(seeing, pipe):
    asked = [says(f"Tell me about {i}", RED if i % 2 else data_url(b"broken")) for i in range(6)]

    def answer(message):
        try:
            return text_of(ask(seeing, message))
        except openai.BadRequestError:
            return None

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(answer, asked))
    assert found == [same(pipe, message) if i % 2 else None for i, message in enumerate(asked)]
    assert seeing.context.engine.num_open == 0


@pytest.mark.parametrize("role", ["system", "assistant", "tool"])
def test_pictures_are_the_users(seeing, role):
    message = {"role": role, "content": [part(RED)], **({"tool_call_id": "x"} if role == "tool" else {})}
    with pytest.raises(openai.BadRequestError, match=f"a message of the {role}") as error:
        ask(seeing, message, says("x"))
    assert error.value.param == "messages[0].content[0].image_url"


def test_bounds(seeing):
    assert "at most 16" in refused(seeing, [part(RED)] * 17, "messages[0].content[16].image_url")
    assert "'auto' or 'high'" in refused(seeing, [part(RED, detail="low")], "messages[0].content[0].image_url.detail")
    many = [part(data_url(picture(84, 28, seed=i))) for i in range(16)]
    long = refused(seeing, [*many, {"type": "text", "text": "word " * 400}], "messages")
    assert "of them of 16 pictures, the context holds 1024" in long


@pytest.mark.parametrize("host", ["http://example.org", "example.org/pictures", "*", "", "a b", "example.org:port"])
def test_what_is_no_host(host):
    with pytest.raises(ConfigError, match="--allowed-image-hosts is"):
        ServerConfig(allowed_image_hosts=("example.org:8000", host))


def test_a_server_that_takes_fewer(seeing):
    with Serving(seeing.engine, max_images=1, max_body_bytes=100_000) as server:
        assert text_of(ask(server, says("x", RED))) == text_of(ask(seeing, says("x", RED)))
        assert "at most 1" in refused(server, [part(RED), part(BLUE)])
        assert refused(server, [part(data_url(b"0" * 100_000))]).startswith("413 ")


def test_large_bodies_are_held_up_to_a_bound(seeing):
    bodies = seeing.context.bodies
    assert bodies.max_bytes == 64 << 20
    large = data_url(picture(20, 20) + b"\0" * 3_000_000)
    bodies.most_bytes, before = 3_000_000, bodies.most_bytes
    try:
        assert refused(seeing, [part(large)]).startswith("429 large requests are being read already")
        assert text_of(ask(seeing, says("x", RED)))
    finally:
        bodies.most_bytes = before
    assert text_of(ask(seeing, says("x", large)))
    assert refused(seeing, [part(data_url(b"broken"))])
    wait_until(lambda: bodies.num_bytes == 0)


def test_a_model_that_sees_nothing_says_so(serving):
    assert "this model takes no pictures" in refused(serving, [part(RED)], "messages[0].content[0].image_url")
    with serving.http() as http:
        assert http.get("/v1/models").json()["data"][0]["input_modalities"] == ["text"]
        answer = http.post("/v1/chat/interactive", json={"prompt": "x", "image_url": RED})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "image_url")
        answer = http.post("/tokenize", json={"messages": [says("x", RED)]})
        assert answer.json()["error"]["param"] == "messages[0].content[0].image_url"


# ---------------------------------------------------------------------- pictures from elsewhere
class Gallery(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        found = self.path == "/a.png"
        data = picture(seed=1) if found else b"nothing"
        self.send_response(200 if found else 302)
        self.send_header("Content-Length", str(len(data)))
        if not found:
            self.send_header("Location", "/a.png")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, form: str, *values: object) -> None:
        pass


@pytest.fixture
def gallery() -> Iterator[str]:
    """host:port of a server with one picture."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Gallery)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_pictures_of_hosts_that_were_named(seeing, gallery):
    with Serving(seeing.engine, allowed_image_hosts=(gallery, "pictures.example.org")) as server:
        assert text_of(ask(server, says("x", f"http://{gallery}/a.png"))) == text_of(ask(seeing, says("x", RED)))
        for url in (f"http://{gallery}/moved.png", f"http://localhost:{gallery.split(':')[1]}/a.png"):
            with pytest.raises(openai.BadRequestError) as error:
                ask(server, says("x", url))
            assert error.value.param == "messages[0].content[0].image_url"
