"""The running sequences' state in one fixed block of device memory, by slot; the host sends changes only.

The device advances last token, position and step by itself, so of these the host's copy is right only where it has
just been written. Everything is counted in 32-bit words: a change is the number of a word and its new value. Knows
no model and no scheduling.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lmtool.engine.batch import Batch, Join
from lmtool.kernels.layout import MIN_P, POSITION, SEED, STEP, TEMPERATURE, TOKEN, TOP_K, TOP_P


@dataclass(frozen=True, slots=True)
class _Parts:
    """Where each array begins, in words."""

    words: int
    rows: int
    tables: int
    end: int


class DeviceState:
    """longs, words: see `kernels.layout`; tables [slots, max_blocks] int32; rows [num_rows] int32: slot of each row."""

    def __init__(self, num_slots: int, num_rows: int, max_blocks: int, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self._num_slots, self._max_blocks = num_slots, max_blocks
        rows = 12 * num_slots
        tables = rows + -(-num_rows // 4) * 4
        self._parts = parts = _Parts(8 * num_slots, rows, tables, tables + num_slots * max_blocks)
        self._host = np.zeros(parts.end, dtype=np.int32)
        self._device = torch.zeros(parts.end, dtype=torch.int32, device=device)
        self._host_longs = self._host[: parts.words].view(np.int64).reshape(4, num_slots)
        self._host_words = self._host[parts.words : parts.rows].reshape(4, num_slots)
        self._host_floats = self._host_words.view(np.float32)
        self._host_rows = self._host[parts.rows : parts.rows + num_rows]
        self.host_tables = self._host[parts.tables :].reshape(num_slots, max_blocks)
        self.longs: Tensor = self._device[: parts.words].view(torch.int64).view(4, num_slots)
        self.words: Tensor = self._device[parts.words : parts.rows].view(4, num_slots)
        self.rows: Tensor = self._device[parts.rows : parts.rows + num_rows]
        self.tables: Tensor = self._device[parts.tables :].view(num_slots, max_blocks)
        self._rows: list[int] = []  # what self.rows begins with; the others are -1
        self._changed: list[np.ndarray] = []  # numbers of words that the device has not got yet
        self._host_rows[:] = -1
        self.rows.fill_(-1)

    # ------------------------------------------------------------------ changes
    def apply(self, batch: Batch) -> None:
        for join in batch.joins:
            self._join(join)
        if batch.new_blocks:
            slots, indexes, blocks = np.asarray(batch.new_blocks, dtype=np.int64).T
            self.host_tables[slots, indexes] = blocks
            self._changed.append(self._parts.tables + slots * self._max_blocks + indexes)
        for chunk in batch.chunks:
            if chunk.samples:  # its last token is what the step advances from
                self._host_longs[POSITION, chunk.slot] = chunk.start + len(chunk.token_ids) - 1
                self._changed.append(self._long(POSITION, chunk.slot))

    def _join(self, join: Join) -> None:
        slot, request = join.slot, join.request
        self._host_longs[TOKEN, slot] = join.answer_ids[-1] if join.answer_ids else 0
        self._host_longs[POSITION, slot] = len(request.prompt_ids) + len(join.answer_ids) - 1
        self._host_longs[SEED, slot] = request.seed
        self._host_longs[STEP, slot] = len(join.answer_ids)
        self._host_floats[TEMPERATURE, slot] = request.params.temperature
        self._host_words[TOP_K, slot] = min(request.params.top_k, 2**31 - 1)
        self._host_floats[TOP_P, slot] = request.params.top_p
        self._host_floats[MIN_P, slot] = request.params.min_p
        self._changed += [self._long(field, slot) for field in (TOKEN, POSITION, SEED, STEP)]
        self._changed.append(self._parts.words + np.arange(4) * self._num_slots + slot)

    def _long(self, field: int, slot: int) -> np.ndarray:
        return 2 * (field * self._num_slots + slot) + np.arange(2)

    def set_rows(self, slots: Sequence[int]) -> None:
        """The rows of the next decode step; nothing is sent where they are those of the last one."""
        if slots == self._rows:
            return
        num_changed = max(len(slots), len(self._rows))
        self._host_rows[: len(slots)] = slots
        self._host_rows[len(slots) : num_changed] = -1
        self._rows = list(slots)
        self._changed.append(self._parts.rows + np.arange(num_changed))

    # ------------------------------------------------------------------ to the device
    def changes(self) -> list[np.ndarray]:
        """Numbers of words [n] int64 and their values [n] int32, not written before; empty where nothing changed."""
        if not self._changed:
            return []
        numbers = np.unique(np.concatenate(self._changed))
        return [numbers, self._host[numbers]]

    def write(self, numbers: Tensor, values: Tensor) -> None:
        """`changes`, after they were copied to the device. What fails before this is sent again with the next step."""
        self._device.index_put_((numbers,), values)
        self._changed = []
