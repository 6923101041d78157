"""Logits → token ids on a CPU, with each sequence's own parameters, which live by slot.

Knows no sequence's text and no scheduling.
"""

import numpy as np
import torch
from torch import Tensor

from lmtool import kernels
from lmtool.engine.batch import Batch, Join, StepOutput
from lmtool.engine.extras import LogitExtras


class Sampler:
    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._vocab_size = vocab_size
        self._extras = LogitExtras(vocab_size, device)
        self._temperature = np.zeros(num_slots, dtype=np.float32)
        self._top_k = np.zeros(num_slots, dtype=np.int32)
        self._top_p = np.ones(num_slots, dtype=np.float32)
        self._min_p = np.zeros(num_slots, dtype=np.float32)
        self._seeds = np.zeros(num_slots, dtype=np.int64)
        self._steps = np.zeros(num_slots, dtype=np.int64)

    def join(self, join: Join) -> None:
        params, slot = join.request.params, join.slot
        self._temperature[slot] = params.temperature
        self._top_k[slot] = min(params.top_k, self._vocab_size)  # what it means, and it fits
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p
        self._seeds[slot] = join.request.seed
        self._steps[slot] = len(join.answer_ids)
        self._extras.join(join)

    def leave(self, slot: int) -> None:
        self._extras.leave(slot)

    def sample(self, logits: Tensor, batch: Batch) -> StepOutput:
        """logits [n, V] float32, one row for each of the batch's sampled slots; they are changed in place."""
        slots = batch.sampled_slots
        special = self._extras.concerns(batch)
        if special:
            self._extras.adjust_(logits, batch)
        ids = self._choose(logits, np.asarray(slots))
        token_ids: list[int] = ids.tolist()
        self._steps[slots] += 1
        output = StepOutput(token_ids)
        if special:
            token_of = dict(zip(slots, token_ids, strict=True))
            found = self._extras.sampled(logits, ids, slots)
            output.logprobs = {slot: row.report(token_of[slot]) for slot, row in found.items()}
        return output

    def _choose(self, logits: Tensor, slots: np.ndarray) -> Tensor:
        if not self._temperature[slots].any():
            return torch.argmax(logits, dim=1)
        arrays = (self._temperature, self._top_k, self._top_p, self._min_p, self._seeds, self._steps)
        return kernels.sample(logits, *(torch.from_numpy(array[slots]).to(self._device) for array in arrays))
