"""What kernels over `W4Tiles` share: codes to numbers, scales, zero points, and where a tile's words lie.

Codes become numbers with one operation for two of them. float16: the AND of a word leaves q·2⁻²⁴ or 16q·2⁻²⁴, float16
numbers that the tensor cores take as they are; what is missing of 2²⁴ goes into the scale. bfloat16: the AND and an
OR leave 128 + q. The zero point is made in the same form, and the tensor cores subtract it.
"""

import triton
import triton.language as tl


@triton.jit
def halves_of(w, MASK: tl.constexpr, MAGIC: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """(w & MASK) | MAGIC of both halves of each word, as ``dtype``: a last dimension of two more."""
    if ASM:
        low, high = tl.inline_asm_elementwise(
            "{ .reg .b32 t; lop3.b32 t, $2, " + MASK + ", " + MAGIC + ", 0xea; mov.b32 {$0, $1}, t; }",
            "=h,=h,r",
            [w],
            dtype=(tl.int16, tl.int16),
            is_pure=True,
            pack=1,
        )
    else:  # the interpreter runs no assembler
        both = (w & _number(MASK)) | _number(MAGIC)
        low = both.to(tl.int16)
        high = (both >> 16).to(tl.int16)
    return tl.join(low, high).to(dtype, bitcast=True)


@triton.constexpr_function
def _number(text):
    """A 32-bit constant of the assembler as the int32 that has its bits."""
    value = int(text, 16)
    return value - (1 << 32) if value >= 1 << 31 else value


@triton.jit
def codes(w, J: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """Codes j of the words as numbers; in float16 those of an odd j are 16 times the others."""
    if dtype == tl.bfloat16:
        out = halves_of(w >> (4 * J), "0x000f000f", "0x43004300", dtype, ASM)
    elif J % 2 == 0:
        out = halves_of(w >> (4 * J), "0x000f000f", "0x00000000", dtype, ASM)
    else:
        out = halves_of(w >> (4 * J - 4), "0x00f000f0", "0x00000000", dtype, ASM)
    return out


@triton.jit
def minus_zero(meta, ODD: tl.constexpr, dtype: tl.constexpr):
    """-zero in the form of `codes`."""
    if dtype == tl.bfloat16:
        bits = ((meta >> 16) & 15) | 0xC300
    elif ODD:
        bits = ((meta >> 12) & 0xF0) | 0x8000
    else:
        bits = ((meta >> 16) & 15) | 0x8000
    return bits.to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def scale_of(meta):
    """float16, as stored."""
    return (meta & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
