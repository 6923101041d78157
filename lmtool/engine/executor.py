"""Where a batch is run: in this process, and in those of the other ranks. Knows no scheduling."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from lmtool.engine.batch import Batch, CopiesDone, Load, StepOutput
from lmtool.errors import RanksLost

if TYPE_CHECKING:  # it brings torch, which HTTP processes do without
    from lmtool.engine.ranks import Ranks


class Pending(Protocol):
    """A step that was launched. ``read`` waits for what comes out of it, and raises what broke in it."""

    def read(self) -> StepOutput: ...


class _Runs(Protocol):
    """
    depth   how many steps may be launched and unread when the next one is scheduled
    copy    begin what a batch has of saves and loads, before it is launched. When this raises, none of them goes on
    copied  what came to an end of all that; wait: until the oldest load has, where one is under way
    """

    @property
    def depth(self) -> int: ...
    def copy(self, saves: Sequence[tuple[int, int]], loads: Sequence[Load]) -> None: ...
    def copied(self, *, wait: bool) -> CopiesDone: ...
    def launch(self, batch: Batch) -> Pending: ...
    def close(self) -> None: ...


class Runner(_Runs, Protocol):
    """One rank: `ModelRunner` or `DeviceRunner`."""

    def await_loads(self, numbers: Sequence[int]) -> None:
        """These are over on the rank that decides: what is launched from now on waits for them."""
        ...


class Executor(_Runs, Protocol):
    """All ranks."""

    def check(self) -> None:
        """Raises RanksLost where one has ended, also while nothing is launched."""
        ...


class LocalExecutor:
    """One rank, in the calling thread."""

    def __init__(self, runner: Runner) -> None:
        self._runner: Runner | None = runner

    @property
    def depth(self) -> int:
        return self._runner.depth if self._runner is not None else 0

    def copy(self, saves: Sequence[tuple[int, int]], loads: Sequence[Load]) -> None:
        assert self._runner is not None, "closed"
        self._runner.copy(saves, loads)

    def copied(self, *, wait: bool) -> CopiesDone:
        assert self._runner is not None, "closed"
        return self._runner.copied(wait=wait)

    def launch(self, batch: Batch) -> Pending:
        assert self._runner is not None, "closed"
        return self._runner.launch(batch)

    def check(self) -> None:
        """There is no other rank."""

    def close(self) -> None:
        """Let go of weights and cache. May be called twice."""
        if self._runner is not None:
            self._runner.close()
        self._runner = None


class RankExecutor(LocalExecutor):
    """The first rank in the calling thread, the others told before it launches anything."""

    def __init__(self, runner: Runner, ranks: "Ranks") -> None:
        super().__init__(runner)
        self._ranks = ranks

    def copy(self, saves: Sequence[tuple[int, int]], loads: Sequence[Load]) -> None:
        """Raises RanksLost where a rank has ended, or this one cannot do what the others do."""
        self._ranks.copy(saves, loads)
        try:
            super().copy(saves, loads)
        except Exception as error:
            raise RanksLost(f"the host tier failed on one rank: {error}", "start the engine again") from error

    def copied(self, *, wait: bool) -> CopiesDone:
        done = super().copied(wait=wait)
        if done.loads:
            self._ranks.landed(done.loads)
        return done

    def launch(self, batch: Batch) -> Pending:
        """Raises RanksLost where a rank has ended, or did not do what the others did."""
        number = self._ranks.launch(batch)
        try:
            pending = super().launch(batch)
        except Exception:
            if self._ranks.watch.failed_together(number):
                raise
            self._ranks.watch.check()
            raise RanksLost("a step failed on some ranks and not on others", "start the engine again") from None
        self._ranks.watch.launched(number)
        return _OfAll(pending, self._ranks)

    def check(self) -> None:
        self._ranks.watch.check()

    def close(self) -> None:
        super().close()
        self._ranks.close()


class _OfAll:
    def __init__(self, pending: Pending, ranks: "Ranks") -> None:
        self._pending, self._ranks = pending, ranks

    def read(self) -> StepOutput:
        try:
            output = self._pending.read()
        except Exception:
            self._ranks.watch.check()
            raise
        self._ranks.watch.check()  # what came from a step that waited for a lost rank is nothing
        return output
