"""A few rows of x as the right operand of `w4_mma.mma`: loaded, sorted so that loads are wide, normalized.

A tile of x has four planes of 32 in features; of each a thread has four registers (e, q) of two numbers.
"""

import triton
import triton.language as tl

from lmtool.kernels.triton.launch import allow_next, wait_for_previous
from lmtool.kernels.triton.norm import normalize
from lmtool.kernels.triton.w4_mma import four, times


@triton.jit
def _load_plane(x_ptrs, J: tl.constexpr, left, SORTED: tl.constexpr, PADDED: tl.constexpr):
    """x of in features 32J … 32J + 31 of a tile: four registers (e, q).

    ``left``: in features that x still has from the tile on; a group is 32 of them or more, so it is all or none.
    """
    if SORTED:
        x = four(tl.load(x_ptrs + 16 * J))
    elif PADDED:
        mask = left > 32 * J
        x = (
            tl.load(x_ptrs + 16 * J, mask=mask, other=0),
            tl.load(x_ptrs + 16 * J + 4, mask=mask, other=0),
            tl.load(x_ptrs + 16 * J + 8, mask=mask, other=0),
            tl.load(x_ptrs + 16 * J + 12, mask=mask, other=0),
        )
    else:
        x = (
            tl.load(x_ptrs + 16 * J),
            tl.load(x_ptrs + 16 * J + 4),
            tl.load(x_ptrs + 16 * J + 8),
            tl.load(x_ptrs + 16 * J + 12),
        )
    return x


@triton.jit
def load_x(x_ptrs, left, SORTED: tl.constexpr, PADDED: tl.constexpr):
    """Eight rows of x for a tile: x[j][2e + q]."""
    return (
        _load_plane(x_ptrs, 0, left, SORTED, PADDED),
        _load_plane(x_ptrs, 1, left, SORTED, PADDED),
        _load_plane(x_ptrs, 2, left, SORTED, PADDED),
        _load_plane(x_ptrs, 3, left, SORTED, PADDED),
    )


@triton.jit
def _normed(x, weight, power, dtype: tl.constexpr, ASM: tl.constexpr):
    """Four registers of x, each times a power of two (exactly) and then the norm's weights."""
    return (
        times(times(x[0], power, dtype, ASM), weight[0], dtype, ASM),
        times(times(x[1], power, dtype, ASM), weight[1], dtype, ASM),
        times(times(x[2], power, dtype, ASM), weight[2], dtype, ASM),
        times(times(x[3], power, dtype, ASM), weight[3], dtype, ASM),
    )


@triton.jit
def normed_tile(x, weight, power, dtype: tl.constexpr, ASM: tl.constexpr):
    """x of a tile, normalized but for the rest that `inverse_rms` leaves."""
    return (
        _normed(x[0], weight[0], power, dtype, ASM),
        _normed(x[1], weight[1], power, dtype, ASM),
        _normed(x[2], weight[2], power, dtype, ASM),
        _normed(x[3], weight[3], power, dtype, ASM),
    )


@triton.jit
def load_rows(first_ptrs, second_ptrs, left, SORTED: tl.constexpr, PADDED: tl.constexpr, VALUES: tl.constexpr):
    """Each eight rows of x for a tile: one or two."""
    xs = (load_x(first_ptrs, left, SORTED, PADDED),)
    if VALUES == 16:
        xs += (load_x(second_ptrs, left, SORTED, PADDED),)
    return xs


@triton.jit
def inverse_rms(x_ptr, eps, K: tl.constexpr, PADDED_K: tl.constexpr):
    """1 / rms of one row as p · rest: p, a power of two, as two numbers in a register; rest float32, from 1 up to 2."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    o_k = tl.arange(0, PADDED_K)
    x = tl.load(x_ptr + o_k, mask=o_k < K, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, axis=0) / K + eps)
    exponent = inverse.to(tl.int32, bitcast=True) >> 23
    if dtype == tl.bfloat16:
        bits = exponent << 7
    else:
        exponent = tl.minimum(tl.maximum(exponent, 113), 142)  # of float16's normal numbers
        bits = (exponent - 112) << 10
    return bits | bits << 16, inverse / (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def sort_x_kernel(
    x_ptr,
    norm_weight_ptr,
    out_ptr,
    eps,
    K: tl.constexpr,
    PADDED_K: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rows of x, normalized first if asked, with each thread's in features side by side, zeros behind the last.

    In feature 32j + 16e + 8q + 2t + b goes to 32j + 8t + 4e + 2q + b: a thread then loads 16 bytes at once instead of
    four times four.
    """
    allow_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    o_out = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = o_out % 32
    o_k = o_out - inside + inside // 4 % 2 * 16 + inside // 2 % 2 * 8 + inside // 8 * 2 + inside % 2
    if NORM:
        weight = tl.load(norm_weight_ptr + o_k, mask=o_k < K, other=0.0)
    wait_for_previous(PDL)
    x = tl.load(x_ptr + row * K + o_k, mask=o_k < K, other=0.0)
    if NORM:
        x32 = x.to(tl.float32)
        x = normalize(x, tl.sum(x32 * x32, axis=0) / K, weight, eps, x_ptr.dtype.element_ty)
    tl.store(out_ptr + row * PADDED_K + o_out, x, mask=o_out < PADDED_K)
