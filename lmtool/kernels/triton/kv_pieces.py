"""Pieces of a sequence: written as answers, or as parts that the last one to come merges.

Parts are written and read as results lie in a warp (`kv_values.py`), so that nothing moves between lanes.
"""

import triton
import triton.language as tl

from lmtool.kernels.triton.kv_access import load_words, store_words
from lmtool.kernels.triton.kv_mma import lanes, pack, top_of_rows, transposed


@triton.jit
def store_out(total, out_ptr, columns, D: tl.constexpr, ASM: tl.constexpr):
    """Into heads [columns, D] from out_ptr on: transposed, lane 4g + t has dims 2t and 2t + 1 of head g."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    lane = lanes(out_ptr)
    head, o_d = lane // 4, lane % 4 * 2
    ptrs = (out_ptr + head * D + o_d).to(tl.pointer_type(tl.int32))
    left = tl.where(head < columns, D - o_d, 0)
    for m in tl.static_range(len(total)):
        c = total[m]
        first = transposed(pack(c[0], c[1], dtype, ASM), ASM)
        second = transposed(pack(c[2], c[3], dtype, ASM), ASM)
        store_words(ptrs, (first,), (left > 16 * m).to(tl.int32), 8 * m, ASM)
        store_words(ptrs, (second,), (left > 16 * m + 8).to(tl.int32), 8 * m + 4, ASM)


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def store_part(total, tops, sums, partial_ptr, top_ptr, ASM: tl.constexpr):
    """A piece's averages [tiles, 32, 4] and, of its eight heads, the logarithms of what they were divided by."""
    lane = lanes(partial_ptr)
    ptrs = partial_ptr.to(tl.pointer_type(tl.int32)) + lane * 4
    for m in tl.static_range(len(total)):
        c = total[m]
        store_words(ptrs, (_bits(c[0]), _bits(c[1]), _bits(c[2]), _bits(c[3])), lane * 0 + 1, 128 * m, ASM)
    logs = (_bits(tops[0] + tl.log2(sums[0])), _bits(tops[1] + tl.log2(sums[1])))
    store_words(top_ptr.to(tl.pointer_type(tl.int32)) + lane * 2, logs, (lane < 4).to(tl.int32), 0, ASM)


@triton.jit
def _numbers(registers):
    return registers[0].to(tl.float32, bitcast=True), registers[1].to(tl.float32, bitcast=True)


@triton.jit
def _logs(top_ptr, piece, exists, NEXT: tl.constexpr, ASM: tl.constexpr):
    """Of heads 2t and 2t + 1 of a piece; past the first-level cache: other multiprocessors wrote them."""
    ptrs = top_ptr.to(tl.pointer_type(tl.int32)) + (piece * (8 * NEXT) + lanes(top_ptr) % 4 * 2)
    logs = _numbers(load_words(ptrs, exists.to(tl.int32), 0, 2, ASM, MASKED=True, ZERO=True, FRESH=True))
    return tl.where(exists, logs[0], float("-inf")), tl.where(exists, logs[1], float("-inf"))


@triton.jit
def merged(partial_ptr, top_ptr, count, TILES: tl.constexpr, NEXT: tl.constexpr, ASM: tl.constexpr):
    """``count`` parts of a sequence, NEXT eights of heads apart, in their order, each weighted by its log."""
    lane = lanes(partial_ptr)
    best0 = tl.full(lane.shape, float("-inf"), tl.float32)
    best1 = best0
    for i in range(0, count, 16):
        for j in tl.static_range(0, 16, 8):  # a piece for each lane of a column
            piece = lane // 4 + (i + j)
            log0, log1 = _logs(top_ptr, piece, piece < count, NEXT, ASM)
            best0, best1 = tl.maximum(best0, log0), tl.maximum(best1, log1)
    best0, best1 = top_of_rows(best0, ASM), top_of_rows(best1, ASM)
    zero = tl.zeros(lane.shape, tl.float32)
    sum0, sum1 = zero, zero
    total = ()
    for _ in tl.static_range(TILES):
        total += ((zero, zero, zero, zero),)
    part_ptrs = partial_ptr.to(tl.pointer_type(tl.int32)) + lane * 4
    for i in range(0, count, 4):
        for j in tl.static_range(4):  # loads of four pieces on their way at once
            piece = lane * 0 + i + j
            log0, log1 = _logs(top_ptr, piece, piece < count, NEXT, ASM)
            weight0, weight1 = tl.exp2(log0 - best0), tl.exp2(log1 - best1)
            sum0, sum1 = sum0 + weight0, sum1 + weight1
            ptrs, exists = part_ptrs + (i + j) * (NEXT * TILES * 128), (piece < count).to(tl.int32)
            more = ()
            for m in tl.static_range(TILES):
                part = load_words(ptrs, exists, 128 * m, 4, ASM, MASKED=True, ZERO=True, FRESH=True)
                p0, p1 = _numbers(part)
                p2, p3 = part[2].to(tl.float32, bitcast=True), part[3].to(tl.float32, bitcast=True)
                c = total[m]
                more += ((c[0] + p0 * weight0, c[1] + p1 * weight1, c[2] + p2 * weight0, c[3] + p3 * weight1),)
            total = more
    out = ()
    for m in tl.static_range(TILES):
        c = total[m]
        out += ((c[0] / sum0, c[1] / sum1, c[2] / sum0, c[3] / sum1),)
    return out
