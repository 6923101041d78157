"""`Batch` → `StepInputs`: fixed tables by slot on the host, one copy of each array to the device.

Knows no scheduling policy: it applies changes and lays out rows, decodes first.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lmtool.engine.batch import Batch
from lmtool.layers.context import AttentionContext


@dataclass(slots=True)
class StepInputs:
    """ids [T] int64 and the attention's view of them; ``sampled_rows`` [n] int64, None where every row is sampled."""

    ids: Tensor
    context: AttentionContext
    sampled_rows: Tensor | None


class SlotTables:
    """What the runner remembers of each running sequence: its blocks and its last token."""

    def __init__(self, num_slots: int, max_blocks: int, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.device = device
        self.block_tables = np.zeros((num_slots, max_blocks), dtype=np.int32)
        self.last_tokens = np.zeros(num_slots, dtype=np.int64)

    def apply(self, batch: Batch) -> None:
        """Take in the batch's changes; must precede `build`."""
        for join in batch.joins:
            if join.answer_ids:
                self.last_tokens[join.slot] = join.answer_ids[-1]
        for slot, index, block in batch.new_blocks:
            self.block_tables[slot, index] = block

    def build(self, batch: Batch) -> StepInputs:
        return self._decode_only(batch) if not batch.chunks else self._mixed(batch)

    def _decode_only(self, batch: Batch) -> StepInputs:
        slots = np.asarray(batch.decodes)
        positions = np.asarray(batch.positions)
        tables = self.block_tables[slots, : int(positions.max()) // self.block_size + 1]
        context = AttentionContext(
            num_decode=len(slots),
            positions=self._to_device(positions),
            slots=self._to_device(self._addresses(slots, positions)),
            seq_lens=self._to_device((positions + 1).astype(np.int32)),
            block_tables=self._to_device(tables),
        )
        return StepInputs(self._to_device(self.last_tokens[slots]), context, None)

    def _mixed(self, batch: Batch) -> StepInputs:
        chunks = batch.chunks
        lengths = np.asarray([len(chunk.token_ids) for chunk in chunks])
        starts = np.asarray([chunk.start for chunk in chunks])
        decodes = np.asarray(batch.decodes, dtype=np.int64)
        slot_of_row = np.concatenate((decodes, np.repeat([chunk.slot for chunk in chunks], lengths)))
        ends = lengths.cumsum()
        within = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
        positions = np.concatenate((np.asarray(batch.positions, dtype=np.int64), np.repeat(starts, lengths) + within))
        prompt_ids = np.concatenate([np.asarray(chunk.token_ids, dtype=np.int64) for chunk in chunks])
        seq_slots = np.concatenate((decodes, np.asarray([chunk.slot for chunk in chunks])))
        seq_lens = np.concatenate((positions[: len(decodes)] + 1, starts + lengths)).astype(np.int32)
        context = AttentionContext(
            num_decode=len(decodes),
            positions=self._to_device(positions),
            slots=self._to_device(self._addresses(slot_of_row, positions)),
            seq_lens=self._to_device(seq_lens),
            block_tables=self._to_device(
                self.block_tables[seq_slots, : (int(seq_lens.max()) - 1) // self.block_size + 1]
            ),
            cu_seqlens_q=self._to_device(np.concatenate(([0], ends)).astype(np.int32)),
            max_seqlen_q=int(lengths.max()),
        )
        sampled = [*range(len(decodes))]
        sampled += [len(decodes) + int(end) - 1 for chunk, end in zip(chunks, ends, strict=True) if chunk.samples]
        ids = np.concatenate((self.last_tokens[decodes], prompt_ids))
        return StepInputs(self._to_device(ids), context, self._to_device(np.asarray(sampled, dtype=np.int64)))

    def _addresses(self, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """The flat cache address of each row's token [T] int64."""
        size = self.block_size
        return self.block_tables[slots, positions // size].astype(np.int64) * size + positions % size

    def _to_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)
