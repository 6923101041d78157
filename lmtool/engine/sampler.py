"""Logits → token ids, with each sequence's own parameters. Knows no sequence's text and no scheduling.

Parameters live by slot. What few requests ask for (penalties, biases, bans) costs nothing to those that do not.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lmtool import kernels
from lmtool.engine.batch import Join, StepOutput
from lmtool.engine.sequence import TokenLogprob


@dataclass(slots=True)
class _Extras:
    """What a slot's logits need before sampling, for the slots that need anything."""

    bias_ids: Tensor | None = None
    bias: Tensor | None = None
    held_back: Tensor | None = None  # ids that may not come before min_new_tokens
    min_new_tokens: int = 0
    penalties: tuple[float, float, float] | None = None  # repetition, presence, frequency
    prompt_mask: Tensor | None = None
    output_counts: Tensor | None = None
    num_logprobs: int | None = None


@dataclass(slots=True)
class _Settings:
    """Sampling parameters of all slots."""

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    seeds: np.ndarray
    steps: np.ndarray
    extras: dict[int, _Extras] = field(default_factory=dict)


class Sampler:
    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._settings = _Settings(
            temperature=np.zeros(num_slots, dtype=np.float32),
            top_k=np.zeros(num_slots, dtype=np.int32),
            top_p=np.ones(num_slots, dtype=np.float32),
            min_p=np.zeros(num_slots, dtype=np.float32),
            seeds=np.zeros(num_slots, dtype=np.int64),
            steps=np.zeros(num_slots, dtype=np.int64),
        )

    # ------------------------------------------------------------------ slots
    def join(self, join: Join) -> None:
        settings, params, slot = self._settings, join.request.params, join.slot
        settings.temperature[slot] = params.temperature
        settings.top_k[slot] = min(params.top_k, self._vocab_size)
        settings.top_p[slot] = params.top_p
        settings.min_p[slot] = params.min_p
        settings.seeds[slot] = join.request.seed
        settings.steps[slot] = len(join.answer_ids)
        extras = self._extras(join)
        if extras is None:
            settings.extras.pop(slot, None)
        else:
            settings.extras[slot] = extras

    def leave(self, slot: int) -> None:
        self._settings.extras.pop(slot, None)

    def _extras(self, join: Join) -> _Extras | None:
        params = join.request.params
        extras = _Extras(num_logprobs=params.logprobs)
        if params.logit_bias:
            extras.bias_ids = self._ids(list(params.logit_bias))
            extras.bias = torch.tensor(list(params.logit_bias.values()), device=self._device)
        if params.min_new_tokens and join.request.stop_ids:
            extras.held_back = self._ids(sorted(join.request.stop_ids))
            extras.min_new_tokens = params.min_new_tokens
        penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        if penalties != (1.0, 0.0, 0.0):
            extras.penalties = penalties
            extras.prompt_mask = torch.zeros(self._vocab_size, dtype=torch.bool, device=self._device)
            extras.prompt_mask[self._ids(join.request.prompt_ids)] = True
            answer = self._ids(join.answer_ids)
            extras.output_counts = torch.bincount(answer, minlength=self._vocab_size).int()
        return extras if extras != _Extras() else None

    def _ids(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self._device)

    # ------------------------------------------------------------------ sampling
    def sample(self, logits: Tensor, slots: list[int], bans: list[tuple[int, int]]) -> StepOutput:
        """logits [n, V] float32, one row for each of ``slots``; they are changed in place."""
        settings = self._settings
        extras = [(row, settings.extras[slot]) for row, slot in enumerate(slots) if slot in settings.extras]
        for row, extra in extras:
            self._adjust(logits[row], extra, int(settings.steps[slots[row]]))
        for slot, token_id in bans:
            logits[slots.index(slot), token_id] = -torch.inf
        ids = self._choose(logits, np.asarray(slots))
        token_ids: list[int] = ids.tolist()
        settings.steps[slots] += 1
        output = StepOutput(token_ids)
        for row, extra in extras:
            if extra.output_counts is not None:
                extra.output_counts[token_ids[row]] += 1
            if extra.num_logprobs is not None:
                output.logprobs[slots[row]] = _logprob(logits[row], token_ids[row], extra.num_logprobs)
        return output

    @staticmethod
    def _adjust(row: Tensor, extra: _Extras, step: int) -> None:
        if extra.penalties is not None:
            assert extra.prompt_mask is not None
            assert extra.output_counts is not None
            factors = (torch.tensor([value], device=row.device) for value in extra.penalties)
            kernels.penalize_(row[None], extra.prompt_mask[None], extra.output_counts[None], *factors)
        if extra.bias is not None and extra.bias_ids is not None:
            row.index_add_(0, extra.bias_ids, extra.bias)
        if extra.held_back is not None and step < extra.min_new_tokens:
            row[extra.held_back] = -torch.inf

    def _choose(self, logits: Tensor, slots: np.ndarray) -> Tensor:
        settings = self._settings
        if not settings.temperature[slots].any():
            return torch.argmax(logits, dim=1)
        arrays = (
            settings.temperature,
            settings.top_k,
            settings.top_p,
            settings.min_p,
            settings.seeds,
            settings.steps,
        )
        return kernels.sample(logits, *(torch.from_numpy(array[slots]).to(self._device) for array in arrays))


def _logprob(row: Tensor, token_id: int, num_top: int) -> TokenLogprob:
    logprobs = torch.log_softmax(row, dim=0)
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        values, ids = torch.topk(logprobs, num_top)
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token_id, float(logprobs[token_id]), top)
