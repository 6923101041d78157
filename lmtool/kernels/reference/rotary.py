"""Rotary position embedding (arXiv 2104.09864, half-split pairs) and the K/V write, plain torch."""

from functools import lru_cache

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
    q, k, v = rotate_heads(qkv, cos_sin, k_cache.shape[0], k_cache.shape[3], q_norm, k_norm, eps)
    _store(k_cache, slots, k)
    _store(v_cache, slots, v)
    return q


def rotate_heads(
    qkv: Tensor,
    cos_sin: Tensor,
    num_kv_heads: int,
    head_dim: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [T, (Hq + 2·Hkv) · D] → q [T, Hq, D], k [T, Hkv, D], both rotated, normalised if asked, and v."""
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    num_q_heads = heads.shape[1] - 2 * num_kv_heads
    q_and_k = heads[:, : num_q_heads + num_kv_heads]
    if q_norm is not None and k_norm is not None:
        q = rms_norm(q_and_k[:, :num_q_heads], q_norm, eps)
        q_and_k = torch.cat((q, rms_norm(q_and_k[:, num_q_heads:], k_norm, eps)), dim=1)
    rotated = _rotate(q_and_k, cos_sin)
    return rotated[:, :num_q_heads], rotated[:, num_q_heads:], heads[:, num_q_heads + num_kv_heads :]


def _store(cache: Tensor, slots: Tensor, new: Tensor) -> None:
    """new [T, Hkv, D] → cache [Hkv, NB, block_size, D] at ``slots``."""
    flat = cache.view(cache.shape[0], -1, cache.shape[-1])
    first = _first_in_a_row(slots)
    if first is None:
        flat.index_copy_(1, slots, new.transpose(0, 1).to(cache.dtype))
    else:  # a copy of neighbours costs a third of an indexed one
        flat[:, first : first + new.shape[0]] = new.transpose(0, 1)


@lru_cache(maxsize=2)
def _first_in_a_row(slots: Tensor) -> int | None:
    """The first of slots that follow one another; None where they do not (a tensor is keyed by its identity)."""
    values: list[int] = slots.tolist()
    return values[0] if values and values == list(range(values[0], values[0] + len(values))) else None


def _rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """x [T, H, D], cos_sin [T, R] float32 → x with its first R dims rotated, in x's dtype."""
    rotary_dim = cos_sin.shape[-1]
    part = x if rotary_dim == x.shape[-1] else x[..., :rotary_dim]
    cos, signed_sin = _spread(cos_sin)
    part32 = part.float()
    turned = (part32 * cos).addcmul_(torch.roll(part32, rotary_dim // 2, dims=-1), signed_sin).to(x.dtype)
    return turned if part is x else torch.cat((turned, x[..., rotary_dim:]), dim=-1)


@lru_cache(maxsize=2)
def _spread(cos_sin: Tensor) -> tuple[Tensor, Tensor]:
    """[T, R] → (cos | cos) and (-sin | sin), each [T, 1, R]: rotated = x · cos + (x, halves exchanged) · signed sin.

    What a step's first layer spreads serves the others (a tensor is keyed by its identity).
    """
    cos, sin = cos_sin[:, None].chunk(2, dim=-1)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
