"""4-bit weights times a few rows: the weights are the left operand of small tensor-core products, out of registers.

Decode at few rows is bound by how many instructions a weight costs and by how many loads are under way, not by its
half byte (docs/log.md): here 1.5 to 2.1 instructions. What makes that possible is that no weight moves between threads:
`W4Tiles` holds the words in the order of the operand, and `w4_mma` puts them there. A warp has a tile of 32 out
features in each turn; warps of a program stand side by side along the out features, the in features, or both.

What a short product waits for is a chain of latencies: so the first words are asked for before the previous kernel has
ended, programs are small, which leaves the next kernel's room to begin, and parts are loaded together.
"""

import triton
import triton.language as tl

from lmtool.kernels.triton.launch import allow_next, wait_for_previous
from lmtool.kernels.triton.w4_codes import scale_of
from lmtool.kernels.triton.w4_mma import four, keep_order, mma
from lmtool.kernels.triton.w4_results import finish
from lmtool.kernels.triton.w4_x import inverse_rms, load_rows, load_x, normed_tile


@triton.jit
def _codes(word, J: tl.constexpr, dtype: tl.constexpr):
    """Codes j of a word as a register of two numbers: float16 q·2⁻²⁴, of an odd j 16 times that; bfloat16 128 + q."""
    if dtype == tl.bfloat16:
        out = ((word >> (4 * J)) & 0x000F000F) | 0x43004300
    elif J % 2 == 0:
        out = (word >> (4 * J)) & 0x000F000F
    else:
        out = (word >> (4 * J - 4)) & 0x00F000F0
    return out


@triton.jit
def _factors(meta, dtype: tl.constexpr):
    """What the products of even and of odd codes are multiplied with, and the sum of x: together w · x."""
    zero = (meta >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)  # · 2⁻²⁴
    scale = scale_of(meta).to(tl.float32)
    if dtype == tl.bfloat16:
        out = (scale, scale, (zero * -16777216.0 - 128.0) * scale)
    else:
        even = scale * 16777216.0
        out = (even, scale * 1048576.0, -(zero * even))
    return out


@triton.jit
def _products(c, a0, a1, a2, a3, xs, J: tl.constexpr, E: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """c + a · x for each eight rows of x: one or two."""
    out = (mma(c[0], a0, a1, a2, a3, xs[0][J][2 * E], xs[0][J][2 * E + 1], dtype, ASM),)
    if len(xs) == 2:
        out += (mma(c[1], a0, a1, a2, a3, xs[1][J][2 * E], xs[1][J][2 * E + 1], dtype, ASM),)
    return out


@triton.jit
def _nothing(xs):
    """Where `_products` begins."""
    zero = tl.zeros_like(xs[0][0][0]).to(tl.float32)
    eight = (zero, zero, zero, zero)
    return (eight,) if len(xs) == 1 else (eight, eight)


@triton.jit
def _sums(xs, FROM: tl.constexpr, TO: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """Of x along planes FROM … TO - 1 of a tile, where `mma` puts a result; two chains where registers allow it."""
    one = tl.zeros_like(xs[0][0][0]) + (0x3F803F80 if dtype == tl.bfloat16 else 0x3C003C00)
    out = _nothing(xs)
    if len(xs) == 1:
        other = _nothing(xs)
        for j in tl.static_range(FROM, TO):
            out = _products(out, one, one, one, one, xs, j, 0, dtype, ASM)
            other = _products(other, one, one, one, one, xs, j, 1, dtype, ASM)
        out = ((out[0][0] + other[0][0], out[0][1] + other[0][1]),)
    else:
        for j in tl.static_range(FROM, TO):
            for e in tl.static_range(2):
                out = _products(out, one, one, one, one, xs, j, e, dtype, ASM)
    return out


@triton.jit
def _scaled(total, even, odd, sums, upper, lower):
    """total + what even codes, odd codes and zero points make; upper, lower: factors of rows g and 8 + g."""
    return (
        total[0] + even[0] * upper[0] + odd[0] * upper[1] + sums[0] * upper[2],
        total[1] + even[1] * upper[0] + odd[1] * upper[1] + sums[1] * upper[2],
        total[2] + even[2] * lower[0] + odd[2] * lower[1] + sums[0] * lower[2],
        total[3] + even[3] * lower[0] + odd[3] * lower[1] + sums[1] * lower[2],
    )


@triton.jit
def _add_rows(
    total,
    upper,
    lower,
    factors,
    lower_factors,
    xs,
    sums,
    FROM: tl.constexpr,
    TO: tl.constexpr,
    dtype: tl.constexpr,
    ASM: tl.constexpr,
):
    """total + planes FROM … TO - 1 of sixteen rows times x: words (q, e) of rows g and of rows 8 + g."""
    even, odd = _nothing(xs), _nothing(xs)
    for j in tl.static_range(FROM, TO):
        for e in tl.static_range(2):
            a0, a1 = _codes(upper[e], j, dtype), _codes(lower[e], j, dtype)
            a2, a3 = _codes(upper[2 + e], j, dtype), _codes(lower[2 + e], j, dtype)
            if j % 2 == 0:
                even = _products(even, a0, a1, a2, a3, xs, j, e, dtype, ASM)
            else:
                odd = _products(odd, a0, a1, a2, a3, xs, j, e, dtype, ASM)
    out = (_scaled(total[0], even[0], odd[0], sums[0], factors, lower_factors),)
    if len(xs) == 2:
        out += (_scaled(total[1], even[1], odd[1], sums[1], factors, lower_factors),)
    return out


@triton.jit
def _add_group(total, words, meta, xs, FROM: tl.constexpr, TO: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """total, of rows 0 … 15 and of rows 16 … 31 of a tile, + planes FROM … TO - 1 of it times each eight rows of x."""
    upper, lower = total
    rows = four(meta)
    f0, f1 = _factors(rows[0], dtype), _factors(rows[1], dtype)
    f2, f3 = _factors(rows[2], dtype), _factors(rows[3], dtype)
    sums = _sums(xs, FROM, TO, dtype, ASM)
    upper = _add_rows(upper, words[0], words[1], f0, f1, xs, sums, FROM, TO, dtype, ASM)
    lower = _add_rows(lower, words[2], words[3], f2, f3, xs, sums, FROM, TO, dtype, ASM)
    return upper, lower


@triton.jit
def _add_tile(total, tile, meta_ptrs, xs, GROUPS: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """total + a tile, as `_load_words` has it, times x; further groups' scales are loaded here."""
    words = (four(tile[0]), four(tile[1]), four(tile[2]), four(tile[3]))
    total = _add_group(total, words, tile[4], xs, 0, 4 // GROUPS, dtype, ASM)
    for group in tl.static_range(1, GROUPS):
        meta = tl.load(meta_ptrs + 32 * group)
        total = _add_group(total, words, meta, xs, group * 4 // GROUPS, (group + 1) * 4 // GROUPS, dtype, ASM)
    return total


@triton.jit
def _load_words(tiles_ptr, o_word, o_meta, wanted, MASKED: tl.constexpr):
    """A tile's four words a thread for each eight rows, and the scales and zero points of its first group."""
    mask = wanted if MASKED else None
    return (
        tl.load(tiles_ptr + o_word, mask=mask, eviction_policy="evict_first"),
        tl.load(tiles_ptr + o_word + 128, mask=mask, eviction_policy="evict_first"),
        tl.load(tiles_ptr + o_word + 256, mask=mask, eviction_policy="evict_first"),
        tl.load(tiles_ptr + o_word + 384, mask=mask, eviction_policy="evict_first"),
        tl.load(tiles_ptr + o_meta, mask=mask, eviction_policy="evict_first"),
    )


@triton.jit(do_not_specialize=["num_rows"])
def few_rows_kernel(
    x_ptr,
    norm_weight_ptr,
    tiles_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    num_rows,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    PADDED_K: tl.constexpr,
    TILES_N: tl.constexpr,
    TILES_K: tl.constexpr,
    GROUPS: tl.constexpr,
    VALUES: tl.constexpr,
    NW: tl.constexpr,
    KW: tl.constexpr,
    TURNS: tl.constexpr,
    HELD: tl.constexpr,
    EARLY: tl.constexpr,
    SORTED: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """out [M, N] (+)= f(x [M, K]) @ w.T for M = 1 (VALUES 2), M ≤ 8 (8) or M ≤ 16 (16), of which a thread has so many.

    A block is NW rows of tiles; KW warps take a tile each of every row in a turn. Turns are numbered along K first, and
    program p takes TURNS of them from p · TURNS on: parts of blocks, or some whole. Whoever is last of those that share
    a block adds their parts, in the order of K. HELD: a program has turns of one block, and their words are all asked
    for at once. SORTED: x comes as `sort_x_kernel` leaves it. NORM: RMSNorm of one row of x before the product.
    """
    allow_next(PDL)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    THREADS: tl.constexpr = 32 * NW * KW
    ROW: tl.constexpr = TILES_K // KW  # turns of a block
    WORDS: tl.constexpr = 512 + 32 * GROUPS
    NEXT_TURN: tl.constexpr = KW * WORDS
    NEXT_BLOCK: tl.constexpr = (NW * TILES_K - (ROW - 1) * KW) * WORDS  # from a row's last turn to the first NW rows on
    PADDED: tl.constexpr = TILES_K * 128 != K
    start = tl.program_id(0) * TURNS
    end = tl.minimum(start + TURNS, TILES_N // NW * ROW)
    thread, side = tl.arange(0, THREADS), tl.arange(0, 4)[None, :]
    lane, along_n, along_k = thread % 32, thread // 32 % NW, thread // (32 * NW)
    block, i_k = start // ROW, start % ROW
    # numbers of 32 bits: half the registers of addresses, and enough for 2³¹ words of eight weights
    here = ((block * NW + along_n) * TILES_K + i_k * KW + along_k) * WORDS
    o_word = (here + lane * 4)[:, None] + side
    o_meta = (here + 512 + lane // 4 * 4)[:, None] + side
    tile = _load_words(tiles_ptr, o_word, o_meta, None, False)
    # rows of x beyond the last repeat it: a column of the product knows nothing of the others
    ROW_OF_X: tl.constexpr = TILES_K * 64 if SORTED else K // 2
    o_first = tl.minimum(lane // 4, num_rows - 1) * ROW_OF_X + along_k * 64 + lane % 4 * (4 if SORTED else 1)
    o_second = tl.minimum(8 + lane // 4, num_rows - 1) * ROW_OF_X + along_k * 64 + lane % 4 * (4 if SORTED else 1)
    if SORTED:
        o_first = o_first[:, None] + side
        o_second = o_second[:, None] + side
    pairs_ptr = x_ptr.to(tl.pointer_type(tl.int32))
    norm_ptrs = norm_weight_ptr.to(tl.pointer_type(tl.int32)) + along_k * 64 + lane % 4
    zero = tl.zeros([THREADS], tl.float32)
    eight = (zero, zero, zero, zero)
    rows_of_nothing = (eight, eight) if VALUES == 16 else (eight,)
    total = (rows_of_nothing, rows_of_nothing)
    left = tl.zeros([THREADS], tl.int32) + K - along_k * 128
    rest = 1.0
    if HELD:
        tiles = (tile,)
        for i in tl.static_range(1, TURNS):
            tiles += (_load_words(tiles_ptr, o_word + i * NEXT_TURN, o_meta + i * NEXT_TURN, None, False),)
        if NORM:
            norms = ()
            for i in tl.static_range(TURNS):
                norms += (load_x(norm_ptrs + (i_k + i) * (KW * 64), left - (i_k + i) * (KW * 128), False, PADDED),)
        wait_for_previous(PDL)
        rows = ()
        for i in tl.static_range(TURNS):
            o_x, left_x = (i_k + i) * (KW * 64), left - (i_k + i) * (KW * 128)
            rows += (load_rows(pairs_ptr + o_first + o_x, pairs_ptr + o_second + o_x, left_x, SORTED, PADDED, VALUES),)
        if NORM:
            power, rest = inverse_rms(x_ptr, eps, K, PADDED_K)
            power += tl.zeros([THREADS], tl.int32)
        for i in tl.static_range(TURNS):
            xs = rows[i]
            if NORM:
                xs = (normed_tile(xs[0], norms[i], power, dtype, ASM),)
            total = _add_tile(total, tiles[i], tiles_ptr + o_meta + i * NEXT_TURN, xs, GROUPS, dtype, ASM)
        finish(
            total,
            block,
            rest,
            bias_ptr,
            out_ptr,
            partial_ptr,
            arrivals_ptr,
            num_rows,
            N,
            ROW,
            TURNS,
            NW,
            KW,
            VALUES,
            NORM,
            GATED,
            BIAS,
            ADD,
        )
    else:
        wait_for_previous(PDL)
        if NORM:
            power, rest = inverse_rms(x_ptr, eps, K, PADDED_K)
            power += tl.zeros([THREADS], tl.int32)
        for turn in range(start, end):
            # the next turn's words are asked for before this one's are used
            ends = i_k == ROW - 1
            step = tl.where(turn + 1 < end, tl.where(ends, NEXT_BLOCK, NEXT_TURN), 0)
            more = tl.zeros([THREADS, 4], tl.int32) + turn + 1 < end
            # a load that may not happen keeps its registers from others; with sixteen rows of x there are none to spare
            next_tile = _load_words(tiles_ptr, o_word + step, o_meta + step, more, VALUES < 16)
            if EARLY:
                keep_order(lane, ASM)
            o_x, left_x = i_k * (KW * 64), left - i_k * (KW * 128)
            xs = load_rows(pairs_ptr + o_first + o_x, pairs_ptr + o_second + o_x, left_x, SORTED, PADDED, VALUES)
            if NORM:
                xs = (normed_tile(xs[0], load_x(norm_ptrs + o_x, left_x, False, PADDED), power, dtype, ASM),)
            total = _add_tile(total, tile, tiles_ptr + o_meta, xs, GROUPS, dtype, ASM)
            tile = next_tile
            o_word += step
            o_meta += step
            i_k = tl.where(ends, 0, i_k + 1)
            if ends | (turn == end - 1):
                finish(
                    total,
                    block,
                    rest,
                    bias_ptr,
                    out_ptr,
                    partial_ptr,
                    arrivals_ptr,
                    num_rows,
                    N,
                    ROW,
                    TURNS,
                    NW,
                    KW,
                    VALUES,
                    NORM,
                    GATED,
                    BIAS,
                    ADD,
                )
                block += 1
                total = (rows_of_nothing, rows_of_nothing)
