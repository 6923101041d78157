"""The query's side of scores over a quantized cache: packed in the order of K's words, and K's channel parameters.

Lane 4g + t has of head g the numbers that stand opposite to its words of K: a quarter of the dims.
"""

import triton
import triton.language as tl

from lmtool.kernels.triton.kv_access import ask, load_words, take
from lmtool.kernels.triton.kv_mma import every_other, lanes, nothing, pack, top_of_warp, unpack
from lmtool.kernels.triton.w4_mma import mma, times


@triton.constexpr_function
def words_at_once(dim, bits):
    """Of a row of K a lane loads a quarter, so many words of four or eight codes at a time."""
    words = dim * bits // 128
    return 4 if words % 4 == 0 else 2 if words % 2 == 0 else 1


@triton.jit
def _four_numbers(ptrs, left, OFFSET: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    first, second = load_words(ptrs, (left > OFFSET).to(tl.int32), OFFSET // 2, 2, ASM, MASKED=True, ZERO=True)
    return unpack(first, dtype) + unpack(second, dtype)


@triton.jit
def load_query(q_ptrs, D: tl.constexpr, DIM: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """Row g's numbers, q_ptrs being where it begins, in the order of a lane's words of K: four a time, float32."""
    AT_ONCE: tl.constexpr = words_at_once(DIM, BITS)
    dtype: tl.constexpr = q_ptrs.dtype.element_ty
    o_d = lanes(q_ptrs) % 4 * (4 * AT_ONCE)
    ptrs = (q_ptrs + o_d).to(tl.pointer_type(tl.int32))
    out = ()
    for n in tl.static_range(DIM * BITS // 128 // AT_ONCE):
        for j in tl.static_range(AT_ONCE):
            for upper in tl.static_range(8 // BITS):
                out += (_four_numbers(ptrs, D - o_d, 16 * n * AT_ONCE + 4 * j + upper * (DIM // 2), dtype, ASM),)
    return out


@triton.jit
def size_of(numbers, ASM: tl.constexpr):
    """A power of two that no number of the warp exceeds, 0 where all are: what is divided by it is not rounded."""
    out = tl.abs(numbers[0][0])
    for i in tl.static_range(len(numbers)):
        for j in tl.static_range(4):
            out = tl.maximum(out, tl.abs(numbers[i][j]))
    bits = top_of_warp(out, ASM).to(tl.int32, bitcast=True)
    return ((bits + 0x007FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)  # the exponent, rounded up


@triton.jit
def packed_query(numbers, factor, BITS: tl.constexpr, ASM: tl.constexpr):
    """The right operand of scores: two registers for each four codes; for upper halves a sixteenth of the numbers."""
    out = ()
    for i in tl.static_range(len(numbers)):
        x = numbers[i]
        f = factor * 0.0625 if BITS == 4 and i % 2 == 1 else factor
        out += ((pack(x[0] * f, x[2] * f, tl.float16, ASM), pack(x[1] * f, x[3] * f, tl.float16, ASM)),)
    return out


@triton.jit
def sums_of(q, ASM: tl.constexpr):
    """Σ q of heads 2t and 2t + 1."""
    one = tl.full(q[0][0].shape, 0x3C003C00, tl.int32)
    out = nothing(one)
    for i in tl.static_range(len(q)):
        out = mma(out, one, one, one, one, q[i][0], q[i][1], tl.float16, ASM)
    return out[0], out[1]


@triton.jit
def ask_channels(shared, meta_ptr, wanted, DIM: tl.constexpr, ASM: tl.constexpr):
    """Scales and minima [2, DIM] float16, each by one lane: others take them too."""
    lane = lanes(shared)
    ask(shared + lane * 16, meta_ptr + lane * 4, tl.where(lane < DIM // 4, wanted, 0), 0, 0, 4, ASM)


@triton.jit
def load_channels(meta_ptr, ROW: tl.constexpr, DIM: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """`take_channels` out of memory."""
    AT_ONCE: tl.constexpr = words_at_once(DIM, BITS)
    ptrs = meta_ptr + lanes(meta_ptr) % 4 * (2 * AT_ONCE)
    out = ()
    for n in tl.static_range(DIM * BITS // 128 // AT_ONCE):
        for upper in tl.static_range(8 // BITS):
            registers = ()
            for i in tl.static_range(AT_ONCE):
                registers += load_words(
                    ptrs, ptrs, ROW * (DIM // 2) + 8 * n * AT_ONCE + upper * (DIM // 4) + 2 * i, 2, ASM
                )
            out += (registers,)
    return out


@triton.jit
def take_channels(shared, meta_ptr, ROW: tl.constexpr, DIM: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """Of [2, DIM] row ROW for a lane's words of K: two registers a word, of four bits two more for the upper half."""
    AT_ONCE: tl.constexpr = words_at_once(DIM, BITS)
    o_meta = lanes(shared) % 4 * (2 * AT_ONCE)
    shared += o_meta * 4
    ptrs = meta_ptr + o_meta
    out = ()
    for n in tl.static_range(DIM * BITS // 128 // AT_ONCE):
        for upper in tl.static_range(8 // BITS):
            out += (_of_channels(shared, ptrs, ROW * (DIM // 2) + 8 * n * AT_ONCE + upper * (DIM // 4), AT_ONCE, ASM),)
    return out


@triton.jit
def _of_channels(shared, ptrs, OFFSET: tl.constexpr, AT_ONCE: tl.constexpr, ASM: tl.constexpr):
    """Twice AT_ONCE registers."""
    if AT_ONCE == 4:
        out = take(shared, ptrs, 4 * OFFSET, OFFSET, 4, ASM)
        out += take(shared, ptrs, 4 * OFFSET + 16, OFFSET + 4, 4, ASM)
    else:
        out = take(shared, ptrs, 4 * OFFSET, OFFSET, 2 * AT_ONCE, ASM)
    return out


@triton.jit
def _every_other(registers, WORD: tl.constexpr, ASM: tl.constexpr):
    return every_other(registers[2 * WORD], registers[2 * WORD + 1], ASM)


@triton.jit
def scaled_query(q, scales, AT_ONCE: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """q · the scale of each channel."""
    EACH: tl.constexpr = 8 // BITS
    out = ()
    for i in tl.static_range(len(q)):
        registers = scales[i // EACH // AT_ONCE * EACH + i % EACH]
        even, odd = _every_other(registers, i // EACH % AT_ONCE, ASM)
        out += ((times(q[i][0], even, tl.float16, ASM), times(q[i][1], odd, tl.float16, ASM)),)
    return out


@triton.jit
def minima_of(q, minima, AT_ONCE: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """Σ q · the minimum of each channel, of heads 2t and 2t + 1: the minima are every row of the left operand."""
    EACH: tl.constexpr = 8 // BITS
    lower = nothing(q[0][0])
    upper = lower
    for i in tl.static_range(len(q)):
        registers = minima[i // EACH // AT_ONCE * EACH + i % EACH]
        even, odd = _every_other(registers, i // EACH % AT_ONCE, ASM)
        if i % EACH == 0:
            lower = mma(lower, even, even, odd, odd, q[i][0], q[i][1], tl.float16, ASM)
        else:
            upper = mma(upper, even, even, odd, odd, q[i][0], q[i][1], tl.float16, ASM)
    return lower[0] + upper[0] * 16.0, lower[1] + upper[1] * 16.0
