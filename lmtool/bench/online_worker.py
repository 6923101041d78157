"""One of several client processes of `lmtool bench online --clients N`: reads its share of the requests as JSON from
stdin and writes each outcome as a line of JSON as soon as it is there.

Python reads some ten thousand events a second: one process would be what is measured. Clocks are the machine's own
(CLOCK_MONOTONIC), the same in all of them.
"""

import asyncio
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx

from lmtool.bench.online_client import Question, Server, ask, make_client
from lmtool.bench.online_figures import Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """starts_s: when each question is sent, seconds after started_s, by time.perf_counter."""

    server: Server
    questions: Sequence[Question]
    starts_s: Sequence[float]
    max_concurrency: int
    api_key: str | None
    started_s: float

    def as_json(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> "Share":
        found: dict[str, Any] = json.loads(data)
        questions = [
            Question(q["prompt"] if isinstance(q["prompt"], str) else tuple(q["prompt"]), q["num_new_tokens"])
            for q in found["questions"]
        ]
        return cls(**{**found, "server": Server(**found["server"]), "questions": questions})


async def send_all(client: httpx.AsyncClient, share: Share, take: Callable[[Outcome], None]) -> None:
    """take: called with each outcome as it comes."""

    def now() -> float:
        return time.perf_counter() - share.started_s

    turn = asyncio.Semaphore(share.max_concurrency)

    async def send(question: Question) -> None:
        async with turn:
            take(await ask(client, share.server, question, now))

    async with asyncio.TaskGroup() as tasks:
        for question, start_s in zip(share.questions, share.starts_s, strict=True):
            if (wait_s := start_s - now()) > 0:
                await asyncio.sleep(wait_s)
            tasks.create_task(send(question))


async def _main() -> None:
    share = Share.from_json(sys.stdin.buffer.readline())
    began_s = time.process_time()
    async with make_client(share.api_key) as client:
        await send_all(client, share, lambda outcome: _say(asdict(outcome)))
    _say({"cpu_s": time.process_time() - began_s})


def _say(what: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(_main())
