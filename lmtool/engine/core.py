"""`EngineCore.step()` = schedule → run → finish. Ids only: knows neither text nor threads nor HTTP."""

import logging
from dataclasses import dataclass

from lmtool.engine.executor import Executor
from lmtool.engine.scheduler import Scheduler
from lmtool.engine.sequence import Request, Sequence, TokenLogprob
from lmtool.errors import EngineError, LmtoolError

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class TokenOutput:
    """What one step gave one request. ``token_id`` is None where the request ends without a token."""

    request_id: int
    token_id: int | None
    finish_reason: str | None = None
    logprob: TokenLogprob | None = None
    num_cached_tokens: int = 0
    error: LmtoolError | None = None


class EngineCore:
    def __init__(self, scheduler: Scheduler, executor: Executor, *, session_len: int) -> None:
        self.scheduler = scheduler
        self.session_len = session_len
        self._executor = executor
        self._sequences: dict[int, Sequence] = {}

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, request: Request) -> None:
        sequence = Sequence(request, max_tokens=self.session_len)
        self._sequences[request.request_id] = sequence
        self.scheduler.add(sequence)

    def abort(self, request_id: int) -> TokenOutput | None:
        """End a request at once; None where it is unknown or already over."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return None
        self.scheduler.abort(sequence)
        return TokenOutput(request_id, None, "abort", num_cached_tokens=sequence.num_cached_tokens)

    def step(self) -> list[TokenOutput]:
        """One step. What breaks in it ends the requests that were in it, with the error; the engine lives on."""
        batch = self.scheduler.schedule()
        try:
            output = self._executor.run(batch)
        except Exception as error:  # whatever a step raises must not end the others' requests
            _log.debug("a step failed", exc_info=True)
            failed = self.scheduler.fail(batch)
            reported = error if isinstance(error, LmtoolError) else EngineError(f"a step failed: {_one_line(error)}")
            return [self._end(sequence, reported) for sequence in failed]
        slots = batch.sampled_slots
        touched = self.scheduler.finish(batch, output)
        return [
            self._report(sequence, output.logprobs.get(slot)) for slot, sequence in zip(slots, touched, strict=True)
        ]

    def _report(self, sequence: Sequence, logprob: TokenLogprob | None) -> TokenOutput:
        if sequence.finish_reason is not None:
            del self._sequences[sequence.request.request_id]
        return TokenOutput(
            sequence.request.request_id,
            sequence.token_ids[-1],
            sequence.finish_reason,
            logprob,
            sequence.num_cached_tokens,
        )

    def _end(self, sequence: Sequence, error: LmtoolError) -> TokenOutput:
        del self._sequences[sequence.request.request_id]
        return TokenOutput(sequence.request.request_id, None, "error", error=error)

    def close(self) -> None:
        self._executor.close()


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
