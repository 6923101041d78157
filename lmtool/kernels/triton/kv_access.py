"""A lane's own loads, stores and copies, an instruction each: tensors have one element a thread, as in `w4_mma.py`.

`ask` has words brought from memory into the program's shared memory without a register waiting for them, `take` reads
them there: much can be under way at once. What a lane takes it has asked for itself, so that nobody waits for others.

`tl.load` would do the same, but the compiler looks at every access together with all that it is connected to, and a
kernel of a hundred straight accesses took it minutes. The interpreter, which runs no assembler, takes `tl.load`.
"""

import triton
import triton.language as tl

from lmtool.kernels.triton.w4_mma import four


@triton.constexpr_function
def _load_code(words, offset, masked, zero, fresh):
    """ld.global of so many words, ``offset`` of them behind the pointer; masked: the operand after it says whether."""
    registers = [f"${i}" for i in range(words)]
    target = registers[0] if words == 1 else "{" + ", ".join(registers) + "}"
    vector = {1: "", 2: ".v2", 4: ".v4"}[words]
    load = f"ld.global{'.cg' if fresh else ''}{vector}.b32 {target}, [${words}+{4 * offset}];"
    if not masked:
        return load
    nothing = "".join(f"mov.b32 {register}, 0; " for register in registers) if zero else ""
    return f"{{ .reg .pred p; setp.ne.b32 p, ${words + 1}, 0; {nothing}@p {load} }}"


@triton.constexpr_function
def _load_constraints(words, masked):
    return ",".join(["=r"] * words + ["l"] + ["r"] * masked)


@triton.jit
def load_words(
    ptrs,
    wanted,
    OFFSET: tl.constexpr,
    WORDS: tl.constexpr,
    ASM: tl.constexpr,
    MASKED: tl.constexpr = False,
    ZERO: tl.constexpr = False,
    FRESH: tl.constexpr = False,
):
    """1, 2 or 4 registers from ``ptrs`` [threads] of int32 + OFFSET on, which lie at as many words.

    MASKED: only where ``wanted`` [threads] int32 is not 0; ZERO: elsewhere zeros, and else whatever there is.
    FRESH: past the first-level cache, what other multiprocessors wrote.
    """
    if ASM:
        CODE: tl.constexpr = _load_code(WORDS, OFFSET, MASKED, ZERO, FRESH)
        CONSTRAINTS: tl.constexpr = _load_constraints(WORDS, MASKED)
        args = [ptrs, wanted] if MASKED else [ptrs]
        if WORDS == 4:
            out = tl.inline_asm_elementwise(
                CODE, CONSTRAINTS, args, dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1
            )
        elif WORDS == 2:
            out = tl.inline_asm_elementwise(CODE, CONSTRAINTS, args, dtype=(tl.int32, tl.int32), is_pure=False, pack=1)
        else:
            out = (tl.inline_asm_elementwise(CODE, CONSTRAINTS, args, dtype=tl.int32, is_pure=False, pack=1),)
    else:
        mask = wanted != 0 if MASKED else tl.full(ptrs.shape, 1, tl.int1)
        side = tl.arange(0, WORDS)[None, :] + OFFSET
        loaded = tl.load(ptrs[:, None] + side, mask=mask[:, None], other=0)
        if WORDS == 4:
            out = four(loaded)
        elif WORDS == 2:
            out = tl.split(loaded)
        else:
            out = (loaded.reshape(ptrs.shape[0]),)
    return out


@triton.constexpr_function
def _store_code(words, offset):
    registers = [f"${2 + i}" for i in range(words)]
    source = registers[0] if words == 1 else "{" + ", ".join(registers) + "}"
    vector = {1: "", 2: ".v2", 4: ".v4"}[words]
    store = f"@p st.global{vector}.b32 [$1+{4 * offset}], {source};"
    return f"{{ .reg .pred p; setp.ne.b32 p, ${2 + words}, 0; {store} mov.b32 $0, 0; }}"


@triton.constexpr_function
def _store_constraints(words):
    return "=r,l" + ",r" * (words + 1)


@triton.jit
def store_words(ptrs, registers, wanted, OFFSET: tl.constexpr, ASM: tl.constexpr):
    """1, 2 or 4 registers to ``ptrs`` [threads] of int32 + OFFSET on, where ``wanted`` [threads] int32 is not 0."""
    WORDS: tl.constexpr = len(registers)
    if ASM:
        if WORDS == 4:
            args = [ptrs, registers[0], registers[1], registers[2], registers[3], wanted]
        elif WORDS == 2:
            args = [ptrs, registers[0], registers[1], wanted]
        else:
            args = [ptrs, registers[0], wanted]
        CODE: tl.constexpr = _store_code(WORDS, OFFSET)
        CONSTRAINTS: tl.constexpr = _store_constraints(WORDS)
        tl.inline_asm_elementwise(CODE, CONSTRAINTS, args, dtype=tl.int32, is_pure=False, pack=1)
    else:
        for i in tl.static_range(WORDS):
            tl.store(ptrs + (OFFSET + i), registers[i], mask=wanted != 0)


@triton.jit
def shared_memory(warp, BYTES: tl.constexpr, ASM: tl.constexpr):
    """Where the BYTES that are each warp's own begin; warp [threads] numbers them."""
    if ASM:
        CODE: tl.constexpr = _shared_code(BYTES * warp.shape[0] // 32)
        begin = tl.inline_asm_elementwise(CODE, "=r,r", [warp], dtype=tl.int32, is_pure=False, pack=1)
        out = begin + warp * BYTES
    else:
        out = warp
    return out


@triton.constexpr_function
def _shared_code(size):
    return f"{{ .shared .align 16 .b8 words[{size}]; mov.u32 $0, words; }}"


@triton.constexpr_function
def _ask_code(words, target, offset):
    level = "cg" if words == 4 else "ca"
    copy = f"@p cp.async.{level}.shared.global [$1+{target}], [$2+{4 * offset}], {4 * words};"
    return f"{{ .reg .pred p; setp.ne.b32 p, $3, 0; {copy} mov.b32 $0, 0; }}"


@triton.jit
def ask(
    shared,
    ptrs,
    wanted,
    TARGET: tl.constexpr,
    OFFSET: tl.constexpr,
    WORDS: tl.constexpr,
    ASM: tl.constexpr,
):
    """WORDS words from ``ptrs`` [threads] of int32 + OFFSET on to byte ``shared`` [threads] + TARGET, if wanted."""
    if ASM:
        CODE: tl.constexpr = _ask_code(WORDS, TARGET, OFFSET)
        tl.inline_asm_elementwise(CODE, "=r,r,l,r", [shared, ptrs, wanted], dtype=tl.int32, is_pure=False, pack=1)


@triton.constexpr_function
def _take_code(words, target):
    registers = ", ".join(f"${i}" for i in range(words))
    vector = {1: "", 2: ".v2", 4: ".v4"}[words]
    return f"ld.shared{vector}.b32 {'{' + registers + '}' if words > 1 else registers}, [${words}+{target}];"


@triton.constexpr_function
def _take_constraints(words):
    return "=r," * words + "r"


@triton.jit
def take(shared, ptrs, TARGET: tl.constexpr, OFFSET: tl.constexpr, WORDS: tl.constexpr, ASM: tl.constexpr):
    """What was asked for, as registers; the interpreter, which copies nothing, reads it where it came from."""
    if ASM:
        CODE: tl.constexpr = _take_code(WORDS, TARGET)
        CONSTRAINTS: tl.constexpr = _take_constraints(WORDS)
        if WORDS == 4:
            out = tl.inline_asm_elementwise(
                CODE, CONSTRAINTS, [shared], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1
            )
        elif WORDS == 2:
            out = tl.inline_asm_elementwise(
                CODE, CONSTRAINTS, [shared], dtype=(tl.int32, tl.int32), is_pure=False, pack=1
            )
        else:
            out = (tl.inline_asm_elementwise(CODE, CONSTRAINTS, [shared], dtype=tl.int32, is_pure=False, pack=1),)
    else:
        out = load_words(ptrs, ptrs, OFFSET, WORDS, ASM)
    return out


@triton.jit
def all_asked(like, ASM: tl.constexpr):
    """What was asked for since the last time is one group."""
    if ASM:
        tl.inline_asm_elementwise(
            "cp.async.commit_group; mov.b32 $0, 0;", "=r,r", [like], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def wait_for_all_but(like, ONE: tl.constexpr, ASM: tl.constexpr):
    """Until all groups but the last one (ONE) or all are there; what one lane asked for others may take then too."""
    if ASM:
        if ONE:
            tl.inline_asm_elementwise(
                "cp.async.wait_group 1; bar.warp.sync 0xffffffff; mov.b32 $0, 0;",
                "=r,r",
                [like],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
        else:
            tl.inline_asm_elementwise(
                "cp.async.wait_group 0; bar.warp.sync 0xffffffff; mov.b32 $0, 0;",
                "=r,r",
                [like],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
