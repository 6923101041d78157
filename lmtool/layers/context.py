"""What attention needs to know of a step, beside the tensors that flow through the model. Passed, never global."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from lmtool.kernels import DecodePlan

if TYPE_CHECKING:
    from lmtool.layers.staging import Staging


@dataclass(slots=True, kw_only=True)
class AttentionContext:
    """The rows of a step: first ``num_decode`` rows of one token each, then the prefill chunks.

    positions       [T] int64: each token's place in its sequence
    slots           [T] int64: where its K and V go in the cache
    seq_lens        [S] int32: cached tokens + this step's, decode rows first
    block_tables    [S, max_blocks] int32
    seq_slots       [S] integers: each sequence's slot, -1: nobody's; needed where sequences have open blocks
    cu_seqlens_q    [S - num_decode + 1] int32: bounds of the chunks among the prefill rows
    max_seqlen_q    the longest chunk, tokens (0: no chunk)
    plan            the decode rows' work list, if it was made already: it serves all layers
    staging         what a cache with open blocks works out once a step
    """

    num_decode: int
    positions: Tensor
    slots: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    seq_slots: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    max_seqlen_q: int = 0
    plan: DecodePlan | None = None
    staging: Staging | None = None

    @property
    def decoding(self) -> tuple[Tensor, Tensor]:
        """block_tables and seq_lens of the decode rows; the tensors themselves where there are no others."""
        n = self.num_decode
        if n == len(self.seq_lens):
            return self.block_tables, self.seq_lens
        return self.block_tables[:n], self.seq_lens[:n]

    @property
    def chunks(self) -> tuple[Tensor, Tensor, Tensor]:
        """block_tables, seq_lens and cu_seqlens_q of the chunks."""
        n = self.num_decode
        assert self.cu_seqlens_q is not None
        return self.block_tables[n:], self.seq_lens[n:], self.cu_seqlens_q
