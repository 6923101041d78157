"""Rotary position embedding (arXiv 2104.09864, half-split pairs) and the K/V write, plain torch."""

import torch
from torch import Tensor

from lmtool.kernels.reference.norm import rms_norm


def rope_store(
    qkv: Tensor,
    cos_sin: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    num_kv_heads, _, _, head_dim = k_cache.shape
    num_tokens = qkv.shape[0]
    heads = qkv.view(num_tokens, -1, head_dim)
    num_q_heads = heads.shape[1] - 2 * num_kv_heads
    q_and_k = heads[:, : num_q_heads + num_kv_heads]
    if q_norm is not None and k_norm is not None:
        q = rms_norm(q_and_k[:, :num_q_heads], q_norm, eps)
        q_and_k = torch.cat((q, rms_norm(q_and_k[:, num_q_heads:], k_norm, eps)), dim=1)
    rotated = _rotate(q_and_k, cos_sin)
    for cache, new in (
        (k_cache, rotated[:, num_q_heads:]),
        (v_cache, heads[:, num_q_heads + num_kv_heads :]),
    ):
        flat = cache.view(num_kv_heads, -1, head_dim)
        flat.index_copy_(1, slots, new.transpose(0, 1).to(cache.dtype))
    return rotated[:, :num_q_heads]


def _rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """x [T, H, D], cos_sin [T, R] float32 → x with its first R dims rotated, in x's dtype."""
    rotary_dim = cos_sin.shape[-1]
    cos, sin = cos_sin[:, None].chunk(2, dim=-1)
    part = x if rotary_dim == x.shape[-1] else x[..., :rotary_dim]
    low, high = part.float().chunk(2, dim=-1)
    turned = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)
    if rotary_dim == x.shape[-1]:
        return turned
    return torch.cat((turned, x[..., rotary_dim:]), dim=-1)
