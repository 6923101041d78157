"""Paged attention of chunks of prompts in Triton, each after what its sequence has in the cache already."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmtool.kernels.triton import tuning
from lmtool.kernels.triton.kv_tiles import attend, load_tile
from lmtool.kernels.triton.launch import allow_next, arch, dependent_launch, wait_for_previous
from lmtool.kernels.triton.paged import LOG2_E, Paged, check, dense


@triton.jit(
    do_not_specialize=["tokens_per_head", "own_tokens_per_head", "table_width", "window"],
    # behind decodes they begin anywhere
    do_not_specialize_on_alignment=["block_tables_ptr", "seq_lens_ptr"],
)
def _prefill_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_meta_ptr,
    v_meta_ptr,
    own_k_ptr,
    own_v_ptr,
    own_k_meta_ptr,
    own_v_meta_ptr,
    own_first_ptr,
    block_tables_ptr,
    cu_seqlens_ptr,
    seq_lens_ptr,
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
    closed = stop
    if own_k_ptr is not None:  # blocks before the last query's; those before the first one's are seen by all
        closed = (stop - 1) // BLOCK_SIZE * BLOCK_SIZE
        diagonal = first_position // BLOCK_SIZE * BLOCK_SIZE
    own_from = diagonal
    if WINDOW:
        start = tl.maximum(first_position + 1 - window, 0) // BLOCK_T * BLOCK_T
        own_from = tl.maximum(start, diagonal)
        diagonal = start  # the window's edge crosses tiles anywhere: all of them are masked
    stored = (k_cache_ptr, v_cache_ptr, k_meta_ptr, v_meta_ptr)
    for t in tl.range(start, diagonal, BLOCK_T, num_stages=STAGES):
        block = tl.load(table_ptr + t // BLOCK_SIZE).to(tl.int64)
        slot = head_start + block * BLOCK_SIZE + t % BLOCK_SIZE
        k, v = load_tile(stored, head, slot, o_t, True, o_d, D, SCHEME, False, q.dtype)
        acc, top, total = attend(q, k, v, True, acc, top, total, scale_log2, MASKED=False)
    for t in tl.range(diagonal, closed, BLOCK_T, num_stages=STAGES):
        block = tl.load(table_ptr + t // BLOCK_SIZE).to(tl.int64)
        slot = head_start + block * BLOCK_SIZE + t % BLOCK_SIZE
        k, v = load_tile(stored, head, slot, o_t, t + o_t < length, o_d, D, SCHEME, True, q.dtype)
        if own_k_ptr is None:
            seen = (t + o_t)[None, :] <= position[:, None]
        else:
            seen = (t // BLOCK_SIZE + 0 * o_t)[None, :] < (position // BLOCK_SIZE)[:, None]
        if WINDOW:
            seen = seen & ((t + o_t)[None, :] > position[:, None] - window)
        acc, top, total = attend(q, k, v, seen, acc, top, total, scale_log2, MASKED=True)
    if own_k_ptr is not None:
        own = (own_k_ptr, own_v_ptr, own_k_meta_ptr, own_v_meta_ptr)
        own_start = head.to(tl.int64) * own_tokens_per_head + tl.load(own_first_ptr + sequence) * BLOCK_SIZE
        for t in tl.range(own_from, stop, BLOCK_T, num_stages=STAGES):
            k, v = load_tile(own, head, own_start + t, o_t, t + o_t < length, o_d, D, "int8", True, q.dtype)
            seen = (t + o_t)[None, :] <= position[:, None]
            seen = seen & (position // BLOCK_SIZE == t // BLOCK_SIZE)[:, None]
            if WINDOW:
                seen = seen & ((t + o_t)[None, :] > position[:, None] - window)
            acc, top, total = attend(q, k, v, seen, acc, top, total, scale_log2, MASKED=True)
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
    cache = dense(k_cache, v_cache)
    return launch_prefill(q, cache, block_tables, cu_seqlens_q, seq_lens, max_seqlen_q, scale, window)


def launch_prefill(
    q: Tensor,
    cache: Paged,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    max_seqlen_q: int,
    scale: float,
    window: int,
) -> Tensor:
    """`attention_prefill` over any cache."""
    num_tokens, num_q_heads, head_dim = q.shape
    check(num_q_heads, cache.num_heads, cache.block_size)
    q = q.contiguous()
    out = torch.empty_like(q)
    if num_tokens == 0:
        return out
    group = num_q_heads // cache.num_heads
    told = (arch(q.device), max_seqlen_q * group, head_dim, q.dtype.itemsize)
    if cache.scheme == "dense":
        config = tuning.prefill_config(*told)
    else:
        config = tuning.kv_prefill_config(*told, static=cache.scheme == "static")
    block_r = max(config.block_r, triton.next_power_of_2(group))
    queries_per_program = block_r // group
    grid = (triton.cdiv(max_seqlen_q, queries_per_program), cache.num_heads, seq_lens.shape[0])
    _prefill_kernel[grid](
        q,
        *cache[:4],
        *cache.own,
        block_tables,
        cu_seqlens_q,
        seq_lens,
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
        BLOCK_Q=queries_per_program,
        BLOCK_R=block_r,
        BLOCK_T=min(cache.block_size, config.block_t),
        BLOCK_D=triton.next_power_of_2(head_dim),
        STAGES=config.num_stages,
        WINDOW=window > 0,
        num_warps=config.num_warps,
        **dependent_launch(q.device),
    )
    return out
