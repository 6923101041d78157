"""What attention needs to know of a step, beside the tensors that flow through the model. Passed, never global."""

from dataclasses import dataclass

from torch import Tensor

from lmtool.kernels import DecodePlan


@dataclass(slots=True, kw_only=True)
class AttentionContext:
    """The rows of a step: first ``num_decode`` rows of one token each, then the prefill chunks.

    positions       [T] int64: each token's place in its sequence
    slots           [T] int64: where its K and V go in the cache
    seq_lens        [S] int32: cached tokens + this step's, decode rows first
    block_tables    [S, max_blocks] int32
    cu_seqlens_q    [S - num_decode + 1] int32: bounds of the chunks among the prefill rows
    max_seqlen_q    the longest chunk, tokens (0: no chunk)
    plan            the decode rows' work list, if it was made already: it serves all layers
    """

    num_decode: int
    positions: Tensor
    slots: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    cu_seqlens_q: Tensor | None = None
    max_seqlen_q: int = 0
    plan: DecodePlan | None = None
