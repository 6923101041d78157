"""Products with 4-bit weights on a GPU: which kernel, with what around it. One row, a few, tens to hundreds, more."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmtool.errors import KernelError
from lmtool.kernels.triton import linear, tuning
from lmtool.kernels.triton.launch import (
    HOPPER,
    allow_next,
    arch,
    arrival_counters,
    dependent_launch,
    wait_for_previous,
)
from lmtool.kernels.triton.norm import rms_norm
from lmtool.kernels.triton.w4_codes import scale_of
from lmtool.kernels.triton.w4_few import few_rows_kernel
from lmtool.kernels.triton.w4_wide import wide_kernel
from lmtool.kernels.triton.w4_x import sort_x_kernel
from lmtool.kernels.w4_layout import W4Tiles

try:
    from lmtool.kernels.triton.w4_wide_hopper import launch_wide_hopper
except (ImportError, AttributeError):  # Gluon is experimental: a Triton that has it otherwise does without
    launch_wide_hopper = None

_FEW_ROWS = 16
_WITHOUT_THE_INSTRUCTION = (75,)  # mma.m16n8k16 came with 8.0
_SORT_BLOCK = 2048


def w4_linear(x: Tensor, weight: W4Tiles, bias: Tensor | None = None) -> Tensor:
    if _many_rows(x, weight):
        return linear.linear(x, w4_expand(weight, x.dtype), bias)
    return _product(x, weight, bias)


def norm_w4_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: W4Tiles, bias: Tensor | None = None) -> Tensor:
    if _many_rows(x, weight):
        return linear.norm_linear(x, norm_weight, eps, w4_expand(weight, x.dtype), bias)
    return _product(x, weight, bias, norm_weight, eps)


def norm_w4_linear_silu(x: Tensor, norm_weight: Tensor, eps: float, weight: W4Tiles) -> Tensor:
    if not weight.paired:
        raise KernelError("a gated product takes weights whose gates and ups are paired", "pack them with paired=True")
    if _many_rows(x, weight):
        return linear.norm_linear_silu(x, norm_weight, eps, w4_expand(weight, x.dtype))
    return _product(x, weight, None, norm_weight, eps)


def add_w4_linear_(residual: Tensor, x: Tensor, weight: W4Tiles, bias: Tensor | None = None) -> Tensor:
    if _many_rows(x, weight):
        return linear.add_linear_(residual, x, w4_expand(weight, x.dtype), bias)
    return _product(x, weight, bias, out=residual)


def _many_rows(x: Tensor, weight: W4Tiles) -> bool:
    if x.ndim != 2 or x.shape[1] != weight.num_in:
        raise KernelError(f"these 4-bit weights take x [T, {weight.num_in}], got {list(x.shape)}")
    if x.dtype == torch.float32 or x.shape[0] == 0:
        return True
    if _hopper_config(x, weight) is not None:
        return False  # as fast as the library with half-precision weights at any number of rows
    return x.shape[0] > tuning.w4_most_rows(arch(x.device))


def _hopper_config(x: Tensor, weight: W4Tiles) -> tuning.W4HopperConfig | None:
    """None: not for `w4_wide_hopper.py`."""
    if launch_wide_hopper is None or arch(x.device) != HOPPER:
        return None
    rows_of_tiles, tiles_k = weight.tiles.shape[:2]
    return tuning.w4_hopper_config(x.shape[0], rows_of_tiles * 32, tiles_k * 128, paired=weight.paired)


def _product(
    x: Tensor,
    weight: W4Tiles,
    bias: Tensor | None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """With a norm before it, and the gate (paired weights) or the sum into ``out`` after it."""
    num_rows = x.shape[0]
    num_out = weight.num_out // 2 if weight.paired else weight.num_out
    flags: dict[str, Any] = {
        "N": num_out,
        "K": weight.num_in,
        "TILES_N": weight.tiles.shape[0],
        "TILES_K": weight.tiles.shape[1],
        "GROUPS": weight.groups,
        "GATED": weight.paired,
        "BIAS": bias is not None,
        "ADD": out is not None,
        "ASM": arch(x.device) > 0,
    }
    flags |= dependent_launch(x.device)
    if out is None:
        out = torch.empty((num_rows, num_out), dtype=x.dtype, device=x.device)
    if num_rows <= _FEW_ROWS and arch(x.device) not in _WITHOUT_THE_INSTRUCTION:
        _launch_few(x, weight, bias, norm_weight, eps, out, flags)
        return out
    x = x.contiguous() if norm_weight is None else rms_norm(x, norm_weight, eps)
    if config := _hopper_config(x, weight):
        launch_wide_hopper(x, weight, bias, out, config, add=flags["ADD"])
    else:
        _launch_wide(x, weight, x if bias is None else bias, out, flags)
    return out


def _sorted(x: Tensor, weight: W4Tiles, norm_weight: Tensor | None, eps: float) -> Tensor:
    """x, normalized if asked, [T, padded K] in the order of `sort_x_kernel`."""
    num_rows, padded = x.shape[0], weight.padded_in
    out = torch.empty((num_rows, padded), dtype=x.dtype, device=x.device)
    has_norm = norm_weight is not None
    block = triton.next_power_of_2(padded) if has_norm else _SORT_BLOCK
    sort_x_kernel[(num_rows, triton.cdiv(padded, block))](
        x.contiguous(),
        norm_weight if has_norm else x,
        out,
        eps,
        K=weight.num_in,
        PADDED_K=padded,
        NORM=has_norm,
        BLOCK=block,
        num_warps=8 if has_norm else 4,
        **dependent_launch(x.device),
    )
    return out


def _launch_few(
    x: Tensor,
    weight: W4Tiles,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    out: Tensor,
    flags: dict[str, Any],
) -> None:
    num_rows = x.shape[0]
    rows_of_tiles, tiles_k = weight.tiles.shape[:2]
    config = tuning.w4_few_config(
        arch(x.device),
        num_rows,
        rows_of_tiles * 32,
        tiles_k * 128,
        paired=weight.paired,
        group_size=weight.group_size,
    )
    norm_inside = num_rows == 1 and norm_weight is not None and config.norm
    if num_rows > 1:
        x = _sorted(x, weight, norm_weight, eps)
    else:
        x = x.contiguous() if norm_weight is None or norm_inside else rms_norm(x, norm_weight, eps)
    rows_at_once = config.num_warps // config.along_k
    row = tiles_k // config.along_k  # turns of it
    num_turns = rows_of_tiles // rows_at_once * row
    shared_by = (row - 1) // config.turns + 2
    values = 2 if num_rows == 1 else 8 * triton.cdiv(num_rows, 8)
    limits = {"maxnreg": config.registers} if arch(x.device) else {}
    few_rows_kernel[(triton.cdiv(num_turns, config.turns),)](
        x,
        norm_weight if norm_inside else x,
        weight.tiles,
        x if bias is None else bias,
        out,
        torch.empty(rows_of_tiles * shared_by * 32 * values, dtype=torch.float32, device=x.device),
        arrival_counters(x.device),
        num_rows,
        eps,
        PADDED_K=triton.next_power_of_2(weight.num_in),
        VALUES=values,
        NW=rows_at_once,
        KW=config.along_k,
        TURNS=config.turns,
        HELD=config.held and row % config.turns == 0,
        EARLY=config.early,
        SORTED=num_rows > 1,
        NORM=norm_inside,
        num_warps=config.num_warps,
        **flags,
        **limits,
    )


def _launch_wide(x: Tensor, weight: W4Tiles, bias: Tensor, out: Tensor, flags: dict[str, Any]) -> None:
    num_rows = out.shape[0]
    rows_of_tiles, tiles_k = weight.tiles.shape[:2]
    config = tuning.w4_wide_config(arch(x.device), num_rows, rows_of_tiles * 32, tiles_k * 128, paired=weight.paired)
    block_n = 16 * config.num_warps * config.high
    grid = (triton.cdiv(rows_of_tiles * 32, block_n), triton.cdiv(num_rows, config.block_m), config.split)
    num_partials = grid[0] * grid[1] * config.split * block_n * config.block_m if config.split > 1 else 0
    wide_kernel[grid](
        x,
        weight.tiles,
        bias,
        out,
        torch.empty(num_partials, dtype=torch.float32, device=x.device),
        arrival_counters(x.device),
        num_rows,
        BM=config.block_m,
        NW=config.num_warps,
        HIGH=config.high,
        SPLIT=config.split,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        **flags,
    )


@triton.jit
def _expand_kernel(
    tiles_ptr,
    out_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    TILES_K: tl.constexpr,
    GROUPS: tl.constexpr,
    PAIRED: tl.constexpr,
    PDL: tl.constexpr,
):
    """One tile a program: out[n, k] = (code - zero) · scale for its 32 × 128, rounded once."""
    allow_next(PDL)
    i_n, i_k = tl.program_id(0), tl.program_id(1)
    tile_ptr = tiles_ptr + (i_n.to(tl.int64) * TILES_K + i_k) * (512 + 32 * GROUPS)
    row = tl.arange(0, 32)[:, None]
    k = tl.arange(0, 128)[None, :]
    word = tl.load(tile_ptr + row // 8 * 128 + row % 8 * 16 + k // 2 % 4 * 4 + k // 8 % 2 * 2 + k // 16 % 2)
    code = (word >> (k // 32 * 4 + k % 2 * 16)) & 15
    meta = tl.load(tile_ptr + 512 + k // (128 // GROUPS) * 32 + row % 8 * 4 + row // 8)
    weight = (code - ((meta >> 16) & 15)).to(tl.float32) * scale_of(meta).to(tl.float32)
    n = i_n * 32 + row
    if PAIRED:
        n = i_n * 16 + row // 16 * 8 + row % 8 + row // 8 % 2 * (N // 2)
    o_k = i_k * 128 + k
    wait_for_previous(PDL)
    mask = (i_n * 32 + row < N) & (o_k < K)
    tl.store(out_ptr + n.to(tl.int64) * K + o_k, weight.to(out_ptr.dtype.element_ty), mask=mask)


def w4_expand(weight: W4Tiles, dtype: torch.dtype) -> Tensor:
    out = torch.empty((weight.num_out, weight.num_in), dtype=dtype, device=weight.tiles.device)
    _expand_kernel[(weight.tiles.shape[0], weight.tiles.shape[1])](
        weight.tiles,
        out,
        N=weight.num_out,
        K=weight.num_in,
        TILES_K=weight.tiles.shape[1],
        GROUPS=weight.groups,
        PAIRED=weight.paired,
        num_warps=4,
        **dependent_launch(out.device),
    )
    return out
