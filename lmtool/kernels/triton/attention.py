"""Paged attention in Triton: decode over a work list, prefill over a cached prefix.

The query heads that share a key/value head are packed into the rows of one product (GQA). Scores are kept in base 2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmtool.errors import KernelError
from lmtool.kernels.layout import PIECE_ALIGN, DecodePlan
from lmtool.kernels.triton import tuning
from lmtool.kernels.triton.launch import allow_next, arch, dependent_launch, prefetch, wait_for_previous
from lmtool.kernels.triton.plan import plan_decode

__all__ = ["attention_decode", "attention_prefill", "plan_decode"]

_LOG2_E = 1.4426950408889634
_MIN_ROWS = 16  # of a tensor-core product


@triton.jit
def _attend(
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


@triton.jit(do_not_specialize=["tokens_per_head", "table_width", "window"])
def _decode_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
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
    table_width,
    window,
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
    oldest = tl.where(window > 0, tl.load(seq_lens_ptr + tl.maximum(sequence, 0)) - window, 0)
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
    for t in tl.range(start, stop, BLOCK_T, num_stages=STAGES):
        block = tl.load(block_tables_ptr + sequence * table_width + t // BLOCK_SIZE).to(tl.int64)
        o_slot = head_start + block * BLOCK_SIZE + t % BLOCK_SIZE + o_t
        m_t = t + o_t < stop
        m_kv = m_t[:, None] & (o_d < D)[None, :]
        k = tl.load(k_cache_ptr + o_slot[:, None] * D + o_d[None, :], mask=m_kv, other=0.0)
        v = tl.load(v_cache_ptr + o_slot[:, None] * D + o_d[None, :], mask=m_kv, other=0.0)
        seen = (m_t & (t + o_t >= oldest))[None, :]
        acc, top, total = _attend(q, k.to(q.dtype), v.to(q.dtype), seen, acc, top, total, scale_log2, MASKED=True)
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
    num_kv_heads, num_blocks, block_size, head_dim = k_cache.shape
    batch_size, num_q_heads, _ = q.shape
    _check(num_q_heads, num_kv_heads, block_size)
    if plan is None:
        plan = plan_decode(seq_lens, num_kv_heads, window)
    num_items = plan.items.shape[0]
    q = q.contiguous()
    out = torch.empty_like(q)
    partial = torch.empty((num_items, num_q_heads, head_dim), dtype=torch.float32, device=q.device)
    tops = torch.empty((num_items, num_q_heads), dtype=torch.float32, device=q.device)
    group = num_q_heads // num_kv_heads
    config = tuning.decode_config(arch(q.device), batch_size, head_dim, q.dtype.itemsize)
    _decode_kernel[(num_items, num_kv_heads)](
        q,
        k_cache,
        v_cache,
        block_tables,
        seq_lens,
        *plan,
        partial,
        tops,
        out,
        scale * _LOG2_E,
        num_blocks * block_size,
        block_tables.shape[1],
        window,
        HKV=num_kv_heads,
        G=group,
        D=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_R=max(_MIN_ROWS, triton.next_power_of_2(group)),
        BLOCK_T=min(block_size, config.block_t),
        BLOCK_D=triton.next_power_of_2(head_dim),
        STAGES=config.num_stages,
        PREFETCH=config.prefetch,
        num_warps=config.num_warps,
        **dependent_launch(q.device),
    )
    return out


@triton.jit(
    do_not_specialize=["tokens_per_head", "table_width", "window"],
    # behind decodes they begin anywhere
    do_not_specialize_on_alignment=["block_tables_ptr", "seq_lens_ptr"],
)
def _prefill_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    block_tables_ptr,
    cu_seqlens_ptr,
    seq_lens_ptr,
    out_ptr,
    scale_log2,
    tokens_per_head,
    table_width,
    window,
    HKV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    WINDOW: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (i, h, s): BLOCK_Q queries of chunk s, each with the G heads of key/value head h, last tile first."""
    allow_next(PDL)
    wait_for_previous(PDL)
    head, sequence = tl.program_id(1), tl.program_id(2)
    chunk_start, chunk_stop = tl.load(cu_seqlens_ptr + sequence), tl.load(cu_seqlens_ptr + sequence + 1)
    num_queries = chunk_stop - chunk_start
    first_query = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q
    if first_query >= num_queries:
        return
    length = tl.load(seq_lens_ptr + sequence)
    o_r, o_t, o_d = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    o_query = first_query + o_r // G
    m_r = (o_r < BLOCK_Q * G) & (o_query < num_queries)
    position = length - num_queries + o_query
    mask = m_r[:, None] & (o_d < D)[None, :]
    rows = (chunk_start + o_query).to(tl.int64) * HKV * G + head * G + o_r % G
    q = tl.load(q_ptr + rows[:, None] * D + o_d[None, :], mask=mask, other=0.0)
    head_start = head.to(tl.int64) * tokens_per_head
    table_ptr = block_tables_ptr + sequence * table_width
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)

    first_position = length - num_queries + first_query
    stop = tl.minimum(first_position + BLOCK_Q, length)
    start = 0
    diagonal = (first_position + 1) // BLOCK_T * BLOCK_T
    if WINDOW:
        start = tl.maximum(first_position + 1 - window, 0) // BLOCK_T * BLOCK_T
        diagonal = start  # the window's edge crosses tiles anywhere: all of them are masked
    for t in tl.range(start, diagonal, BLOCK_T, num_stages=STAGES):
        block = tl.load(table_ptr + t // BLOCK_SIZE).to(tl.int64)
        o_slot = (head_start + block * BLOCK_SIZE + t % BLOCK_SIZE + o_t)[:, None] * D + o_d[None, :]
        k = tl.load(k_cache_ptr + o_slot, mask=(o_d < D)[None, :], other=0.0)
        v = tl.load(v_cache_ptr + o_slot, mask=(o_d < D)[None, :], other=0.0)
        acc, top, total = _attend(q, k.to(q.dtype), v.to(q.dtype), True, acc, top, total, scale_log2, MASKED=False)
    for t in tl.range(diagonal, stop, BLOCK_T, num_stages=STAGES):
        block = tl.load(table_ptr + t // BLOCK_SIZE).to(tl.int64)
        o_slot = (head_start + block * BLOCK_SIZE + t % BLOCK_SIZE + o_t)[:, None] * D + o_d[None, :]
        m_kv = (t + o_t < length)[:, None] & (o_d < D)[None, :]
        k = tl.load(k_cache_ptr + o_slot, mask=m_kv, other=0.0)
        v = tl.load(v_cache_ptr + o_slot, mask=m_kv, other=0.0)
        seen = (t + o_t)[None, :] <= position[:, None]
        if WINDOW:
            seen = seen & ((t + o_t)[None, :] > position[:, None] - window)
        acc, top, total = _attend(q, k.to(q.dtype), v.to(q.dtype), seen, acc, top, total, scale_log2, MASKED=True)
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out_ptr + rows[:, None] * D + o_d[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


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
    num_kv_heads, num_blocks, block_size, head_dim = k_cache.shape
    num_tokens, num_q_heads, _ = q.shape
    _check(num_q_heads, num_kv_heads, block_size)
    q = q.contiguous()
    out = torch.empty_like(q)
    if num_tokens == 0:
        return out
    group = num_q_heads // num_kv_heads
    config = tuning.prefill_config(arch(q.device), max_seqlen_q * group, head_dim, q.dtype.itemsize)
    block_r = max(config.block_r, triton.next_power_of_2(group))
    queries_per_program = block_r // group
    grid = (triton.cdiv(max_seqlen_q, queries_per_program), num_kv_heads, seq_lens.shape[0])
    _prefill_kernel[grid](
        q,
        k_cache,
        v_cache,
        block_tables,
        cu_seqlens_q,
        seq_lens,
        out,
        scale * _LOG2_E,
        num_blocks * block_size,
        block_tables.shape[1],
        window,
        HKV=num_kv_heads,
        G=group,
        D=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_Q=queries_per_program,
        BLOCK_R=block_r,
        BLOCK_T=min(block_size, config.block_t),
        BLOCK_D=triton.next_power_of_2(head_dim),
        STAGES=config.num_stages,
        WINDOW=window > 0,
        num_warps=config.num_warps,
        **dependent_launch(q.device),
    )
    return out


def _check(num_q_heads: int, num_kv_heads: int, block_size: int) -> None:
    if num_q_heads % num_kv_heads:
        raise KernelError(f"attention: {num_q_heads} query heads cannot share {num_kv_heads} key/value heads evenly")
    if block_size < _MIN_ROWS or block_size & (block_size - 1) or PIECE_ALIGN % min(block_size, 64):
        raise KernelError(
            f"attention: a cache block holds 16, 32, 64 or more (a power of two) tokens, not {block_size}"
        )
