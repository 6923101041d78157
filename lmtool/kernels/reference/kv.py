"""A quantized K/V cache, plain torch: written, copied from one form into another, read as numbers and attended to."""

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from lmtool.kernels.kv_layout import KV_BLOCK, QuantizedKv, halves, numbers, quantize, to_codes
from lmtool.kernels.layout import DecodePlan
from lmtool.kernels.reference.rotary import rotate_heads


# ------------------------------------------------------------------ writing
def kv_store(
    qkv: Tensor,
    cos_sin: Tensor,
    slots: Tensor,
    cache: QuantizedKv,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    q, k, v = rotate_heads(qkv, cos_sin, cache.num_heads, cache.head_dim, q_norm, k_norm, eps)
    blocks, places = slots // KV_BLOCK, slots % KV_BLOCK
    missing = (0, cache.padded_dim - cache.head_dim)
    for x, bits, codes, meta, is_v in (
        (k, cache.k_bits, cache.k, cache.k_meta, False),
        (v, cache.v_bits, cache.v, cache.v_meta, True),
    ):
        x = x.transpose(0, 1).float()  # Hkv T D
        if cache.scheme == "static":
            x_codes = to_codes(pad(x, missing), meta[:, 0, :1], meta[:, 0, 1:], bits)
        else:
            x_codes, scale, low = quantize(x, bits, -1)
            x_codes = pad(x_codes, missing)
            meta[:, blocks, places] = torch.cat((scale, low), dim=-1)
        if bits == 4:
            x_codes = halves(x_codes, -1)
        if is_v:
            codes.transpose(2, 3)[:, blocks, places] = x_codes
        else:
            codes[:, blocks, places] = x_codes
    return q


def kv_copy(source: QuantizedKv, source_blocks: Tensor, target: QuantizedKv, target_blocks: Tensor) -> None:
    wanted = target_blocks > 0
    there, here = target_blocks[wanted].long(), source_blocks[wanted].long()
    if not len(there):
        return
    if source.scheme == target.scheme:
        for mine, theirs in zip(target[:4], source[:4], strict=True):
            mine[:, there] = theirs[:, here]
        return
    k, v = numbers(source, here)
    k_codes, k_scale, k_low = quantize(pad(k, (0, target.padded_dim - target.head_dim)), 4, 2)
    target.k[:, there] = halves(k_codes, -1)
    target.k_meta[:, there] = torch.cat((k_scale, k_low), dim=2)
    v_codes, v_scale, v_low = quantize(v, 4, -1)
    v_codes = pad(v_codes, (0, target.padded_dim - target.head_dim)).transpose(2, 3)
    target.v[:, there] = halves(v_codes, 2)
    target.v_meta[:, there] = torch.cat((v_scale, v_low), dim=-1)


# ------------------------------------------------------------------ reading
def _tokens(cache: QuantizedKv, table: Tensor, first: int, last: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """K and V of blocks first … last - 1 of a sequence, each [1, Hkv, tokens, D]."""
    k, v = numbers(cache, table[first:last].long())
    return k.flatten(1, 2)[None].to(dtype), v.flatten(1, 2)[None].to(dtype)


def kv_attention_decode(
    q: Tensor,
    cache: QuantizedKv,
    block_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
    window: int = 0,
    plan: DecodePlan | None = None,
    opened: QuantizedKv | None = None,
    open_blocks: Tensor | None = None,
) -> Tensor:
    bounds = torch.arange(len(q) + 1)
    fresh_first = None
    if open_blocks is not None:  # an open block is a chunk's only fresh one
        fresh_first = open_blocks - (seq_lens - 1).clamp_min(0) // KV_BLOCK
    return kv_attention_prefill(q, cache, block_tables, bounds, seq_lens, 1, scale, window, opened, fresh_first)


def kv_attention_prefill(
    q: Tensor,
    cache: QuantizedKv,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    max_seqlen_q: int,
    scale: float,
    window: int = 0,
    fresh: QuantizedKv | None = None,
    fresh_first: Tensor | None = None,
) -> Tensor:
    out = torch.zeros_like(q)
    bounds = cu_seqlens_q.tolist()
    for s, length in enumerate(seq_lens.tolist()):
        if length == 0 or bounds[s] == bounds[s + 1]:
            continue
        start = length - (bounds[s + 1] - bounds[s])
        rows = out[bounds[s] : bounds[s + 1]]
        queries = q[bounds[s] : bounds[s + 1]]
        if fresh is None or fresh_first is None:
            rows[:] = _attend(queries, cache, block_tables[s], start, length, scale, window)
            continue
        for block in range(start // KV_BLOCK, -(-length // KV_BLOCK)):  # each sees its own block as it was written
            first, last = max(start, block * KV_BLOCK), min(length, (block + 1) * KV_BLOCK)
            own = (fresh, fresh_first[s] + block)
            rows[first - start : last - start] = _attend(
                queries[first - start : last - start], cache, block_tables[s], first, last, scale, window, own
            )
    return out


def _attend(
    queries: Tensor,
    cache: QuantizedKv,
    table: Tensor,
    start: int,
    stop: int,
    scale: float,
    window: int,
    own: tuple[QuantizedKv, Tensor] | None = None,
) -> Tensor:
    """queries [n, Hq, D] at places start … stop - 1 → as many; own: where the last block is read instead."""
    seen_from = max(0, start + 1 - window) // KV_BLOCK if window else 0
    last = -(-stop // KV_BLOCK)
    k, v = _tokens(cache, table, seen_from, last - (own is not None), queries.dtype)
    if own is not None:
        k_own, v_own = _tokens(own[0], own[1][None], 0, 1, queries.dtype)
        k, v = torch.cat((k, k_own), dim=2), torch.cat((v, v_own), dim=2)
    offset = seen_from * KV_BLOCK
    k, v = k[:, :, : stop - offset], v[:, :, : stop - offset]
    keys = torch.arange(offset, stop, device=queries.device)[None]
    places = torch.arange(start, stop, device=queries.device)[:, None]
    mask = keys <= places
    if window:
        mask &= keys > places - window
    attended = scaled_dot_product_attention(
        queries.transpose(0, 1)[None], k, v, attn_mask=mask, scale=scale, enable_gqa=True
    )
    return attended[0].transpose(0, 1)
