"""Listens to the other ranks, and ends them all when one is lost. Knows neither how they are started nor what they do.

Whoever waits for one of them gets the reason, and nobody waits for ever: a rank says that it is there before it joins
the group, so that its end is noticed when torch would wait for minutes; one that breaks in a step alone is taken for
lost, and so is one that stands still; and on a CPU whoever waits in a sum hears from the ends of the killed.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from lmtool.engine.rank_group import leave_group
from lmtool.engine.rank_start import RankHandle
from lmtool.engine.rank_wire import Arrived, Failed, Present, Refused
from lmtool.engine.silence import SILENT_S, START_S, STILL_S, expect_within
from lmtool.errors import BY_NAME, EngineError, LmtoolError, RanksLost
from lmtool.layers.group import TorchGroup

_log = logging.getLogger(__name__)
_END_S = 5.0
_TOGETHER_S = 5.0  # a step that breaks on all ranks does so within it: they wait for each other in every layer


class RankWatch:
    def __init__(self, size: int) -> None:
        """size: of the group, with the first rank."""
        self.handles: list[RankHandle] = []
        self._num_others = size - 1
        self._changed = threading.Condition()
        self._arrived: set[int] = set()
        self._ready: set[int] = set()
        self._steps: dict[int, tuple[int, float]] = {}  # rank -> the last step it has launched, and since when no other
        self._failed: dict[int, dict[str, str]] = {}  # step -> rank's name -> why
        self._done = 0  # the last step that was launched here
        self._broken = -1  # the last one that broke here
        self._lost: LmtoolError | None = None
        self._closing = False
        self._listening: list[threading.Thread] = []
        self._leaving: threading.Thread | None = None
        self._group: TorchGroup | None = None

    def hold(self, rank: int, handle: RankHandle) -> None:
        self.handles.append(handle)
        expect_within(handle.frames.connection, START_S)
        listening = threading.Thread(target=self._listen, args=(rank, handle), name=f"lmtool-rank-{rank}", daemon=True)
        self._listening.append(listening)
        listening.start()

    # ------------------------------------------------------------------ what they say
    def _listen(self, rank: int, handle: RankHandle) -> None:
        try:
            while True:
                self._hear(rank, handle, handle.frames.receive())
        except (EOFError, ConnectionError):
            self.lose(handle.ended())
        except BlockingIOError:
            self.lose(_stands_still(handle.name, "said nothing"))
        except TimeoutError:
            fix = "is its machine there, and the network?"
            self.lose(RanksLost(f"{handle.name} was silent for {SILENT_S} s", fix))
        except OSError as error:
            self.lose(RanksLost(f"{handle.name} cannot be reached: {error.strerror or error}"))

    def _hear(self, rank: int, handle: RankHandle, message: Any) -> None:
        if isinstance(message, Refused):
            cause = message.cause if handle.pid is not None else f"{handle.name} cannot start: {message.cause}"
            self.lose(BY_NAME.get(message.kind, EngineError)(cause, message.fix))
        elif isinstance(message, Failed):
            self._judge(handle, message)
        elif isinstance(message, Present):
            self._follow(rank, handle, message.number)
        else:
            with self._changed:
                (self._arrived if isinstance(message, Arrived) else self._ready).add(rank)
                self._changed.notify_all()

    def _follow(self, rank: int, handle: RankHandle, number: int) -> None:
        """A rank may be alive and yet not go on: in a call of the system, or of a driver, that does not come back."""
        now = time.monotonic()
        if rank not in self._steps:
            expect_within(handle.frames.connection, STILL_S)
        last, since = self._steps.get(rank, (-1, now))
        if number > last or number >= self._done:
            self._steps[rank] = (number, now)
        elif now - since > STILL_S:
            self.lose(_stands_still(handle.name, f"launched nothing after step {number}"))

    def _judge(self, handle: RankHandle, failed: Failed) -> None:
        """A step may have broken here as well, or be about to; else this rank waits for one that has left the step."""
        number = failed.number
        with self._changed:
            self._failed.setdefault(number, {})[handle.name] = failed.cause
            _log.debug("%s: step %d: %s", handle.name, number, failed.cause)
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._lost is not None or self._done >= number or self._broken == number, _TOGETHER_S
            )
            alone = self._broken != number
        if alone:
            self.lose(_broke(handle.name, failed.cause))

    # ------------------------------------------------------------------ what is waited for
    def wait_until_arrived(self) -> None:
        """All are there, and join the group next. Raises as `check` does."""
        self._wait_for(lambda: len(self._arrived) == self._num_others)

    def wait_until_ready(self) -> None:
        """All wait for steps. Raises as `check` does."""
        self._wait_for(lambda: len(self._ready) == self._num_others)

    def join(self, join_group: Callable[[], TorchGroup]) -> TorchGroup:
        """On a thread of its own: torch would wait for minutes for a rank that is gone. Raises as `check` does, and
        EngineError."""
        joined: list[TorchGroup | Exception] = []

        def join() -> None:
            try:
                joined.append(join_group())
            except Exception as error:
                joined.append(error)
            with self._changed:
                self._changed.notify_all()
                late = self._lost is not None or self._closing
            if late and not isinstance(joined[0], Exception):  # else the group is another engine's, if there is one
                leave_group()

        threading.Thread(target=join, name="lmtool-join", daemon=True).start()
        self._wait_for(lambda: bool(joined))
        if isinstance(joined[0], Exception):
            self.explain()
            raise EngineError(f"the ranks do not find each other: {_first_line(joined[0])}") from joined[0]
        self._group = joined[0]
        return joined[0]

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._lost is not None or condition())
        self.check()

    def explain(self, within_s: float = 2.0) -> None:
        """For who has waited for the others and got an error: the reason may be on its way. Raises as `check` does."""
        with self._changed:
            self._changed.wait_for(lambda: self._lost is not None, within_s)
        self.check()

    # ------------------------------------------------------------------ steps
    def launched(self, number: int) -> None:
        """The step is under way here: a rank where it is not would be waited for in vain. Raises as `check` does."""
        with self._changed:
            self._done = number
            late = [one for told in self._failed.values() for one in told.items()]
            self._changed.notify_all()
        if late:
            self.lose(_broke(*late[0]))
            self.check()

    def failed_together(self, number: int) -> bool:
        """A step that broke here broke on every rank: they are still of one mind."""
        with self._changed:
            self._broken = number
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._lost is not None or len(self._failed.get(number, ())) == self._num_others, _TOGETHER_S
            )
            told = self._failed.pop(number, {})
            return self._lost is None and len(told) == self._num_others

    # ------------------------------------------------------------------ the end
    def check(self) -> None:
        """Raises what ended a rank: RanksLost, or what it refused to start for."""
        if self._lost is not None:
            raise type(self._lost)(self._lost.cause, self._lost.fix)

    def lose(self, reason: LmtoolError) -> None:
        """Only the first reason counts; behind `close` none does."""
        with self._changed:
            if self._lost is not None or self._closing:
                return
            self._lost = reason
            self._changed.notify_all()
            self._leave()
        for handle in self.handles:  # who waits for one of them on a CPU hears of it when its connections end
            handle.kill()

    def _leave(self) -> threading.Thread:
        """A kernel that waits for a rank would wait for ever. It is told at once; this may end only when nothing holds
        the group any more."""
        if self._leaving is None:
            self._leaving = threading.Thread(target=self._leave_group, name="lmtool-leave", daemon=True)
            self._leaving.start()
        return self._leaving

    def _leave_group(self) -> None:
        if self._group is not None:
            self._group.let_go()
        leave_group()

    def close(self) -> None:
        """May be called twice."""
        with self._changed:
            self._closing = True
        for handle in self.handles:
            handle.hang_up()
        until = time.monotonic() + _END_S
        for listening in self._listening:  # a connection ends when the rank at its other end has
            listening.join(max(0.0, until - time.monotonic()))
        for handle in self.handles:
            handle.close(max(0.0, until - time.monotonic()))
        with self._changed:
            leaving = self._leave()
        leaving.join(_END_S)
        if self._group is not None and not leaving.is_alive():
            self._group.close()


def _stands_still(name: str, how: str) -> RanksLost:
    fix = "its process was stopped, or waits for its GPU or a disk: see dmesg there"
    return RanksLost(f"{name} stands still: it {how} for {STILL_S:g} s", fix)


def _broke(name: str, cause: str) -> RanksLost:
    return RanksLost(f"{name} broke in a step: {cause}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
