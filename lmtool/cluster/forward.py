"""A request's way to a replica and its answer's way back. Bytes go through unchanged; events only as whole ones.

As long as nothing of an answer went out, another replica is asked; after that, an answer that breaks off ends with an
error event. Answers that do not stream are passed on when they are whole, so they never break off.
"""

import contextlib
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

import aiohttp
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lmtool.cluster.directory import Record
from lmtool.cluster.figures import Figures
from lmtool.cluster.fleet import Fleet
from lmtool.cluster.routing import Prompt, Router, Ticket
from lmtool.cluster.sessions import Turn
from lmtool.engine.silence import watch
from lmtool.errors import EngineError
from lmtool.server.disconnect import ClientGone, until_gone
from lmtool.server.errors import Refusal, body_of
from lmtool.server.json_body import Bodies
from lmtool.server.sse import event

_CONNECT_S = 3.0  # to a machine of the same cluster
_IDLE_S = 30.0  # that a connection is kept: less than the 75 of a replica, who would close it under a request
_ELSEWHERE = (429, 503)  # another replica may have room, or an engine
_KEPT = ("content-type", "retry-after", "cache-control", "x-accel-buffering")


def replica_session() -> aiohttp.ClientSession:
    """For `Forward`. To be made on the event loop that uses it."""
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_S, socket_factory=_watched),
        auto_decompress=False,
    )


def _watched(address: aiohttp.AddrInfoType) -> socket.socket:
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    watch(made)
    return made


@dataclass(frozen=True, slots=True)
class Question:
    """What is sent: the body as it came. prompt and num_new_tokens: what it costs, as far as can be told. turn: of
    the conversation that it belongs to."""

    model: str
    method: str
    path: str
    data: bytes
    headers: Mapping[str, str]
    prompt: Prompt = Prompt((), (), 0)
    num_new_tokens: int = 0
    turn: Turn = field(default_factory=Turn)


@dataclass(frozen=True, slots=True)
class _Whole:
    """An answer as it came."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class _Elsewhere(Exception):
    """The replica refused for now."""

    def __init__(self, answer: _Whole) -> None:
        super().__init__(answer.status)
        self.answer = answer


class _Broken(Exception):
    """The replica's answer did not come, or not whole."""


@dataclass(slots=True)
class _Answer:
    """What has gone to the client."""

    send: Send
    has_begun: bool = False

    async def begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.has_begun = True
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    async def part(self, data: bytes, *, more: bool = True) -> None:
        await self.send({"type": "http.response.body", "body": data, "more_body": more})

    async def whole(self, answer: _Whole) -> None:
        await self.begin(answer.status, answer.headers)
        await self.part(answer.body, more=False)


class Forward(Response):
    """Raises Refusal 503 where no replica is ready; what they refuse themselves is passed on."""

    def __init__(
        self, fleet: Fleet, session: aiohttp.ClientSession, figures: Figures, bodies: Bodies, question: Question
    ) -> None:
        super().__init__()
        self._bodies = bodies
        self._fleet = fleet
        self._session = session
        self._figures = figures
        self._question = question

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(ClientGone):
            async with until_gone(receive):
                num_bytes = len(self._question.data)
                self._bodies.add(num_bytes)  # kept till the end: it may have to be sent again
                try:
                    await self._ask_in_turn(_Answer(send))
                finally:
                    self._bodies.num_bytes -= num_bytes

    async def _ask_in_turn(self, answer: _Answer) -> None:
        model, turn, tried = self._question.model, self._question.turn, set[str]()
        refused: _Whole | None = None
        while (ticket := self._take(tried)) is not None:
            tried.add(ticket.name)
            self._figures.asked(model, is_retry=len(tried) > 1)
            turn.go_to(ticket.name)
            try:
                turn.answered(await self._ask(ticket, answer))
                return
            except _Elsewhere as elsewhere:
                refused = elsewhere.answer
                if refused.status == 503:  # 429 says that it is well, and full
                    self._fleet.suspect(ticket.name)
            except _Broken:
                self._fleet.suspect(ticket.name)
                if answer.has_begun:
                    self._figures.broken(model)
                    error = EngineError("the replica that was answering is gone", "ask again: another one answers")
                    await answer.part(event(body_of(error)), more=False)
                    return
        turn.answered(503)
        if refused is None:
            raise Refusal(503, f"no replica of {model} is ready", "ask again in a moment", retry_after_s=2)
        await answer.whole(refused)

    def _take(self, tried: set[str]) -> Ticket | None:
        question = self._question
        return self._fleet.take(question.model, question.prompt, question.num_new_tokens, tried, question.turn.only)

    async def _ask(self, ticket: Ticket, answer: _Answer) -> int:
        """The answer's status."""
        try:
            async with self._fleet.at(ticket) as record, self._post(record) as response:
                if response.content_type == "text/event-stream":
                    await self._pass_events(ticket, response, answer)
                    return response.status
                whole = _Whole(response.status, _headers(response), await response.read())
        except (aiohttp.ClientError, OSError) as error:  # TimeoutError is an OSError: the replica is gone
            raise _Broken from error
        if whole.status in _ELSEWHERE:
            raise _Elsewhere(whole)
        await answer.whole(whole)
        return whole.status

    def _post(self, record: Record) -> "aiohttp.client._RequestContextManager":
        question = self._question
        headers = {**question.headers, "Authorization": f"Bearer {record.key}"}
        url = record.url + question.path
        return self._session.request(question.method, url, data=question.data, headers=headers)

    async def _pass_events(self, ticket: Ticket, response: aiohttp.ClientResponse, answer: _Answer) -> None:
        rest = b""
        async for data in response.content.iter_any():
            rest += data
            end = rest.rfind(b"\n\n") + 2
            if end < 2:
                continue
            if not answer.has_begun:
                await answer.begin(response.status, _headers(response))
                # the prompt has been computed: what waits there now is the answer
                Router.end(ticket, ticket.num_tokens - self._question.num_new_tokens)
            await answer.part(rest[:end])
            rest = rest[end:]
        if not answer.has_begun:
            raise _Broken
        await answer.part(rest, more=False)


def _headers(response: aiohttp.ClientResponse) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), response.headers[name].encode("latin-1")) for name in _KEPT if name in response.headers]
