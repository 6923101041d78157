"""What becomes of a product of few rows: summed over warps and programs, gated, added to, written.

Of a warp's lanes, 4g + t, each has results of rows g and 8 + g of sixteen, for columns 2t and 2t + 1 (`w4_mma.mma`).
"""

import triton
import triton.language as tl

from lmtool.kernels.triton.activation import gated


@triton.jit
def _results(total, VALUES: tl.constexpr):
    """A thread's results side by side, [threads, (r, n, b, h)]: row 16r + 8h + g, row of x 8n + 2t + b.

    Where x has one row all columns repeat it: two results, r = t mod 2.
    """
    upper, lower = total
    if VALUES == 2:
        is_upper = tl.arange(0, upper[0][0].shape[0]) % 2 == 0
        out = tl.join(tl.where(is_upper, upper[0][0], lower[0][0]), tl.where(is_upper, upper[0][2], lower[0][2]))
    elif VALUES == 8:
        out = _eight_rows(upper[0], lower[0])
    else:
        out = tl.permute(tl.join(_eight_rows(upper[0], lower[0]), _eight_rows(upper[1], lower[1])), (0, 1, 4, 2, 3))
    return out.reshape(out.shape[0], VALUES)


@triton.jit
def _eight_rows(upper, lower):
    first = tl.join(tl.join(upper[0], lower[0]), tl.join(upper[2], lower[2]))  # r h
    second = tl.join(tl.join(upper[1], lower[1]), tl.join(upper[3], lower[3]))
    return tl.permute(tl.join(first, second), (0, 1, 3, 2))  # r b h


@triton.jit
def _places(block, N: tl.constexpr, NW: tl.constexpr, VALUES: tl.constexpr, GATED: tl.constexpr):
    """(row of x, out feature) of each of a block's results [threads, values]; gated: of each two, a gate and its up."""
    thread = tl.arange(0, 32 * NW)[:, None]
    lane = thread % 32
    tile = block * NW + thread // 32
    EACH: tl.constexpr = VALUES // 2 if GATED else VALUES
    value = tl.arange(0, EACH)[None, :]
    r = lane % 2 if VALUES == 2 else value // (EACH // 2)
    if GATED:
        o_n = tile * 16 + r * 8 + lane // 4
        column = value
    else:
        o_n = tile * 32 + r * 16 + value % 2 * 8 + lane // 4
        column = value // 2
    o_m = lane % 4 // 2 if VALUES == 2 else column // 2 % (VALUES // 8) * 8 + lane % 4 * 2 + column % 2
    return o_m + value * 0, o_n + value * 0


@triton.jit
def _added(out_ptr, bias_ptr, o_m, o_n, num_rows, N: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr):
    """What is added to a product: asked for early, it is there when the product is."""
    added = tl.zeros(o_m.shape, tl.float32)
    if BIAS:
        added += tl.load(bias_ptr + o_n, mask=o_n < N, other=0.0).to(tl.float32)
    if ADD:
        added += tl.load(out_ptr + o_m * N + o_n, mask=(o_n < N) & (o_m < num_rows), other=0.0).to(tl.float32)
    return added


@triton.jit
def _write(out, added, out_ptr, o_m, o_n, num_rows, N: tl.constexpr, GATED: tl.constexpr):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if GATED:
        gate, up = tl.split(out.reshape(o_m.shape[0], o_m.shape[1], 2))
        out = gated(gate, up, dtype)
    tl.store(out_ptr + o_m * N + o_n, (out + added).to(dtype), mask=(o_n < N) & (o_m < num_rows))


@triton.jit
def _sum_of_parts(parts_ptr, count, SHARE: tl.constexpr, MOST: tl.constexpr, NW: tl.constexpr, VALUES: tl.constexpr):
    """In their order; several are on their way at once. Past the first-level cache: other programs wrote them."""
    out = tl.zeros([32 * NW, VALUES], tl.float32)
    FEW: tl.constexpr = MOST if MOST < 8 else 8
    AT_ONCE: tl.constexpr = 1 if VALUES == 16 else FEW  # what registers have room for
    for part in range(0, count, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            exists = tl.zeros([32 * NW, VALUES], tl.int32) + part + i < count
            out += tl.load(parts_ptr + (part + i) * SHARE, mask=exists, other=0.0, cache_modifier=".cg")
    return out


@triton.jit
def finish(
    total,
    block,
    rest,
    bias_ptr,
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    num_rows,
    N: tl.constexpr,
    ROW: tl.constexpr,
    TURNS: tl.constexpr,
    NW: tl.constexpr,
    KW: tl.constexpr,
    VALUES: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
):
    """A block's product, or this program's part of it: summed over warps and, by the last to come, over programs."""
    o_m, o_n = _places(block, N, NW, VALUES, GATED)
    if VALUES < 16:
        added = _added(out_ptr, bias_ptr, o_m, o_n, num_rows, N, BIAS, ADD)
    out = _results(total, VALUES)
    if KW > 1:
        out = tl.sum(out.reshape(KW, 32 * NW, VALUES), axis=0)
    if NORM:
        out *= rest
    complete = True
    if TURNS % ROW != 0:
        SHARE: tl.constexpr = 32 * NW * VALUES  # of a program in a block
        MOST: tl.constexpr = (ROW - 1) // TURNS + 2  # programs that may share a block
        first, last = block * ROW // TURNS, (block * ROW + ROW - 1) // TURNS
        complete = first == last
        if first != last:
            o_part = tl.arange(0, 32 * NW)[:, None] * VALUES + tl.arange(0, VALUES)[None, :]
            parts_ptr = partial_ptr + block * (MOST * SHARE) + o_part
            tl.store(parts_ptr + (tl.program_id(0) - first) * SHARE, out)
            tl.debug_barrier()  # every thread's part is written before this program is counted
            complete = tl.atomic_add(arrivals_ptr + block, 1, sem="acq_rel") == last - first
            if complete:
                tl.store(arrivals_ptr + block, 0)
                out = _sum_of_parts(parts_ptr, last - first + 1, SHARE, MOST, NW, VALUES)
    if complete:
        if VALUES == 16:  # held from the start they would be registers too many
            added = _added(out_ptr, bias_ptr, o_m, o_n, num_rows, N, BIAS, ADD)
        _write(out, added, out_ptr, o_m, o_n, num_rows, N, GATED)
