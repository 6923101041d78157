"""Attention of one layer over one step's rows: decode rows and prefill chunks each go to their kernel."""

import torch
from torch import Tensor

from lmtool import kernels
from lmtool.layers.context import AttentionContext


def attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionContext, scale: float, window: int) -> Tensor:
    """q [T, Hq, D] → [T, Hq · D]; k_cache and v_cache [Hkv, NB, block_size, D] hold this step's tokens already."""
    n = step.num_decode
    parts: list[Tensor] = []
    if n:
        decoded = kernels.attention_decode(
            q[:n], k_cache, v_cache, step.block_tables[:n], step.seq_lens[:n], scale, window
        )
        parts.append(decoded)
    if step.cu_seqlens_q is not None:
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
        parts.append(prefilled)
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.flatten(1)
