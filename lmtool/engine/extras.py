"""What few requests ask of their logits: penalties, biases, bans, masks, stops held back, logprobs. By slot; costs
the others nothing.

Nothing here waits for the device. Knows no sequence's text and no scheduling.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lmtool import kernels
from lmtool.engine.batch import Batch, Join, Mask
from lmtool.engine.sequence import TokenLogprob
from lmtool.engine.transfer import download, upload


@dataclass(slots=True)
class _Extras:
    """One slot's. num_answer_tokens: how many were sampled; the others None where nothing is asked."""

    num_answer_tokens: int
    bias_ids: Tensor | None = None
    bias: Tensor | None = None
    held_back: Tensor | None = None  # ids that may not come before min_new_tokens
    min_new_tokens: int = 0
    penalties: tuple[Tensor, Tensor, Tensor] | None = None  # repetition, presence, frequency: [1] each
    prompt_mask: Tensor | None = None
    output_counts: Tensor | None = None
    num_logprobs: int | None = None


@dataclass(slots=True)
class RowLogprob:
    """Copies on their way to the host: the chosen token's logprob [1], and the most likely ones [n]."""

    chosen: Tensor
    top_ids: Tensor
    top: Tensor

    def report(self, token_id: int) -> TokenLogprob:
        """The copies have arrived. What cannot come at all is not among the likely ones."""
        top = tuple(
            (i, value) for i, value in zip(self.top_ids.tolist(), self.top.tolist(), strict=True) if value > -torch.inf
        )
        return TokenLogprob(token_id, float(self.chosen), top)


class LogitExtras:
    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._of_slot: dict[int, _Extras] = {}

    def concerns(self, batch: Batch) -> bool:
        slots = batch.sampled_slots if self._of_slot else ()
        return bool(batch.bans or batch.masks) or any(slot in self._of_slot for slot in slots)

    def join(self, join: Join) -> None:
        params = join.request.params
        self._of_slot.pop(join.slot, None)
        penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        holds_back = bool(params.min_new_tokens and join.request.stop_ids)
        penalizes = penalties != (1.0, 0.0, 0.0)
        if not (params.logit_bias or holds_back or penalizes or params.logprobs is not None):
            return
        extras = _Extras(len(join.answer_ids), num_logprobs=params.logprobs)
        if params.logit_bias:
            extras.bias_ids = self._ids(list(params.logit_bias))
            extras.bias = self._floats(list(params.logit_bias.values()))
        if holds_back:
            extras.held_back = self._ids(sorted(join.request.stop_ids))
            extras.min_new_tokens = params.min_new_tokens
        if penalizes:
            repetition, presence, frequency = self._floats(penalties).split(1)
            extras.penalties = (repetition, presence, frequency)
            extras.prompt_mask = torch.zeros(self._vocab_size, dtype=torch.bool, device=self._device)
            extras.prompt_mask.index_fill_(0, self._ids([i for i in join.request.prompt_ids if i >= 0]), True)
            extras.output_counts = torch.zeros(self._vocab_size, dtype=torch.int32, device=self._device)
            _count(extras.output_counts, self._ids(join.answer_ids))
        self._of_slot[join.slot] = extras

    def leave(self, slot: int) -> None:
        self._of_slot.pop(slot, None)

    def _ids(self, ids: Sequence[int]) -> Tensor:
        return upload([np.asarray(ids, dtype=np.int64)], self._device)[0]

    def _floats(self, values: Sequence[float]) -> Tensor:
        return upload([np.asarray(values, dtype=np.float32)], self._device)[0]

    # ------------------------------------------------------------------ around sampling
    def adjust_(self, logits: Tensor, batch: Batch) -> None:
        """logits [n, V] float32, one row for each of the batch's sampled slots, in place."""
        slots = batch.sampled_slots
        must_end = {mask.slot for mask in batch.masks if mask.only_ends}  # held back or not: the grammar wins
        for row, extra in self._rows(slots):
            _adjust_(logits[row], extra, may_end=slots[row] in must_end)
        for slot, token_id in batch.bans:
            logits[slots.index(slot), token_id].fill_(-torch.inf)
        if batch.masks:
            self._mask_(logits, slots, batch.masks)

    def _mask_(self, logits: Tensor, slots: Sequence[int], masks: Sequence[Mask]) -> None:
        rows = np.asarray([slots.index(mask.slot) for mask in masks], dtype=np.int32)
        words = np.frombuffer(b"".join(mask.words for mask in masks), dtype=np.int32).reshape(len(masks), -1)
        kernels.mask_(logits, *upload([rows, words], self._device))

    def sampled(self, logits: Tensor, ids: Tensor, slots: Sequence[int]) -> dict[int, RowLogprob]:
        """Count the tokens ids [n] that came out; logprobs for the slots that asked."""
        found = {}
        for row, extra in self._rows(slots):
            extra.num_answer_tokens += 1
            token = ids[row : row + 1].clamp_min(0)  # -1: there is none, and nobody will ask
            if extra.output_counts is not None:
                _count(extra.output_counts, token)
            if extra.num_logprobs is not None:
                logprobs = torch.log_softmax(logits[row], dim=0)
                top = torch.topk(logprobs, extra.num_logprobs)
                found[slots[row]] = RowLogprob(
                    download(logprobs.gather(0, token)), download(top.indices), download(top.values)
                )
        return found

    def _rows(self, slots: Sequence[int]) -> list[tuple[int, _Extras]]:
        return [(row, self._of_slot[slot]) for row, slot in enumerate(slots) if slot in self._of_slot]


def _adjust_(row: Tensor, extra: _Extras, *, may_end: bool) -> None:
    if extra.penalties is not None:
        assert extra.prompt_mask is not None
        assert extra.output_counts is not None
        kernels.penalize_(row[None], extra.prompt_mask[None], extra.output_counts[None], *extra.penalties)
    if extra.bias is not None and extra.bias_ids is not None:
        row.index_add_(0, extra.bias_ids, extra.bias)
    if extra.held_back is not None and extra.num_answer_tokens < extra.min_new_tokens and not may_end:
        row.index_fill_(0, extra.held_back, -torch.inf)


def _count(counts: Tensor, ids: Tensor) -> None:
    counts.index_add_(0, ids, torch.ones_like(ids, dtype=counts.dtype))
