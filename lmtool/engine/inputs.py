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


@dataclass(slots=True)
class MixedRows:
    """The rows of a step with prompt chunks, on the host: first the decodes, whose ids the runner knows.

    prompt_ids [T - num_decode], positions, addresses [T] int64: flat cache addresses; seq_slots [S] int64 and
    seq_lens [S] int32 of the sequences; cu_seqlens [number of chunks + 1] int32; sampled_rows [n] int64.
    """

    prompt_ids: np.ndarray
    positions: np.ndarray
    addresses: np.ndarray
    seq_slots: np.ndarray
    seq_lens: np.ndarray
    cu_seqlens: np.ndarray
    sampled_rows: np.ndarray
    max_chunk: int


def lay_out(batch: Batch, block_tables: np.ndarray, block_size: int) -> MixedRows:
    """block_tables [number of slots, max_blocks] int32; the batch has chunks."""
    chunks = batch.chunks
    num_decodes = len(batch.decodes)
    lengths = np.asarray([len(chunk.token_ids) for chunk in chunks])
    starts = np.asarray([chunk.start for chunk in chunks])
    seq_slots = np.asarray([*batch.decodes, *(chunk.slot for chunk in chunks)], dtype=np.int64)
    slot_of_row = np.repeat(seq_slots, np.concatenate((np.ones(num_decodes, dtype=np.int64), lengths)))
    ends = lengths.cumsum()
    within = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    positions = np.concatenate((np.asarray(batch.positions, dtype=np.int64), np.repeat(starts, lengths) + within))
    lasts = num_decodes + ends - 1
    sampled = [*range(num_decodes), *(int(i) for i, chunk in zip(lasts, chunks, strict=True) if chunk.samples)]
    return MixedRows(
        # rows of pictures have no id of the vocabulary: whatever is looked up for them is overwritten
        prompt_ids=np.concatenate([np.asarray(chunk.token_ids, dtype=np.int64) for chunk in chunks]).clip(min=0),
        positions=positions,
        addresses=addresses(block_tables, block_size, slot_of_row, positions),
        seq_slots=seq_slots,
        seq_lens=np.concatenate((positions[:num_decodes] + 1, starts + lengths)).astype(np.int32),
        cu_seqlens=np.concatenate(([0], ends)).astype(np.int32),
        sampled_rows=np.asarray(sampled, dtype=np.int64),
        max_chunk=int(lengths.max()),
    )


def addresses(block_tables: np.ndarray, block_size: int, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The flat cache address of each row's token [T] int64."""
    return block_tables[slots, positions // block_size].astype(np.int64) * block_size + positions % block_size


class SlotTables:
    """What the runner on a CPU remembers of each running sequence: its blocks and its last token."""

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
            slots=self._to_device(addresses(self.block_tables, self.block_size, slots, positions)),
            seq_lens=self._to_device((positions + 1).astype(np.int32)),
            block_tables=self._to_device(tables),
            seq_slots=self._to_device(slots),
        )
        return StepInputs(self._to_device(self.last_tokens[slots]), context, None)

    def _mixed(self, batch: Batch) -> StepInputs:
        rows = lay_out(batch, self.block_tables, self.block_size)
        num_blocks = (int(rows.seq_lens.max()) - 1) // self.block_size + 1
        context = AttentionContext(
            num_decode=len(batch.decodes),
            positions=self._to_device(rows.positions),
            slots=self._to_device(rows.addresses),
            seq_lens=self._to_device(rows.seq_lens),
            block_tables=self._to_device(self.block_tables[rows.seq_slots, :num_blocks]),
            seq_slots=self._to_device(rows.seq_slots),
            cu_seqlens_q=self._to_device(rows.cu_seqlens),
            max_seqlen_q=rows.max_chunk,
        )
        decoded_ids = self.last_tokens[rows.seq_slots[: len(batch.decodes)]]
        ids = np.concatenate((decoded_ids, rows.prompt_ids))
        return StepInputs(self._to_device(ids), context, self._to_device(rows.sampled_rows))

    def _to_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)
