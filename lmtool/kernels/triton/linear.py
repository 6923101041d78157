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
from lmtool.kernels.triton.launch import allow_next, arch, arrival_counters, dependent_launch, wait_for_previous
from lmtool.kernels.triton.norm import rms_norm


@triton.jit
def _row_slice(x_ptr, norm_weight_ptr, o_k, K: tl.constexpr, NORM: tl.constexpr):
    """x[o_k] as float32, times the norm's weight if there is one; and the squares of x[o_k]."""
    x = tl.load(x_ptr + o_k, mask=o_k < K, other=0.0).to(tl.float32)
    squares = x * x
    if NORM:
        x *= tl.load(norm_weight_ptr + o_k, mask=o_k < K, other=0.0).to(tl.float32)
    return x, squares


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
    """out [N] (+)= f(x [K]) @ weight [N, K].T; gated: weight [2·N, K], out = silu(first N) · last N.

    The norm's division is taken out of the product, so that nothing waits for the mean square; what the reference
    rounds on the way stays in float32 here.
    """
    allow_next(PDL)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_n = (o_n < N)[:, None]
    rows = weight_ptr + o_n.to(tl.int64)[:, None] * K + o_k[None, :]
    mask = m_n if K % BLOCK_K == 0 else m_n & (o_k < K)[None, :]
    tile = tl.load(rows, mask=mask, other=0.0, eviction_policy="evict_first")
    if GATED:
        up_tile = tl.load(rows + N * K, mask=mask, other=0.0, eviction_policy="evict_first")
    added = tl.zeros([BLOCK_N], tl.float32)
    if BIAS:
        added += tl.load(bias_ptr + o_n, mask=o_n < N, other=0.0).to(tl.float32)
    wait_for_previous(PDL)
    x, squares = _row_slice(x_ptr, norm_weight_ptr, o_k, K, NORM)
    if ADD:
        added += tl.load(out_ptr + o_n, mask=o_n < N, other=0.0).to(tl.float32)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up_acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    # the next tile is asked for before this one is used, so that one is always on its way
    for k in range(BLOCK_K, K, BLOCK_K):
        mask = m_n if K % BLOCK_K == 0 else m_n & (k + o_k < K)[None, :]
        next_tile = tl.load(rows + k, mask=mask, other=0.0, eviction_policy="evict_first")
        if GATED:
            next_up = tl.load(rows + N * K + k, mask=mask, other=0.0, eviction_policy="evict_first")
        next_x, next_squares = _row_slice(x_ptr, norm_weight_ptr, k + o_k, K, NORM)
        acc += tile.to(tl.float32) * x[None, :]
        tile = next_tile
        if GATED:
            up_acc += up_tile.to(tl.float32) * x[None, :]
            up_tile = next_up
        x = next_x
        squares += next_squares
    out = tl.sum(acc + tile.to(tl.float32) * x[None, :], axis=1)
    scale = tl.rsqrt(tl.sum(squares, axis=0) / K + eps) if NORM else 1.0
    out = out * scale + added
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if GATED:
        up = tl.sum(up_acc + up_tile.to(tl.float32) * x[None, :], axis=1) * scale
        out = gated(out, up, dtype)
    tl.store(out_ptr + o_n, out.to(dtype), mask=o_n < N)


@triton.jit
def _tile_product(w, x, acc, SWAP: tl.constexpr):
    """acc += x @ w.T for w [BLOCK_N, BLOCK_K], x [BLOCK_M, BLOCK_K]; swapped: acc is [BLOCK_N, BLOCK_M]."""
    if SWAP:
        acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
    else:
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["num_rows"])
def _tile_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    SWAP: tl.constexpr,
    PDL: tl.constexpr,
):
    """out [M, N] (+)= x [M, K] @ weight [N, K].T for M ≤ BLOCK_M; gated as in the one-row kernel.

    Program (i, s) takes the s-th of SPLIT parts of K; the last of them to finish adds all parts, in their order.
    """
    allow_next(PDL)
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_m, m_n = (o_m < num_rows)[:, None], (o_n < N)[:, None]
    rows = weight_ptr + o_n.to(tl.int64)[:, None] * K
    PART: tl.constexpr = (K + SPLIT * BLOCK_K - 1) // (SPLIT * BLOCK_K) * BLOCK_K
    start = tl.program_id(1) * PART
    acc = tl.zeros([BLOCK_N, BLOCK_M] if SWAP else [BLOCK_M, BLOCK_N], tl.float32)
    up_acc = tl.zeros([BLOCK_N, BLOCK_M] if SWAP else [BLOCK_M, BLOCK_N], tl.float32)
    wait_for_previous(PDL)
    for k in tl.range(start, tl.minimum(start + PART, K), BLOCK_K, num_stages=STAGES):
        m_k = (k + o_k < K)[None, :]
        w = tl.load(rows + k + o_k[None, :], mask=m_n & m_k, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_ptr + o_m[:, None] * K + k + o_k[None, :], mask=m_m & m_k, other=0.0)
        acc = _tile_product(w, x, acc, SWAP)
        if GATED:
            up_rows = rows + N * K + k + o_k[None, :]
            up_w = tl.load(up_rows, mask=m_n & m_k, other=0.0, eviction_policy="evict_first")
            up_acc = _tile_product(up_w, x, up_acc, SWAP)
    out = tl.trans(acc) if SWAP else acc
    up = tl.trans(up_acc) if SWAP else up_acc
    o_out = o_m[:, None] * N + o_n[None, :]
    mask = m_m & (o_n < N)[None, :]
    if SPLIT > 1:
        part_size = num_rows * N
        parts_ptr = partial_ptr + tl.program_id(1) * part_size * (2 if GATED else 1)
        tl.store(parts_ptr + o_out, out, mask=mask)
        if GATED:
            tl.store(parts_ptr + part_size + o_out, up, mask=mask)
        tl.debug_barrier()  # every thread's part is written before this program is counted
        arrival_ptr = arrivals_ptr + tl.program_id(0)
        if tl.atomic_add(arrival_ptr, 1, sem="acq_rel") != SPLIT - 1:
            return
        tl.store(arrival_ptr, 0)
        out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for part in tl.static_range(SPLIT):
            parts_ptr = partial_ptr + part * part_size * (2 if GATED else 1)
            out += tl.load(parts_ptr + o_out, mask=mask, other=0.0, cache_modifier=".cg")
            if GATED:
                up += tl.load(parts_ptr + part_size + o_out, mask=mask, other=0.0, cache_modifier=".cg")
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if BIAS:
        out += tl.load(bias_ptr + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
    if GATED:
        out = gated(out, up, dtype)
    if ADD:
        out += tl.load(out_ptr + o_out, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + o_out, out.to(dtype), mask=mask)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if _many_rows(x, weight):
        return torch.nn.functional.linear(x, weight, bias)
    return _few_rows(x, weight, bias)


def norm_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if _many_rows(x, weight):
        return torch.nn.functional.linear(rms_norm(x, norm_weight, eps), weight, bias)
    return _few_rows(x, weight, bias, norm_weight, eps)


def norm_linear_silu(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor) -> Tensor:
    if _many_rows(x, weight, paired=True):
        return silu_mul(torch.nn.functional.linear(rms_norm(x, norm_weight, eps), weight))
    return _few_rows(x, weight, None, norm_weight, eps, is_gated=True)


def add_linear_(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if _many_rows(x, weight):
        residual.addmm_(x, weight.t())  # the library's own β = 1: the sum costs no pass of its own
        return residual if bias is None else residual.add_(bias)
    return _few_rows(x, weight, bias, out=residual)


def _many_rows(x: Tensor, weight: Tensor, *, paired: bool = False) -> bool:
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise KernelError(f"linear takes x [T, K] and weight [N, K], got {list(x.shape)} and {list(weight.shape)}")
    num_out, num_in = weight.shape[0] // (2 if paired else 1), weight.shape[1]
    most = tuning.max_rows(arch(x.device), num_out, num_in, paired=paired, itemsize=x.dtype.itemsize)
    return x.shape[0] > most or x.shape[0] == 0


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
    weight = weight.contiguous()
    add = out is not None
    if out is None:
        out = torch.empty((num_rows, num_out), dtype=x.dtype, device=x.device)
    flags = {"N": num_out, "K": num_in, "GATED": is_gated, "BIAS": bias is not None, "ADD": add}
    flags |= dependent_launch(x.device)
    if num_rows > 1:
        x = x.contiguous() if norm_weight is None else rms_norm(x, norm_weight, eps)
        _launch_tiles(x, weight, bias, out, flags)
        return out
    row = tuning.row_config(arch(x.device), num_out, num_in, paired=is_gated, itemsize=x.dtype.itemsize)
    _row_kernel[(triton.cdiv(num_out, row.block_n),)](
        x.contiguous(),
        x if norm_weight is None else norm_weight,
        weight,
        x if bias is None else bias,
        out,
        eps,
        NORM=norm_weight is not None,
        BLOCK_N=row.block_n,
        BLOCK_K=row.block_k,
        num_warps=row.num_warps,
        **flags,
    )
    return out


def _launch_tiles(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, flags: dict[str, Any]) -> None:
    num_rows, num_out = out.shape
    shape = {"paired": flags["GATED"], "itemsize": x.dtype.itemsize}
    tile = tuning.tile_config(arch(x.device), num_rows, num_out, x.shape[1], **shape)
    num_partials = tile.split * num_rows * weight.shape[0] if tile.split > 1 else 0
    _tile_kernel[(triton.cdiv(num_out, tile.block_n), tile.split)](
        x,
        weight,
        x if bias is None else bias,
        out,
        torch.empty(num_partials, dtype=torch.float32, device=x.device),
        arrival_counters(x.device),
        num_rows,
        BLOCK_M=max(16, triton.next_power_of_2(num_rows)),
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        SPLIT=tile.split,
        STAGES=tile.num_stages,
        SWAP=tile.swap,
        num_warps=tile.num_warps,
        **flags,
    )
