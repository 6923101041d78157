"""What the HTTP processes and the engine's process say to each other, in frames over a Unix socket.

Nearly all that comes back are single tokens of many requests, so these are columns of numbers (`Tokens`); whatever says
more than a token is an `Output`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec

from lmtool.engine.core import TokenOutput
from lmtool.engine.sequence import Request, TokenLogprob
from lmtool.errors import BY_NAME, EngineError, LmtoolError


# ------------------------------------------------------------------ to the engine
class Submit(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """The choices of one prompt; ids of requests are those of this connection. The pictures of the first one are those
    of all: they are megabytes."""

    choices: list[Request]

    @classmethod
    def of(cls, choices: Sequence[Request]) -> "Submit":
        images = choices[0].images
        return cls([choices[0], *(replace(other, images=()) if images else other for other in choices[1:])])

    def requests(self) -> list[Request]:
        images = self.choices[0].images
        return [replace(one, images=images) for one in self.choices] if images else self.choices


class Abort(msgspec.Struct, tag=True, frozen=True, array_like=True):
    request_id: int


# ------------------------------------------------------------------ from the engine
class EngineInfo(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """The engine is ready. generation_defaults: as in generation_config.json; description: one line for people."""

    description: str
    session_len: int
    vocab_size: int
    max_batch_size: int
    num_blocks: int
    block_size: int
    load_s: float
    generation_defaults: dict[str, Any]


class Loading(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """What is being done before the engine is ready; total 0: not known."""

    what: str
    done: int = 0
    total: int = 0


class Failure(msgspec.Struct, frozen=True):
    """An `LmtoolError` on its way; kind: the name of its class."""

    kind: str
    cause: str
    fix: str | None = None

    @classmethod
    def of(cls, error: LmtoolError) -> "Failure":
        return cls(type(error).__name__, error.cause, error.fix)

    def error(self) -> LmtoolError:
        """An exception of its own for whoever asks."""
        return BY_NAME.get(self.kind, EngineError)(self.cause, self.fix)


class Refused(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """The engine cannot be: its process ends after this."""

    failure: Failure


class Stats(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """The engine's own heartbeat, said by its thread between two steps. Counters are totals since it started."""

    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_host_blocks_used: int
    counters: dict[str, float]


class Tokens(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """One more token for each of these requests."""

    request_ids: list[int]
    token_ids: list[int]


class Output(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """A `TokenOutput` with all it has."""

    request_id: int
    token_id: int | None
    finish_reason: str | None = None
    num_cached_tokens: int = 0
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    failure: Failure | None = None

    @classmethod
    def of(cls, output: TokenOutput) -> "Output":
        failure = Failure.of(output.error) if output.error is not None else None
        return cls(
            output.request_id,
            output.token_id,
            output.finish_reason,
            output.num_cached_tokens,
            output.logprob,
            output.prompt_logprobs,
            failure,
        )

    def output(self) -> TokenOutput:
        return TokenOutput(
            self.request_id,
            self.token_id,
            self.finish_reason,
            self.logprob,
            self.num_cached_tokens,
            self.failure.error() if self.failure is not None else None,
            self.prompt_logprobs,
        )


ToEngine = Submit | Abort
FromEngine = EngineInfo | Loading | Refused | Stats | Tokens | Output
