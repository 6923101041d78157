"""A tile of keys and one of values: read out of a paged cache as numbers, whatever it holds, and attended to."""

import triton
import triton.language as tl

BLOCK: tl.constexpr = tl.constexpr(64)  # tokens of a quantized cache's block, kv_layout.KV_BLOCK


@triton.jit
def number(codes, scale, low, dtype: tl.constexpr):
    """code · scale + minimum, in float32 and then in ``dtype``; codes integers, scale and low float16."""
    # beside 2^23 a code is the last bits of a float32: no conversion, of which a multiprocessor makes few at a time
    exact = (codes.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    return (exact * scale.to(tl.float32) + low.to(tl.float32)).to(dtype)


@triton.jit
def _codes(ptr, o_kv, o_d, stride_d, mask, DP: tl.constexpr, BITS: tl.constexpr):
    """o_kv: offsets without the dimensions, which are ``stride_d`` bytes apart; all [BLOCK_T, 1] or [1, BLOCK_D]."""
    if BITS == 4:  # dimensions d and d + DP/2 share a byte
        is_upper = o_d >= DP // 2
        both = tl.load(ptr + o_kv + tl.where(is_upper, o_d - DP // 2, o_d) * stride_d, mask=mask, other=0)
        codes = (both.to(tl.int32) >> tl.where(is_upper, 4, 0)) & 15
    else:
        codes = tl.load(ptr + o_kv + o_d * stride_d, mask=mask, other=0)
    return codes


@triton.jit
def _meta(ptr, head, slot, o_t, m_t, o_d, m_d, DP: tl.constexpr, GROUP: tl.constexpr, MASKED: tl.constexpr):
    """Scale and minimum of a tile: [BLOCK_T, 1] where GROUP is 'token', else [1, BLOCK_D]."""
    if GROUP == "token":
        ptrs = ptr + (slot + o_t)[:, None] * 2 + tl.arange(0, 2)[None, :]
        if MASKED:  # those of tokens that were never written may be anything
            scale, low = tl.split(tl.load(ptrs, mask=m_t[:, None], other=0.0))
        else:
            scale, low = tl.split(tl.load(ptrs))
        scale, low = scale[:, None], low[:, None]
    else:
        if GROUP == "block":
            ptr += slot // BLOCK * (2 * DP)
        else:
            ptr += head * (2 * DP)
        scale = tl.load(ptr + o_d, mask=m_d, other=0.0)[None, :]
        low = tl.load(ptr + DP + o_d, mask=m_d, other=0.0)[None, :]
    return scale, low


@triton.jit
def load_tile(
    stored,
    head,
    slot,
    o_t,
    m_t,
    o_d,
    D: tl.constexpr,
    SCHEME: tl.constexpr,
    MASKED: tl.constexpr,
    dtype: tl.constexpr,
    ROW_POINTERS: tl.constexpr = False,
):
    """Tokens slot + o_t of one block → k, v [BLOCK_T, BLOCK_D] in ``dtype``.

    stored: pointers to K, V and, if they are codes, what belongs to them; ``slot`` counts all heads' tokens. m_t: which
    tokens there are, where MASKED, else all; numbers of others are finite, as are those of dimensions from D on.
    ROW_POINTERS, where dense: another order of the same sum, which costs fewer instructions and more registers.
    """
    mask = (o_d < D)[None, :]
    if MASKED:
        mask = m_t[:, None] & mask
    o_row = (slot + o_t)[:, None]
    if SCHEME == "dense":
        if ROW_POINTERS:
            k_ptrs, v_ptrs = stored[0] + o_row * D + o_d[None, :], stored[1] + o_row * D + o_d[None, :]
        else:
            o_kv = o_row * D + o_d[None, :]
            k_ptrs, v_ptrs = stored[0] + o_kv, stored[1] + o_kv
        k = tl.load(k_ptrs, mask=mask, other=0.0).to(dtype)
        v = tl.load(v_ptrs, mask=mask, other=0.0).to(dtype)
    else:
        DP: tl.constexpr = (D + 31) // 32 * 32
        K_BITS: tl.constexpr = 4 if SCHEME == "int4" else 8
        V_BITS: tl.constexpr = 4 if SCHEME == "int4" or SCHEME == "k8v4" else 8
        K_GROUP: tl.constexpr = "block" if SCHEME == "int4" else "head" if SCHEME == "static" else "token"
        V_GROUP: tl.constexpr = "head" if SCHEME == "static" else "token"
        m_d = o_d < D
        k_codes = _codes(stored[0], o_row * (DP * K_BITS // 8), o_d[None, :], 1, mask, DP, K_BITS)
        o_column = slot // BLOCK * (DP * V_BITS // 8 * BLOCK) + (slot % BLOCK + o_t)[:, None]
        v_codes = _codes(stored[1], o_column, o_d[None, :], BLOCK, mask, DP, V_BITS)
        k_scale, k_low = _meta(stored[2], head, slot, o_t, m_t, o_d, m_d, DP, K_GROUP, MASKED)
        v_scale, v_low = _meta(stored[3], head, slot, o_t, m_t, o_d, m_d, DP, V_GROUP, MASKED)
        k = number(k_codes, k_scale, k_low, dtype)
        v = number(v_codes, v_scale, v_low, dtype)
    return k, v


@triton.jit
def attend(
    q,
    k,
    v,
    seen,
    acc,
    top,
    total,
    scale_log2,
    MASKED: tl.constexpr,
):
    """One tile of keys and values: k [BLOCK_T, D], v [BLOCK_T, D] → new (acc [M, D], row maximum, row sum)."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    # a row that has seen nothing yet stays at -inf: subtract zero instead, exp2(-inf) is the 0 that is wanted
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - base[:, None])
    decay = tl.exp2(top - base)
    total = total * decay + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, new_top, total
