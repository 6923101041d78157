"""Attention of one layer over one step's rows: decode rows and prefill chunks each go to their kernel."""

import torch
from torch import Tensor

from lmtool.layers.context import AttentionContext
from lmtool.layers.kv_store import KvStore


def attention(q: Tensor, cache: KvStore, step: AttentionContext, scale: float, window: int) -> Tensor:
    """q [T, Hq, D] → [T, Hq · D]; the cache holds this step's tokens already."""
    n = step.num_decode
    if step.cu_seqlens_q is None:
        return cache.decode(q, step, scale, window).flatten(1)
    prefilled = cache.prefill(q[n:], step, scale, window)
    if n == 0:
        return prefilled.flatten(1)
    return torch.cat((cache.decode(q[:n], step, scale, window), prefilled)).flatten(1)
