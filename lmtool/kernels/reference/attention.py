"""Paged attention, plain torch, one sequence at a time.

Where a sequence's blocks lie side by side (the usual case with few users) its K and V are views, not copies.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lmtool.kernels.layout import PIECE_ALIGN, DecodePlan, num_plan_items, share_of_tokens, shortest_piece


class _Span(NamedTuple):
    """``length`` tokens from ``offset`` on, among ``blocks`` side by side; None: among the whole cache's."""

    blocks: Tensor | None
    offset: int
    length: int


def plan_decode(seq_lens: Tensor, num_kv_heads: int, window: int = 0) -> DecodePlan:
    stops: list[int] = seq_lens.tolist()
    num_items = num_plan_items(len(stops), num_kv_heads)
    starts = [max(0, stop - window) // PIECE_ALIGN * PIECE_ALIGN if window else 0 for stop in stops]
    share = share_of_tokens(sum(stops) - sum(starts), num_items - len(stops))
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
    spans = _spans(block_tables, seq_lens, k_cache.shape[2], window)
    if len(spans) == 1 and spans[0].length:
        return _attend(q, k_cache, v_cache, spans[0], scale)
    rows = [
        _attend(row, k_cache, v_cache, span, scale) if span.length else torch.zeros_like(row)
        for row, span in zip(q.split(1), spans, strict=True)
    ]
    return torch.cat(rows)


def _attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, span: _Span, scale: float) -> Tensor:
    """q [1, Hq, D] over one sequence's tokens → [1, Hq, D].

    The query heads that share a key head stand as its queries, so nothing is repeated and nothing is masked.
    """
    k, v = _tokens(k_cache, span), _tokens(v_cache, span)
    grouped = q.view(1, k.shape[1], -1, q.shape[-1])
    attended = scaled_dot_product_attention(grouped, k, v, scale=scale)
    return attended.reshape(q.shape)  # CUDA's may lie transposed


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
        span = _span(block_tables[s], start, length, k_cache.shape[2])
        chunk = q[first:last].transpose(0, 1)[None]
        plain_causal = num_queries == length - start and not window
        mask = None if plain_causal else _mask(num_queries, length, start, window, q.device)
        attended = scaled_dot_product_attention(
            chunk,
            _tokens(k_cache, span),
            _tokens(v_cache, span),
            attn_mask=mask,
            is_causal=plain_causal,
            scale=scale,
            enable_gqa=True,
        )
        out[first:last] = attended[0].transpose(0, 1)
    return out


@lru_cache(maxsize=2)
def _spans(block_tables: Tensor, seq_lens: Tensor, block_size: int, window: int) -> list[_Span]:
    """Each sequence's tokens; what a step's first layer works out serves the others (tensors are keyed by identity)."""
    return [
        _span(table, max(0, length - window) if window else 0, length, block_size)
        for table, length in zip(block_tables, seq_lens.tolist(), strict=True)
    ]


def _span(block_table: Tensor, start: int, stop: int, block_size: int) -> _Span:
    """Tokens start:stop of the sequence that ``block_table`` belongs to."""
    first = start // block_size
    blocks: list[int] = block_table[first : -(-stop // block_size)].tolist()
    offset = start - first * block_size
    if blocks and blocks == list(range(blocks[0], blocks[0] + len(blocks))):
        return _Span(None, blocks[0] * block_size + offset, stop - start)
    return _Span(torch.tensor(blocks, device=block_table.device), offset, stop - start)


def _tokens(cache: Tensor, span: _Span) -> Tensor:
    """cache [Hkv, NB, block_size, D] → the span's tokens [1, Hkv, length, D]."""
    if span.blocks is not None:
        cache = cache.index_select(1, span.blocks)
    flat = cache.view(1, cache.shape[0], -1, cache.shape[3])
    return flat.narrow(2, span.offset, span.length)


def _mask(num_queries: int, length: int, start: int, window: int, device: torch.device) -> Tensor:
    """True where query i (position length - num_queries + i) sees key j (position start + j)."""
    queries = torch.arange(length - num_queries, length, device=device)[:, None]
    keys = torch.arange(start, length, device=device)[None]
    seen = keys <= queries
    return seen & (keys > queries - window) if window else seen
