"""`lmtool serve api_server` as users start it: a process of its own, SmolLM2 on the CPU."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from tests.processes import children

LMTOOL = str(Path(sys.executable).with_name("lmtool"))  # as users call it
TIMEOUT_S = 180.0  # generous: the machine is shared


class Process:
    """``with Process("--http-processes", "2") as server``. folder: that it is started in; said: its stderr so far."""

    def __init__(
        self, *flags: str, model: str = "smollm2-135m", folder: Path | None = None, **environment: str
    ) -> None:
        self._words = [LMTOOL, "serve", "api_server", model, "--port", "0", *flags]
        self._folder = folder
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        self.said: list[str] = []
        self.url = ""

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            self._words,
            stderr=subprocess.PIPE,
            text=True,
            env=self._environment,
            start_new_session=True,
            cwd=self._folder,
        )
        ready = threading.Event()
        self._listening = threading.Thread(target=self._listen, args=(ready,), daemon=True)
        self._listening.start()
        try:
            assert ready.wait(TIMEOUT_S), self.said
            assert self.url, self.said
        except BaseException:  # nobody will leave what was not entered: its processes would stay
            self._end()
            raise
        return self

    def _listen(self, ready: threading.Event) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line.rstrip())
            if found := re.search(r"serving on (\S+)", line):
                self.url = found[1]
                ready.set()
        ready.set()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        code = self.process.wait(TIMEOUT_S)
        self._listening.join(TIMEOUT_S)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code

    def client(self, **settings: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=TIMEOUT_S, **settings)  # type: ignore[arg-type]

    def engine_pid(self) -> int:
        return next(pid for pid, words in self.children().items() if "lmtool.server.engine_process" in words)

    def children(self) -> dict[int, str]:
        """Command lines of the processes that it started."""
        found = children(self.process.pid)
        return {pid: Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode() for pid in found}

    def wait_until_listening(self, num_processes: int) -> None:
        """Each of its HTTP processes has a socket of its own at its port."""
        here = f"0100007F:{int(self.url.rpartition(':')[2]):04X} 00000000:0000 0A"  # 127.0.0.1, nobody, LISTEN
        until(lambda: Path("/proc/net/tcp").read_text().count(here) == num_processes)

    def wait_until_ready(self) -> None:
        with self.client() as client:
            until(lambda: client.get("/ready").status_code == 200)


def until(condition, every_s: float = 0.05) -> None:
    """Poll: what is waited for happens in another process."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(every_s)


def run_to_its_end(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """For a server that is not to start."""
    return subprocess.run(
        [LMTOOL, "serve", "api_server", *flags],
        capture_output=True, text=True, timeout=TIMEOUT_S, env={**os.environ, **environment},
    )  # fmt: skip
