"""4-bit weights times a few rows: the weights are the left operand of small tensor-core products, out of registers.

Decode at few rows is bound by how many instructions a weight costs and by how many loads are under way, not by its
half byte (docs/log.md): here 1.5 to 1.9 instructions. What makes that possible is that no weight moves between threads:
`W4Tiles` holds the words in the order of the operand, and `w4_mma` puts them there. A warp has 32 out features, a tile
in each turn; warps of a program share the in features, so that x comes from their common cache.
"""

import triton
import triton.language as tl

from lmtool.kernels.triton.activation import gated
from lmtool.kernels.triton.launch import allow_next, wait_for_previous
from lmtool.kernels.triton.norm import normalize
from lmtool.kernels.triton.w4_codes import scale_of
from lmtool.kernels.triton.w4_mma import four, keep_order, mma


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
def _load_x(x_ptrs, left, SORTED: tl.constexpr, PADDED: tl.constexpr):
    """Eight rows of x for a tile: x[j][2e + q]."""
    return (
        _load_plane(x_ptrs, 0, left, SORTED, PADDED),
        _load_plane(x_ptrs, 1, left, SORTED, PADDED),
        _load_plane(x_ptrs, 2, left, SORTED, PADDED),
        _load_plane(x_ptrs, 3, left, SORTED, PADDED),
    )


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
    """Of x along planes FROM … TO - 1 of a tile, where `mma` puts a result."""
    one = tl.zeros_like(xs[0][0][0]) + (0x3F803F80 if dtype == tl.bfloat16 else 0x3C003C00)
    out = _nothing(xs)
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
def _add_tile(total, words, meta_ptrs, meta, xs, GROUPS: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    total = _add_group(total, words, meta, xs, 0, 4 // GROUPS, dtype, ASM)
    for group in tl.static_range(1, GROUPS):
        meta = tl.load(meta_ptrs + 32 * group)
        total = _add_group(total, words, meta, xs, group * 4 // GROUPS, (group + 1) * 4 // GROUPS, dtype, ASM)
    return total


@triton.jit
def _results(total, VALUES: tl.constexpr):
    """A thread's results side by side, [threads, (r, n, b, h)]: row 16r + 8h + g, row of x 8n + 2t + b.

    Four where x has one row: all columns repeat it.
    """
    upper, lower = total
    out = _eight_rows(upper[0], lower[0], VALUES == 4)
    if VALUES == 16:
        out = tl.permute(tl.join(out, _eight_rows(upper[1], lower[1], False)), (0, 1, 4, 2, 3))
    return out.reshape(out.shape[0], VALUES)


@triton.jit
def _eight_rows(upper, lower, ONE: tl.constexpr):
    out = tl.join(tl.join(upper[0], lower[0]), tl.join(upper[2], lower[2]))  # r h
    if not ONE:
        second = tl.join(tl.join(upper[1], lower[1]), tl.join(upper[3], lower[3]))
        out = tl.permute(tl.join(out, second), (0, 1, 3, 2))  # r b h
    return out


@triton.jit
def _write(
    out,
    out_ptr,
    bias_ptr,
    block,
    num_rows,
    N: tl.constexpr,
    NW: tl.constexpr,
    VALUES: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
):
    """Results to their places; gated: a row of sixteen is a gate or, eight further, its up."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    thread = tl.arange(0, 32 * NW)[:, None]
    lane = thread % 32
    tile = block * NW + thread // 32
    if GATED:
        gate, up = tl.split(out.reshape(32 * NW, VALUES // 2, 2))
        out = gated(gate, up, dtype)
        column = tl.arange(0, VALUES // 2)[None, :]  # r n b
        o_n = tile * 16 + column // (VALUES // 4) * 8 + lane // 4
    else:
        value = tl.arange(0, VALUES)[None, :]
        o_n = tile * 32 + value // (VALUES // 2) * 16 + value % 2 * 8 + lane // 4
        column = value // 2
    o_m = column // 2 % (VALUES // 8) * 8 + lane % 4 * 2 + column % 2 if VALUES > 4 else lane % 4
    mask = (o_n < N) & (o_m < num_rows)
    o_out = o_m * N + o_n
    if BIAS:
        out += tl.load(bias_ptr + o_n, mask=o_n < N, other=0.0).to(tl.float32)
    if ADD:
        out += tl.load(out_ptr + o_out, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + o_out, out.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def few_rows_kernel(
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
    VALUES: tl.constexpr,
    NW: tl.constexpr,
    TURNS: tl.constexpr,
    EARLY: tl.constexpr,
    SORTED: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """out [M, N] (+)= x [M, K] @ w.T for M = 1 (VALUES 4), M ≤ 8 (8) or M ≤ 16 (16), of which a thread has so many.

    A block is NW rows of tiles, one a warp, and a turn one tile of each; turns are numbered along K first, and program
    p takes TURNS of them from p · TURNS on: parts of blocks, or some whole. Whoever is last of those that share a block
    adds their parts, in the order of K. SORTED: x comes as `sort_x_kernel` leaves it.
    """
    allow_next(PDL)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    WORDS: tl.constexpr = 512 + 32 * GROUPS
    NEXT_BLOCK: tl.constexpr = ((NW - 1) * TILES_K + 1) * WORDS  # from a row's last tile to the first NW rows on
    SHARE: tl.constexpr = 32 * NW * VALUES  # of a program in a block
    MOST: tl.constexpr = (TILES_K - 1) // TURNS + 2  # programs that may share a block
    PADDED: tl.constexpr = TILES_K * 128 != K
    start = tl.program_id(0) * TURNS
    end = tl.minimum(start + TURNS, TILES_N // NW * TILES_K)
    thread, side = tl.arange(0, 32 * NW), tl.arange(0, 4)[None, :]
    lane = thread % 32
    block, i_k = start // TILES_K, start % TILES_K
    # numbers of 32 bits: half the registers of addresses, and enough for 2³¹ words of eight weights
    here = ((block * NW + thread // 32) * TILES_K + i_k) * WORDS
    o_word = (here + lane * 4)[:, None] + side
    o_meta = (here + 512 + lane // 4 * 4)[:, None] + side
    w0 = tl.load(tiles_ptr + o_word, eviction_policy="evict_first")
    w1 = tl.load(tiles_ptr + o_word + 128, eviction_policy="evict_first")
    w2 = tl.load(tiles_ptr + o_word + 256, eviction_policy="evict_first")
    w3 = tl.load(tiles_ptr + o_word + 384, eviction_policy="evict_first")
    meta = tl.load(tiles_ptr + o_meta, eviction_policy="evict_first")
    # rows of x beyond the last repeat it: a column of the product knows nothing of the others
    ROW_OF_X: tl.constexpr = TILES_K * 64 if SORTED else K // 2
    o_first = tl.minimum(lane // 4, num_rows - 1) * ROW_OF_X + lane % 4 * (4 if SORTED else 1)
    o_second = tl.minimum(8 + lane // 4, num_rows - 1) * ROW_OF_X + lane % 4 * (4 if SORTED else 1)
    pairs_ptr = x_ptr.to(tl.pointer_type(tl.int32))
    if SORTED:
        o_first = o_first[:, None] + side
        o_second = o_second[:, None] + side
    zero = tl.zeros([32 * NW], tl.float32)
    eight = (zero, zero, zero, zero)
    rows_of_nothing = (eight, eight) if VALUES == 16 else (eight,)
    total = (rows_of_nothing, rows_of_nothing)
    wait_for_previous(PDL)
    for turn in range(start, end):
        # the next turn's words are asked for before this one's are used
        ends = i_k == TILES_K - 1
        step = tl.where(turn + 1 < end, tl.where(ends, NEXT_BLOCK, WORDS), 0)
        next_w0 = tl.load(tiles_ptr + o_word + step, eviction_policy="evict_first")
        next_w1 = tl.load(tiles_ptr + o_word + step + 128, eviction_policy="evict_first")
        next_w2 = tl.load(tiles_ptr + o_word + step + 256, eviction_policy="evict_first")
        next_w3 = tl.load(tiles_ptr + o_word + step + 384, eviction_policy="evict_first")
        next_meta = tl.load(tiles_ptr + o_meta + step, eviction_policy="evict_first")
        if EARLY:
            keep_order(lane, ASM)
        words = (four(w0), four(w1), four(w2), four(w3))
        left = tl.zeros([32 * NW], tl.int32) + K - i_k * 128
        xs = (_load_x(pairs_ptr + o_first + i_k * 64, left, SORTED, PADDED),)
        if VALUES == 16:
            xs += (_load_x(pairs_ptr + o_second + i_k * 64, left, SORTED, PADDED),)
        total = _add_tile(total, words, tiles_ptr + o_meta, meta, xs, GROUPS, dtype, ASM)
        w0, w1, w2, w3 = next_w0, next_w1, next_w2, next_w3
        meta = next_meta
        o_word += step
        o_meta += step
        i_k = tl.where(ends, 0, i_k + 1)
        if ends | (turn == end - 1):
            out = _results(total, VALUES)
            first, last = block * TILES_K // TURNS, (block * TILES_K + TILES_K - 1) // TURNS
            complete = first == last
            if first != last:
                o_part = tl.arange(0, 32 * NW)[:, None] * VALUES + tl.arange(0, VALUES)[None, :]
                parts_ptr = partial_ptr + block * (MOST * SHARE) + o_part
                tl.store(parts_ptr + (tl.program_id(0) - first) * SHARE, out)
                tl.debug_barrier()  # every thread's part is written before this program is counted
                complete = tl.atomic_add(arrivals_ptr + block, 1, sem="acq_rel") == last - first
                if complete:
                    tl.store(arrivals_ptr + block, 0)
                    out = tl.zeros([32 * NW, VALUES], tl.float32)
                    for part in range(0, last - first + 1):
                        out += tl.load(parts_ptr + part * SHARE, cache_modifier=".cg")
            if complete:
                _write(out, out_ptr, bias_ptr, block, num_rows, N, NW, VALUES, GATED, BIAS, ADD)
            block += 1
            total = (rows_of_nothing, rows_of_nothing)


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
