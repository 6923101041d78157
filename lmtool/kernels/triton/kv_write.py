"""A quantized K/V cache is written: tokens as they are rotated, and whole blocks out of another cache.

V is taken as two halves, dimensions d and d + DP/2, which share a byte where codes have four bits.
"""

import triton
import triton.language as tl

from lmtool.kernels.triton.kv_tiles import BLOCK, number
from lmtool.kernels.triton.launch import allow_next, wait_for_previous
from lmtool.kernels.triton.rotary import rotated

_ROWS: tl.constexpr = tl.constexpr(16)  # of a block that is sealed, at once: DP / 2 is a multiple of it


# ------------------------------------------------------------------ numbers → codes
@triton.jit
def _lowest(x, mask, axis: tl.constexpr):
    return tl.min(tl.where(mask, x, float("inf")), axis=axis)


@triton.jit
def _highest(x, mask, axis: tl.constexpr):
    return tl.max(tl.where(mask, x, float("-inf")), axis=axis)


@triton.jit
def _scale_and_low(lowest, highest, BITS: tl.constexpr):
    """What a group of numbers is stored with, float16, as kv_layout.quantize has it; lowest, highest float32."""
    low = tl.minimum(tl.maximum(lowest, -65504.0), 65504.0).to(tl.float16)
    levels = tl.full(highest.shape, (1 << BITS) - 1, tl.float32)
    scale = tl.div_rn(highest - low.to(tl.float32), levels)
    return tl.minimum(tl.maximum(scale, 0.0), 65504.0).to(tl.float16), low


@triton.jit
def _codes(x, scale, low, BITS: tl.constexpr):
    """The nearest codes of x float32, as int32; scale and low float16, of x's shape or with ones in it."""
    step = tl.where(scale > 0.0, scale.to(tl.float32), 1.0)
    places = (x - low.to(tl.float32)) * (1.0 / step)  # not divided: what lies between two codes may go to either
    places = tl.minimum(tl.maximum(places, 0.0), ((1 << BITS) - 1) * 1.0)
    # beside 2^23 a float32 has no room for a fraction: it is rounded, halves to the even code, as torch rounds them
    return (places + 8388608.0).to(tl.int32, bitcast=True) & ((1 << BITS) - 1)


@triton.jit
def _store_halves(ptr, o_byte, stride, lower, upper, mask, BITS: tl.constexpr):
    """Codes of dimensions d and d + DP/2: in one byte, or ``stride`` bytes from each other."""
    if BITS == 4:
        tl.store(ptr + o_byte, (lower | (upper << 4)).to(tl.uint8), mask=mask)
    else:
        tl.store(ptr + o_byte, lower.to(tl.uint8), mask=mask)
        tl.store(ptr + o_byte + stride, upper.to(tl.uint8), mask=mask)


# ------------------------------------------------------------------ tokens of a step
@triton.jit
def _static_meta(meta_ptr, o_h, o_d, mask, DP: tl.constexpr):
    """Scale and minimum of dimensions o_d [1, n] of heads o_h [BLOCK_H]."""
    ptrs = meta_ptr + o_h[:, None] * (2 * DP) + o_d
    return tl.load(ptrs, mask=mask, other=0.0), tl.load(ptrs + DP, mask=mask, other=0.0)


@triton.jit
def _token_meta(lowest, highest, meta_ptr, row, m_h, BITS: tl.constexpr):
    """Scale and minimum [BLOCK_H, 1] of one token's heads, written at ``row`` too."""
    scale, low = _scale_and_low(lowest, highest, BITS)
    tl.store(meta_ptr + row * 2, scale, mask=m_h)
    tl.store(meta_ptr + row * 2 + 1, low, mask=m_h)
    return scale[:, None], low[:, None]


@triton.jit
def _store_keys(k, k_ptr, meta_ptr, o_h, row, m_h, o_d, D: tl.constexpr, DP: tl.constexpr, STATIC: tl.constexpr):
    """k float32 [BLOCK_H, BLOCK_D] → token ``row`` [BLOCK_H] of all that the cache has room for."""
    is_dim = (o_d < D)[None, :]
    if STATIC:
        scale, low = _static_meta(meta_ptr, o_h, o_d[None, :], m_h[:, None] & is_dim, DP)
    else:
        scale, low = _token_meta(_lowest(k, is_dim, 1), _highest(k, is_dim, 1), meta_ptr, row, m_h, 8)
    codes = tl.where(is_dim, _codes(k, scale, low, 8), 0)
    tl.store(k_ptr + row[:, None] * DP + o_d[None, :], codes.to(tl.uint8), mask=m_h[:, None] & (o_d < DP)[None, :])


@triton.jit
def _store_values(
    x_ptrs,
    v_ptr,
    meta_ptr,
    o_h,
    row,
    m_h,
    o_i,
    D: tl.constexpr,
    DP: tl.constexpr,
    STATIC: tl.constexpr,
    BITS: tl.constexpr,
):
    """Heads at x_ptrs [BLOCK_H, 1] → token ``row``, its dimensions below each other; o_i: those of a half."""
    half: tl.constexpr = DP // 2
    lower_d, upper_d = o_i[None, :], o_i[None, :] + half
    m_half = m_h[:, None] & (lower_d < half)
    m_lower, m_upper = m_half & (lower_d < D), m_half & (upper_d < D)
    lower = tl.load(x_ptrs + lower_d, mask=m_lower, other=0.0).to(tl.float32)
    upper = tl.load(x_ptrs + upper_d, mask=m_upper, other=0.0).to(tl.float32)
    if STATIC:
        scale, low = _static_meta(meta_ptr, o_h, lower_d, m_lower, DP)
        upper_scale, upper_low = _static_meta(meta_ptr, o_h, upper_d, m_upper, DP)
    else:
        lowest = tl.minimum(_lowest(lower, m_lower, 1), _lowest(upper, m_upper, 1))
        highest = tl.maximum(_highest(lower, m_lower, 1), _highest(upper, m_upper, 1))
        scale, low = _token_meta(lowest, highest, meta_ptr, row, m_h, BITS)
        upper_scale, upper_low = scale, low
    lower = tl.where(m_lower, _codes(lower, scale, low, BITS), 0)
    upper = tl.where(m_upper, _codes(upper, upper_scale, upper_low, BITS), 0)
    first_byte = (row // BLOCK) * (DP * BITS // 8 * BLOCK) + row % BLOCK
    _store_halves(v_ptr, first_byte[:, None] + lower_d * BLOCK, half * BLOCK, lower, upper, m_half, BITS)


@triton.jit(do_not_specialize=["num_blocks"])
def kv_store_kernel(
    qkv_ptr,
    cos_sin_ptr,
    slots_ptr,
    k_ptr,
    v_ptr,
    k_meta_ptr,
    v_meta_ptr,
    q_norm_ptr,
    k_norm_ptr,
    q_ptr,
    eps,
    num_blocks,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    R: tl.constexpr,
    NORM: tl.constexpr,
    STATIC: tl.constexpr,
    V_BITS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (t, i): the i-th part of token t: BLOCK_H q heads, or k heads, or v heads, counted in this order."""
    allow_next(PDL)
    wait_for_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    num_q_parts: tl.constexpr = (HQ + BLOCK_H - 1) // BLOCK_H
    num_kv_parts: tl.constexpr = (HKV + BLOCK_H - 1) // BLOCK_H
    o_d = tl.arange(0, BLOCK_D)
    o_h = tl.arange(0, BLOCK_H)
    token_ptr = qkv_ptr + token * (HQ + 2 * HKV) * D
    cos_sin_ptr += token * R
    if part < num_q_parts:
        o_h += part * BLOCK_H
        mask = (o_h < HQ)[:, None] & (o_d < D)[None, :]
        q = rotated(token_ptr + o_h[:, None] * D, q_norm_ptr, cos_sin_ptr, mask, o_d, eps, D, R, NORM)
        tl.store(q_ptr + token * HQ * D + o_h[:, None] * D + o_d[None, :], q, mask=mask)
    else:
        part -= num_q_parts
        slot = tl.load(slots_ptr + token).to(tl.int64)
        o_h += part % num_kv_parts * BLOCK_H
        m_h = o_h < HKV
        row = o_h.to(tl.int64) * num_blocks * BLOCK + slot
        if part < num_kv_parts:
            mask = m_h[:, None] & (o_d < D)[None, :]
            heads = token_ptr + (HQ + o_h)[:, None] * D
            k = rotated(heads, k_norm_ptr, cos_sin_ptr, mask, o_d, eps, D, R, NORM).to(tl.float32)
            _store_keys(k, k_ptr, k_meta_ptr, o_h, row, m_h, o_d, D, DP, STATIC)
        else:
            heads = token_ptr + (HQ + HKV + o_h)[:, None] * D
            o_i = tl.arange(0, BLOCK_D // 2)
            _store_values(heads, v_ptr, v_meta_ptr, o_h, row, m_h, o_i, D, DP, STATIC, V_BITS)


# ------------------------------------------------------------------ whole blocks
@triton.jit
def _copy_block(codes_ptr, meta_ptr, to_ptr, to_meta_ptr, DP: tl.constexpr):
    """K or V of a head in eight bits, as it is."""
    o_byte, o_meta = tl.arange(0, 2048), tl.arange(0, 2 * BLOCK)
    for i in range(0, BLOCK * DP, 2048):
        tl.store(to_ptr + i + o_byte, tl.load(codes_ptr + i + o_byte))
    tl.store(to_meta_ptr + o_meta, tl.load(meta_ptr + o_meta))


@triton.jit
def _numbers_of(codes_ptr, o_byte, scale, low, mask):
    return number(tl.load(codes_ptr + o_byte, mask=mask, other=0), scale, low, tl.float32)


@triton.jit
def _seal_keys(codes_ptr, meta_ptr, k_ptr, k_meta_ptr, D: tl.constexpr, DP: tl.constexpr, BLOCK_I: tl.constexpr):
    """One block in eight bits, scaled token by token → four bits, scaled channel by channel: twice past the tokens."""
    half: tl.constexpr = DP // 2
    o_r, o_i = tl.arange(0, _ROWS), tl.arange(0, BLOCK_I)
    m_half = o_i < half
    m_lower, m_upper = (m_half & (o_i < D))[None, :], (m_half & (o_i + half < D))[None, :]
    lowest = tl.full([_ROWS, BLOCK_I], float("inf"), tl.float32)
    highest, upper_lowest, upper_highest = -lowest, lowest, -lowest
    for t in range(0, BLOCK, _ROWS):
        scale, low = tl.load(meta_ptr + (t + o_r) * 2)[:, None], tl.load(meta_ptr + (t + o_r) * 2 + 1)[:, None]
        o_byte = (t + o_r)[:, None] * DP + o_i[None, :]
        lower = _numbers_of(codes_ptr, o_byte, scale, low, m_lower)
        upper = _numbers_of(codes_ptr + half, o_byte, scale, low, m_upper)
        lowest, highest = tl.minimum(lowest, lower), tl.maximum(highest, lower)
        upper_lowest, upper_highest = tl.minimum(upper_lowest, upper), tl.maximum(upper_highest, upper)
    # what a head is filled up with is zeros, of a scale and a minimum of zero
    x_scale, x_low = _scale_and_low(
        tl.min(tl.where(m_lower, lowest, 0.0), 0), tl.max(tl.where(m_lower, highest, 0.0), 0), 4
    )
    u_scale, u_low = _scale_and_low(
        tl.min(tl.where(m_upper, upper_lowest, 0.0), 0), tl.max(tl.where(m_upper, upper_highest, 0.0), 0), 4
    )
    tl.store(k_meta_ptr + o_i, x_scale, mask=m_half)
    tl.store(k_meta_ptr + half + o_i, u_scale, mask=m_half)
    tl.store(k_meta_ptr + DP + o_i, x_low, mask=m_half)
    tl.store(k_meta_ptr + DP + half + o_i, u_low, mask=m_half)
    for t in range(0, BLOCK, _ROWS):
        scale, low = tl.load(meta_ptr + (t + o_r) * 2)[:, None], tl.load(meta_ptr + (t + o_r) * 2 + 1)[:, None]
        o_byte = (t + o_r)[:, None] * DP + o_i[None, :]
        lower = _codes(_numbers_of(codes_ptr, o_byte, scale, low, m_lower), x_scale[None, :], x_low[None, :], 4)
        upper = _codes(_numbers_of(codes_ptr + half, o_byte, scale, low, m_upper), u_scale[None, :], u_low[None, :], 4)
        lower, upper = tl.where(m_lower, lower, 0), tl.where(m_upper, upper, 0)
        _store_halves(k_ptr, (t + o_r)[:, None] * half + o_i[None, :], 0, lower, upper, m_half[None, :], 4)


@triton.jit
def _seal_values(codes_ptr, meta_ptr, v_ptr, v_meta_ptr, D: tl.constexpr, DP: tl.constexpr):
    """One block, dimensions below each other, in eight bits → four bits, both scaled token by token."""
    half: tl.constexpr = DP // 2
    o_r, o_t = tl.arange(0, _ROWS), tl.arange(0, BLOCK)
    scale, low = tl.load(meta_ptr + o_t * 2)[None, :], tl.load(meta_ptr + o_t * 2 + 1)[None, :]
    lowest = tl.full([_ROWS, BLOCK], float("inf"), tl.float32)
    highest = -lowest
    for d in range(0, DP, _ROWS):
        is_dim = (d + o_r < D)[:, None]
        x = _numbers_of(codes_ptr, (d + o_r)[:, None] * BLOCK + o_t[None, :], scale, low, is_dim)
        lowest = tl.minimum(lowest, tl.where(is_dim, x, float("inf")))
        highest = tl.maximum(highest, tl.where(is_dim, x, float("-inf")))
    x_scale, x_low = _scale_and_low(tl.min(lowest, 0), tl.max(highest, 0), 4)
    tl.store(v_meta_ptr + o_t * 2, x_scale)
    tl.store(v_meta_ptr + o_t * 2 + 1, x_low)
    x_scale, x_low = x_scale[None, :], x_low[None, :]
    for d in range(0, half, _ROWS):
        o_byte = (d + o_r)[:, None] * BLOCK + o_t[None, :]
        m_lower, m_upper = (d + o_r < D)[:, None], (d + o_r + half < D)[:, None]
        lower = _codes(_numbers_of(codes_ptr, o_byte, scale, low, m_lower), x_scale, x_low, 4)
        upper = _codes(_numbers_of(codes_ptr + half * BLOCK, o_byte, scale, low, m_upper), x_scale, x_low, 4)
        lower, upper = tl.where(m_lower, lower, 0), tl.where(m_upper, upper, 0)
        _store_halves(v_ptr, o_byte, 0, lower, upper, (d + o_r < half)[:, None], 4)


@triton.jit(do_not_specialize=["source_num_blocks", "num_blocks", "num_copies"])
def kv_copy_kernel(
    source_k_ptr,
    source_v_ptr,
    source_k_meta_ptr,
    source_v_meta_ptr,
    source_blocks_ptr,
    k_ptr,
    v_ptr,
    k_meta_ptr,
    v_meta_ptr,
    blocks_ptr,
    source_num_blocks,
    num_blocks,
    num_copies,
    D: tl.constexpr,
    DP: tl.constexpr,
    SEAL: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (i, h, x): head h of every n-th block from the i-th on, K or V. SEAL: eight bits become four."""
    allow_next(PDL)
    wait_for_previous(PDL)
    head, is_value = tl.program_id(1).to(tl.int64), tl.program_id(2) == 1
    for i in range(tl.program_id(0), num_copies, tl.num_programs(0)):
        block = tl.load(blocks_ptr + i)
        if block > 0:
            source = head * source_num_blocks + tl.load(source_blocks_ptr + i)
            target = head * num_blocks + block
            o_codes, o_meta = source * (BLOCK * DP), source * (2 * BLOCK)
            if is_value:
                codes_ptr, meta_ptr = source_v_ptr + o_codes, source_v_meta_ptr + o_meta
                to_meta_ptr = v_meta_ptr + target * (2 * BLOCK)
                if SEAL:
                    to_ptr = v_ptr + target * (BLOCK * DP // 2)
                    _seal_values(codes_ptr, meta_ptr, to_ptr, to_meta_ptr, D, DP)
                else:
                    _copy_block(codes_ptr, meta_ptr, v_ptr + target * (BLOCK * DP), to_meta_ptr, DP)
            else:
                codes_ptr, meta_ptr = source_k_ptr + o_codes, source_k_meta_ptr + o_meta
                if SEAL:
                    to_ptr, to_meta_ptr = k_ptr + target * (BLOCK * DP // 2), k_meta_ptr + target * (2 * DP)
                    _seal_keys(codes_ptr, meta_ptr, to_ptr, to_meta_ptr, D, DP, BLOCK_I)
                else:
                    to_ptr, to_meta_ptr = k_ptr + target * (BLOCK * DP), k_meta_ptr + target * (2 * BLOCK)
                    _copy_block(codes_ptr, meta_ptr, to_ptr, to_meta_ptr, DP)
