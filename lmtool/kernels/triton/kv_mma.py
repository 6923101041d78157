"""What a warp does with registers of a quantized K/V cache, an instruction each: expand, pack, transpose, exchange.

As in `w4_mma.py` every tensor has one element a thread, [32 · warps], lanes are 4g + t, and a register is an int32 with
two numbers in it. The interpreter runs no assembler: beside each instruction stands the same in plain Triton.
"""

import triton
import triton.language as tl

from lmtool.kernels.triton.w4_mma import four, mma

SUBNORMAL = tl.constexpr(16777216.0)  # a code read as float16 is so many times smaller


@triton.jit
def lanes(like):
    """Numbers of the threads of ``like`` in their warps."""
    return tl.arange(0, like.shape[0]) % 32


@triton.jit
def byte_pairs(word, ASM: tl.constexpr):
    """A word's four codes as two registers, codes 0 and 2, 1 and 3: read as float16 they are code · 2⁻²⁴."""
    if ASM:
        even = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0, 0x4240;", "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1
        )
        odd = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0, 0x4341;", "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        even, odd = word & 0x00FF00FF, (word >> 8) & 0x00FF00FF
    return even, odd


@triton.jit
def nibble_pairs(word):
    """Eight codes of four bits: `byte_pairs` of the lower halves of the bytes, and 16 times those of the upper."""
    shifted = word >> 8
    return word & 0x000F000F, shifted & 0x000F000F, word & 0x00F000F0, shifted & 0x00F000F0


@triton.jit
def every_other(first, second, ASM: tl.constexpr):
    """Registers of numbers (0, 1) and (2, 3) → (0, 2) and (1, 3)."""
    if ASM:
        even = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", [first, second], dtype=tl.int32, is_pure=True, pack=1
        )
        odd = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r", [first, second], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        even = (first & 0xFFFF) | (second << 16)
        odd = ((first >> 16) & 0xFFFF) | (second & -65536)
    return even, odd


@triton.jit
def pack(low, high, dtype: tl.constexpr, ASM: tl.constexpr):
    """Two float32 as the ``dtype`` of a register."""
    if ASM:
        TYPE: tl.constexpr = "bf16x2" if dtype == tl.bfloat16 else "f16x2"
        out = tl.inline_asm_elementwise(
            "cvt.rn." + TYPE + ".f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        lower = low.to(dtype).to(tl.int16, bitcast=True).to(tl.int32)
        upper = high.to(dtype).to(tl.int16, bitcast=True).to(tl.int32)
        out = (lower & 0xFFFF) | (upper << 16)
    return out


@triton.jit
def unpack(register, dtype: tl.constexpr):
    """The two ``dtype`` of a register as float32."""
    low = register.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return low, (register >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def transposed(register, ASM: tl.constexpr):
    """An 8 × 8 of 16 bits, of which lane 4g + t has row g, columns 2t and 2t + 1; now column g, rows 2t and 2t + 1."""
    if ASM:
        out = tl.inline_asm_elementwise(
            "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [register], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        WARPS: tl.constexpr = register.shape[0] // 32
        matrix = tl.join(register & 0xFFFF, (register >> 16) & 0xFFFF).reshape(WARPS, 8, 8)
        low, high = tl.split(tl.permute(matrix, (0, 2, 1)).reshape(WARPS * 32, 2))
        out = low | (high << 16)
    return out


@triton.jit
def of_four(x, LANE: tl.constexpr, ASM: tl.constexpr):
    """Of each four lanes 4g … 4g + 3 the value, 32 bits, that lane number LANE of them has."""
    if ASM:
        TYPE: tl.constexpr = "f" if x.dtype == tl.float32 else "r"
        out = tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, " + _digit(LANE) + ", 0x1c1f, 0xffffffff;",
            "=" + TYPE + "," + TYPE,
            [x],
            dtype=x.dtype,
            is_pure=True,
            pack=1,
        )
    else:
        out = tl.broadcast_to(four(x.reshape(x.shape[0] // 4, 4))[LANE][:, None], x.shape[0] // 4, 4)
        out = out.reshape(x.shape[0])
    return out


@triton.constexpr_function
def _digit(number):
    return str(number)


@triton.jit
def _from_across(x, DISTANCE: tl.constexpr):
    """The value of the lane whose number differs in bit DISTANCE."""
    TYPE: tl.constexpr = "f" if x.dtype == tl.float32 else "r"
    return tl.inline_asm_elementwise(
        "shfl.sync.bfly.b32 $0, $1, " + _digit(DISTANCE) + ", 0x1f, 0xffffffff;",
        "=" + TYPE + "," + TYPE,
        [x],
        dtype=x.dtype,
        is_pure=True,
        pack=1,
    )


@triton.jit
def top_of_rows(x, ASM: tl.constexpr):
    """The largest of the eight lanes that share t, for all of them."""
    if ASM:
        x = tl.maximum(x, _from_across(x, 4))
        x = tl.maximum(x, _from_across(x, 8))
        x = tl.maximum(x, _from_across(x, 16))
    else:
        rows = x.reshape(x.shape[0] // 32, 8, 4)
        x = tl.broadcast_to(tl.max(rows, axis=1)[:, None, :], x.shape[0] // 32, 8, 4).reshape(x.shape[0])
    return x


@triton.jit
def top_of_warp(x, ASM: tl.constexpr):
    """The largest of a warp, for all of its lanes."""
    x = top_of_rows(x, ASM)
    if ASM:
        x = tl.maximum(x, _from_across(x, 1))
        x = tl.maximum(x, _from_across(x, 2))
    else:
        of_warps = x.reshape(x.shape[0] // 32, 32)
        x = tl.broadcast_to(tl.max(of_warps, axis=1)[:, None], x.shape[0] // 32, 32).reshape(x.shape[0])
    return x


@triton.jit
def sum_of_rows(x, ASM: tl.constexpr):
    """The sum over the eight lanes that share t, for all of them."""
    if ASM:
        x += _from_across(x, 4)
        x += _from_across(x, 8)
        x += _from_across(x, 16)
    else:
        rows = x.reshape(x.shape[0] // 32, 8, 4)
        x = tl.broadcast_to(tl.sum(rows, axis=1)[:, None, :], x.shape[0] // 32, 8, 4).reshape(x.shape[0])
    return x


@triton.jit
def nothing(like):
    """Where `mma` begins, for the threads of ``like``."""
    zero = tl.zeros(like.shape, tl.float32)
    return (zero, zero, zero, zero)


@triton.jit
def add_bytes(c, upper, lower, b, ASM: tl.constexpr):
    """c + the codes of a word of rows g and of one of rows 8 + g times b."""
    a0, a2 = byte_pairs(upper, ASM)
    a1, a3 = byte_pairs(lower, ASM)
    return mma(c, a0, a1, a2, a3, b[0], b[1], tl.float16, ASM)


@triton.jit
def add_nibbles(c, d, upper, lower, b, b_of_upper, SAME: tl.constexpr, ASM: tl.constexpr):
    """c + the codes in the lower halves of bytes times b, and to that (SAME) or d those in the upper times another."""
    a0, a2, a4, a6 = nibble_pairs(upper)
    a1, a3, a5, a7 = nibble_pairs(lower)
    c = mma(c, a0, a1, a2, a3, b[0], b[1], tl.float16, ASM)
    if SAME:
        out = mma(c, a4, a5, a6, a7, b_of_upper[0], b_of_upper[1], tl.float16, ASM)
    else:
        out = (c, mma(d, a4, a5, a6, a7, b_of_upper[0], b_of_upper[1], tl.float16, ASM))
    return out
