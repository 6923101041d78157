"""A real HTTP server in a thread that speaks as much of OpenAI's API as a benchmark needs, from a script."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answer:
    """texts, one event each, ``delay_s`` before each; then usage and [DONE] unless they are left out.

    broken: 'status' a 500 with ``message``, 'cut' the connection ends in the middle of the stream, 'early' the stream
    ends without [DONE], 'error' an error event, 'garbage' what is no JSON, 'hang' nothing comes until it closes.
    """

    texts: Sequence[str] = ("a", " b", " c")
    delay_s: float = 0.0
    usage: bool = True
    broken: str | None = None
    message: str = "out of  memory"


@dataclass
class FakeServer:
    """answers in turn, the last one for all the rest; requests: the bodies that came; most_at_once: of requests, each
    of which counts until the last of its answer is sent: behind that the client may send its next one."""

    answers: Sequence[Answer]
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    most_at_once: int = 0
    hanging: threading.Event = field(default_factory=threading.Event)
    closing: threading.Event = field(default_factory=threading.Event)
    _at_once: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> Answer:
        with self._lock:
            answer = self.answers[min(len(self.requests), len(self.answers) - 1)]
            self.requests.append(body)
            self.headers.append(dict(handler.headers))
            self.paths.append(handler.path)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        return answer

    def end(self) -> None:
        with self._lock:
            self._at_once -= 1


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._whole(200, {"data": [{"id": "fake-model"}]} if self.path == "/v1/models" else {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fake: FakeServer = self.server.fake
        answer = fake.begin(self, body)
        with contextlib.suppress(ConnectionError):  # the client has gone
            if answer.broken != "status":
                self._stream(answer, body, fake)
        fake.end()
        with contextlib.suppress(ConnectionError):
            if answer.broken == "status":
                self._whole(500, {"error": {"message": answer.message, "code": 500}})
            elif answer.broken != "cut":
                self.wfile.write(b"0\r\n\r\n")

    def _whole(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _stream(self, answer: Answer, body: dict[str, Any], fake: FakeServer) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        chat = "messages" in body
        if answer.broken == "hang":
            self._event({"choices": []})
            fake.hanging.set()
            fake.closing.wait()
        if chat:
            self._event({"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        for text in answer.texts:
            time.sleep(answer.delay_s)  # a server that computes
            part = {"delta": {"content": text}} if chat else {"text": text}
            self._event({"choices": [{**part, "finish_reason": None}], "usage": None})
        if answer.broken == "cut":
            self.close_connection = True
            return  # in the middle of a chunked body
        if answer.broken == "error":
            self._event({"error": {"message": "the engine failed"}})
        elif answer.broken == "garbage":
            self._raw(b"data: {no json\n\n")
        elif answer.broken != "early":
            self._event({"choices": [{"delta": {}, "text": "", "finish_reason": "length"}]})
            if answer.usage:
                usage = {"prompt_tokens": 7, "completion_tokens": body["max_tokens"]}
                self._event({"choices": [], "usage": usage})
            self._raw(b"data: [DONE]\r\n\r\n")

    def _event(self, event: dict[str, Any]) -> None:
        self._raw(b"data: " + json.dumps(event).encode() + b"\n\n")

    def _raw(self, data: bytes) -> None:
        half = len(data) // 2  # an event may come in two pieces
        for part in (data[:half], data[half:]):
            self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            self.wfile.flush()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # as many as a test sends at once: of 5 the others would try again a second later


@contextmanager
def serving(*answers: Answer) -> Iterator[FakeServer]:
    """On a free port of this machine, until the block ends."""
    server: Any = _Server(("127.0.0.1", 0), _Handler)
    server.fake = FakeServer(answers or (Answer(),), url=f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server.fake
    finally:
        server.fake.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()
