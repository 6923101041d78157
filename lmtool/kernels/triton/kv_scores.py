"""Scores of 64 tokens of a quantized cache and eight heads, and their softmax.

A score is kept in base 2 with the logarithm of its token's scale of V added: then weights are at most 1, fit float16
and need no other scale. What the softmax divides by, and what V's minima add, are sums in float32 beside it.
"""

import triton
import triton.language as tl

from lmtool.kernels.triton.kv_access import ask, load_words, take
from lmtool.kernels.triton.kv_mma import (
    SUBNORMAL,
    add_bytes,
    add_nibbles,
    lanes,
    nothing,
    of_four,
    pack,
    sum_of_rows,
    top_of_rows,
    transposed,
    unpack,
)
from lmtool.kernels.triton.kv_query import words_at_once

_SMALLEST = tl.constexpr(2.0**-24)


@triton.jit
def first_token(like):
    """Which token of a block a lane's row is; the row's other one is the next token. Tile i of four lies 4i further."""
    g = lanes(like) // 4
    return g // 2 * 16 + g % 2 * 2


@triton.jit
def _rows_of_keys(shared, k_ptr, DIM: tl.constexpr, BITS: tl.constexpr):
    """Where a lane's words begin in memory, and where in shared memory: all lanes' words of one load side by side."""
    AT_ONCE: tl.constexpr = words_at_once(DIM, BITS)
    lane = lanes(shared)
    return k_ptr + first_token(shared) * (DIM * BITS // 32) + lane % 4 * AT_ONCE, shared + lane * (4 * AT_ONCE)


@triton.jit
def ask_keys(shared, k_ptr, wanted, DIM: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """A block's words [64, DIM · BITS / 32] from k_ptr on: of tiles 0 … 3 the rows of both tokens of a lane."""
    AT_ONCE: tl.constexpr = words_at_once(DIM, BITS)
    ROW: tl.constexpr = DIM * BITS // 32
    LOADS: tl.constexpr = ROW // 4 // AT_ONCE
    ptrs, places = _rows_of_keys(shared, k_ptr, DIM, BITS)
    for row in tl.static_range(8):
        for n in tl.static_range(LOADS):
            ask(
                places,
                ptrs,
                wanted,
                (row * LOADS + n) * (128 * AT_ONCE),
                (row // 2 * 4 + row % 2) * ROW + 4 * n * AT_ONCE,
                AT_ONCE,
                ASM,
            )


@triton.jit
def _take_keys(
    places,
    ptrs,
    TILE: tl.constexpr,
    N: tl.constexpr,
    SECOND: tl.constexpr,
    DIM: tl.constexpr,
    BITS: tl.constexpr,
    ASM: tl.constexpr,
):
    """Load N of a tile's first or second tokens."""
    AT_ONCE: tl.constexpr = words_at_once(DIM, BITS)
    ROW: tl.constexpr = DIM * BITS // 32
    LOADS: tl.constexpr = ROW // 4 // AT_ONCE
    PLACE: tl.constexpr = ((2 * TILE + SECOND) * LOADS + N) * (128 * AT_ONCE)
    return take(places, ptrs, PLACE, (4 * TILE + SECOND) * ROW + 4 * N * AT_ONCE, AT_ONCE, ASM)


@triton.jit
def load_tokens(meta_ptr, wanted, ASM: tl.constexpr):
    """Scale and minimum of two tokens a lane, of tile t the tokens of row g: `of_four` hands them out."""
    return load_words(meta_ptr + first_token(wanted) + lanes(wanted) % 4 * 4, wanted, 0, 2, ASM, MASKED=True)


@triton.jit
def scores(shared, k_ptr, q, DIM: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """codes · q · 2⁻²⁴ of four tiles of sixteen tokens, where `mma` puts them: first tokens, then those after them.

    One product of each tile after the other: four chains of them, none of which waits for itself.
    """
    AT_ONCE: tl.constexpr = words_at_once(DIM, BITS)
    ptrs, places = _rows_of_keys(shared, k_ptr, DIM, BITS)
    none = nothing(shared)
    tiles = (none, none, none, none)
    for n in tl.static_range(DIM * BITS // 128 // AT_ONCE):
        rows = ()
        for i in tl.static_range(4):
            first = _take_keys(places, ptrs, i, n, 0, DIM, BITS, ASM)
            rows += ((first, _take_keys(places, ptrs, i, n, 1, DIM, BITS, ASM)),)
        for j in tl.static_range(AT_ONCE):
            more = ()
            for i in tl.static_range(4):
                if BITS == 8:
                    more += (add_bytes(tiles[i], rows[i][0][j], rows[i][1][j], q[n * AT_ONCE + j], ASM),)
                else:
                    lower, upper = q[2 * (n * AT_ONCE + j)], q[2 * (n * AT_ONCE + j) + 1]
                    more += (add_nibbles(tiles[i], tiles[i], rows[i][0][j], rows[i][1][j], lower, upper, True, ASM),)
            tiles = more
    return tiles


@triton.jit
def token_terms(k_meta, v_meta, seen, factor, K_TOKENS: tl.constexpr, V_TOKENS: tl.constexpr):
    """What a token's two groups make of its score: (scale of K, minimum of K, log₂ of V's scale, its inverse, minimum).

    The minimum of V is divided by its scale. Of a token that is not seen the metas may be anything: it weighs nothing.
    """
    zero = tl.zeros(seen.shape, tl.float32)
    scale, low, inverse, offset = zero, zero, zero, zero
    log = tl.where(seen, 0.0, float("-inf"))
    if K_TOKENS:
        scale, low = unpack(k_meta, tl.float16)
        scale = tl.where(seen, scale * (factor * SUBNORMAL), 0.0)
        low = tl.where(seen, low * factor, 0.0)
    if V_TOKENS:
        of_v, offset = unpack(v_meta, tl.float16)
        # a scale of zero comes with codes of zero: any other would do
        log_v = tl.log2(tl.maximum(of_v, _SMALLEST))
        log = tl.where(seen, log_v, float("-inf"))
        inverse = tl.where(seen, tl.exp2(-log_v), 0.0)
        offset = tl.where(seen, offset * inverse, 0.0)
    return scale, low, log, inverse, offset


@triton.jit
def _logits(tile, pair, per_head, TILE: tl.constexpr, factor, K_TOKENS: tl.constexpr, ASM: tl.constexpr):
    """Of a tile: score · log₂ e + log₂ of V's scale, for rows g and 8 + g and heads 2t and 2t + 1."""
    log_a, log_b = of_four(pair[0][2], TILE, ASM), of_four(pair[1][2], TILE, ASM)
    if K_TOKENS:
        scale_a, scale_b = of_four(pair[0][0], TILE, ASM), of_four(pair[1][0], TILE, ASM)
        low_a, low_b = of_four(pair[0][1], TILE, ASM), of_four(pair[1][1], TILE, ASM)
        out = (
            tile[0] * scale_a + (low_a * per_head[0] + log_a),
            tile[1] * scale_a + (low_a * per_head[1] + log_a),
            tile[2] * scale_b + (low_b * per_head[0] + log_b),
            tile[3] * scale_b + (low_b * per_head[1] + log_b),
        )
    else:
        scale = factor * SUBNORMAL
        first, second = per_head[0] * factor, per_head[1] * factor
        out = (
            tile[0] * scale + (first + log_a),
            tile[1] * scale + (second + log_a),
            tile[2] * scale + (first + log_b),
            tile[3] * scale + (second + log_b),
        )
    return out


@triton.jit
def softmax(tiles, pair, per_head, sums, factor, K_TOKENS: tl.constexpr, V_TOKENS: tl.constexpr, ASM: tl.constexpr):
    """Scores of 64 tokens → (weights as the right operand, new sums, what the results so far are multiplied with).

    sums: for heads 2t and 2t + 1 the largest logit, and of a lane's own tokens Σ weight / scale of V and
    Σ weight · minimum / scale of V. per_head: Σ q or, of K's channels, Σ q · minimum.
    """
    top0, top1, total0, total1, low0, low1 = sums
    logits = ()
    new0, new1 = top0, top1
    for i in tl.static_range(4):
        x = _logits(tiles[i], pair, per_head, i, factor, K_TOKENS, ASM)
        new0 = tl.maximum(new0, tl.maximum(x[0], x[2]))
        new1 = tl.maximum(new1, tl.maximum(x[1], x[3]))
        logits += (x,)
    new0, new1 = top_of_rows(new0, ASM), top_of_rows(new1, ASM)
    decay0, decay1 = tl.exp2(top0 - new0), tl.exp2(top1 - new1)
    total0, total1 = total0 * decay0, total1 * decay1
    low0, low1 = low0 * decay0, low1 * decay1
    weights = ()
    for i in tl.static_range(4):
        x = logits[i]
        p0, p1, p2, p3 = tl.exp2(x[0] - new0), tl.exp2(x[1] - new1), tl.exp2(x[2] - new0), tl.exp2(x[3] - new1)
        if V_TOKENS:
            inverse_a, inverse_b = of_four(pair[0][3], i, ASM), of_four(pair[1][3], i, ASM)
            offset_a, offset_b = of_four(pair[0][4], i, ASM), of_four(pair[1][4], i, ASM)
            total0 += p0 * inverse_a + p2 * inverse_b
            total1 += p1 * inverse_a + p3 * inverse_b
            low0 += p0 * offset_a + p2 * offset_b
            low1 += p1 * offset_a + p3 * offset_b
        else:
            total0 += p0 + p2
            total1 += p1 + p3
        first, second = pack(p0, p1, tl.float16, ASM), pack(p2, p3, tl.float16, ASM)
        weights += ((transposed(first, ASM), transposed(second, ASM)),)
    return weights, (new0, new1, total0, total1, low0, low1), (decay0, decay1)


@triton.jit
def finished(sums, ASM: tl.constexpr):
    """What the lanes added up apart, together: (largest logits, Σ weight / scale, Σ weight · minimum / scale)."""
    top0, top1, total0, total1, low0, low1 = sums
    total = (sum_of_rows(total0, ASM), sum_of_rows(total1, ASM))
    return (top0, top1), total, (sum_of_rows(low0, ASM), sum_of_rows(low1, ASM))
