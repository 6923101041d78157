"""4-bit weights times a few rows: the weights are the left operand of small tensor-core products, out of registers.

Decode at few rows is bound by how many instructions a weight costs, not by its half byte (docs/log.md): here 1.9. What
makes that possible is that no weight moves between threads: `W4Tiles` holds the words in the order of the operand, and
the shapes below are chosen so that the compiler's own layouts are that order. Their dimensions, everywhere:
t 4 and g 8 are a warp's threads; W the warps, each with tiles of its own along K; R, h, g make the 32 rows of a tile;
q, e, b the in features of one thread; n the rows of x, eight a product.
"""

import triton
import triton.language as tl

from lmtool.kernels.triton.activation import gated
from lmtool.kernels.triton.launch import allow_next, wait_for_previous
from lmtool.kernels.triton.norm import normalize
from lmtool.kernels.triton.w4_codes import codes, minus_zero, scale_of


@triton.jit
def _load_x(
    x_ptrs, mask, left, J: tl.constexpr, NW: tl.constexpr, NT: tl.constexpr, SORTED: tl.constexpr, PADDED: tl.constexpr
):
    """x of in features 32J … 32J + 31 of each warp's tile, as the right operand [NW, 32, 8 · NT].

    ``left``: in features that x still has from the tile on; a group is 32 of them or more, so it is all or none.
    """
    if PADDED and not SORTED:
        mask = mask & (left > 32 * J)
    if SORTED:
        x = tl.load(x_ptrs + 8 * J, mask=mask, other=0.0).reshape(4, 8, NW, NT, 2, 2, 2)  # t n W nt e q b
        x = tl.permute(x, (2, 5, 0, 4, 6, 3, 1))
    else:
        x00 = tl.load(x_ptrs + 32 * J, mask=mask, other=0.0)
        x01 = tl.load(x_ptrs + 32 * J + 8, mask=mask, other=0.0)
        x10 = tl.load(x_ptrs + 32 * J + 16, mask=mask, other=0.0)
        x11 = tl.load(x_ptrs + 32 * J + 24, mask=mask, other=0.0)
        x = tl.permute(tl.join(tl.join(x00, x01), tl.join(x10, x11)), (2, 5, 0, 6, 4, 3, 1))  # from t n W nt b q e
    return x.reshape(NW, 32, 8 * NT)


@triton.jit
def _spread(zero, NW: tl.constexpr):
    """[NW, R, h, g, t] → the left operand [NW, 32, 32] whose columns are all alike."""
    wide = tl.broadcast_to(zero[:, :, :, :, None, :, None], [NW, 2, 2, 8, 2, 4, 2]).reshape(NW, 32, 16)
    return tl.join(wide, wide).reshape(NW, 32, 32)


@triton.jit
def _tile_product(
    words,
    meta_ptrs,
    meta,
    x_ptrs,
    m_x,
    left,
    total,
    GROUPS: tl.constexpr,
    NW: tl.constexpr,
    NT: tl.constexpr,
    SORTED: tl.constexpr,
    PADDED: tl.constexpr,
    ASM: tl.constexpr,
):
    """total [NW, R, h, g, NT, t, 2] += a tile of each warp times its part of x."""
    dtype: tl.constexpr = x_ptrs.dtype.element_ty
    EXACT: tl.constexpr = dtype == tl.float16
    w = words.reshape(4, 8, NW, 2, 2, 2, 2)  # t g W R h q e
    w = tl.permute(w, (2, 3, 4, 1, 5, 0, 6)).reshape(NW, 32, 16)
    even = tl.zeros([NW, 32, 8 * NT], tl.float32)
    odd = tl.zeros([NW, 32, 8 * NT], tl.float32)
    for j in tl.static_range(4):
        x = _load_x(x_ptrs, m_x, left, j, NW, NT, SORTED, PADDED)
        if j % (4 // GROUPS) == 0:
            if j > 0:
                meta = tl.load(meta_ptrs + (j * GROUPS // 4) * 32)
            rows = tl.permute(meta.reshape(4, 8, NW, 2, 2), (2, 3, 4, 1, 0))  # W R h g t
        a = codes(w, j, dtype, ASM).reshape(NW, 32, 32)
        zero = _spread(minus_zero(rows, j % 2 == 1, dtype), NW)
        if j % 2 == 0 or not EXACT:
            even = tl.dot(zero, x, tl.dot(a, x, even))
        else:
            odd = tl.dot(zero, x, tl.dot(a, x, odd))
        if (j + 1) % (4 // GROUPS) == 0:
            scale = scale_of(rows).to(tl.float32) * (16777216.0 if EXACT else 1.0)
            both = even + odd * 0.0625 if EXACT else even
            total += both.reshape(NW, 2, 2, 8, NT, 4, 2) * scale[:, :, :, :, None, :, None]
            even = tl.zeros([NW, 32, 8 * NT], tl.float32)
            odd = tl.zeros([NW, 32, 8 * NT], tl.float32)
    return total


@triton.jit
def _sum_warps(total, NW: tl.constexpr, NT: tl.constexpr, ONE: tl.constexpr):
    """[NW, R, h, g, NT, t, 2] → [32, 8 · NT], or the first column alone [32, 1] where x has one row."""
    if ONE:
        first = (tl.arange(0, 4)[:, None] + tl.arange(0, 2)[None, :]) == 0
        column = tl.sum(tl.sum(tl.where(first[None, None, None, None, None, :, :], total, 0.0), axis=6), axis=5)
        out = tl.sum(column.reshape(NW, 32), axis=0)[:, None]
    else:
        out = tl.sum(total.reshape(NW, 32, 8 * NT), axis=0)
    return out


@triton.jit
def _write(
    out,
    out_ptr,
    bias_ptr,
    tile,
    num_rows,
    N: tl.constexpr,
    COLUMNS: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
):
    """The 32 out features of a tile for every row of x; gated: sixteen, of eight gates and eight ups twice."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    HEIGHT: tl.constexpr = 16 if GATED else 32
    if GATED:
        pairs = tl.permute(out.reshape(2, 2, 8, COLUMNS), (0, 2, 3, 1))
        gate, up = tl.split(pairs.reshape(16, COLUMNS, 2))
        out = gated(gate, up, dtype)
    o_n = tile * HEIGHT + tl.arange(0, HEIGHT)[:, None]
    o_m = tl.arange(0, COLUMNS)[None, :]
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
    NT: tl.constexpr,
    NW: tl.constexpr,
    TURNS: tl.constexpr,
    ONE: tl.constexpr,
    SORTED: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """out [M, N] (+)= x [M, K] @ w.T for M ≤ 8 · NT.

    A turn is NW tiles side by side along K, one a warp; turns are numbered along K first, and program p takes TURNS
    of them from p · TURNS on: whole rows of tiles and parts of rows. Whoever is last of those that share a row adds
    their parts, in the order of K. SORTED: x comes as `sort_x_kernel` leaves it, else there is one row of it.
    """
    allow_next(PDL)
    ROW: tl.constexpr = TILES_K // NW  # turns of a row of tiles
    WORDS: tl.constexpr = 512 + 32 * GROUPS
    COLUMNS: tl.constexpr = 1 if ONE else 8 * NT
    MOST: tl.constexpr = (ROW - 1) // TURNS + 2  # programs that may share a row
    start = tl.program_id(0) * TURNS
    end = tl.minimum(start + TURNS, TILES_N * ROW)
    t4, g8 = tl.arange(0, 4), tl.arange(0, 8)
    i_w = tl.arange(0, NW)[None, None, :, None, None]
    o_tg = g8[None, :, None, None, None] * 4 + t4[:, None, None, None, None]
    word_ptrs = tiles_ptr + i_w * WORDS + t4[None, None, None, :, None] * 128 + o_tg * 4 + t4[None, None, None, None, :]
    o_rows = g8[None, :, None, None] * 4 + t4[None, None, None, :] + 0 * t4[:, None, None, None]
    meta_ptrs = tiles_ptr + tl.arange(0, NW)[None, None, :, None] * WORDS + 512 + o_rows
    o_m = tl.arange(0, NT)[None, None, None, :, None] * 8 + g8[None, :, None, None, None]
    o_b = tl.arange(0, 8 if SORTED else 2)[None, None, None, None, :]
    o_x = i_w * 128 + t4[:, None, None, None, None] * (32 if SORTED else 2) + o_b
    x_ptrs = x_ptr + o_m * (TILES_K * 128 if SORTED else K) + o_x
    m_x = (o_m < num_rows) & (o_x >= 0)
    PADDED: tl.constexpr = TILES_K * 128 != K
    here = tl.program_id(0).to(tl.int64) * (TURNS * NW * WORDS)
    words = tl.load(word_ptrs + here, eviction_policy="evict_first")
    meta = tl.load(meta_ptrs + here)
    wait_for_previous(PDL)
    total = tl.zeros([NW, 2, 2, 8, NT, 4, 2], tl.float32)
    for turn in range(start, end):
        # the next turn's words are asked for before this one's are used
        ahead = here + tl.where(turn + 1 < end, NW * WORDS, 0)
        next_words = tl.load(word_ptrs + ahead, eviction_policy="evict_first")
        next_meta = tl.load(meta_ptrs + ahead)
        o_k = turn % ROW * (NW * 128)
        left = K - o_k - i_w * 128
        total = _tile_product(
            words, meta_ptrs + here, meta, x_ptrs + o_k, m_x, left, total, GROUPS, NW, NT, SORTED, PADDED, ASM
        )
        words = next_words
        meta = next_meta
        here = ahead
        if (turn % ROW == ROW - 1) | (turn == end - 1):
            tile = turn // ROW
            out = _sum_warps(total, NW, NT, ONE)
            first, last = tile * ROW // TURNS, (tile * ROW + ROW - 1) // TURNS
            complete = first == last
            if first != last:
                o_part = tl.arange(0, COLUMNS)[None, :] * 32 + tl.arange(0, 32)[:, None]
                parts_ptr = partial_ptr + tile * (MOST * 32 * COLUMNS) + o_part
                tl.store(parts_ptr + (tl.program_id(0) - first) * (32 * COLUMNS), out)
                tl.debug_barrier()  # every thread's part is written before this program is counted
                complete = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") == last - first
                if complete:
                    tl.store(arrivals_ptr + tile, 0)
                    out = tl.zeros([32, COLUMNS], tl.float32)
                    for part in range(0, last - first + 1):
                        out += tl.load(parts_ptr + part * (32 * COLUMNS), cache_modifier=".cg")
            if complete:
                _write(out, out_ptr, bias_ptr, tile, num_rows, N, COLUMNS, GATED, BIAS, ADD)
            total = tl.zeros([NW, 2, 2, 8, NT, 4, 2], tl.float32)


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

    In feature 128c + 32j + 16e + 8q + 2t + b goes to 128c + 32t + 8j + 4e + 2q + b: a thread then loads 16 bytes at
    once instead of four times four from as many lines.
    """
    allow_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    o_out = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = o_out % 128
    o_k = o_out - inside + inside // 8 % 4 * 32 + inside // 4 % 2 * 16 + inside // 2 % 2 * 8 + inside // 32 * 2
    o_k += inside % 2
    if NORM:
        weight = tl.load(norm_weight_ptr + o_k, mask=o_k < K, other=0.0)
    wait_for_previous(PDL)
    x = tl.load(x_ptr + row * K + o_k, mask=o_k < K, other=0.0)
    if NORM:
        x32 = x.to(tl.float32)
        x = normalize(x, tl.sum(x32 * x32, axis=0) / K, weight, eps, x_ptr.dtype.element_ty)
    tl.store(out_ptr + row * PADDED_K + o_out, x, mask=o_out < PADDED_K)
