"""`EngineCore.step()` = schedule → copy → launch → read → finish. Ids only: knows neither text nor threads nor HTTP."""

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lmtool.engine.batch import Batch
from lmtool.engine.constraint import Constraint
from lmtool.engine.executor import Executor, Pending
from lmtool.engine.grammar_frames import GrammarVocabulary
from lmtool.engine.grammar_process import GrammarLimits
from lmtool.engine.grammar_source import grammar_source
from lmtool.engine.grammars import Grammars
from lmtool.engine.held import Held
from lmtool.engine.scheduler import Scheduler
from lmtool.engine.sequence import Request, Sequence, TokenLogprob
from lmtool.errors import EngineError, LmtoolError, RanksLost

_log = logging.getLogger(__name__)
_IDLE_S = 0.02  # how long a new request may wait where all others wait for their grammars


@dataclass(slots=True)
class TokenOutput:
    """What one step gave one request. ``token_id`` is None where the request ends without a token.

    prompt_logprobs   with the first token, where they were asked for: of the prompt's tokens from its second on
    """

    request_id: int
    token_id: int | None
    finish_reason: str | None = None
    logprob: TokenLogprob | None = None
    num_cached_tokens: int = 0
    error: LmtoolError | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, slots=True)
class _Launched:
    batch: Batch
    pending: Pending
    started: float


class EngineCore:
    def __init__(self, scheduler: Scheduler, executor: Executor, *, session_len: int) -> None:
        self.scheduler = scheduler
        self.session_len = session_len
        self._executor = executor
        self._sequences: dict[int, Sequence] = {}
        self._held = Held()
        self._grammars: Grammars | None = None
        self._constrained: dict[Constraint, Sequence] = {}
        self._launched: deque[_Launched] = deque()  # and not read yet, oldest first
        self._last_read = 0.0

    @property
    def has_work(self) -> bool:
        """A launched step that nobody waits for is no work."""
        return self.scheduler.has_work or bool(self._held)

    def give_vocabulary(self, vocabulary: Callable[[], GrammarVocabulary], limits: GrammarLimits | None = None) -> None:
        """What `response_format` needs: called on a thread of its own when a request first has one."""
        self._grammars = Grammars(vocabulary, limits)

    def add(self, request: Request) -> None:
        leader = self._sequences.get(request.after) if request.after is not None else None
        sequence = Sequence(request, max_tokens=self.session_len)
        self._sequences[request.request_id] = sequence
        if request.params.response_format is not None:
            self._constrain(sequence, request.params.response_format)
        if leader is not None and not leader.num_generated_tokens:
            self._held.add(sequence, leader.request.request_id)
        elif sequence.waits_for_its_grammar:
            self._held.add(sequence, None)
        else:
            self.scheduler.add(sequence)

    def _constrain(self, sequence: Sequence, response_format: Mapping[str, Any]) -> None:
        try:
            source = grammar_source(response_format)
            if source is None:
                return
            if self._grammars is None:
                raise EngineError("response_format: this engine knows no vocabulary", "call its give_vocabulary")
            sequence.constraint = self._grammars.follow(source)
        except LmtoolError as error:  # the next step tells
            sequence.constraint = Constraint(error=error)
        sequence.needs_known_tokens = True
        self._constrained[sequence.constraint] = sequence

    def abort(self, request_id: int) -> TokenOutput | None:
        """End a request at once; None where it is unknown or already over."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return None
        self._take_out(sequence)
        self._forget(sequence)
        self._release(request_id)
        return TokenOutput(request_id, None, "abort", num_cached_tokens=sequence.num_cached_tokens)

    def _take_out(self, sequence: Sequence) -> None:
        if sequence in self._held:
            self._held.remove(sequence)
        else:
            self.scheduler.abort(sequence)

    def _release(self, request_id: int) -> None:
        """Its first token is there, or it has ended: whoever comes after it may start."""
        self.scheduler.add_first(self._held.release(request_id))

    def step(self) -> list[TokenOutput]:
        """Launch one step, then read the oldest one if more than the executor's depth are launched.

        What breaks in a step ends the requests that were in it, with the error; the engine lives on. Raises RanksLost
        where it cannot.
        """
        outputs: list[TokenOutput] = []
        if self.scheduler.blocks.host.num_blocks:
            self.scheduler.landed(self._executor.copied(wait=False))
        outputs += self._hear_grammars()
        batch = self.scheduler.schedule()
        if batch.saves or batch.loads:
            self._copy(batch)
        if batch.num_tokens:
            started = time.perf_counter()
            try:
                self._launched.append(_Launched(batch, self._executor.launch(batch), started))
            except RanksLost:
                raise
            except Exception as error:  # whatever a step raises must not end the others' requests
                outputs += self._fail(batch, error)
        if self._launched and (len(self._launched) > self._executor.depth or not batch.num_tokens):
            outputs += self._read(self._launched.popleft())
        elif self.scheduler.loads and not batch.num_tokens:  # there is nothing else to do
            self.scheduler.landed(self._executor.copied(wait=True))
        elif self._constrained and not batch.num_tokens:
            outputs += self._hear_grammars(_IDLE_S)
        return outputs

    def _hear_grammars(self, wait_s: float = 0.0) -> list[TokenOutput]:
        """Who may start or go on now, and whose grammar came to nothing."""
        if not self._constrained:
            return []
        if self._grammars is not None:
            news = self._grammars.poll(wait_s) if wait_s else self._grammars.gather()
            heard = [self._constrained[one] for one in news if one in self._constrained]
            self.scheduler.add_first(self._held.let_go(heard))
        failed = [(one.error, sequence) for one, sequence in self._constrained.items() if one.error is not None]
        for _, sequence in failed:
            self._take_out(sequence)
        return [self._end(sequence, error) for error, sequence in failed]

    def _copy(self, batch: Batch) -> None:
        try:
            self._executor.copy(batch.saves, batch.loads)
        except RanksLost:
            raise
        except Exception as error:  # slower, but nobody's answer depends on it
            _log.warning("the host tier lost %d blocks: %s", len(batch.saves) + len(batch.loads), _one_line(error))
            self.scheduler.copies_failed(batch)

    def _read(self, launched: _Launched) -> list[TokenOutput]:
        batch = launched.batch
        try:
            output = launched.pending.read()
        except RanksLost:
            raise
        except Exception as error:
            return self._fail(batch, error)
        now = time.perf_counter()
        if batch.chunks:
            self.scheduler.swap_cost.step_took(batch.num_tokens, now - max(launched.started, self._last_read))
        self._last_read = now
        touched = self.scheduler.finish(batch, output)
        if not output.logprobs:
            return [self._report(sequence, None) for sequence in touched if sequence is not None]
        return [
            self._report(sequence, output.logprobs.get(slot))
            for slot, sequence in zip(batch.sampled_slots, touched, strict=True)
            if sequence is not None
        ]

    def _fail(self, batch: Batch, error: Exception) -> list[TokenOutput]:
        _log.debug("a step failed", exc_info=error)
        reported = error if isinstance(error, LmtoolError) else EngineError(f"a step failed: {_one_line(error)}")
        return [self._end(sequence, reported) for sequence in self.scheduler.fail(batch)]

    def _report(self, sequence: Sequence, logprob: TokenLogprob | None) -> TokenOutput:
        if sequence.error is not None:
            return self._end(sequence, sequence.error)
        if sequence.finish_reason is not None:
            self._forget(sequence)
        output = TokenOutput(
            sequence.request.request_id,
            sequence.token_ids[-1],
            sequence.finish_reason,
            logprob,
            sequence.num_cached_tokens,
        )
        if sequence.num_generated_tokens == 1:
            self._release(output.request_id)
            if sequence.prompt_logprobs is not None:
                output.prompt_logprobs = tuple(sequence.prompt_logprobs)
        return output

    def _end(self, sequence: Sequence, error: LmtoolError) -> TokenOutput:
        self._forget(sequence)
        self._release(sequence.request.request_id)
        return TokenOutput(sequence.request.request_id, None, "error", error=error)

    def _forget(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request.request_id]
        if sequence.constraint is not None:
            del self._constrained[sequence.constraint]
            if self._grammars is not None:
                self._grammars.leave(sequence.constraint)

    def check(self) -> None:
        """For an engine that has nothing to do. Raises RanksLost where it could do nothing."""
        self._executor.check()

    def close(self) -> None:
        self._launched.clear()
        if self._grammars is not None:
            self._grammars.close()
        self._executor.close()


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
