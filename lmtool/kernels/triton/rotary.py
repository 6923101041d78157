"""Rotary embedding (arXiv 2104.09864, half-split pairs), the per-head norm before it, the K/V write after it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmtool.errors import KernelError
from lmtool.kernels.triton.launch import allow_next, dependent_launch, wait_for_previous
from lmtool.kernels.triton.norm import normalize


@triton.jit
def rotated(
    x_ptrs,
    norm_weight_ptr,
    cos_sin_ptr,
    mask,
    o_d,
    eps,
    D: tl.constexpr,
    R: tl.constexpr,
    NORM: tl.constexpr,
):
    """Heads at x_ptrs [H, 1] (o_d [BLOCK_D] within a head) → normalised if asked, first R dims rotated; one token."""
    dtype: tl.constexpr = x_ptrs.dtype.element_ty
    in_rotation = o_d < R
    # dim d turns with dim d ± R/2; a dim beyond R turns with itself by an angle of zero
    is_low = o_d < R // 2
    o_partner = tl.where(in_rotation, tl.where(is_low, o_d + R // 2, o_d - R // 2), o_d)
    x = tl.load(x_ptrs + o_d[None, :], mask=mask, other=0.0)
    partner = tl.load(x_ptrs + o_partner[None, :], mask=mask, other=0.0)
    if NORM:
        x32 = x.to(tl.float32)
        mean_square = tl.sum(x32 * x32, axis=1)[:, None] / D
        weight = tl.load(norm_weight_ptr + o_d, mask=o_d < D, other=0.0)
        partner_weight = tl.load(norm_weight_ptr + o_partner, mask=o_d < D, other=0.0)
        x = normalize(x, mean_square, weight[None, :], eps, dtype)
        partner = normalize(partner, mean_square, partner_weight[None, :], eps, dtype)
    o_angle = tl.where(is_low, o_d, o_d - R // 2)
    cos = tl.load(cos_sin_ptr + o_angle, mask=in_rotation, other=1.0)[None, :]
    sin = tl.load(cos_sin_ptr + R // 2 + o_angle, mask=in_rotation, other=0.0)[None, :]
    sin = tl.where(is_low[None, :], -sin, sin)
    return (x.to(tl.float32) * cos + partner.to(tl.float32) * sin).to(dtype)


@triton.jit(do_not_specialize=["tokens_per_head"])
def _rope_store_kernel(
    qkv_ptr,
    cos_sin_ptr,
    slots_ptr,
    k_cache_ptr,
    v_cache_ptr,
    q_norm_ptr,
    k_norm_ptr,
    q_ptr,
    eps,
    tokens_per_head,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (t, i): the i-th part of token t: BLOCK_H q heads, or k heads, or v heads, counted in this order."""
    allow_next(PDL)
    wait_for_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    num_q_parts: tl.constexpr = (HQ + BLOCK_H - 1) // BLOCK_H
    num_kv_parts: tl.constexpr = (HKV + BLOCK_H - 1) // BLOCK_H
    o_d = tl.arange(0, BLOCK_D)
    o_h = tl.arange(0, BLOCK_H)
    token_ptr = qkv_ptr + token * (HQ + 2 * HKV) * D
    cos_sin_ptr += token * R
    if part < num_q_parts:
        o_h += part * BLOCK_H
        mask = (o_h < HQ)[:, None] & (o_d < D)[None, :]
        heads = token_ptr + o_h[:, None] * D
        q = rotated(heads, q_norm_ptr, cos_sin_ptr, mask, o_d, eps, D, R, NORM)
        tl.store(q_ptr + token * HQ * D + o_h[:, None] * D + o_d[None, :], q, mask=mask)
    else:
        part -= num_q_parts
        slot = tl.load(slots_ptr + token).to(tl.int64)
        o_h += part % num_kv_parts * BLOCK_H
        mask = (o_h < HKV)[:, None] & (o_d < D)[None, :]
        o_cache = (o_h.to(tl.int64) * tokens_per_head + slot)[:, None] * D + o_d[None, :]
        if part < num_kv_parts:
            heads = token_ptr + (HQ + o_h)[:, None] * D
            k = rotated(heads, k_norm_ptr, cos_sin_ptr, mask, o_d, eps, D, R, NORM)
            tl.store(k_cache_ptr + o_cache, k.to(k_cache_ptr.dtype.element_ty), mask=mask)
        else:
            v = tl.load(token_ptr + (HQ + HKV + o_h)[:, None] * D + o_d[None, :], mask=mask, other=0.0)
            tl.store(v_cache_ptr + o_cache, v.to(v_cache_ptr.dtype.element_ty), mask=mask)


def query_heads(op: str, width: int, num_kv_heads: int, head_dim: int) -> int:
    """How many there are in rows of q, k and v of this width. Raises KernelError where they hold no whole heads."""
    num_q_heads = width // head_dim - 2 * num_kv_heads
    if width % head_dim or num_q_heads < 1:
        raise KernelError(f"{op}: qkv of width {width} does not hold heads of {head_dim} beside {num_kv_heads}")
    return num_q_heads


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
    num_kv_heads, num_blocks, block_size, head_dim = k_cache.shape
    num_tokens, width = qkv.shape
    num_q_heads = query_heads("rope_store", width, num_kv_heads, head_dim)
    q = torch.empty((num_tokens, num_q_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if num_tokens == 0:
        return q
    has_norm = q_norm is not None and k_norm is not None
    block_h = 8
    num_parts = triton.cdiv(num_q_heads, block_h) + 2 * triton.cdiv(num_kv_heads, block_h)
    _rope_store_kernel[(num_tokens, num_parts)](
        qkv.contiguous(),
        cos_sin.contiguous(),
        slots,
        k_cache,
        v_cache,
        q_norm if has_norm else qkv,
        k_norm if has_norm else qkv,
        q,
        eps,
        num_blocks * block_size,
        HQ=num_q_heads,
        HKV=num_kv_heads,
        D=head_dim,
        R=cos_sin.shape[1],
        NORM=has_norm,
        BLOCK_H=block_h,
        BLOCK_D=triton.next_power_of_2(head_dim),
        num_warps=4,
        **dependent_launch(qkv.device),
    )
    return q
