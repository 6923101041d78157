"""A tile of keys and one of values out of a paged cache, dense or of one of kv_layout's schemes, as numbers."""

import triton
import triton.language as tl

_BLOCK: tl.constexpr = tl.constexpr(64)  # tokens of a quantized cache's block, as kv_layout.KV_BLOCK


@triton.jit
def number(codes, scale, low, dtype: tl.constexpr):
    """code · scale + low, in float32 and then in ``dtype``; scale and low float16."""
    # beside 2^23 a code is a float32's last bits: no conversion, of which a multiprocessor makes few
    exact = (codes.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    return (exact * scale.to(tl.float32) + low.to(tl.float32)).to(dtype)


@triton.jit
def _of_tokens(meta_ptr, slot, o_t, m_t):
    """Scale and minimum [BLOCK_T] of tokens from ``slot`` on; zeros for those that were never written."""
    o_pair = tl.arange(0, 2)
    pairs = tl.load(meta_ptr + (slot + o_t)[:, None] * 2 + o_pair[None, :], mask=m_t[:, None], other=0.0)
    return tl.split(pairs)


@triton.jit
def _of_channels(meta_ptr, o_d, m_d, DP: tl.constexpr):
    """Scale and minimum [BLOCK_D] of a block's channels."""
    return tl.load(meta_ptr + o_d, mask=m_d, other=0.0), tl.load(meta_ptr + DP + o_d, mask=m_d, other=0.0)


@triton.jit
def _bits(codes_ptr, o_codes, o_d, mask, HALF: tl.constexpr):
    """Codes of four bits, uint8: of two dimensions that share a byte, the one from HALF on is in its upper half."""
    return (tl.load(codes_ptr + o_codes, mask=mask, other=0) >> tl.where(o_d < HALF, 0, 4).to(tl.uint8)) & 15


@triton.jit
def _keys(k_ptr, meta_ptr, head, slot, o_t, o_d, m_t, m_d, mask, DP: tl.constexpr, SCHEME: tl.constexpr, dtype: tl.constexpr):
    rows = (slot + o_t)[:, None]
    if SCHEME == "int4":
        half: tl.constexpr = DP // 2
        o_byte = tl.where(o_d < half, o_d, o_d - half)[None, :]
        codes = _bits(k_ptr, rows * half + o_byte, o_d[None, :], mask, half)
        scale, low = _of_channels(meta_ptr + slot // _BLOCK * (2 * DP), o_d, m_d, DP)
        return number(codes, scale[None, :], low[None, :], dtype)
    codes = tl.load(k_ptr + rows * DP + o_d[None, :], mask=mask, other=0)
    if SCHEME == "static":
        scale, low = _of_channels(meta_ptr + head * (2 * DP), o_d, m_d, DP)
        return number(codes, scale[None, :], low[None, :], dtype)
    scale, low = _of_tokens(meta_ptr, slot, o_t, m_t)
    return number(codes, scale[:, None], low[:, None], dtype)
