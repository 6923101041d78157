"""Decode attention over a quantized cache: its codes are the left operand of small tensor-core products as they are.

A warp has one piece of the work list (`plan.py`) and up to eight query heads of one K/V head: scores are Sᵀ [tokens,
heads] = K · qᵀ, what is added up is Oᵀ [dims, heads] = Vᵀ · Pᵀ. A code in the low bits of a float16 is the number
code · 2⁻²⁴, which tensor cores take. In which order a sum runs is free: q lies in the order of the words of K
(`kv_query.py`), and a lane takes those tokens of K whose weights, transposed, are in the order of the words of V.

Nobody waits for another warp. While a block's scores become weights (`kv_scores.py`) its values and the next block's
keys are on their way into the warp's own shared memory (`kv_access.py`), so that its registers hold none of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmtool.kernels.kv_layout import KV_BLOCK, QuantizedKv
from lmtool.kernels.layout import DecodePlan
from lmtool.kernels.triton.kv_access import all_asked, shared_memory, wait_for_all_but
from lmtool.kernels.triton.kv_pieces import merged, store_out, store_part
from lmtool.kernels.triton.kv_query import (
    ask_channels,
    load_channels,
    load_query,
    minima_of,
    packed_query,
    scaled_query,
    size_of,
    sums_of,
    take_channels,
    words_at_once,
)
from lmtool.kernels.triton.kv_scores import (
    ask_keys,
    finished,
    first_token,
    load_tokens,
    scores,
    softmax,
    token_terms,
)
from lmtool.kernels.triton.kv_values import add_values, ask_values, averages, of_channels, scaled
from lmtool.kernels.triton.launch import HOPPER, allow_next, arch, dependent_launch, wait_for_previous
from lmtool.kernels.triton.paged import LOG2_E, check
from lmtool.kernels.triton.plan import plan_decode
from lmtool.kernels.triton.w4_mma import keep_order

_WITH_THE_INSTRUCTION = 80  # mma.m16n8k16
_COLUMNS = 8
# so that twelve warps fit on a multiprocessor: by itself the compiler takes 190 for four bits
_REGISTERS = 168
# of a program, known to the compiler: more would have to be asked for at launch
_SHARED_BYTES = 48 * 1024 - 1024
_MOST_COLUMNS = 32  # heads that share a K/V head: a sequence has a counter for each K/V head
_WIDEST = 128  # results take a quarter of it in registers, a block a kilobyte for four dims of shared memory


@triton.jit
def _seen(lane, first_of_block, oldest, stop):
    """Which of a lane's two tokens (see `load_tokens`) a query sees."""
    token = first_of_block + first_token(lane) + lane % 4 * 4
    return (token >= oldest) & (token < stop), (token + 1 >= oldest) & (token + 1 < stop)


@triton.jit
def _metas(metas, seen, factor, K_TOKENS: tl.constexpr, V_TOKENS: tl.constexpr):
    """`token_terms` of a lane's two tokens."""
    nothing = tl.zeros(seen[0].shape, tl.int32)
    of_k = metas[2] if K_TOKENS else (nothing, nothing)
    of_v = metas[1] if V_TOKENS else (nothing, nothing)
    return (
        token_terms(of_k[0], of_v[0], seen[0], factor, K_TOKENS, V_TOKENS),
        token_terms(of_k[1], of_v[1], seen[1], factor, K_TOKENS, V_TOKENS),
    )


@triton.jit
def _ask_keys(
    shared,
    k_ptr,
    k_meta_ptr,
    v_meta_ptr,
    block,
    wanted,
    DIM: tl.constexpr,
    BITS: tl.constexpr,
    SCHEME: tl.constexpr,
    ASM: tl.constexpr,
):
    """All of a block but its values; what its tokens have of their own comes back in registers: (nothing, V's, K's)."""
    block = block.to(tl.int64)
    ask_keys(shared, k_ptr + block * (2 * DIM * BITS), wanted, DIM, BITS, ASM)
    if SCHEME == "int4":
        ask_channels(shared + 8 * DIM * BITS, k_meta_ptr + block * DIM, wanted, DIM, ASM)
    all_asked(shared, ASM)
    out = (wanted,)
    if SCHEME != "static":
        out += (load_tokens(v_meta_ptr + block * 64, wanted, ASM),)
    if SCHEME == "int8":
        out += (load_tokens(k_meta_ptr + block * 64, wanted, ASM),)
    return out


@triton.jit
def _scores(
    shared,
    k_ptr,
    k_meta_ptr,
    block,
    q,
    per_head,
    DIM: tl.constexpr,
    BITS: tl.constexpr,
    SCHEME: tl.constexpr,
    ASM: tl.constexpr,
):
    """`scores` of a block and what else belongs to each head: Σ q or, of K's channels, Σ q · minimum."""
    block = block.to(tl.int64)
    if SCHEME == "int4":
        AT_ONCE: tl.constexpr = words_at_once(DIM, BITS)
        place, ptr = shared + 8 * DIM * BITS, k_meta_ptr + block * DIM
        per_head = minima_of(q, take_channels(place, ptr, 1, DIM, BITS, ASM), AT_ONCE, BITS, ASM)
        q = scaled_query(q, take_channels(place, ptr, 0, DIM, BITS, ASM), AT_ONCE, BITS, ASM)
    return scores(shared, k_ptr + block * (2 * DIM * BITS), q, DIM, BITS, ASM), per_head


@triton.jit
def _weigh(state, found, metas, seen, factor, SCHEME: tl.constexpr, ASM: tl.constexpr):
    """A block's scores as weights, and state (results, sums) as it is beside them."""
    total, sums = state
    K_TOKENS: tl.constexpr = SCHEME == "int8"
    V_TOKENS: tl.constexpr = SCHEME != "static"
    pair = _metas(metas, seen, factor, K_TOKENS, V_TOKENS)
    weights, sums, decay = softmax(found[0], pair, found[1], sums, factor, K_TOKENS, V_TOKENS, ASM)
    return weights, (scaled(total, decay[0], decay[1], 0), sums)


@triton.jit
def _attend_opened(
    state, shared, k_ptr, v_ptr, k_meta_ptr, v_meta_ptr, block, q, seen, factor, DIM: tl.constexpr, ASM: tl.constexpr
):
    """state and a block of an 'int8' cache more; q: packed in the order of its words. V comes where K was."""
    words: tl.constexpr = tl.pointer_type(tl.int32)
    k_ptr, v_ptr = k_ptr.to(words), v_ptr.to(words)
    k_meta_ptr, v_meta_ptr = k_meta_ptr.to(words), v_meta_ptr.to(words)
    always = tl.full(shared.shape, 1, tl.int32)
    metas = _ask_keys(shared, k_ptr, k_meta_ptr, v_meta_ptr, block, always, DIM, 8, "int8", ASM)
    wait_for_all_but(shared, False, ASM)
    found = _scores(shared, k_ptr, k_meta_ptr, block, q, sums_of(q, ASM), DIM, 8, "int8", ASM)
    v_ptr += block * (16 * DIM)
    ask_values(shared, v_ptr, always, DIM, 8, ASM)
    all_asked(shared, ASM)
    weights, state = _weigh(state, found, metas, seen, factor, "int8", ASM)
    wait_for_all_but(shared, False, ASM)
    return add_values(shared, v_ptr, state[0], weights, 8, ASM), state[1]


@triton.jit(do_not_specialize=["num_blocks", "num_opened", "table_width", "window"])
def kv_decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_meta_ptr,
    v_meta_ptr,
    opened_k_ptr,
    opened_v_ptr,
    opened_k_meta_ptr,
    opened_v_meta_ptr,
    open_blocks_ptr,
    block_tables_ptr,
    seq_lens_ptr,
    items_ptr,
    spans_ptr,
    arrivals_ptr,
    partial_ptr,
    top_ptr,
    out_ptr,
    scale_log2,
    num_blocks,
    num_opened,
    table_width,
    window,
    HKV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    SCHEME: tl.constexpr,
    OPENED: tl.constexpr,
    WARPS: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (w, p): item w of the work list, of its eights of heads WARPS from p · WARPS on, each a warp's.

    The last of a sequence's pieces merges them all.

    SCHEME: 'int8' stands for 'k8v4' too. OPENED: a sequence's last block is read from the cache opened, 'int8'.
    """
    EIGHTS: tl.constexpr = (G + 7) // 8
    TILES: tl.constexpr = DIM // 16
    HALF: tl.constexpr = TILES // 2 if V_BITS == 4 else TILES  # from this tile on codes are 16 times what they are
    item, thread = tl.program_id(0), tl.arange(0, 32 * WARPS)
    lane, warp = thread % 32, thread // 32
    # a warp too many does what the last one does
    place = tl.minimum(tl.program_id(1) * WARPS + warp, HKV * EIGHTS - 1)
    head, column = place // EIGHTS, place % EIGHTS * 8
    # the plan was complete before the kernel before this one began: see _plan_kernel
    sequence = tl.load(items_ptr + 3 * item)
    start, stop = tl.load(items_ptr + 3 * item + 1), tl.load(items_ptr + 3 * item + 2)
    length = tl.load(seq_lens_ptr + tl.maximum(sequence, 0))
    spans_ptr += 2 * tl.maximum(sequence, 0)
    first, count = tl.load(spans_ptr), tl.load(spans_ptr + 1)
    oldest = tl.where(window > 0, length - window, 0)
    wait_for_previous(PDL)
    if sequence < 0:
        return
    table_ptr = block_tables_ptr + sequence.to(tl.int64) * table_width
    block_of_head = head * num_blocks
    begin, end = start // 64, tl.cdiv(stop, 64)
    if OPENED:
        end = tl.where(stop == length, tl.maximum((length - 1) // 64, begin), end)
    k_ptr = k_ptr.to(tl.pointer_type(tl.int32))
    v_ptr = v_ptr.to(tl.pointer_type(tl.int32))
    k_words_ptr = k_meta_ptr.to(tl.pointer_type(tl.int32))
    v_words_ptr = v_meta_ptr.to(tl.pointer_type(tl.int32))
    K_BYTES: tl.constexpr = 8 * DIM * K_BITS + (4 * DIM if SCHEME == "int4" else 0)
    V_BYTES: tl.constexpr = 8 * DIM * V_BITS
    k_shared = shared_memory(warp, K_BYTES + V_BYTES, ASM)
    v_shared = k_shared + K_BYTES
    block = tl.load(table_ptr + begin)
    next_block = tl.load(table_ptr + tl.maximum(tl.minimum(begin + 1, end - 1), begin))
    wanted = (lane * 0 + begin < end).to(tl.int32)
    ahead = _ask_keys(
        k_shared, k_ptr, k_words_ptr, v_words_ptr, block_of_head + block, wanted, DIM, K_BITS, SCHEME, ASM
    )
    ask_values(v_shared, v_ptr + (block_of_head + block).to(tl.int64) * (2 * DIM * V_BITS), wanted, DIM, V_BITS, ASM)
    all_asked(lane, ASM)

    row = sequence.to(tl.int64) * (HKV * G) + head * G + column
    q_ptrs = q_ptr + row * D + tl.minimum(lane // 4, G - 1 - column) * D
    numbers = load_query(q_ptrs, D, DIM, K_BITS, ASM)
    size = size_of(numbers, ASM)
    inverse = 1.0 / tl.where(size > 0, size, 1.0)
    factor = size * scale_log2
    q = packed_query(numbers, inverse, K_BITS, ASM)
    per_head = sums_of(q, ASM)
    if SCHEME == "static":
        AT_ONCE: tl.constexpr = words_at_once(DIM, K_BITS)
        ptr = k_words_ptr + head * DIM
        per_head = minima_of(q, load_channels(ptr, 1, DIM, K_BITS, ASM), AT_ONCE, K_BITS, ASM)
        q = scaled_query(q, load_channels(ptr, 0, DIM, K_BITS, ASM), AT_ONCE, K_BITS, ASM)
    zero = tl.zeros(lane.shape, tl.float32)
    nothing = zero + float("-inf")
    total = ()
    for _ in tl.static_range(TILES):
        total += ((zero, zero, zero, zero),)
    state = (total, (nothing, nothing, zero, zero, zero, zero))

    for i in range(begin, end):
        after = tl.load(table_ptr + tl.minimum(i + 2, end - 1))
        wait_for_all_but(lane, True, ASM)
        found = _scores(k_shared, k_ptr, k_words_ptr, block_of_head + block, q, per_head, DIM, K_BITS, SCHEME, ASM)
        keep_order(lane, ASM)  # what other lanes still take is not written over
        wanted = (lane * 0 + i + 1 < end).to(tl.int32)
        this = ahead
        ahead = _ask_keys(
            k_shared, k_ptr, k_words_ptr, v_words_ptr, block_of_head + next_block, wanted, DIM, K_BITS, SCHEME, ASM
        )
        weights, state = _weigh(state, found, this, _seen(lane, i * 64, oldest, stop), factor, SCHEME, ASM)
        wait_for_all_but(lane, True, ASM)
        total = add_values(
            v_shared, v_ptr + (block_of_head + block).to(tl.int64) * (2 * DIM * V_BITS), state[0], weights, V_BITS, ASM
        )
        state = (total, state[1])
        ask_values(
            v_shared, v_ptr + (block_of_head + next_block).to(tl.int64) * (2 * DIM * V_BITS), wanted, DIM, V_BITS, ASM
        )
        all_asked(lane, ASM)
        block, next_block = next_block, after
    # not earlier: programs of the next kernel that only wait would stand where this one's are still to come, unevenly
    allow_next(PDL)
    FROM: tl.constexpr = TILES if OPENED else HALF
    if OPENED:
        total = scaled(state[0], 0.0625, 0.0625, HALF)
        if (stop == length) & (stop > start):
            numbers = load_query(q_ptrs, D, DIM, 8, ASM)
            state = _attend_opened(
                (total, state[1]),
                k_shared,
                opened_k_ptr,
                opened_v_ptr,
                opened_k_meta_ptr,
                opened_v_meta_ptr,
                head.to(tl.int64) * num_opened + tl.load(open_blocks_ptr + sequence),
                packed_query(numbers, inverse, 8, ASM),
                _seen(lane, (length - 1) // 64 * 64, oldest, stop),
                factor,
                DIM,
                ASM,
            )
        else:
            state = (total, state[1])
    total, sums = state
    tops, added, lows = finished(sums, ASM)
    total = averages(total, added, lows, FROM)
    if SCHEME == "static":
        # a padded row saw nothing: no minimum either
        total = of_channels(total, v_meta_ptr + head * (2 * DIM), tl.where(stop > start, 1.0, 0.0), DIM, ASM)
    out_ptr += row * D
    if count == 1:
        store_out(total, out_ptr, G - column, D, ASM)
        return
    NEXT: tl.constexpr = HKV * EIGHTS
    part = item.to(tl.int64) * NEXT + place
    store_part(total, tops, added, partial_ptr + part * (TILES * 128), top_ptr + part * 8, ASM)
    tl.debug_barrier()  # every lane's part is written before this piece is counted
    arrival_ptr = arrivals_ptr + sequence * HKV + tl.program_id(1)
    if tl.atomic_add(arrival_ptr, 1, sem="acq_rel") == count - 1:
        tl.store(arrival_ptr, 0)
        part = first.to(tl.int64) * NEXT + place
        total = merged(partial_ptr + part * (TILES * 128), top_ptr + part * 8, count, TILES, NEXT, ASM)
        store_out(total, out_ptr, G - column, D, ASM)


def serves(q: Tensor, cache: QuantizedKv) -> bool:
    """Whether `kv_attention_decode` takes q [B, Hq, D] over this cache: half precision, D ≤ 128, Ampere or newer."""
    if 0 < arch(q.device) < _WITH_THE_INSTRUCTION or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    fits = cache.padded_dim <= _WIDEST and cache.head_dim % 4 == 0
    return fits and q.shape[1] <= _MOST_COLUMNS * cache.num_heads


def _warps(cache: QuantizedKv, eights: int) -> int:
    """Of a program: four, one for each part of a multiprocessor, which fill up unevenly with programs of fewer."""
    of_warp = KV_BLOCK * cache.padded_dim * (cache.k_bits + cache.v_bits) // 8 + 4 * cache.padded_dim
    warps = 4
    while warps > 1 and (warps * of_warp > _SHARED_BYTES or warps >= 2 * eights):
        warps //= 2
    return warps


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
    _, num_q_heads, head_dim = q.shape
    check(num_q_heads, cache.num_heads, KV_BLOCK)
    if plan is None:
        plan = plan_decode(seq_lens, cache.num_heads, window)
    group = num_q_heads // cache.num_heads
    q = q.contiguous()
    out = torch.empty_like(q)
    eights = cache.num_heads * triton.cdiv(group, _COLUMNS)
    warps = _warps(cache, eights)
    grid = (plan.items.shape[0], triton.cdiv(eights, warps))
    partial = torch.empty((grid[0] * eights * _COLUMNS, cache.padded_dim), dtype=torch.float32, device=q.device)
    tops = torch.empty(grid[0] * eights * _COLUMNS, dtype=torch.float32, device=q.device)
    last = cache if opened is None or open_blocks is None else opened
    limits = {"maxnreg": _REGISTERS} if arch(q.device) >= HOPPER else {}
    kv_decode_kernel[grid](
        q,
        cache.k,
        cache.v,
        cache.k_meta,
        cache.v_meta,
        last.k,
        last.v,
        last.k_meta,
        last.v_meta,
        seq_lens if open_blocks is None else open_blocks,
        block_tables,
        seq_lens,
        *plan,
        partial,
        tops,
        out,
        scale * LOG2_E,
        cache.num_blocks,
        last.num_blocks,
        block_tables.shape[1],
        window,
        HKV=cache.num_heads,
        G=group,
        D=head_dim,
        DIM=cache.padded_dim,
        K_BITS=cache.k_bits,
        V_BITS=cache.v_bits,
        SCHEME="int8" if cache.scheme == "k8v4" else cache.scheme,
        OPENED=last is opened,
        ASM=arch(q.device) > 0,
        WARPS=warps,
        num_warps=warps,
        **limits,
        num_stages=1,
        **dependent_launch(q.device),
    )
    return out
