"""Pictures from the network: one request to an address that was checked, against servers that do as they like."""

import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from lmtool.errors import ConfigError, RequestError
from lmtool.images.addresses import is_named, is_public, resolve
from lmtool.images.fetch import fetch_image
from lmtool.images.load import load_image

BODY = b"bytes of a picture"
GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)


class Server:
    """Answers each connection with the same bytes, then goes on as ``after`` does; keeps what it was sent."""

    def __init__(
        self, answer: bytes, after: Callable[[socket.socket], None] | None, tls: ssl.SSLContext | None
    ) -> None:
        self.requests: list[bytes] = []
        self._answer, self._after, self._tls = answer, after, tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                try:
                    self._talk(connection if self._tls is None else self._tls.wrap_socket(connection, server_side=True))
                except OSError:
                    continue  # the client went away

    def _talk(self, connection: socket.socket) -> None:
        with connection:
            request = b""
            while not request.endswith(b"\r\n\r\n") and (more := connection.recv(65_536)):
                request += more
            self.requests.append(request)
            connection.sendall(self._answer)
            if self._after is not None:
                self._after(connection)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(
        answer: bytes, after: Callable[[socket.socket], None] | None = None, tls: ssl.SSLContext | None = None
    ) -> Server:
        servers.append(Server(answer, after, tls))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


class Resolver:
    """Names as a test has them. asked: of what."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = list(addresses)
        self.asked: list[str] = []

    def __call__(self, host: str, port: int, timeout_s: float) -> list[str]:
        self.asked.append(host)
        return self.addresses


LOCAL = Resolver("127.0.0.1")


def fetched(server: Server, path: str = "/a.png", *, timeout_s: float = 20) -> bytes:
    hosts = [f"pictures.test:{server.port}"]
    url = f"http://pictures.test:{server.port}{path}"
    return fetch_image(url, allowed_hosts=hosts, timeout_s=timeout_s, resolver=LOCAL)


def refusal(fetch: Callable[[], object]) -> str:
    with pytest.raises(RequestError) as caught:
        fetch()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------ what it asks


def test_one_request_to_what_was_looked_up_once(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # nobody's business
    server = serve(GOOD)
    resolver = Resolver("127.0.0.1")
    url = f"HTTP://Pictures.Test:{server.port}/ä b/%41.png?q=ü&r=%20#part".replace(" ", "%20")
    assert fetch_image(url, allowed_hosts=[f"pictures.test:{server.port}"], resolver=resolver) == BODY
    assert resolver.asked == ["pictures.test"]
    request, *headers = server.requests[0].decode().split("\r\n")
    assert request == "GET /%C3%A4%20b/%41.png?q=%C3%BC&r=%20 HTTP/1.1"
    assert f"Host: pictures.test:{server.port}" in headers
    assert len(server.requests) == 1


def test_the_next_address_where_one_does_not_answer(serve: Callable[..., Server]) -> None:
    server = serve(GOOD)
    hosts = [f"pictures.test:{server.port}"]
    url = f"http://pictures.test:{server.port}/"
    assert fetch_image(url, allowed_hosts=hosts, resolver=Resolver("127.0.0.2", "127.0.0.1")) == BODY
    said = refusal(lambda: fetch_image(url, allowed_hosts=hosts, resolver=Resolver("127.0.0.2")))
    assert "cannot be reached: Connection refused" in said
    assert "it has no address" in refusal(lambda: fetch_image(url, allowed_hosts=hosts, resolver=Resolver()))


def test_an_address_that_swallows_everything_leaves_time(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(GOOD)
    connect, given_s = socket.create_connection, []

    def swallow(address: tuple[str, int], timeout: float) -> socket.socket:
        given_s.append(timeout)
        if address[0] == "127.0.0.2":
            raise TimeoutError
        return connect(address, timeout=timeout)

    monkeypatch.setattr(socket, "create_connection", swallow)
    hosts = [f"pictures.test:{server.port}"]
    url = f"http://pictures.test:{server.port}/"
    resolver = Resolver("127.0.0.2", "127.0.0.1")
    assert fetch_image(url, allowed_hosts=hosts, timeout_s=20, resolver=resolver) == BODY
    assert given_s[0] <= 10 < given_s[1]
    said = refusal(lambda: fetch_image(url, allowed_hosts=hosts, resolver=Resolver("127.0.0.2")))
    assert "took longer than 10 s" in said


def test_every_form_of_a_body(serve: Callable[..., Server]) -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n%s\r\n0\r\n\r\n" % BODY[:5]
    assert fetched(serve(chunked)) == BODY[:5]
    assert fetched(serve(b"HTTP/1.1 200 OK\r\n\r\n" + BODY)) == BODY
    assert fetched(serve(b"HTTP/1.1 100 Continue\r\n\r\n" + GOOD)) == BODY


# ------------------------------------------------------------------ whom it asks


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "1.1.1.1", "2001:4860:4860::8888", "::ffff:8.8.8.8", "64:ff9b::808:808"],
)
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",  # where clouds tell a machine its secrets
        "100.64.0.1",
        "0.0.0.0",
        "192.0.0.1",
        "198.18.0.1",
        "224.0.0.1",
        "239.255.255.250",
        "240.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "fd12::1",
        "fec0::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::127.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b::a00:1",
        "64:ff9b:1::808:808",
        "2002:7f00:1::",
        "2002:a00:1::1",
        "2001:0:53aa:64c:0:fffe:80ff:fffe",
        "2001:db8::1",
        "100::1",
        "not an address",
        "",
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)
    said = refusal(lambda: fetch_image("http://example.org/a.png", resolver=Resolver("8.8.8.8", address)))
    assert said.startswith("example.org is not at a public address")


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "127.1", "0x7f.0.0.1", "2130706433", "[::1]", "[::ffff:127.0.0.1]", "0"]
)
def test_every_spelling_of_this_machine(host: str) -> None:
    """As the system itself reads them."""
    said = refusal(lambda: fetch_image(f"http://{host}:9/a.png"))
    assert "is not at a public address" in said or "cannot be reached" in said
    assert "refused" not in said


def test_load_image_asks_nobody_here(serve: Callable[..., Server]) -> None:
    server = serve(GOOD)
    said = refusal(lambda: load_image(f"http://127.0.0.1:{server.port}/a.png"))
    assert "is not at a public address; give the picture itself" in said
    assert server.requests == []


@pytest.mark.parametrize(
    ("host", "port", "names", "expected"),
    [
        ("example.org", 443, ["example.org"], True),
        ("EXAMPLE.org.", 443, ["Example.ORG"], True),
        ("example.org", 8000, ["example.org"], False),
        ("example.org", 8000, ["example.org:8000"], True),
        ("example.org", 443, ["example.org:8000"], False),
        ("a.example.org", 443, ["example.org"], False),
        ("a.example.org", 443, ["*.example.org"], True),
        ("a.b.example.org", 8000, ["*.example.org:8000"], True),
        ("example.org", 443, ["*.example.org"], False),
        ("notexample.org", 443, ["*.example.org", "*example.org", "*"], False),
        ("example.org", 443, [], False),
        ("::1", 80, ["[::1]:80"], True),
    ],
)
def test_hosts_that_were_named(host: str, port: int, names: list[str], expected: bool) -> None:
    assert is_named(host, port, port == 443, names) == expected


@pytest.mark.parametrize("name", ["example.org:99999", "example.org:http", "[::1"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ConfigError, match="is no host; give example.org, "):
        is_named("example.org", 80, True, [name])


def test_a_host_that_was_not_named(serve: Callable[..., Server]) -> None:
    resolver = Resolver("127.0.0.1")
    for url in ("http://other.test/a.png", "http://pictures.test.other.test/", "http://pictures.test:81/"):
        said = refusal(lambda url=url: fetch_image(url, allowed_hosts=["pictures.test"], resolver=resolver))
        assert said.startswith("pictures are not fetched from ")
    assert resolver.asked == []


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://example.org/a", "no http(s) URL"),
        ("file:///etc/passwd", "no http(s) URL"),
        ("http:///a.png", "no http(s) URL"),
        ("http://exa mple.org/", "no http(s) URL"),
        ("http://example.org/a\r\nX: y", "no http(s) URL"),
        ("http://example.org\\@other.test/", "no http(s) URL"),
        ("http://user@example.org/", "holds a user's name"),
        ("http://:secret@example.org/", "holds a user's name"),
        ("http://example.org:99999/", "is broken"),
        ("http://example.org:x/", "is broken"),
        ("http://[::1/", "is broken"),
        ("http://.example.org/", "is broken"),
        ("http://" + "a" * 70 + ".org/", "is broken"),
    ],
)
def test_urls_that_are_none(url: str, said: str) -> None:
    resolver = Resolver("8.8.8.8")
    assert said in refusal(lambda: fetch_image(url, resolver=resolver))
    assert "secret" not in refusal(lambda: fetch_image(url, resolver=resolver))
    assert resolver.asked == []


def test_names_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(resolve("localhost", 80, 20)) <= {"127.0.0.1", "::1"}
    ask = socket.getaddrinfo  # of the system, but not of a network that says what it likes, when it likes
    monkeypatch.setattr(socket, "getaddrinfo", lambda *it, **more: ask(*it, flags=socket.AI_NUMERICHOST, **more))
    with pytest.raises(OSError, match=r"."):
        resolve("nobody.invalid", 80, 20)
    said = refusal(lambda: fetch_image("http://nobody.invalid/a.png", timeout_s=20))
    assert "nobody.invalid cannot be reached" in said


def test_nobody_waits_for_a_name_longer_than_for_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answered.wait(30) and [])
    assert "slow.test took longer than 0.1 s" in refusal(lambda: fetch_image("http://slow.test/", timeout_s=0.1))
    answered.set()


# ------------------------------------------------------------------ what they answer


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/\r\n\r\n", "leads elsewhere (302); give the URL of"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "answers 404"),
        (b"HTTP/1.1 206 Partial Content\r\nContent-Length: 0\r\n\r\n", "answers 206"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc", "packed as 'gzip'"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 20000001\r\n\r\n", "has more than 20 MB"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nabc", "broke off in the middle"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n50\r\nabc", "gives no sound HTTP answer"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc", "gives no sound HTTP answer"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n", "gives no sound HTTP answer"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000, "gives no sound HTTP answer"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "gives no sound HTTP answer"),
        (b"", "gives no sound HTTP answer"),
    ],
)
def test_answers_that_are_no_picture(serve: Callable[..., Server], answer: bytes, said: str) -> None:
    server = serve(answer)
    assert said in refusal(lambda: fetched(server))
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "head", [b"", b"Transfer-Encoding: chunked\r\n\r\n-1", b"Transfer-Encoding: chunked\r\n\r\n7fffffff"]
)
def test_what_has_no_end_is_left_off(serve: Callable[..., Server], head: bytes) -> None:
    def go_on(connection: socket.socket) -> None:
        while True:
            connection.sendall(bytes(65_536))

    server = serve(b"HTTP/1.1 200 OK\r\n%s\r\n" % head, go_on)
    assert f"the picture at pictures.test:{server.port} has more than 20 MB" in refusal(lambda: fetched(server))


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\n\r\n"])
def test_a_byte_now_and_then_does_not_keep_it_waiting(serve: Callable[..., Server], answer: bytes) -> None:
    gone = threading.Event()

    def drip(connection: socket.socket) -> None:
        while not gone.wait(0.02):
            connection.sendall(b"x")

    server = serve(answer, drip)
    assert "took longer than 0.5 s" in refusal(lambda: fetched(server, timeout_s=0.5))
    gone.set()


def test_silence_does_not_keep_it_waiting(serve: Callable[..., Server]) -> None:
    gone = threading.Event()
    server = serve(b"", lambda connection: None if gone.wait(30) else None)
    assert "took longer than 0.3 s" in refusal(lambda: fetched(server, timeout_s=0.3))
    gone.set()


# ------------------------------------------------------------------ TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder: Path = tmp_path_factory.mktemp("tls")
    key, file = folder / "key.pem", folder / "cert.pem"
    if shutil.which("openssl") is None:
        pytest.skip("needs the command openssl to make a certificate")
    names = ["-subj", "/CN=pictures.test", "-addext", "subjectAltName=DNS:pictures.test", "-days", "2"]
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(file), *names]
    subprocess.run(made, check=True, capture_output=True)
    return file, key


def test_a_certificate_is_checked(
    serve: Callable[..., Server], certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    server = serve(GOOD, tls=context)

    def fetch(name: str) -> bytes:
        url = f"https://{name}:{server.port}/a.png"
        return fetch_image(url, allowed_hosts=[f"{name}:{server.port}"], timeout_s=20, resolver=LOCAL)

    assert "cannot be trusted: self-signed certificate" in refusal(lambda: fetch("pictures.test"))
    assert server.requests == []
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    assert fetch("pictures.test") == BODY
    assert "cannot be trusted: Hostname mismatch" in refusal(lambda: fetch("other.test"))
    assert len(server.requests) == 1


def test_https_from_a_server_without(serve: Callable[..., Server]) -> None:
    server = serve(b"HTTP/1.1 200 OK\r\n\r\n")
    with closing(socket.create_connection(("127.0.0.1", server.port))) as other:
        other.sendall(b"\r\n\r\n")  # it takes one after the other
    url = f"https://pictures.test:{server.port}/"
    hosts = [f"pictures.test:{server.port}"]
    said = refusal(lambda: fetch_image(url, allowed_hosts=hosts, timeout_s=0.5, resolver=LOCAL))
    assert "cannot be trusted" in said or "took longer than 0.5 s" in said
