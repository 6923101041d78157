"""What kernels over `W4Tiles` share: codes to numbers, and scales.

Codes become numbers with one operation for two of them: (word & mask) | magic is a pair of floats that are a power of
two and a code more.
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
def scale_of(meta):
    """float16, as stored."""
    return (meta & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
