"""Where a step's tokens go while their blocks are open, for a cache whose blocks are quantized when they are full.

A decode's token goes into its sequence's open block. A chunk's tokens go into *fresh* blocks, which live for one step
and serve all layers one after the other: the chunk's first one is carried over from the open block, its last one is
kept as such, and what is full in between becomes part of the cache. Made on the device: it may be part of a graph.
Of the meta device only shapes are made: there torch computes with what it imports a compiler for.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lmtool import kernels
from lmtool.kernels import KV_BLOCK, QuantizedKv
from lmtool.layers.context import AttentionContext


class StagedDecodes(NamedTuple):
    """Of each decode row: its open block [n] int32, the slot in it [n] int64, the block that is full now or 0 [n]."""

    open_blocks: Tensor
    slots: Tensor
    sealed: Tensor


class StagedChunks(NamedTuple):
    """S chunks of T tokens in F fresh blocks, of which 0 is nobody's.

    slots         [T] int64: where tokens go in ``fresh``
    fresh_first   [S] int32: fresh_first + j is the fresh block of a sequence's block j
    open_blocks   [S] int32: the sequences' own; carried [S]: where what it holds is wanted, 0: it holds nothing
    fresh_blocks  [F] int32: 0, 1, …; sealed [F]: the block of the cache that it fills, or 0
    last_blocks   [S] int32: the chunks' last; kept [S]: the open block that it stays, or 0
    """

    fresh: QuantizedKv
    slots: Tensor
    fresh_first: Tensor
    open_blocks: Tensor
    carried: Tensor
    fresh_blocks: Tensor
    sealed: Tensor
    last_blocks: Tensor
    kept: Tensor


class Staging:
    """``decodes`` and ``chunks`` are None where the step has none."""

    def __init__(self, step: AttentionContext, num_heads: int, head_dim: int) -> None:
        self.decodes = _stage_decodes(step) if step.num_decode else None
        self.chunks = _stage_chunks(step, num_heads, head_dim) if step.cu_seqlens_q is not None else None


def _open_blocks(step: AttentionContext) -> Tensor:
    """[S] int32: 1 + slot; a row of nobody has slot -1."""
    assert step.seq_slots is not None, "whoever has open blocks says whose they are"
    return (step.seq_slots + 1).int()


def _stage_decodes(step: AttentionContext) -> StagedDecodes:
    n = step.num_decode
    if step.positions.device.type == "meta":
        numbers = torch.empty(n, dtype=torch.int32, device="meta")
        return StagedDecodes(numbers, torch.empty(n, dtype=torch.int64, device="meta"), numbers)
    open_blocks, positions = _open_blocks(step)[:n], step.positions[:n]
    within = positions % KV_BLOCK
    filled = step.block_tables[:n].gather(1, (positions // KV_BLOCK)[:, None])[:, 0]
    is_full = (within == KV_BLOCK - 1) & (open_blocks > 0)
    return StagedDecodes(
        open_blocks=open_blocks,
        slots=open_blocks.long() * KV_BLOCK + within,
        sealed=torch.where(is_full, filled, 0).int(),
    )


def _stage_chunks(step: AttentionContext, num_heads: int, head_dim: int) -> StagedChunks:
    n, device = step.num_decode, step.positions.device
    tables, seq_lens, bounds = step.chunks
    positions = step.positions[n:]
    num_chunks, num_tokens = len(seq_lens), len(positions)
    # c tokens lie in at most c // 64 + 2 blocks
    num_fresh = num_tokens // KV_BLOCK + 2 * num_chunks + 2
    fresh = kernels.empty_kv("int8", num_heads, num_fresh, head_dim, device)
    if device.type == "meta":
        slots, per_chunk, per_fresh = (
            torch.empty(count, dtype=dtype, device=device)
            for count, dtype in ((num_tokens, torch.int64), (num_chunks, torch.int32), (num_fresh, torch.int32))
        )
        firsts = opened = carried = last = kept = per_chunk
        return StagedChunks(fresh, slots, firsts, opened, carried, per_fresh, per_fresh, last, kept)
    firsts, lasts = bounds[:-1], bounds[1:]
    counts = lasts - firsts
    touched = (seq_lens - counts) // KV_BLOCK  # the first block that a chunk has tokens in
    base = firsts // KV_BLOCK + 2 * torch.arange(num_chunks, device=device) + 1
    fresh_first = (base - touched).int()
    owner = torch.searchsorted(lasts, torch.arange(num_tokens, device=device), right=True)
    is_padding = owner == num_chunks
    slots = (fresh_first[owner.clamp_max(num_chunks - 1)] + positions // KV_BLOCK) * KV_BLOCK + positions % KV_BLOCK
    open_blocks = torch.where(counts > 0, _open_blocks(step)[n:], 0)
    fresh_blocks = torch.arange(num_fresh, device=device, dtype=torch.int32)
    of_chunk = (torch.searchsorted(base, fresh_blocks, right=True) - 1).clamp_min(0)
    place = (fresh_blocks - fresh_first[of_chunk]).clamp_min(0).long()
    is_full = (place >= touched[of_chunk]) & ((place + 1) * KV_BLOCK <= seq_lens[of_chunk])
    is_full &= (counts[of_chunk] > 0) & (fresh_blocks > 0)
    filled = tables[of_chunk, place.clamp_max(tables.shape[1] - 1)]
    begins_inside = (seq_lens - counts) % KV_BLOCK > 0
    return StagedChunks(
        fresh=fresh,
        slots=torch.where(is_padding, 0, slots),
        fresh_first=fresh_first,
        open_blocks=open_blocks,
        carried=torch.where(begins_inside & (counts > 0), base, 0).int(),
        fresh_blocks=fresh_blocks,
        sealed=torch.where(is_full, filled, 0).int(),
        last_blocks=(fresh_first + (seq_lens - 1).clamp_min(0) // KV_BLOCK).int(),
        kept=torch.where(seq_lens % KV_BLOCK > 0, open_blocks, 0).int(),
    )
