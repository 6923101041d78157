"""The engine's end of a grammar's process: what its answers may say next, and what is done when it does not tell.

Nothing here waits. Knows no scheduling.
"""

import contextlib
import itertools
import socket
import time
from collections import deque
from dataclasses import dataclass

import msgspec

from lmtool.engine.constraint import Constraint
from lmtool.engine.frames import Codec
from lmtool.engine.grammar_frames import Allowed, Close, Open, Refused, Reply, Source, Step
from lmtool.engine.grammar_source import GrammarSource
from lmtool.errors import EngineError, LmtoolError, RequestError

_PIECE = 1 << 20
_LOOK = "see what `python -c 'import xgrammar'` says"


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """What grammars may take.

    start_s        seconds, for the process that all others come from, which loads the library
    compile_s      for a grammar to be compiled
    step_s         to say what may follow a token
    memory_bytes   of a process, beyond what all of them share
    num_processes  that there may be, in use or not
    num_answers    of one grammar that a process follows before there is another: each takes 0.15 ms a token
    """

    start_s: float = 120.0
    compile_s: float = 10.0
    step_s: float = 2.0
    memory_bytes: int = 512 << 20
    num_processes: int = 32
    num_answers: int = 8


class GrammarProcess:
    def __init__(self, source: GrammarSource, connection: socket.socket, limits: GrammarLimits) -> None:
        self.source = source
        self.connection = connection
        self.answers: dict[int, Constraint] = {}
        self._limits = limits
        self._numbers = itertools.count()
        self._codec = Codec(Reply)
        self._awaited = deque(["start"])  # what the replies that are still to come tell
        self._since = time.monotonic()  # the first of them is the next
        self._order(Source(source.kind, source.text, source.closed, limits.memory_bytes), "compile")

    # ------------------------------------------------------------------ orders
    def open(self, constraint: Constraint) -> None:
        constraint.follower, constraint.number = self, next(self._numbers)
        self.answers[constraint.number] = constraint
        self._order(Open(constraint.number), "step")

    def step(self, constraint: Constraint, token_id: int) -> None:
        self._order(Step(constraint.number, token_id), "step")

    def close(self, constraint: Constraint) -> None:
        del self.answers[constraint.number]
        constraint.follower = None
        self._order(Close(constraint.number), None)

    def _order(self, message: msgspec.Struct, awaited: str | None) -> None:
        if awaited is not None:
            if not self._awaited:
                self._since = time.monotonic()
            self._awaited.append(awaited)
        with contextlib.suppress(OSError):  # it is gone, or takes nothing in: `receive` or `overdue` says so
            self.connection.sendall(self._codec.encode(message))

    # ------------------------------------------------------------------ replies
    @property
    def is_awaited(self) -> bool:
        return bool(self._awaited)

    def tells_soon(self, within_s: float) -> bool:
        """What may follow a token is asked, and has not been for longer than this."""
        return bool(self._awaited) and self._awaited[0] == "step" and time.monotonic() - self._since < within_s

    def receive(self) -> list[Constraint]:
        """Take in what has come: whose state it changed. Raises LmtoolError where that is the end of them all."""
        try:
            data = self.connection.recv(_PIECE)
        except (BlockingIOError, TimeoutError):
            return []
        except OSError:
            data = b""
        if not data:
            raise self._gone()
        # all are taken before the first is acted on: one that ends them all leaves nothing half read
        replies = list(self._codec.feed(data))
        return [constraint for constraint in map(self._take, replies) if constraint is not None]

    def _take(self, reply: Reply) -> Constraint | None:
        self._awaited.popleft()
        self._since = time.monotonic()
        if isinstance(reply, Refused) and reply.number is None:
            raise RequestError(reply.cause, reply.fix)
        if not isinstance(reply, Allowed | Refused):
            return None
        constraint = self.answers.get(reply.number) if reply.number is not None else None
        if constraint is None:  # it has ended meanwhile
            return None
        if isinstance(reply, Allowed):
            constraint.allowed, constraint.only_ends = reply.words, reply.only_ends
        else:
            constraint.error = RequestError(reply.cause, reply.fix)
        return constraint

    def overdue(self) -> LmtoolError | None:
        """Why it is to be given up; None: it is in time."""
        if not self._awaited:
            return None
        limits, late = self._limits, self._awaited[0]
        limit_s = {"start": limits.start_s, "compile": limits.compile_s, "step": limits.step_s}[late]
        if time.monotonic() - self._since < limit_s:
            return None
        if late == "start":
            return EngineError("the process that follows grammars does not start", _LOOK)
        if late == "compile":
            return RequestError(
                f"response_format: its grammar was not compiled within {limit_s:g} s", "make it simpler"
            )
        return RequestError(
            f"response_format: its grammar did not say within {limit_s:g} s what may come next",
            "make it less ambiguous",
        )

    def _gone(self) -> LmtoolError:
        if self._awaited and self._awaited[0] == "start":
            return EngineError("the process that follows grammars ended", _LOOK)
        return RequestError("response_format: its grammar needs too much memory, or broke xgrammar", "make it smaller")

    def end(self, error: LmtoolError) -> list[Constraint]:
        """Nobody hears of it again; the process ends by itself when its connection does."""
        self.connection.close()
        ended, self.answers = list(self.answers.values()), {}
        for constraint in ended:
            constraint.error, constraint.follower = type(error)(error.cause, error.fix), None
        return ended
