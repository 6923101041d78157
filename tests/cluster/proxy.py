"""`lmtool serve proxy` as users start it, and clients that keep asking it."""

import contextlib
import json
import os
import re
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx

from tests.processes import children
from tests.server import process
from tests.server.process import LMTOOL, TIMEOUT_S, Process

SMALL = "cpus=0.1,device=cpu,dtype=float32,cache-gb=0.05"
PROMPT = {"prompt": "The lighthouse", "temperature": 0, "max_tokens": 16, "ignore_eos": True}
KEY = {"Authorization": "Bearer secret"}
until = partial(process.until, every_s=0.8)  # what it looks at costs what is waited for


class Proxy(Process):
    """Its key is `KEY`'s. before: words of the command that starts it elsewhere; env: instead of this process's."""

    config: Path

    def __init__(self, *flags: str, before: Sequence[str] = (), env: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self._words = [*before, LMTOOL, "serve", "proxy", "--port", "0", "--api-keys", "secret", *flags]
        self._environment = {**self._environment, **(env or {})}
        self._asking = httpx.Client(headers=KEY, timeout=TIMEOUT_S)  # to make one costs more than to ask

    def wait(self) -> int:
        self._asking.close()
        return super().wait()

    def metrics(self) -> dict[tuple[str, str], int]:
        """The front's own, by name and model."""
        text = self._asking.get(f"{self.url}/metrics").text
        found = re.findall(r'^lmtool:proxy_(\w+){model_name="(\w)"} (\S+)$', text, flags=re.MULTILINE)
        return {(name, model): int(float(value)) for name, model, value in found}

    def has_replicas(self, **models: int) -> bool:
        """So many of each, all of them ready."""
        found = self.metrics()
        names = ("replicas", "replicas_ready")
        return all(found.get((name, model)) == number for name in names for model, number in models.items())

    def answered(self, model: str) -> dict[str, int]:
        """Requests that each replica has answered, as it says itself; who cannot be reached is missing."""
        text = self._asking.get(f"{self.url}/metrics").text
        row = rf'^lmtool:request_success_total{{.*model_name="{model}".*replica="(\w+)"}} (\S+)$'
        found = re.findall(row, text, flags=re.MULTILINE)
        return {name: sum(int(float(value)) for one, value in found if one == name) for name, _ in found}

    def answered_by(self, number: int, model: str) -> dict[str, int]:
        """As `answered`, once so many say it: who has much to do may be too slow. One that is new says 0."""
        found: dict[str, int] = {}

        def all_say() -> bool:
            nonlocal found
            found = self.answered(model)
            return len(found) == number

        until(all_say)
        return found


class Load:
    """``with Load(proxy, "ab") as load``: four clients that ask the models in turn, most of them for streams.

    With a little rest between two requests: on two cores whatever they take is missing where replicas start.
    """

    NUM, REST_S = 4, 0.6

    def __init__(self, proxy: Proxy, models: str = "ab") -> None:
        self._proxy, self._models = proxy, models
        self._over = threading.Event()
        self.ends: Counter[tuple[str, str]] = Counter()
        self.longest_s = 0.0

    def __enter__(self) -> "Load":
        self._pool = ThreadPoolExecutor(self.NUM)
        self._waiting = [self._pool.submit(self._ask_on, number) for number in range(self.NUM)]
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for waiting in self._waiting:
            waiting.result(TIMEOUT_S)
        self._pool.shutdown()

    def _ask_on(self, number: int) -> None:
        with httpx.Client(base_url=self._proxy.url, timeout=TIMEOUT_S, headers=KEY) as client:
            while not self._over.wait(self.REST_S):
                number += 1
                model = self._models[number % len(self._models)]
                body = {**PROMPT, "stream": number % 3 != 0, "model": model}
                began_s = time.monotonic()
                self.ends[model, end_of(client.post("/v1/completions", json=body))] += 1
                self.longest_s = max(self.longest_s, time.monotonic() - began_s)

    def num(self, model: str, end: str = "whole") -> int:
        return self.ends[model, end]

    def check(self) -> None:
        """Whole, or an error of ours at the end of a stream that had begun: at most as many as ran at once."""
        print(
            dict(self.ends), {key: value for key, value in self._proxy.metrics().items() if key[0] == "retries_total"}
        )
        broken = {key: number for key, number in self.ends.items() if key[1] != "whole"}
        assert {end for _, end in broken} <= {"broken: service_unavailable_error"}
        assert sum(broken.values()) <= self.NUM


def end_of(answer: httpx.Response) -> str:
    """'whole', or what kind of error it is; fails for an answer that is neither."""
    if answer.status_code == 200 and not answer.headers["content-type"].startswith("text/event-stream"):
        assert answer.json()["usage"]["completion_tokens"] == PROMPT["max_tokens"]
        return "whole"
    if answer.status_code != 200:
        return f"{answer.status_code} {answer.json()['error']['type']}"
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    if events[-1] != "[DONE]":
        kind: str = json.loads(events[-1])["error"]["type"]
        return f"broken: {kind}"
    assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
    return "whole"


def refusal(*flags: str) -> str:
    """The last line of a proxy that is not to start."""
    done = subprocess.run(
        [LMTOOL, "serve", "proxy", *flags],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    return done.stderr.splitlines()[-1]


def processes(root: int) -> dict[int, str]:
    """Command lines of all that a process and its children have started."""
    found, todo = {}, [root]
    while todo:
        with contextlib.suppress(OSError):  # it has ended meanwhile
            started = children(todo.pop())
            found |= {pid: command_line(Path(f"/proc/{pid}")) for pid in started}
            todo += started
    return found


def command_line(folder: Path) -> str:
    """Of a process's folder in /proc; '' where there is none any more."""
    with contextlib.suppress(OSError):
        return (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    return ""
