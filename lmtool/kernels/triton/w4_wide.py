"""4-bit weights times tens to hundreds of rows: codes become weights in registers, which wgmma takes from there.

The same tiles as for a few rows: a warp's words are, in their order, the left operand of m64nNk16 as well. x goes
through shared memory, fetched stages ahead. Beyond that the weights are expanded and the library multiplies (`w4.py`).
On Hopper `w4_wide_hopper.py` takes all of this, but for matrices of an odd number of rows of tiles.
"""

import triton
import triton.language as tl

from lmtool.kernels.triton.activation import gated
from lmtool.kernels.triton.launch import allow_next, wait_for_previous
from lmtool.kernels.triton.w4_codes import halves_of, scale_of


@triton.jit
def _weights(w, scale, even_zero, odd_zero, J: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """(code - zero) · scale of codes j of w [BN, 16] → [BN, 16, 2]: the difference is exact, the product rounded."""
    if dtype == tl.bfloat16:
        number = halves_of(w >> (4 * J), "0x000f000f", "0x43004300", dtype, ASM)  # 128 + q
        zero = even_zero
    elif J % 2 == 0:
        number = halves_of(w >> (4 * J), "0x000f000f", "0x64006400", dtype, ASM)  # 1024 + q
        zero = even_zero
    else:
        number = halves_of(w >> (4 * J - 4), "0x00f000f0", "0x54005400", dtype, ASM)  # 64 + q
        zero = odd_zero
    return (number - zero[:, None, None]) * scale[:, None, None]


@triton.jit
def _zeros(meta, ODD: tl.constexpr, dtype: tl.constexpr):
    """Zero points [BN] in the form of the numbers that they are taken from."""
    if dtype == tl.bfloat16:
        bits = ((meta >> 16) & 15) | 0x4300
    elif ODD:
        bits = ((meta >> 12) & 0xF0) | 0x5400
    else:
        bits = ((meta >> 16) & 15) | 0x6400
    return bits.to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def _left_operand(w, meta_ptrs, GROUPS: tl.constexpr, BN: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """A tile's words [BN, 16] → weights [BN, 128]."""
    meta0 = tl.load(meta_ptrs)
    meta1 = tl.load(meta_ptrs + 32) if GROUPS == 4 else meta0
    meta2 = tl.load(meta_ptrs + 32 * (GROUPS // 2)) if GROUPS > 1 else meta0
    meta3 = tl.load(meta_ptrs + 96) if GROUPS == 4 else meta2
    part0 = _weights(w, scale_of(meta0).to(dtype), _zeros(meta0, 0, dtype), _zeros(meta0, 1, dtype), 0, dtype, ASM)
    part1 = _weights(w, scale_of(meta1).to(dtype), _zeros(meta1, 0, dtype), _zeros(meta1, 1, dtype), 1, dtype, ASM)
    part2 = _weights(w, scale_of(meta2).to(dtype), _zeros(meta2, 0, dtype), _zeros(meta2, 1, dtype), 2, dtype, ASM)
    part3 = _weights(w, scale_of(meta3).to(dtype), _zeros(meta3, 0, dtype), _zeros(meta3, 1, dtype), 3, dtype, ASM)
    both = tl.join(tl.join(part0, part2), tl.join(part1, part3))  # n, word, b, j // 2, j % 2
    return tl.permute(both, (0, 3, 4, 1, 2)).reshape(BN, 128)


@triton.jit(do_not_specialize=["num_rows"])
def wide_kernel(
    x_ptr,
    tiles_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    TILES_N: tl.constexpr,
    TILES_K: tl.constexpr,
    GROUPS: tl.constexpr,
    BM: tl.constexpr,
    NW: tl.constexpr,
    HIGH: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """out [M, N] (+)= x [M, K] @ w.T; a program takes 16 · NW · HIGH rows of w, BM rows of x and one SPLIT-th of K.

    NW warps hold 16 rows of w each, HIGH times; of the parts of K, the program that is last adds all, in their order.
    """
    allow_next(PDL)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    BN: tl.constexpr = 16 * NW * HIGH
    WORDS: tl.constexpr = 512 + 32 * GROUPS
    PART: tl.constexpr = (TILES_K + SPLIT - 1) // SPLIT
    i_n = tl.program_id(0)
    i_m = tl.program_id(1)
    start = tl.program_id(2) * PART
    end = tl.minimum(start + PART, (K + 127) // 128)
    t4, g8 = tl.arange(0, 4), tl.arange(0, 8)
    i_w = tl.arange(0, NW)[None, None, :, None, None]
    i_h = tl.arange(0, 2 * HIGH)[None, None, None, :, None]
    # [t, g, W, high h, word]; rows of tiles beyond the last are read as the last and not kept
    i_tile = tl.minimum(i_n * (BN // 32) + i_w // 2 + i_h // 2 * (NW // 2), TILES_N - 1).to(tl.int64)
    o_word = (g8[None, :, None, None, None] * 4 + t4[:, None, None, None, None]) * 4 + t4[None, None, None, None, :]
    word_ptrs = tiles_ptr + i_tile * (TILES_K * WORDS) + (i_w % 2 * 2 + i_h % 2) * 128 + o_word
    row = tl.arange(0, BN)
    i_row_tile = tl.minimum(i_n * (BN // 32) + row // 32, TILES_N - 1).to(tl.int64)
    meta_ptrs = tiles_ptr + i_row_tile * (TILES_K * WORDS) + 512 + row % 8 * 4 + row // 8 % 4
    o_m = i_m * BM + tl.arange(0, BM)
    # rows beyond the last are computed as others and not kept: no mask in the loop
    x_ptrs = x_ptr + (o_m % num_rows).to(tl.int64)[:, None] * K + tl.arange(0, 128)[None, :]
    wait_for_previous(PDL)
    acc = tl.zeros([BN, BM], tl.float32)
    for tile in tl.range(start, end, num_stages=STAGES):
        w = tl.load(word_ptrs + tile * WORDS).reshape(4, 8, NW, HIGH, 2, 2, 2)  # t g W high h q e
        if K % 128 == 0:
            x = tl.load(x_ptrs + tile * 128)
        else:
            x = tl.load(x_ptrs + tile * 128, mask=(tile * 128 + tl.arange(0, 128) < K)[None, :], other=0.0)
        w = tl.permute(w, (3, 2, 4, 1, 6, 5, 0)).reshape(BN, 16)
        a = _left_operand(w, meta_ptrs + tile * WORDS, GROUPS, BN, dtype, ASM)
        acc = tl.dot(a, tl.trans(x), acc)
    complete = SPLIT == 1
    if SPLIT > 1:
        o_part = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        i_out = i_n * tl.num_programs(1) + i_m
        parts_ptr = partial_ptr + i_out.to(tl.int64) * (SPLIT * BN * BM) + o_part
        tl.store(parts_ptr + tl.program_id(2) * (BN * BM), acc)
        tl.debug_barrier()  # every thread's part is written before this program is counted
        complete = tl.atomic_add(arrivals_ptr + i_out, 1, sem="acq_rel") == SPLIT - 1
        if complete:
            tl.store(arrivals_ptr + i_out, 0)
            acc = tl.zeros([BN, BM], tl.float32)
            for part in range(SPLIT):
                acc += tl.load(parts_ptr + part * (BN * BM), cache_modifier=".cg")
    if complete:
        _write(acc, out_ptr, bias_ptr, i_n, o_m, num_rows, N, BN, BM, GATED, BIAS, ADD)


@triton.jit
def _write(
    out,
    out_ptr,
    bias_ptr,
    i_n,
    o_m,
    num_rows,
    N: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
):
    """out [BN, BM] to its place in [M, N]; gated: eight gates and eight ups become eight."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    HEIGHT: tl.constexpr = BN // 2 if GATED else BN
    if GATED:
        pairs = tl.permute(out.reshape(BN // 16, 2, 8, BM), (0, 2, 3, 1))
        gate, up = tl.split(pairs.reshape(HEIGHT, BM, 2))
        out = gated(gate, up, dtype)
    o_n = i_n * HEIGHT + tl.arange(0, HEIGHT)[:, None]
    mask = (o_n < N) & (o_m < num_rows)[None, :]
    o_out = o_m.to(tl.int64)[None, :] * N + o_n
    if BIAS:
        out += tl.load(bias_ptr + o_n, mask=o_n < N, other=0.0).to(tl.float32)
    if ADD:
        out += tl.load(out_ptr + o_out, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + o_out, out.to(dtype), mask=mask)
