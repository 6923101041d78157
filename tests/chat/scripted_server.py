"""A server that answers what it is told to, byte for byte: for what real servers do only when they are ill."""

import socketserver
import threading
from types import TracebackType
from typing import Any, Self

MODELS = b'{"object": "list", "data": [{"id": "ill"}]}'


class ScriptedServer:
    """answers: path → (status, body). A body is sent as it stands, with no length: its end is the connection's."""

    def __init__(self, **answers: tuple[int, bytes]) -> None:
        self.answers = {"/v1/models": (200, MODELS)} | {path.replace("_", "/"): one for path, one in answers.items()}
        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _handler(self) -> Any:
        answers = self.answers

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                path = self.rfile.readline().split()[1].decode()
                length = 0
                while line := self.rfile.readline().strip():
                    name, _, value = line.partition(b":")
                    length = int(value) if name.lower() == b"content-length" else length
                self.rfile.read(length)
                status, body = answers.get(path, (404, b"not here"))
                self.wfile.write(b"HTTP/1.1 %d -\r\nconnection: close\r\n\r\n" % status + body)

        return Handler
