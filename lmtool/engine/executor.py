"""Where a batch is run. Today: in this process. Knows no scheduling."""

from typing import Protocol

from lmtool.engine.batch import Batch, StepOutput
from lmtool.engine.model_runner import ModelRunner


class Executor(Protocol):
    def run(self, batch: Batch) -> StepOutput: ...
    def close(self) -> None: ...


class LocalExecutor:
    """One rank, in the calling thread."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner: ModelRunner | None = runner

    def run(self, batch: Batch) -> StepOutput:
        assert self._runner is not None, "closed"
        return self._runner.run(batch)

    def close(self) -> None:
        """Let go of weights and cache."""
        self._runner = None
