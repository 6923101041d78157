"""Paged attention in Triton: decode over a work list; `prefill` has the other one.

The query heads that share a key/value head are packed into the rows of one product (GQA). Scores are kept in base 2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmtool.kernels.layout import DecodePlan
from lmtool.kernels.triton import tuning
from lmtool.kernels.triton.kv_tiles import attend, load_tile
from lmtool.kernels.triton.launch import allow_next, arch, dependent_launch, prefetch, wait_for_previous
from lmtool.kernels.triton.paged import LOG2_E, MIN_ROWS, Paged, check, dense
from lmtool.kernels.triton.plan import plan_decode
from lmtool.kernels.triton.prefill import attention_prefill

__all__ = ["attention_decode", "attention_prefill", "plan_decode"]


@triton.jit
def _combine(
    partial_ptr, top_ptr, first, count, o_row, m_row, o_d, mask, HQ, D, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The pieces of one sequence, in their order, weighted by their log-sums: rows o_row of [W, HQ, D].

    All loads go past the first-level cache: other multiprocessors wrote what they read.
    """
    best = tl.full([BLOCK_R], float("-inf"), tl.float32)
    o_i = tl.arange(0, 32)
    for i in range(0, count, 32):
        m_top = m_row[:, None] & (i + o_i < count)[None, :]
        o_top = (first + i + o_i)[None, :] * HQ + o_row[:, None]
        tops = tl.load(top_ptr + o_top, mask=m_top, other=float("-inf"), cache_modifier=".cg")
        best = tl.maximum(best, tl.max(tops, axis=1))
    best = tl.where(m_row, best, 0.0)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    for i in range(0, count, 4):
        for j in tl.static_range(4):  # loads of four pieces on their way at once
            exists = tl.full([BLOCK_R], i + j, tl.int32) < count
            rows = (first + i + j) * HQ + o_row
            top = tl.load(top_ptr + rows, mask=m_row & exists, other=float("-inf"), cache_modifier=".cg")
            o_partial = rows[:, None] * D + o_d[None, :]
            piece = tl.load(partial_ptr + o_partial, mask=mask & exists[:, None], other=0.0, cache_modifier=".cg")
            weight = tl.exp2(top - best)
            acc += piece * weight[:, None]
            total += weight
    return acc / tl.where(m_row, total, 1.0)[:, None]


@triton.jit(do_not_specialize=["tokens_per_head", "own_tokens_per_head", "table_width", "window"])
def _decode_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_meta_ptr,
    v_meta_ptr,
    own_k_ptr,
    own_v_ptr,
    own_k_meta_ptr,
    own_v_meta_ptr,
    own_blocks_ptr,
    block_tables_ptr,
    seq_lens_ptr,
    items_ptr,
    spans_ptr,
    arrivals_ptr,
    partial_ptr,
    top_ptr,
    out_ptr,
    scale_log2,
    tokens_per_head,
    own_tokens_per_head,
    table_width,
    window,
    SCHEME: tl.constexpr,
    HKV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (w, h): item w of the work list for key/value head h; the last of a sequence's pieces merges them all."""
    allow_next(PDL)
    item, head = tl.program_id(0), tl.program_id(1)
    # the plan was complete before the kernel before this one began: see _plan_kernel
    sequence = tl.load(items_ptr + 3 * item)
    start, stop = tl.load(items_ptr + 3 * item + 1), tl.load(items_ptr + 3 * item + 2)
    spans_ptr += 2 * tl.maximum(sequence, 0)
    first, count = tl.load(spans_ptr), tl.load(spans_ptr + 1)
    length = tl.load(seq_lens_ptr + tl.maximum(sequence, 0))
    oldest = tl.where(window > 0, length - window, 0)
    if PDL and PREFETCH:
        o_line = tl.arange(0, BLOCK_T)
        block = tl.load(block_tables_ptr + tl.maximum(sequence, 0) * table_width + start // BLOCK_SIZE).to(tl.int64)
        lines = (head.to(tl.int64) * tokens_per_head + block * BLOCK_SIZE + start % BLOCK_SIZE + o_line) * D
        if sequence >= 0:
            for d in tl.static_range(0, D, 64):
                prefetch(k_cache_ptr + lines + d)
                prefetch(v_cache_ptr + lines + d)
    wait_for_previous(PDL)
    if sequence < 0:
        return
    o_r, o_t, o_d = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    m_r = o_r < G
    mask = m_r[:, None] & (o_d < D)[None, :]
    o_row = head * G + o_r
    q_rows = (sequence.to(tl.int64) * HKV * G + o_row)[:, None] * D + o_d[None, :]
    q = tl.load(q_ptr + q_rows, mask=mask, other=0.0)
    head_start = head.to(tl.int64) * tokens_per_head
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    closed = stop
    if own_k_ptr is not None:
        closed = tl.minimum(stop, tl.maximum(length - 1, 0) // BLOCK_SIZE * BLOCK_SIZE)
    stored = (k_cache_ptr, v_cache_ptr, k_meta_ptr, v_meta_ptr)
    for t in tl.range(start, closed, BLOCK_T, num_stages=STAGES):
        block = tl.load(block_tables_ptr + sequence * table_width + t // BLOCK_SIZE).to(tl.int64)
        slot = head_start + block * BLOCK_SIZE + t % BLOCK_SIZE
        m_t = t + o_t < closed
        k, v = load_tile(stored, head, slot, o_t, m_t, o_d, D, SCHEME, True, q.dtype, ROW_POINTERS=True)
        seen = (m_t & (t + o_t >= oldest))[None, :]
        acc, top, total = attend(q, k, v, seen, acc, top, total, scale_log2, MASKED=True)
    if own_k_ptr is not None:
        own = (own_k_ptr, own_v_ptr, own_k_meta_ptr, own_v_meta_ptr)
        own_block = tl.load(own_blocks_ptr + sequence).to(tl.int64)
        own_start = head.to(tl.int64) * own_tokens_per_head + own_block * BLOCK_SIZE
        for t in tl.range(tl.maximum(start, closed), stop, BLOCK_T, num_stages=1):
            m_t = t + o_t < stop
            k, v = load_tile(own, head, own_start + t % BLOCK_SIZE, o_t, m_t, o_d, D, "int8", True, q.dtype)
            seen = (m_t & (t + o_t >= oldest))[None, :]
            acc, top, total = attend(q, k, v, seen, acc, top, total, scale_log2, MASKED=True)
    # a padded row has one piece without tokens: zero over one is the zero it must give
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    if count == 1:
        tl.store(out_ptr + q_rows, acc.to(out_ptr.dtype.element_ty), mask=mask)
        return
    rows = item.to(tl.int64) * HKV * G + o_row
    tl.store(top_ptr + rows, top + tl.log2(total), mask=m_r)
    tl.store(partial_ptr + rows[:, None] * D + o_d[None, :], acc, mask=mask)
    tl.debug_barrier()  # every thread's part is written before this piece is counted
    arrival_ptr = arrivals_ptr + sequence * HKV + head
    if tl.atomic_add(arrival_ptr, 1, sem="acq_rel") == count - 1:
        tl.store(arrival_ptr, 0)
        merged = _combine(
            partial_ptr, top_ptr, first, count, o_row, m_r, o_d, mask, HKV * G, D, BLOCK_R=BLOCK_R, BLOCK_D=BLOCK_D
        )
        tl.store(out_ptr + q_rows, merged.to(out_ptr.dtype.element_ty), mask=mask)


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
    window: int = 0,
    plan: DecodePlan | None = None,
) -> Tensor:
    return launch_decode(q, dense(k_cache, v_cache), block_tables, seq_lens, scale, window, plan)


def launch_decode(
    q: Tensor,
    cache: Paged,
    block_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
    window: int,
    plan: DecodePlan | None,
) -> Tensor:
    """`attention_decode` over any cache."""
    batch_size, num_q_heads, head_dim = q.shape
    check(num_q_heads, cache.num_heads, cache.block_size)
    if plan is None:
        plan = plan_decode(seq_lens, cache.num_heads, window)
    num_items = plan.items.shape[0]
    q = q.contiguous()
    out = torch.empty_like(q)
    partial = torch.empty((num_items, num_q_heads, head_dim), dtype=torch.float32, device=q.device)
    tops = torch.empty((num_items, num_q_heads), dtype=torch.float32, device=q.device)
    group = num_q_heads // cache.num_heads
    if cache.scheme == "dense":
        config = tuning.decode_config(arch(q.device), batch_size, head_dim, q.dtype.itemsize)
    else:
        config = tuning.kv_decode_config(arch(q.device), q.dtype.itemsize)
    _decode_kernel[(num_items, cache.num_heads)](
        q,
        *cache[:4],
        *cache.own,
        block_tables,
        seq_lens,
        *plan,
        partial,
        tops,
        out,
        scale * LOG2_E,
        cache.num_tokens,
        cache.own_num_tokens,
        block_tables.shape[1],
        window,
        SCHEME=cache.scheme,
        HKV=cache.num_heads,
        G=group,
        D=head_dim,
        BLOCK_SIZE=cache.block_size,
        BLOCK_R=max(MIN_ROWS, triton.next_power_of_2(group)),
        BLOCK_T=min(cache.block_size, config.block_t),
        BLOCK_D=triton.next_power_of_2(head_dim),
        STAGES=config.num_stages,
        PREFETCH=config.prefetch,
        num_warps=config.num_warps,
        **dependent_launch(q.device),
    )
    return out
