"""Paged attention, plain torch, one sequence at a time.

Where a sequence's blocks lie side by side (the usual case with few users) its K and V are views, not copies.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lmtool.kernels.layout import PIECE_ALIGN, DecodePlan, num_plan_items, shortest_piece


def plan_decode(seq_lens: Tensor, num_kv_heads: int, window: int = 0) -> DecodePlan:
    stops: list[int] = seq_lens.tolist()
    num_items = num_plan_items(len(stops), num_kv_heads)
    starts = [max(0, stop - window) // PIECE_ALIGN * PIECE_ALIGN if window else 0 for stop in stops]
    share = -(-(sum(stops) - sum(starts)) // (num_items - len(stops)))
    longest = max(stop - start for start, stop in zip(starts, stops, strict=True))
    piece = max(-(-share // PIECE_ALIGN) * PIECE_ALIGN, shortest_piece(longest))
    items: list[tuple[int, int, int]] = []
    spans: list[tuple[int, int]] = []
    for i, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        first = len(items)
        items += [(i, t, min(t + piece, stop)) for t in range(start, max(stop, start + 1), piece)]
        spans.append((first, len(items) - first))
    items += [(-1, 0, 0)] * (num_items - len(items))
    arrivals = torch.zeros(len(stops), num_kv_heads, dtype=torch.int32)
    as_tensor = (torch.tensor(rows, dtype=torch.int32) for rows in (items, spans))
    return DecodePlan(*(made.to(seq_lens.device) for made in (*as_tensor, arrivals)))


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
    window: int = 0,
    plan: DecodePlan | None = None,  # a list of work for many programs; here one loop does it all
) -> Tensor:
    rows = [
        _attend(row, k_cache, v_cache, table, length, scale, window) if length else torch.zeros_like(row)
        for row, table, length in zip(q.unbind(), block_tables.unbind(), seq_lens.tolist(), strict=True)
    ]
    return rows[0][None] if len(rows) == 1 else torch.stack(rows)


def _attend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, length: int, scale: float, window: int
) -> Tensor:
    """q [Hq, D] over the last ``window`` of ``length`` tokens → [Hq, D].

    The query heads that share a key head stand as its queries, so nothing is repeated and nothing is masked.
    """
    start = max(0, length - window) if window else 0
    k, v = _tokens(k_cache, v_cache, block_table, start, length)
    grouped = q.view(1, k.shape[0], -1, q.shape[-1])
    return scaled_dot_product_attention(grouped, k[None], v[None], scale=scale).view_as(q)


def attention_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    max_seqlen_q: int,
    scale: float,
    window: int = 0,
) -> Tensor:
    out = torch.zeros_like(q)
    bounds = cu_seqlens_q.tolist()
    for s, length in enumerate(seq_lens.tolist()):
        first, last = bounds[s], bounds[s + 1]
        num_queries = last - first
        if num_queries == 0:
            continue
        start = max(0, length - num_queries + 1 - window) if window else 0
        k, v = _tokens(k_cache, v_cache, block_tables[s], start, length)
        chunk = q[first:last].transpose(0, 1)[None]
        plain_causal = num_queries == length - start and not window
        mask = None if plain_causal else _mask(num_queries, length, start, window, q.device)
        attended = scaled_dot_product_attention(
            chunk, k[None], v[None], attn_mask=mask, is_causal=plain_causal, scale=scale, enable_gqa=True
        )
        out[first:last] = attended[0].transpose(0, 1)
    return out


def _tokens(k_cache: Tensor, v_cache: Tensor, block_table: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """K and V [Hkv, stop - start, D] of tokens start:stop of one sequence."""
    num_kv_heads, _, block_size, head_dim = k_cache.shape
    first = start // block_size
    blocks: list[int] = block_table[first : -(-stop // block_size)].tolist()
    offset = start - first * block_size
    if blocks == list(range(blocks[0], blocks[0] + len(blocks))):
        offset += blocks[0] * block_size
        flat = (cache.view(num_kv_heads, -1, head_dim) for cache in (k_cache, v_cache))
    else:
        index = torch.tensor(blocks, device=k_cache.device)
        flat = (cache.index_select(1, index).flatten(1, 2) for cache in (k_cache, v_cache))
    k, v = (tokens.narrow(1, offset, stop - start) for tokens in flat)
    return k, v


def _mask(num_queries: int, length: int, start: int, window: int, device: torch.device) -> Tensor:
    """True where query i (position length - num_queries + i) sees key j (position start + j)."""
    queries = torch.arange(length - num_queries, length, device=device)[:, None]
    keys = torch.arange(start, length, device=device)[None]
    seen = keys <= queries
    return seen & (keys > queries - window) if window else seen
