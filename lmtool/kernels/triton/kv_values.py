"""Weights times the values of a quantized cache, and what becomes of the sums when a piece is done.

Results lie as `w4_mma.mma` leaves them: of tile m lane 4g + t has dims 16m + g (first two numbers) and 16m + 8 + g,
each of heads 2t and 2t + 1.
"""

import triton
import triton.language as tl

from lmtool.kernels.triton.kv_access import ask, load_words, take
from lmtool.kernels.triton.kv_mma import SUBNORMAL, add_bytes, add_nibbles, lanes, unpack


@triton.jit
def ask_values(shared, v_ptr, wanted, DIM: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """A block's words [DIM · BITS / 8, 16]: of each sixteen rows g and 8 + g, sixteen tokens a lane."""
    lane = lanes(shared)
    for row in tl.static_range(0, DIM * BITS // 8, 8):
        ask(shared + lane * 16, v_ptr + lane * 4, wanted, 64 * row, 16 * row, 4, ASM)


@triton.jit
def scaled(total, factor0, factor1, FROM: tl.constexpr):
    """Results from tile FROM on times what belongs to heads 2t and 2t + 1."""
    out = ()
    for m in tl.static_range(len(total)):
        c = total[m]
        if m >= FROM:
            c = (c[0] * factor0, c[1] * factor1, c[2] * factor0, c[3] * factor1)
        out += (c,)
    return out


@triton.jit
def add_values(shared, v_ptr, total, weights, BITS: tl.constexpr, ASM: tl.constexpr):
    """total + codes · weights · 2⁻²⁴ for each sixteen dims; of four bits the upper half's are 16 times that."""
    lane = lanes(shared)
    places, ptrs = shared + lane * 16, v_ptr + lane * 4
    TILES: tl.constexpr = len(total) * BITS // 8  # of rows of words
    lower, upper = (), ()
    for m in tl.static_range(0, TILES, 2):  # two tiles at once: as many chains of products, or twice
        rows = ()
        for i in tl.static_range(4 if m + 1 < TILES else 2):
            rows += (take(places, ptrs, 64 * (16 * m + 8 * i), 16 * (16 * m + 8 * i), 4, ASM),)
        if BITS == 8:
            lower += _add_tiles(_some(total, m, TILES), rows, weights, ASM)
        else:
            found = _add_packed(_some(total, m, TILES), _some(total, TILES + m, 2 * TILES), rows, weights, ASM)
            lower += found[0]
            upper += found[1]
    return lower + upper


@triton.jit
def _some(total, FROM: tl.constexpr, TO: tl.constexpr):
    """Two tiles, or the last one."""
    out = (total[FROM],)
    if FROM + 1 < TO:
        out += (total[FROM + 1],)
    return out


@triton.jit
def _add_tiles(total, rows, weights, ASM: tl.constexpr):
    for i in tl.static_range(4):
        more = ()
        for m in tl.static_range(len(total)):
            more += (add_bytes(total[m], rows[2 * m][i], rows[2 * m + 1][i], weights[i], ASM),)
        total = more
    return total


@triton.jit
def _add_packed(lower, upper, rows, weights, ASM: tl.constexpr):
    for i in tl.static_range(4):
        more, more_upper = (), ()
        for m in tl.static_range(len(lower)):
            a, b = rows[2 * m][i], rows[2 * m + 1][i]
            found = add_nibbles(lower[m], upper[m], a, b, weights[i], weights[i], False, ASM)
            more += (found[0],)
            more_upper += (found[1],)
        lower, upper = more, more_upper
    return lower, upper


@triton.jit
def averages(total, sums, lows, FROM: tl.constexpr):
    """(codes · weights + Σ weight · minimum) / Σ weight; from tile FROM on the codes are 16 times what they are.

    A row that saw nothing (padded) becomes zeros.
    """
    inverse0, inverse1 = 1.0 / tl.where(sums[0] > 0, sums[0], 1.0), 1.0 / tl.where(sums[1] > 0, sums[1], 1.0)
    out = ()
    for m in tl.static_range(len(total)):
        c = total[m]
        unit = SUBNORMAL / 16 if m >= FROM else SUBNORMAL
        out += (
            (
                (c[0] * unit + lows[0]) * inverse0,
                (c[1] * unit + lows[1]) * inverse1,
                (c[2] * unit + lows[0]) * inverse0,
                (c[3] * unit + lows[1]) * inverse1,
            ),
        )
    return out


@triton.jit
def of_channels(total, meta_ptr, share, DIM: tl.constexpr, ASM: tl.constexpr):
    """Where V's parameters belong to channels: results · scale + share · minimum, from float16 [2, DIM]."""
    g = lanes(meta_ptr) // 4
    ptrs = meta_ptr.to(tl.pointer_type(tl.int32)) + g // 2
    out = ()
    for m in tl.static_range(len(total)):
        c = total[m]
        upper, lower = _own(ptrs, g, share, 8 * m, DIM, ASM), _own(ptrs, g, share, 8 * m + 4, DIM, ASM)
        out += (
            (
                c[0] * upper[0] + upper[1],
                c[1] * upper[0] + upper[1],
                c[2] * lower[0] + lower[1],
                c[3] * lower[0] + lower[1],
            ),
        )
    return out


@triton.jit
def _own(ptrs, g, share, OFFSET: tl.constexpr, DIM: tl.constexpr, ASM: tl.constexpr):
    """A row's scale and share of its minimum, each one half of a word."""
    scales = unpack(load_words(ptrs, g, OFFSET, 1, ASM)[0], tl.float16)
    minima = unpack(load_words(ptrs, g, OFFSET + DIM // 2, 1, ASM)[0], tl.float16)
    return tl.where(g % 2 == 0, scales[0], scales[1]), share * tl.where(g % 2 == 0, minima[0], minima[1])
