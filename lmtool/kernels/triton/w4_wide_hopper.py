"""4-bit weights times tens to thousands of rows on Hopper: codes are expanded while the tensor cores multiply.

The tiles and the arithmetic of `w4_wide.py`. Plain Triton waits for each product whose left operand is in registers;
Gluon lets the kernel say when, so that half a tile is expanded while the half before it is multiplied. x comes through
the copy engine, stages ahead. As many programs as the card holds at once: `w4_wide_plan.py` says what each computes.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language import debug_barrier

from lmtool.kernels.triton.launch import (
    allow_next,
    arrival_counters,
    dependent_launch,
    multiprocessors,
    wait_for_previous,
)
from lmtool.kernels.triton.tuning import W4HopperConfig
from lmtool.kernels.triton.w4_wide_parts import give, take
from lmtool.kernels.triton.w4_wide_plan import piece_of, share_out
from lmtool.kernels.w4_layout import W4Tiles

# Triton 3.6 calls it otherwise than 3.9
_copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_X_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


@gluon.constexpr_function
def _words_layout(NW, HIGH):
    """Words [16 · NW · HIGH, 16] in the order in which they are stored: a thread has four side by side of a row."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0], *([16 * NW << i, 0] for i in range(HIGH.bit_length() - 1))],
        lane_bases=[[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16 << i, 0] for i in range(NW.bit_length() - 1)],
        block_bases=[],
        shape=[16 * NW * HIGH, 16],
    )


# ------------------------------------------------------------------ codes
@gluon.jit
def _plane(w, meta, SHIFT: gl.constexpr, HIGH: gl.constexpr, dtype: gl.constexpr):
    """(code - zero) · scale of the codes SHIFT bits up in each half of w [rows, 16] → [rows, 16, 2].

    The difference is exact, the product rounded. HIGH: the code stays in bits 4 to 7, over a power of two of its own.
    """
    BF16: gl.constexpr = dtype == gl.bfloat16
    MAGIC: gl.constexpr = 0x43004300 if BF16 else 0x54005400 if HIGH else 0x64006400
    CONSTANTS: gl.constexpr = (
        "0x000f000f, 0x43004300" if BF16 else "0x00f000f0, 0x54005400" if HIGH else "0x000f000f, 0x64006400"
    )
    KIND: gl.constexpr = "bf16x2" if BF16 else "f16x2"
    zero = ((meta >> 16) & 15) << (4 if HIGH else 0)
    scale = meta & 0xFFFF
    low, high = gl.inline_asm_elementwise(
        "{ .reg .b32 t; lop3.b32 t, $2, " + CONSTANTS + ", 0xea; "
        "sub." + KIND + " t, t, $4; mul." + KIND + " t, t, $3; mov.b32 {$0, $1}, t; }",
        "=h,=h,r,r,r",
        [
            w >> SHIFT if SHIFT else w,
            _as_stored(scale | scale << 16, dtype)[:, None],
            (zero | zero << 16 | MAGIC)[:, None],
        ],
        dtype=(gl.int16, gl.int16),
        is_pure=True,
        pack=1,
    )
    return gl.join(low, high).to(dtype, bitcast=True)


@gluon.jit
def _as_stored(scale, dtype: gl.constexpr):
    """Two float16 scales in a word, as two numbers of dtype in a word."""
    if dtype == gl.bfloat16:
        rounded = (scale & 0xFFFF).to(gl.int16).to(gl.float16, bitcast=True).to(dtype).to(gl.int16, bitcast=True)
        scale = rounded.to(gl.int32) & 0xFFFF
        scale = scale | scale << 16
    return scale


@gluon.jit
def _half_tile(w, even, odd, HALF: gl.constexpr, layout: gl.constexpr, dtype: gl.constexpr):
    """In features 64 · HALF on of a tile's words [rows, 16] → weights [rows, 64], as the left operand.

    even, odd: scale and zero point [rows] of the first 32 of them, and of the others.
    """
    ROWS: gl.constexpr = w.shape[0]
    first = _plane(w, even, 8 * HALF, False, dtype)
    if dtype == gl.bfloat16:
        second = _plane(w, odd, 8 * HALF + 4, False, dtype)
    else:
        second = _plane(w, odd, 8 * HALF, True, dtype)
    both = gl.join(first, second).reshape(ROWS, 4, 2, 2, 2, 2)  # n t q e b j
    return gl.convert_layout(gl.permute(both, (0, 5, 3, 2, 1, 4)).reshape(ROWS, 64), layout)


@gluon.jit
def _metas(ptrs, GROUPS: gl.constexpr):
    """Scale and zero point of each quarter of a tile."""
    meta0 = gl.load(ptrs)
    meta1 = gl.load(ptrs + 32) if GROUPS == 4 else meta0
    meta2 = gl.load(ptrs + 32 * (GROUPS // 2)) if GROUPS > 1 else meta0
    meta3 = gl.load(ptrs + 96) if GROUPS == 4 else meta2
    return meta0, meta1, meta2, meta3


# ------------------------------------------------------------------ x
@gluon.jit
def _place(tile, tiles_n, tiles_m):
    """Which rows of weights and of x a tile stands for: programs of a wave share both out of the L2."""
    NEIGHBOURS: gl.constexpr = 8
    group = tile // (NEIGHBOURS * tiles_n)
    height = gl.minimum(tiles_m - group * NEIGHBOURS, NEIGHBOURS)
    within = tile % (NEIGHBOURS * tiles_n)
    return within // height, group * NEIGHBOURS + within % height


@gluon.jit
def _first_row(i_m, num_rows, BM: gl.constexpr):
    """Of x, for a tile. The last begins earlier where it can: the copy engine is slow at rows that are not there."""
    return gl.minimum(i_m * BM, gl.maximum(num_rows - BM, 0))


@gluon.jit
def _fetch(x_desc, x_smem, full, stage, row, unit, pred, BM: gl.constexpr):
    """Ask for BM rows of x, 128 wide, as two halves that fill a line of the swizzle each."""
    mbarrier.expect(full.index(stage), BM * 256, pred=pred)
    _copy(x_desc, [row, unit * 128], full.index(stage), x_smem.index(2 * stage), pred=pred)
    _copy(x_desc, [row, unit * 128 + 64], full.index(stage), x_smem.index(2 * stage + 1), pred=pred)


# ------------------------------------------------------------------ the kernel
@gluon.jit(do_not_specialize=["num_rows", "tiles_n", "tiles_m", "units", "pieces", "whole", "rest", "share", "most"])
def wide_hopper_kernel(
    x_desc,
    tiles_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    num_rows,
    tiles_n,
    tiles_m,
    units,
    pieces,
    whole,
    rest,
    share,
    most,
    N: gl.constexpr,
    TILES_K: gl.constexpr,
    GROUPS: gl.constexpr,
    BM: gl.constexpr,
    HIGH: gl.constexpr,
    STAGES: gl.constexpr,
    GATED: gl.constexpr,
    BIAS: gl.constexpr,
    ADD: gl.constexpr,
    PDL: gl.constexpr,
):
    """out [M, N] (+)= x [M, K] @ w.T; a tile of it is 16 · warps · HIGH rows of w, all of them there, by BM of x.

    x_desc takes [BM, 64] of x. pieces to most: the fields of `Shares`. arrivals: for each tile that is shared a
    counter, zero before and after.
    """
    allow_next(PDL)
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    NW: gl.constexpr = gl.num_warps()
    ROWS: gl.constexpr = 16 * NW * HIGH
    CHUNK: gl.constexpr = 32 if BM == 256 else 16
    WORDS: gl.constexpr = 512 + 32 * GROUPS
    STRIDE: gl.constexpr = TILES_K * WORDS
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[NW, 1], instr_shape=[16, BM, 16]
    )
    a_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    w_layout: gl.constexpr = _words_layout(NW, HIGH)
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [2 * STAGES, BM, 64], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
    program, programs = gl.program_id(0), gl.num_programs(0)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, w_layout))
    word = gl.arange(0, 16, layout=gl.SliceLayout(0, w_layout))
    o_words = (row // 32 * STRIDE + row // 8 % 4 * 128 + row % 8 * 16)[:, None] + word[None, :]
    o_meta = row // 32 * STRIDE + 512 + row % 8 * 4 + row // 8 % 4
    tile, start, end, part, parts, adding = piece_of(0, program, programs, whole, rest, share, units)
    i_n, i_m = _place(tile, tiles_n, tiles_m)
    tile_ptr = tiles_ptr + (i_n * (ROWS // 32)).to(gl.int64) * STRIDE + start * WORDS
    w = gl.load(tile_ptr + o_words)
    meta0, meta1, meta2, meta3 = _metas(tile_ptr + o_meta, GROUPS)
    wait_for_previous(PDL)
    # what is asked for next: a piece, a row of x, a unit
    f_piece, f_row, f_unit, f_end = 0, _first_row(i_m, num_rows, BM), start, end
    for stage in range(STAGES - 1):
        _fetch(x_desc, x_smem, full, stage, f_row, f_unit, f_unit < f_end, BM)
        f_unit += 1
        if f_unit >= f_end:
            f_piece += 1
            if f_piece < pieces:
                f_tile, f_unit, f_end, _p, _ps, _a = piece_of(f_piece, program, programs, whole, rest, share, units)
                _f_n, f_m = _place(f_tile, tiles_n, tiles_m)
                f_row = _first_row(f_m, num_rows, BM)
    stage = 0
    phase = 0
    for s in range(pieces):
        n_tile, n_start, n_end, n_part, n_parts, n_adding = piece_of(
            s + 1, program, programs, whole, rest, share, units
        )
        n_n, n_m = _place(n_tile, tiles_n, tiles_m)
        next_ptr = tiles_ptr + (n_n * (ROWS // 32)).to(gl.int64) * STRIDE + n_start * WORDS
        if start < end:
            acc = gl.zeros([ROWS, BM], gl.float32, layout=acc_layout)
            for unit in range(start, end):
                first = _half_tile(w, meta0, meta1, 0, a_layout, dtype)
                mbarrier.wait(full.index(stage), phase)
                acc = warpgroup_mma(first, x_smem.index(2 * stage).permute((1, 0)), acc, is_async=True)
                second = _half_tile(w, meta2, meta3, 1, a_layout, dtype)
                tile_ptr = tile_ptr + WORDS if unit + 1 < end else next_ptr
                w = gl.load(tile_ptr + o_words)
                meta0, meta1, meta2, meta3 = _metas(tile_ptr + o_meta, GROUPS)
                acc = warpgroup_mma_wait(1, deps=(acc,))
                # the unit before is done with: its stage is free
                _fetch(x_desc, x_smem, full, (stage + STAGES - 1) % STAGES, f_row, f_unit, f_unit < f_end, BM)
                f_unit += 1
                if f_unit >= f_end:
                    f_piece += 1
                    if f_piece < pieces:
                        f_tile, f_unit, f_end, _p, _ps, _a = piece_of(
                            f_piece, program, programs, whole, rest, share, units
                        )
                        _f_n, f_m = _place(f_tile, tiles_n, tiles_m)
                        f_row = _first_row(f_m, num_rows, BM)
                acc = warpgroup_mma(second, x_smem.index(2 * stage + 1).permute((1, 0)), acc, is_async=True)
                acc = warpgroup_mma_wait(1, deps=(acc,))
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1
            acc = warpgroup_mma_wait(0, deps=(acc,))
            first_m = _first_row(i_m, num_rows, BM)
            from_m, to_m = i_m * BM - first_m, num_rows - first_m
            i_shared = tile - whole * programs
            parts_ptr = partial_ptr + i_shared.to(gl.int64) * (most * ROWS * BM)
            if parts > 1:
                give(acc, parts_ptr, part, adding, most, from_m, to_m, 0, CHUNK)
                debug_barrier()  # every thread's part is written before it is counted
                arrived = gl.atomic_add(arrivals_ptr + i_shared, 1, sem="acq_rel") + 1
                if part < adding:
                    while arrived < parts:
                        arrived = gl.atomic_add(arrivals_ptr + i_shared, 0, sem="acquire")
            if part < adding:
                take(
                    acc, parts_ptr, part, parts, adding, most, out_ptr, bias_ptr, i_n, first_m, from_m, to_m,
                    0, CHUNK, N, GATED, BIAS, ADD,
                )  # fmt: skip
                if parts > 1:
                    debug_barrier()
                    if gl.atomic_add(arrivals_ptr + i_shared, 1, sem="acq_rel") + 1 == parts + adding:
                        gl.store(arrivals_ptr + i_shared, 0)
        tile, start, end, part, parts, adding = n_tile, n_start, n_end, n_part, n_parts, n_adding
        i_n, i_m = n_n, n_m


def launch_wide_hopper(
    x: Tensor, weight: W4Tiles, bias: Tensor | None, out: Tensor, config: W4HopperConfig, *, add: bool
) -> None:
    """out [T, num_out] (paired: half of it, gated) = x [T, num_in] @ w.T + bias, or with ``add`` added to out.

    x is contiguous; config's tiles hold whole rows of weight's tiles.
    """
    num_rows, num_in = x.shape
    if x.data_ptr() % 16:
        x = x.clone()  # the copy engine takes whole 16 bytes
    rows_of_tiles, tiles_k = weight.tiles.shape[:2]
    tile_rows = 16 * config.num_warps * config.high
    tiles_n, tiles_m = rows_of_tiles * 32 // tile_rows, triton.cdiv(num_rows, config.block_m)
    units = triton.cdiv(num_in, 128)
    slots = multiprocessors(x.device) * config.programs
    shares = share_out(tiles_n * tiles_m, units, slots)
    registers = 65536 // (32 * config.num_warps * config.programs)  # or fewer programs would be on a multiprocessor
    num_partials = shares.rest * shares.parts * tile_rows * config.block_m if shares.parts > 1 else 0
    wide_hopper_kernel[(shares.programs,)](
        TensorDescriptor(x, [num_rows, num_in], [num_in, 1], [config.block_m, 64], _X_LAYOUT),
        weight.tiles,
        x if bias is None else bias,
        out,
        torch.empty(num_partials, dtype=torch.float32, device=x.device),
        arrival_counters(x.device),
        num_rows,
        tiles_n,
        tiles_m,
        units,
        *shares[1:],
        N=out.shape[1],
        TILES_K=tiles_k,
        GROUPS=weight.groups,
        BM=config.block_m,
        HIGH=config.high,
        STAGES=config.num_stages,
        GATED=weight.paired,
        BIAS=bias is not None,
        ADD=add,
        num_warps=config.num_warps,
        **dependent_launch(x.device),
        **({"maxnreg": registers} if registers < 255 else {}),
    )
