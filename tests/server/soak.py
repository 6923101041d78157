"""A server under all kinds of clients at once: some wait, some leave at any moment, some send rubbish."""

import asyncio
import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.server.process import Process, until

TIMEOUT_S = 300.0
NUM_TOKENS = (1, 3, 8, 16)  # that an answer may have
NUM_PROMPTS = 12
VOCABULARY = 8192  # of which their tokens are
_AT_ONCE = 12
_JSON = {"Content-Type": "application/json"}


@dataclass(slots=True)
class Soak:
    """url: of the server, whose ``max_body_bytes`` is below 200,000. seen: how often what happened. wrong: uncut
    answers that were not those of the same request alone. resident: the memory that is to stay flat, bytes.
    """

    url: str
    num_requests: int
    seed: int = 0
    resident: Callable[[], int] = field(default_factory=lambda: resident_bytes)
    seen: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    rss_bytes: list[int] = field(default_factory=list)
    _alone: dict[tuple[int, int], str] = field(default_factory=dict)

    def run(self) -> None:
        asyncio.run(self._run())

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=_AT_ONCE)
        async with httpx.AsyncClient(base_url=self.url, timeout=TIMEOUT_S, limits=limits) as client:
            for prompt in range(NUM_PROMPTS):
                for num_tokens in NUM_TOKENS:
                    self._alone[prompt, num_tokens] = await self._whole(client, prompt, num_tokens)
            numbers = iter(range(self.num_requests))

            async def worker() -> None:
                for number in numbers:
                    await self._one(client, random.Random(f"{self.seed} {number}"))
                    if number % (self.num_requests // 20) == 0:
                        self.rss_bytes.append(self.resident())

            await asyncio.gather(*(worker() for _ in range(_AT_ONCE)))

    async def _one(self, client: httpx.AsyncClient, draw: random.Random) -> None:
        kind = draw.choices(["waits", "leaves", "rubbish"], [5, 4, 2])[0]
        await {"waits": self._waits, "leaves": self._leaves, "rubbish": self._rubbish}[kind](client, draw)
        self.seen[kind] += 1

    # ------------------------------------------------------------------ kinds of clients
    async def _waits(self, client: httpx.AsyncClient, draw: random.Random) -> None:
        prompt, num_tokens = draw.randrange(NUM_PROMPTS), draw.choice(NUM_TOKENS)
        expected = self._alone[prompt, num_tokens]
        text = await (self._streamed if draw.random() < 0.5 else self._whole)(client, prompt, num_tokens)
        if text != expected:
            self.wrong.append(f"{prompt}: {text!r} instead of {expected!r}")

    async def _leaves(self, client: httpx.AsyncClient, draw: random.Random) -> None:
        body = body_of(draw.randrange(NUM_PROMPTS), draw.choice([16, 300]), n=draw.randint(1, 3))
        if draw.random() < 0.5:
            num_lines = draw.randint(0, 20)
            async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
                lines = response.aiter_lines()
                for _ in range(num_lines):
                    await anext(lines, None)
            return
        asking = asyncio.create_task(client.post("/v1/completions", json=body))
        await asyncio.wait({asking}, timeout=draw.random() * 0.1)
        self.seen["left before an answer"] += asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    async def _rubbish(self, client: httpx.AsyncClient, draw: random.Random) -> None:
        content, status = draw.choice(
            [
                (b"{", 400),
                (draw.randbytes(200), 400),
                (b"[" * 5000, 400),
                (b'{"prompt": "' + b"a" * 200_000 + b'"}', 413),
                (json.dumps({"prompt": [5] * 5000}).encode(), 400),
                (json.dumps({"prompt": "a", "temperature": "hot"}).encode(), 400),
                (json.dumps({"prompt": "a", "unknown": 1}).encode(), 400),
                (json.dumps({"prompt": "a", "model": "another"}).encode(), 404),
            ]
        )
        response = await client.post("/v1/completions", content=content, headers=_JSON)
        assert response.status_code == status, response.text
        assert response.json()["error"]["message"]

    async def _whole(self, client: httpx.AsyncClient, prompt: int, num_tokens: int) -> str:
        response = await client.post("/v1/completions", json=body_of(prompt, num_tokens))
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["text"])

    async def _streamed(self, client: httpx.AsyncClient, prompt: int, num_tokens: int) -> str:
        async with client.stream("POST", "/v1/completions", json={**body_of(prompt, num_tokens), "stream": True}) as r:
            lines = [line.removeprefix("data: ") async for line in r.aiter_lines() if line]
        assert lines[-1] == "[DONE]", lines[-1]
        choices = [json.loads(line)["choices"][0] for line in lines[:-1]]
        assert choices[-1]["finish_reason"] == "length"
        return "".join(choice["text"] for choice in choices)


def body_of(prompt: int, num_tokens: int, **settings: Any) -> dict[str, Any]:
    """Prompts of 10 to some 150 tokens, the longer ones beginning alike."""
    draw = random.Random(prompt)
    ids = [*range(200, 200 + 10 * prompt), *(draw.randrange(1000, VOCABULARY) for _ in range(10 + prompt))]
    return {"prompt": ids, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, **settings}


def resident_bytes(*pids: int) -> int:
    """Of these processes, or of this one."""
    sizes = (Path(f"/proc/{pid}/statm").read_text().split()[1] for pid in pids or ("self",))
    return 4096 * sum(map(int, sizes))


def main(num_requests: int) -> list[str]:
    """`make soak`: SmolLM2 behind the command itself. What is wrong in the end, in words."""
    # float32: 4-bit weights are multiplied in another way where a batch is large
    with Process("--max-body-mb", "0.1", "--dtype", "float32", "--session-len", "512") as server:
        pids = [server.process.pid, *server.children()]
        soak = Soak(server.url, num_requests, resident=lambda: resident_bytes(*pids))
        soak.run()
        with server.client() as client:
            idle = 'lmtool:num_requests_running{model_name="smollm2-135m"} 0.0'
            until(lambda: idle in client.get("/metrics").text)
            text = client.get("/metrics").text
    print(dict(soak.seen), f"resident {[size >> 20 for size in soak.rss_bytes]} MB")
    half = soak.rss_bytes[len(soak.rss_bytes) // 2]
    wrong = list(soak.wrong)
    if 'lmtool:kv_cache_usage_perc{model_name="smollm2-135m"} 0.0\n' not in text:
        wrong.append("blocks are still in use")
    if soak.rss_bytes[-1] > 1.05 * half:
        wrong.append(f"memory grew from {half >> 20} to {soak.rss_bytes[-1] >> 20} MB")
    return wrong


if __name__ == "__main__":
    found = main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
    print(*found or ["nothing is lost, nothing is left"], sep="\n")
    sys.exit(bool(found))
