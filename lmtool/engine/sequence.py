"""`Request`: what was asked for, frozen. `Sequence`: its living state in the engine. Knows neither torch nor text."""

from __future__ import annotations  # array[int] is only a type before Python 3.12

from array import array
from dataclasses import dataclass, field

from lmtool.config import GenerationConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """prompt_ids and every id below are token ids.

    stop_ids   end the answer; they are part of ``token_ids`` but not of its text
    bad_ids    sequences that are never completed in the answer
    seed       always set: the front door draws one where the user gave none
    after      a request before whose first token this one does not start, or before it has ended: the choices of one
               prompt, all but the first after it, so share what it has computed
    """

    request_id: int
    prompt_ids: tuple[int, ...]
    params: GenerationConfig
    stop_ids: frozenset[int]
    seed: int
    bad_ids: tuple[tuple[int, ...], ...] = ()
    after: int | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The chosen token and the ``top`` most likely ones, after penalties and before temperature."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True, eq=False)
class Sequence:
    """Counters are of tokens.

    token_ids              what is known: the prompt and the answer as far as it was read
    num_inflight_tokens    sampled by steps that were launched and not yet read; they follow ``token_ids``
    num_computed_tokens    have K and V in ``block_table``'s blocks once every launched step has run
    num_finished_tokens    have it now: the steps that computed them were read
    """

    request: Request
    token_ids: array[int] = field(init=False)
    num_prompt_tokens: int = field(init=False)
    most_tokens: int = field(init=False)  # prompt and answer
    needs_known_tokens: bool = field(init=False)
    max_tokens: int = 0
    num_inflight_tokens: int = 0
    num_computed_tokens: int = 0
    num_finished_tokens: int = 0
    num_cached_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    slot: int = -1
    finish_reason: str | None = None
    num_preemptions: int = 0

    def __post_init__(self) -> None:
        self.token_ids = array("q", self.request.prompt_ids)
        self.num_prompt_tokens = len(self.token_ids)
        max_new_tokens = self.request.params.max_new_tokens
        self.most_tokens = self.max_tokens
        if max_new_tokens is not None:
            self.most_tokens = min(self.max_tokens, self.num_prompt_tokens + max_new_tokens)
        # a ban that depends on the token before it can be worked out only when that token is known
        self.needs_known_tokens = any(len(bad) > 1 for bad in self.request.bad_ids)

    @property
    def num_tokens(self) -> int:
        """Known and in flight."""
        return len(self.token_ids) + self.num_inflight_tokens

    @property
    def num_generated_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) + self.num_inflight_tokens - self.num_computed_tokens

    def banned_next(self) -> list[int]:
        """Ids that would complete one of the request's bad sequences."""
        answer = self.token_ids[self.num_prompt_tokens :]
        return [
            bad[-1]
            for bad in self.request.bad_ids
            if len(bad) == 1 or tuple(answer[len(answer) - len(bad) + 1 :]) == bad[:-1]
        ]

    def append(self, token_id: int) -> None:
        """Take the next token; sets ``finish_reason`` when it is the last one."""
        self.token_ids.append(token_id)
        num_tokens = len(self.token_ids)
        if token_id in self.request.stop_ids and self.num_generated_tokens > self.request.params.min_new_tokens:
            self.finish_reason = "stop"
        elif num_tokens >= self.most_tokens:
            full = num_tokens - self.num_prompt_tokens == self.request.params.max_new_tokens
            self.finish_reason = "length" if full else "context"
