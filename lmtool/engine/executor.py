"""Where a batch is run. Today: in this process. Knows no scheduling."""

from typing import Protocol

from lmtool.engine.batch import Batch, StepOutput


class Pending(Protocol):
    """A step that was launched. ``read`` waits for what comes out of it, and raises what broke in it."""

    def read(self) -> StepOutput: ...


class Executor(Protocol):
    """depth: how many steps may be launched and unread when the next one is scheduled."""

    @property
    def depth(self) -> int: ...
    def launch(self, batch: Batch) -> Pending: ...
    def close(self) -> None: ...


class Runner(Protocol):
    """One rank: `ModelRunner` or `DeviceRunner`."""

    @property
    def depth(self) -> int: ...
    def launch(self, batch: Batch) -> Pending: ...


class LocalExecutor:
    """One rank, in the calling thread."""

    def __init__(self, runner: Runner) -> None:
        self._runner: Runner | None = runner

    @property
    def depth(self) -> int:
        return self._runner.depth if self._runner is not None else 0

    def launch(self, batch: Batch) -> Pending:
        assert self._runner is not None, "closed"
        return self._runner.launch(batch)

    def close(self) -> None:
        """Let go of weights and cache."""
        self._runner = None
