"""Attention of one layer over one step's rows: decode rows and prefill chunks each go to their kernel."""

import torch
from torch import Tensor

from lmtool import kernels
from lmtool.layers.context import AttentionContext


def attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionContext, scale: float, window: int) -> Tensor:
    """q [T, Hq, D] → [T, Hq · D]; k_cache and v_cache [Hkv, NB, block_size, D] hold this step's tokens already."""
    n = step.num_decode
    if step.cu_seqlens_q is None:
        return _decode(q, k_cache, v_cache, step, scale, window).flatten(1)
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
    decoded = _decode(q[:n], k_cache, v_cache, step, scale, window)
    return torch.cat((decoded, prefilled)).flatten(1)


def _decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionContext, scale: float, window: int) -> Tensor:
    n = q.shape[0]
    tables, seq_lens = (
        (step.block_tables, step.seq_lens)
        if n == len(step.seq_lens)
        else (
            step.block_tables[:n],
            step.seq_lens[:n],
        )
    )
    return kernels.attention_decode(q, k_cache, v_cache, tables, seq_lens, scale, window, step.plan)
