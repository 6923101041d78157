"""Attention of one layer over one step's rows: decode rows and prefill chunks each go to their kernel."""

import torch
from torch import Tensor

from lmtool import kernels
from lmtool.layers.context import AttentionContext


def attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionContext, scale: float, window: int) -> Tensor:
    """q [T, Hq, D] → [T, Hq · D]; k_cache and v_cache [Hkv, NB, block_size, D] hold this step's tokens already."""
    if step.cu_seqlens_q is None:
        return kernels.attention_decode(q, k_cache, v_cache, step.block_tables, step.seq_lens, scale, window).flatten(1)
    n = step.num_decode
    prefilled = kernels.attention_prefill(
        q[n:],
        k_cache,
        v_cache,
        step.block_tables[n:],
        step.cu_seqlens_q,
        step.seq_lens[n:],
        step.max_seqlen_q,
        scale,
        window,
    )
    if n == 0:
        return prefilled.flatten(1)
    decoded = kernels.attention_decode(q[:n], k_cache, v_cache, step.block_tables[:n], step.seq_lens[:n], scale, window)
    return torch.cat((decoded, prefilled)).flatten(1)
