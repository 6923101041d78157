"""Requests of one HTTP request on their way: admitted, sent to the engine, read as pieces of text, ended when nobody
reads on. The one way from a route to the engine.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Self

from lmtool.engine.core import TokenOutput
from lmtool.engine.response import Answer, Response
from lmtool.engine.sequence import Request
from lmtool.server.context import ServerContext
from lmtool.server.errors import Refusal


class Answers:
    """``async with Answers(context, requests) as answers: async for piece in answers``: `Response` pieces, whose
    ``index`` says which request they belong to. Leaving the block ends what is still running.
    continues: the answers go on with the text of their prompts.

    Raises Refusal (429, 503) when it is made, and while reading LmtoolError: what ended a request ends them all.
    """

    def __init__(self, context: ServerContext, requests: Sequence[Request], *, continues: bool = False) -> None:
        context.admit(len(requests))
        self._context = context
        started = time.perf_counter()
        self._answers = {
            request.request_id: Answer(
                index, request, context.maker.detokenizer(request.params, continues=continues), started
            )
            for index, request in enumerate(requests)
        }
        self._deadline: asyncio.TimerHandle | None = None
        if timeout_s := context.config.request_timeout_s:  # one timer for all reads, not one for each
            self._deadline = asyncio.get_running_loop().call_later(timeout_s, self._expire)
        self._last: dict[int, Response] = {}  # piece of each request
        self._stream = context.engine.submit(requests)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.abort()
        if self._deadline is not None:
            self._deadline.cancel()

    async def __aiter__(self) -> AsyncIterator[Response]:
        while self._answers:
            for piece in self._pieces(await self._stream.read()):
                yield piece

    async def whole(self) -> list[Response]:
        """Every answer to its end, by index."""
        found = [Response(index=i) for i in range(len(self._answers))]
        async for piece in self:
            found[piece.index].extend(piece)
        return found

    def cancel(self) -> None:
        """End every answer from outside: whoever reads gets a last piece of each, which was aborted."""
        for request_id in self._answers:
            self._context.engine.abort(request_id)
            self._stream.push(TokenOutput(request_id, None, "abort"))

    def _expire(self) -> None:
        seconds = self._context.config.request_timeout_s
        for request_id in self._answers:
            self._context.engine.abort(request_id)
            error = Refusal(504, f"the answer took longer than {seconds:g} s", "ask for less", code="timeout")
            self._stream.push(TokenOutput(request_id, None, "error", error=error))

    def _pieces(self, outputs: list[TokenOutput]) -> list[Response]:
        """One piece for each request that got something: tokens that came together are one piece."""
        if len(outputs) == 1:  # nearly always
            sorted_out = {outputs[0].request_id: outputs}
        else:
            sorted_out = {}
            for output in outputs:
                sorted_out.setdefault(output.request_id, []).append(output)
        pieces = []
        for request_id, own in sorted_out.items():
            answer = self._answers.get(request_id)
            if answer is None:  # tokens that were on their way when a stop text ended it
                continue
            piece = answer.take(own)
            if piece.finish_reason is not None:
                del self._answers[request_id]
                self._stream.abort(request_id)
            self._context.metrics.take(piece, self._last.get(request_id))
            self._last[request_id] = piece
            pieces.append(piece)
        return pieces
