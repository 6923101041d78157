"""One streamed request to an OpenAI-compatible server, from sending to its last text; whatever happens is an `Outcome`.

Knows no workload and no figures. Server-sent events are split here: a client that is slow would be what is measured.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import httpx

from lmtool.bench.online_figures import Outcome
from lmtool.errors import ConfigError, InputError

_MOST_WORDS = 120  # characters of a server's own message that are kept
_CONNECT_S = 10.0


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, as text or as token ids, and how many tokens to answer it with."""

    prompt: str | tuple[int, ...]
    num_new_tokens: int


@dataclass(frozen=True, slots=True)
class Server:
    """url: with or without ``/v1``. endpoint: 'completions' or 'chat'. timeout_s: for a whole answer."""

    url: str
    model: str
    endpoint: str = "completions"
    ignore_eos: bool = True
    timeout_s: float = 600.0

    @property
    def path(self) -> str:
        return api_url(self.url) + ("/chat/completions" if self.endpoint == "chat" else "/completions")

    def body(self, question: Question) -> dict[str, Any]:
        """Greedy, streamed, with the server's own count of tokens at the end."""
        prompt: dict[str, Any] = {"prompt": question.prompt}
        if self.endpoint == "chat":
            prompt = {"messages": [{"role": "user", "content": question.prompt}]}
        return {
            "model": self.model,
            **prompt,
            "max_tokens": question.num_new_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"ignore_eos": True} if self.ignore_eos else {}),
        }


def api_url(url: str) -> str:
    """Raises ConfigError for what is no address of a server."""
    if not url.startswith(("http://", "https://")) or not httpx.URL(url).host:
        raise ConfigError(f"URL is {url!r}", "give one as in http://localhost:8000")
    url = url.rstrip("/")
    return url if url.endswith("/v1") else f"{url}/v1"


def make_client(api_key: str | None) -> httpx.AsyncClient:
    """As many connections as there are requests at once; no proxy of the environment in between."""
    headers = {"Accept-Encoding": "identity"}  # what is packed comes in other pieces than it was sent
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    # a whole answer is timed by `ask`
    timeout = httpx.Timeout(None, connect=_CONNECT_S)
    return httpx.AsyncClient(headers=headers, limits=limits, timeout=timeout, trust_env=False)


async def first_model(client: httpx.AsyncClient, url: str) -> str:
    """The name of the server's model. Raises InputError where no server answers, or names none."""
    address = f"{api_url(url)}/models"
    fix = "start the server, give its address, or name the model with --model"
    try:
        response = await client.get(address, timeout=_CONNECT_S)
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])
    except httpx.HTTPStatusError as error:
        raise InputError(f"{address} answers {_status(error.response)}", "give --api-key or --model") from None
    except httpx.HTTPError as error:
        raise InputError(f"{address} does not answer: {_cause(error)}", fix) from None
    except (ValueError, LookupError, TypeError):
        raise InputError(f"{address} names no model", "give its name with --model") from None


async def ask(client: httpx.AsyncClient, server: Server, question: Question, now: Callable[[], float]) -> Outcome:
    """now(): seconds since the benchmark began. Never raises for what a server or a network does."""
    outcome = Outcome(sent_s=now())
    try:
        async with asyncio.timeout(server.timeout_s):
            outcome.failure = await _stream(client, server, question, now, outcome)
    except TimeoutError:
        outcome.failure = f"no whole answer within {server.timeout_s:g} s"
    except httpx.HTTPError as error:
        outcome.failure = f"the stream broke off: {_cause(error)}" if outcome.text_s else _cause(error)
    if not outcome.counted:
        outcome.num_output_tokens = len(outcome.text_s)
    return outcome


async def _stream(
    client: httpx.AsyncClient, server: Server, question: Question, now: Callable[[], float], outcome: Outcome
) -> str | None:
    """→ why the answer does not count; None: it is whole."""
    ended = False
    async with client.stream("POST", server.path, json=server.body(question)) as response:
        if response.status_code != 200:
            await response.aread()
            return _status(response)
        async for data in _events(response.aiter_raw()):
            came_s = now()
            if data == b"[DONE]":  # what is left is the end of the body: read, so that the connection serves others
                ended = True
                continue
            try:
                event = json.loads(data)
            except ValueError:
                return "the stream holds what is no JSON"
            if not isinstance(event, dict):
                return "the stream holds what is no object"
            if event.get("error") is not None:
                return f"error in the stream: {_message(event)}"
            ended |= _take(event, came_s, outcome)
    if not ended:
        return "the stream broke off: it ends without [DONE]"
    return None if outcome.text_s else "no text came"


def _take(event: dict[str, Any], came_s: float, outcome: Outcome) -> bool:
    """Note text and counts. → whether this was the last text."""
    usage = event.get("usage")
    if isinstance(usage, dict) and isinstance(usage.get("completion_tokens"), int):
        outcome.num_output_tokens, outcome.counted = usage["completion_tokens"], True
        outcome.num_prompt_tokens = usage.get("prompt_tokens")
    choices = event.get("choices")
    if not choices:
        return False
    choice = choices[0]
    text = choice["delta"].get("content") if isinstance(choice.get("delta"), dict) else choice.get("text")
    if text:
        outcome.text_s.append(came_s)
    return choice.get("finish_reason") is not None


async def _events(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of each server-sent event: one line each, as these servers write them."""
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


# ---------------------------------------------------------------------- causes in words
def _status(response: httpx.Response) -> str:
    try:
        message = _message(response.json())
    except ValueError:
        message = " ".join(response.text.split())[:_MOST_WORDS]
    return f"HTTP {response.status_code}" + (f": {message}" if message else "")


def _message(body: Any) -> str:
    """OpenAI's {"error": {"message": …}}, FastAPI's {"detail": …}, or whatever it is."""
    found = body
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and key in found:
            found = found[key]
    return " ".join(str(found).split())[:_MOST_WORDS]


def _cause(error: httpx.HTTPError) -> str:
    """By kind, not by number: every refused connection is the same cause."""
    causes: dict[type[httpx.HTTPError], str] = {
        httpx.ConnectTimeout: f"no connection within {_CONNECT_S:g} s",
        httpx.ConnectError: "the connection is refused or the host is not known",
        httpx.RemoteProtocolError: "the server closed the connection",
        httpx.ReadError: "the connection was lost",
    }
    return causes.get(type(error), type(error).__name__)
