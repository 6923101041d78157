"""Tiles of a product on Hopper from the registers of a program to the result: added up by several, gated, summed.

A tile that several programs share is divided into chunks of columns: each program gives away those that are not its
own, and adds up its own in the order of the parts, so that the sum does not depend on who was first.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from lmtool.kernels.triton.activation import gated


@gluon.constexpr_function
def _out_layout(HEIGHT, NW):
    """[HEIGHT, columns]: a thread has eight out features side by side."""
    high = min(HEIGHT // 8, 32)
    return gl.BlockedLayout([8, 1], [high, 32 // high], [1, NW], [0, 1])


@gluon.jit
def _flat(acc):
    """[rows, columns] → [rows · columns] in the order of threads, each with four numbers side by side."""
    ROWS: gl.constexpr = acc.shape[0]
    COLUMNS: gl.constexpr = acc.shape[1]
    parts = gl.permute(acc.reshape(ROWS, COLUMNS // 16, 2, 4, 2), (1, 0, 3, 2, 4))
    return parts.reshape(ROWS * COLUMNS)


@gluon.jit
def give(acc, parts_ptr, part, adding, most, from_m, to_m, FIRST: gl.constexpr, CHUNK: gl.constexpr):
    """Columns that others add up go to memory; part c % adding adds up chunk c, CHUNK columns wide."""
    COLUMNS: gl.constexpr = acc.shape[1]
    if COLUMNS > CHUNK:
        left, right = gl.split(gl.permute(acc.reshape(acc.shape[0], 2, COLUMNS // 2), (0, 2, 1)))
        give(left, parts_ptr, part, adding, most, from_m, to_m, FIRST, CHUNK)
        give(right, parts_ptr, part, adding, most, from_m, to_m, FIRST + COLUMNS // 2, CHUNK)
    else:
        if (FIRST // CHUNK % adding != part) & (from_m < FIRST + CHUNK) & (to_m > FIRST):
            SIZE: gl.constexpr = acc.shape[0] * COLUMNS
            flat = _flat(acc)
            layout: gl.constexpr = flat.type.layout
            gl.store(parts_ptr + (FIRST // CHUNK * most + part) * SIZE + gl.arange(0, SIZE, layout=layout), flat)


@gluon.jit
def take(
    acc, parts_ptr, part, parts, adding, most, out_ptr, bias_ptr, i_n, first_m, from_m, to_m,
    FIRST: gl.constexpr, CHUNK: gl.constexpr,
    N: gl.constexpr, GATED: gl.constexpr, BIAS: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """The columns that this part adds up, in the order of the parts, and writes."""
    ROWS: gl.constexpr = acc.shape[0]
    COLUMNS: gl.constexpr = acc.shape[1]
    if COLUMNS > CHUNK:
        left, right = gl.split(gl.permute(acc.reshape(ROWS, 2, COLUMNS // 2), (0, 2, 1)))
        take(
            left, parts_ptr, part, parts, adding, most, out_ptr, bias_ptr, i_n, first_m, from_m, to_m,
            FIRST, CHUNK, N, GATED, BIAS, ADD,
        )  # fmt: skip
        take(
            right, parts_ptr, part, parts, adding, most, out_ptr, bias_ptr, i_n, first_m, from_m, to_m,
            FIRST + COLUMNS // 2, CHUNK, N, GATED, BIAS, ADD,
        )  # fmt: skip
    else:
        if (FIRST // CHUNK % adding == part) & (from_m < FIRST + CHUNK) & (to_m > FIRST):
            if parts > 1:
                mine = _flat(acc)
                flat: gl.constexpr = mine.type.layout
                layout: gl.constexpr = acc.type.layout
                ptrs = parts_ptr + FIRST // CHUNK * most * (ROWS * COLUMNS) + gl.arange(0, ROWS * COLUMNS, layout=flat)
                total = gl.zeros([ROWS * COLUMNS], gl.float32, layout=flat)
                for other in range(parts):
                    if other == part:
                        total += mine
                    else:
                        total += gl.load(ptrs + other * (ROWS * COLUMNS), cache_modifier=".cg")
                total = gl.permute(total.reshape(COLUMNS // 16, ROWS, 4, 2, 2), (1, 0, 3, 2, 4))
                acc = gl.convert_layout(total.reshape(ROWS, COLUMNS), layout)
            _write(acc, out_ptr, bias_ptr, i_n, first_m, from_m, to_m, FIRST, N, GATED, BIAS, ADD)


@gluon.jit
def _write(
    acc, out_ptr, bias_ptr, i_n, first_m, from_m, to_m,
    FIRST: gl.constexpr, N: gl.constexpr, GATED: gl.constexpr, BIAS: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """acc [rows of weights, rows of x] to its place in out [M, N]; gated: eight gates and eight ups become eight.

    FIRST: acc's first column in its tile, whose first row of x is first_m and of which from_m to to_m are written.
    """
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    ROWS: gl.constexpr = acc.shape[0]
    COLUMNS: gl.constexpr = acc.shape[1]
    HEIGHT: gl.constexpr = ROWS // 2 if GATED else ROWS
    if GATED:
        pairs = gl.permute(acc.reshape(ROWS // 16, 2, 8, COLUMNS), (0, 2, 3, 1))
        gate, up = gl.split(pairs.reshape(HEIGHT, COLUMNS, 2))
        acc = gated(gate, up, dtype)
    layout: gl.constexpr = _out_layout(HEIGHT, gl.num_warps())
    out = gl.convert_layout(acc, layout).to(gl.float32)
    o_n = i_n * HEIGHT + gl.arange(0, HEIGHT, layout=gl.SliceLayout(1, layout))
    column = FIRST + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    mask = (o_n < N)[:, None] & ((column >= from_m) & (column < to_m))[None, :]
    out_ptrs = out_ptr + (first_m + column).to(gl.int64)[None, :] * N + o_n[:, None]
    if BIAS:
        out += gl.load(bias_ptr + o_n, mask=o_n < N, other=0.0).to(gl.float32)[:, None]
    if ADD:
        out += gl.load(out_ptrs, mask=mask, other=0.0).to(gl.float32)
    gl.store(out_ptrs, out.to(dtype), mask=mask)
