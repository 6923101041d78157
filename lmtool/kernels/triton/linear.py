"""Matrix products for few rows, with the norm before them and the gate or the sum after them in the same kernel.

One row: float32 FMAs, a few weight rows a program. A few rows: tensor cores. Many rows: the library's product.
Weights are first touched before the wait for the previous kernel: they are what a decode step spends its time on.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmtool.errors import KernelError
from lmtool.kernels.triton import tuning
from lmtool.kernels.triton.activation import gated, silu_mul
from lmtool.kernels.triton.launch import allow_next, dependent_launch, wait_for_previous
from lmtool.kernels.triton.norm import normalize, rms_norm


@triton.jit
def _mean_square(x_ptr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    total = tl.zeros([BLOCK_K], tl.float32)
    for k in tl.static_range(0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + o_k, mask=o_k < K, other=0.0).to(tl.float32)
        total += x * x
    return tl.sum(total, axis=0) / K


@triton.jit
def _row_slice(x_ptr, norm_weight_ptr, mean_square, eps, o_k, K: tl.constexpr, NORM: tl.constexpr):
    """x[o_k], normalised if asked, as float32."""
    x = tl.load(x_ptr + o_k, mask=o_k < K, other=0.0)
    if NORM:
        norm_weight = tl.load(norm_weight_ptr + o_k, mask=o_k < K, other=0.0)
        x = normalize(x, mean_square, norm_weight, eps, x_ptr.dtype.element_ty)
    return x.to(tl.float32)


@triton.jit
def _row_kernel(
    x_ptr,
    norm_weight_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """out [N] (+)= f(x [K]) @ weight [N, K].T; gated: weight [2·N, K], out = silu(first N) · last N."""
    allow_next(PDL)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_n = (o_n < N)[:, None]
    rows = weight_ptr + o_n.to(tl.int64)[:, None] * K + o_k[None, :]
    mask = m_n if K % BLOCK_K == 0 else m_n & (o_k < K)[None, :]
    tile = tl.load(rows, mask=mask, other=0.0, eviction_policy="evict_first")
    if GATED:
        up_tile = tl.load(rows + N * K, mask=mask, other=0.0, eviction_policy="evict_first")
    wait_for_previous(PDL)
    mean_square = _mean_square(x_ptr, K, BLOCK_K) if NORM else 0.0
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up_acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    x = _row_slice(x_ptr, norm_weight_ptr, mean_square, eps, o_k, K, NORM)[None, :]
    # the next tile is asked for before this one is used, so that one is always on its way
    for k in range(BLOCK_K, K, BLOCK_K):
        mask = m_n if K % BLOCK_K == 0 else m_n & (k + o_k < K)[None, :]
        next_tile = tl.load(rows + k, mask=mask, other=0.0, eviction_policy="evict_first")
        if GATED:
            next_up = tl.load(rows + N * K + k, mask=mask, other=0.0, eviction_policy="evict_first")
        next_x = _row_slice(x_ptr, norm_weight_ptr, mean_square, eps, k + o_k, K, NORM)[None, :]
        acc += tile.to(tl.float32) * x
        tile = next_tile
        if GATED:
            up_acc += up_tile.to(tl.float32) * x
            up_tile = next_up
        x = next_x
    out = tl.sum(acc + tile.to(tl.float32) * x, axis=1)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if BIAS:
        out += tl.load(bias_ptr + o_n, mask=o_n < N, other=0.0).to(tl.float32)
    if GATED:
        out = gated(out, tl.sum(up_acc + up_tile.to(tl.float32) * x, axis=1), dtype)
    if ADD:
        out += tl.load(out_ptr + o_n, mask=o_n < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + o_n, out.to(dtype), mask=o_n < N)


@triton.jit
def _tile_product(w, x, acc, SWAP: tl.constexpr):
    """acc += x @ w.T for w [BLOCK_N, BLOCK_K], x [BLOCK_M, BLOCK_K]; swapped: acc is [BLOCK_N, BLOCK_M]."""
    if SWAP:
        return tl.dot(w, tl.trans(x), acc, input_precision="ieee")
    return tl.dot(x, tl.trans(w), acc, input_precision="ieee")


@triton.jit
def _prefetch(ptrs):
    """Ask for the lines at ptrs to be brought into the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ptrs], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _tile_kernel(
    x_ptr,
    norm_weight_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    SWAP: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    """out [M, N] (+)= f(x [M, K]) @ weight [N, K].T for M ≤ BLOCK_M; gated as in the one-row kernel."""
    allow_next(PDL)
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_m, m_n = (o_m < num_rows)[:, None], (o_n < N)[:, None]
    rows = weight_ptr + o_n.to(tl.int64)[:, None] * K
    if PREFETCH and PDL:
        line = 128 // (weight_ptr.dtype.element_ty.primitive_bitwidth // 8)
        for k in tl.static_range(0, STAGES * BLOCK_K, BLOCK_K):
            o_line = k + line * tl.arange(0, BLOCK_K // line)
            if k + BLOCK_K <= K:
                _prefetch(tl.where(m_n, rows, weight_ptr) + o_line[None, :])
                if GATED:
                    _prefetch(tl.where(m_n, rows, weight_ptr) + N * K + o_line[None, :])
    wait_for_previous(PDL)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x_rows = x_ptr + o_m[:, None] * K
    if NORM:
        squares = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        for k in range(0, K, BLOCK_K):
            x = tl.load(x_rows + k + o_k[None, :], mask=m_m & (k + o_k < K)[None, :], other=0.0).to(tl.float32)
            squares += x * x
        mean_square = tl.sum(squares, axis=1)[:, None] / K
    acc = tl.zeros([BLOCK_N, BLOCK_M] if SWAP else [BLOCK_M, BLOCK_N], tl.float32)
    up_acc = tl.zeros([BLOCK_N, BLOCK_M] if SWAP else [BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        m_k = (k + o_k < K)[None, :]
        w = tl.load(rows + k + o_k[None, :], mask=m_n & m_k, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_rows + k + o_k[None, :], mask=m_m & m_k, other=0.0)
        if NORM:
            norm_weight = tl.load(norm_weight_ptr + k + o_k, mask=k + o_k < K, other=0.0)[None, :]
            x = normalize(x, mean_square, norm_weight, eps, dtype)
        acc = _tile_product(w, x, acc, SWAP)
        if GATED:
            up_rows = rows + N * K + k + o_k[None, :]
            up_w = tl.load(up_rows, mask=m_n & m_k, other=0.0, eviction_policy="evict_first")
            up_acc = _tile_product(up_w, x, up_acc, SWAP)
    out = tl.trans(acc) if SWAP else acc
    if BIAS:
        out += tl.load(bias_ptr + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
    if GATED:
        out = gated(out, tl.trans(up_acc) if SWAP else up_acc, dtype)
    out_ptrs = out_ptr + o_m[:, None] * N + o_n[None, :]
    mask = m_m & (o_n < N)[None, :]
    if ADD:
        out += tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptrs, out.to(dtype), mask=mask)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if _many_rows(x, weight):
        return torch.nn.functional.linear(x, weight, bias)
    return _few_rows(x, weight, bias)


def norm_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if _many_rows(x, weight):
        return torch.nn.functional.linear(rms_norm(x, norm_weight, eps), weight, bias)
    return _few_rows(x, weight, bias, norm_weight, eps)


def norm_linear_silu(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor) -> Tensor:
    if _many_rows(x, weight):
        return silu_mul(torch.nn.functional.linear(rms_norm(x, norm_weight, eps), weight))
    return _few_rows(x, weight, None, norm_weight, eps, is_gated=True)


def add_linear_(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if _many_rows(x, weight):
        residual.addmm_(x, weight.t())  # the library's own β = 1: the sum costs no pass of its own
        return residual if bias is None else residual.add_(bias)
    return _few_rows(x, weight, bias, out=residual)


def _many_rows(x: Tensor, weight: Tensor) -> bool:
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise KernelError(f"linear takes x [T, K] and weight [N, K], got {list(x.shape)} and {list(weight.shape)}")
    return x.shape[0] > tuning.max_rows(*weight.shape) or x.shape[0] == 0


def _few_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    *,
    is_gated: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    num_rows, num_in = x.shape
    num_out = weight.shape[0] // 2 if is_gated else weight.shape[0]
    x, weight = x.contiguous(), weight.contiguous()
    add = out is not None
    if out is None:
        out = torch.empty((num_rows, num_out), dtype=x.dtype, device=x.device)
    flags: dict[str, Any] = {
        "N": num_out,
        "K": num_in,
        "NORM": norm_weight is not None,
        "GATED": is_gated,
        "BIAS": bias is not None,
        "ADD": add,
        **dependent_launch(x.device),
    }
    pointers = (x, x if norm_weight is None else norm_weight, weight, x if bias is None else bias, out)
    if num_rows == 1:
        row = tuning.row_config(num_out, num_in, paired=is_gated)
        _row_kernel[(triton.cdiv(num_out, row.block_n),)](
            *pointers, eps, BLOCK_N=row.block_n, BLOCK_K=row.block_k, num_warps=row.num_warps, **flags
        )
        return out
    tile = tuning.tile_config(num_rows, num_out, num_in, paired=is_gated)
    _tile_kernel[(triton.cdiv(num_out, tile.block_n),)](
        *pointers,
        num_rows,
        eps,
        BLOCK_M=max(16, triton.next_power_of_2(num_rows)),
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        STAGES=tile.num_stages,
        SWAP=tile.swap,
        PREFETCH=tile.prefetch,
        num_warps=tile.num_warps,
        **flags,
    )
    return out
