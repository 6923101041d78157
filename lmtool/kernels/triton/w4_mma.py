"""The tensor cores' small product as one instruction, with its operands where the hardware wants them.

Every tensor here has one element a thread, [32 · warps], so that nothing but this file decides which thread holds
what: `tl.dot` would choose, and it chooses anew with each compiler. A register is an int32 with two numbers in it.
Of a warp's lanes, 4g + t, g numbers rows (left operand, result) or columns (right operand), t the pairs along the
other side (PTX ISA, mma.m16n8k16).
"""

import triton
import triton.language as tl


@triton.jit
def mma(c, a0, a1, a2, a3, b0, b1, dtype: tl.constexpr, ASM: tl.constexpr):
    """c + a · b for each warp: a 16 × 16, b 16 × 8, c 16 × 8 float32 in four elements a thread.

    a0, a2: row g, columns 2t … and 8 + 2t …; a1, a3: row 8 + g. b0, b1: column g, rows 2t … and 8 + 2t ….
    c: row g, columns 2t and 2t + 1, then row 8 + g.
    """
    if ASM:
        TYPE: tl.constexpr = "bf16" if dtype == tl.bfloat16 else "f16"
        c0, c1, c2, c3 = tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k16.row.col.f32." + TYPE + "." + TYPE + ".f32"
            " {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
            [a0, a1, a2, a3, b0, b1, c[0], c[1], c[2], c[3]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:  # the interpreter runs no assembler: the same threads' numbers as matrices, [warp, row, column]
        WARPS: tl.constexpr = c[0].shape[0] // 32
        upper = tl.join(_pair(a0, dtype), _pair(a2, dtype))  # thread b q
        lower = tl.join(_pair(a1, dtype), _pair(a3, dtype))
        a = tl.join(upper, lower).reshape(WARPS, 8, 4, 2, 2, 2)  # W g t b q h
        a = tl.permute(a, (0, 5, 1, 4, 2, 3)).reshape(WARPS, 16, 16)
        b = tl.join(_pair(b0, dtype), _pair(b1, dtype)).reshape(WARPS, 8, 4, 2, 2)  # W g t b q
        b = tl.permute(b, (0, 4, 2, 3, 1)).reshape(WARPS, 16, 8)
        out = tl.dot(a, b).reshape(WARPS, 2, 8, 4, 2)  # W h g t b
        left, right = tl.split(tl.permute(out, (0, 2, 3, 1, 4)).reshape(WARPS * 32, 2, 2))
        c0, c2 = tl.split(left)
        c1, c3 = tl.split(right)
        c0, c1, c2, c3 = c[0] + c0, c[1] + c1, c[2] + c2, c[3] + c3
    return c0, c1, c2, c3


@triton.jit
def times(a, b, dtype: tl.constexpr, ASM: tl.constexpr):
    """a · b, two numbers at once, rounded to ``dtype``."""
    if ASM:
        if dtype == tl.bfloat16:
            CODE: tl.constexpr = "{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z; }"
        else:
            CODE: tl.constexpr = "mul.rn.f16x2 $0, $1, $2;"
        out = tl.inline_asm_elementwise(CODE, "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)
    else:
        low, high = tl.split((_pair(a, dtype) * _pair(b, dtype)).to(tl.int16, bitcast=True).to(tl.int32))
        out = (low & 0xFFFF) | (high << 16)
    return out


@triton.jit
def _pair(register, dtype: tl.constexpr):
    """The two numbers of a register: a last dimension of two more."""
    low = register.to(tl.int16).to(dtype, bitcast=True)
    high = (register >> 16).to(tl.int16).to(dtype, bitcast=True)
    return tl.join(low, high)


@triton.jit
def four(quad):
    """[threads, 4], which a thread loads at once, as four registers."""
    even, odd = tl.split(quad.reshape(quad.shape[0], 2, 2))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def keep_order(like, ASM: tl.constexpr):
    """Loads above stay above: left alone, the compiler moves a load down to where its registers are free."""
    if ASM:
        tl.inline_asm_elementwise(
            "bar.warp.sync 0xffffffff; mov.b32 $0, $1;", "=r,r", [like], dtype=tl.int32, is_pure=False, pack=1
        )
