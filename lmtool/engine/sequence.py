"""`Request`: what was asked for, frozen. `Sequence`: its living state in the engine. Knows neither torch nor text."""

from __future__ import annotations  # array[int] is only a type before Python 3.12

from array import array
from dataclasses import dataclass, field

from lmtool.config import GenerationConfig
from lmtool.engine.constraint import Constraint
from lmtool.errors import EngineError, LmtoolError, RequestError
from lmtool.images.prepared import PreparedImage


@dataclass(frozen=True, slots=True)
class PlacedImage:
    """A picture in a prompt: its rows are the tokens from ``start`` on."""

    start: int
    image: PreparedImage

    @property
    def end(self) -> int:
        return self.start + self.image.num_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """prompt_ids and every id below are token ids; those below 0 are rows of ``images``, in the prompt's order.

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
    images: tuple[PlacedImage, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The chosen token and the ``top`` most likely ones, after penalties and before temperature."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Scored:
    """Prompt tokens whose logprobs a chunk brings: the row at position ``first`` tells of the first, and so on."""

    first: int
    target_ids: list[int]
    num_top: int


@dataclass(slots=True)
class ImageRows:
    """Rows of a picture among a chunk's tokens: ``count`` from the picture's ``first`` on, the first of them the
    chunk's token ``at``."""

    image: PreparedImage
    first: int
    count: int
    at: int


@dataclass(slots=True, eq=False)
class Sequence:
    """Counters are of tokens.

    token_ids              what is known: the prompt and the answer as far as it was read
    num_inflight_tokens    sampled by steps that were launched and not yet read; they follow ``token_ids``
    num_computed_tokens    have K and V in ``block_table``'s blocks once every launched step has run
    num_finished_tokens    have it now: the steps that computed them were read
    error                  why it ended, where that is known and ``finish_reason`` is 'error'
    constraint             the grammar that its answer follows
    prompt_logprobs        of the prompt's second token and those after it, as far as they were read; None: not asked
    """

    request: Request
    token_ids: array[int] = field(init=False)
    num_prompt_tokens: int = field(init=False)
    most_tokens: int = field(init=False)  # prompt and answer
    needs_known_tokens: bool = field(init=False)
    prompt_logprobs: list[TokenLogprob] | None = field(init=False)
    max_tokens: int = 0
    num_inflight_tokens: int = 0
    num_computed_tokens: int = 0
    num_finished_tokens: int = 0
    num_cached_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    slot: int = -1
    finish_reason: str | None = None
    error: LmtoolError | None = None
    constraint: Constraint | None = None
    num_preemptions: int = 0

    def __post_init__(self) -> None:
        self.token_ids = array("q", self.request.prompt_ids)
        self.num_prompt_tokens = len(self.token_ids)
        max_new_tokens = self.request.params.max_new_tokens
        self.most_tokens = self.max_tokens
        if max_new_tokens is not None:
            self.most_tokens = min(self.max_tokens, self.num_prompt_tokens + max_new_tokens)
        self.prompt_logprobs = None if self.request.params.prompt_logprobs is None else []
        # a ban that depends on the token before it can be worked out only when that token is known
        self.needs_known_tokens = any(len(bad) > 1 for bad in self.request.bad_ids)

    @property
    def waits_for_its_grammar(self) -> bool:
        """What its next token may be is not known yet."""
        return self.constraint is not None and self.constraint.allowed is None

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

    @property
    def shareable_ids(self) -> array[int]:
        """K and V of all but the last of these may come from the cache. A position whose row is still to tell of the
        token after it must be computed."""
        known = self.num_prompt_tokens - 1 if self.prompt_logprobs is None else len(self.prompt_logprobs)
        return self.token_ids if known == self.num_prompt_tokens - 1 else self.token_ids[: known + 1]

    def scored(self, start: int, end: int) -> Scored | None:
        """What a chunk of these positions is to tell of the prompt, besides what is known."""
        num_top = self.request.params.prompt_logprobs
        if self.prompt_logprobs is None or num_top is None:
            return None
        first, last = max(start, len(self.prompt_logprobs)), min(end, self.num_prompt_tokens - 1)
        return Scored(first, self.token_ids[first + 1 : last + 1].tolist(), num_top) if first < last else None

    def image_rows(self, start: int, end: int) -> list[ImageRows]:
        """What stands for the pictures' tokens in a chunk of these positions."""
        found = []
        for placed in self.request.images:
            first, last = max(start, placed.start), min(end, placed.end)
            if first < last:
                found.append(ImageRows(placed.image, first - placed.start, last - first, first - start))
        return found

    def take_scores(self, first: int, scores: list[TokenLogprob]) -> None:
        """What came of `scored`. A sequence that was preempted meanwhile may get it twice."""
        assert self.prompt_logprobs is not None
        known = len(self.prompt_logprobs)
        assert first <= known, "chunks are read in their order"
        self.prompt_logprobs += scores[known - first :]

    @property
    def has_sound_scores(self) -> bool:
        return self.prompt_logprobs is None or all(one.logprob == one.logprob for one in self.prompt_logprobs)

    def banned_next(self) -> list[int]:
        """Ids that would complete one of the request's bad sequences."""
        answer = self.token_ids[self.num_prompt_tokens :]
        return [
            bad[-1]
            for bad in self.request.bad_ids
            if len(bad) == 1 or tuple(answer[len(answer) - len(bad) + 1 :]) == bad[:-1]
        ]

    def refuse(self, token_id: int) -> LmtoolError | None:
        """Why this, which a step gave, is no token of the answer."""
        if self.constraint is not None and not self.constraint.allows(token_id):
            fix = "leave out one of them (or the model's logits are not numbers)"
            return RequestError("response_format: --bad-words leave no token that it allows", fix)
        if token_id < 0 or not (self.num_generated_tokens or self.has_sound_scores):
            fix = "its weights are damaged, or try --dtype bfloat16 or float32"
            return EngineError("the model's logits are not numbers", fix)
        return None

    def append(self, token_id: int) -> None:
        """Take the next token; sets ``finish_reason`` when it is the last one."""
        self.token_ids.append(token_id)
        num_tokens = len(self.token_ids)
        if self.constraint is not None and token_id in self.constraint.stop_ids:
            self.finish_reason = "stop"  # the grammar lets it end here, or must: whatever else was asked
        elif token_id in self.request.stop_ids and self.num_generated_tokens > self.request.params.min_new_tokens:
            self.finish_reason = "stop"
        elif num_tokens >= self.most_tokens:
            full = num_tokens - self.num_prompt_tokens == self.request.params.max_new_tokens
            self.finish_reason = "length" if full else "context"
        elif self.constraint is not None:
            self.constraint.advance(token_id)
