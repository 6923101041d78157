"""Penalties and sampling in Triton: no sort of the vocabulary, no row's result depends on another row.

`_scan_kernel` reads every logit once, by chunks. `_choose_kernel` ends the greedy and the unrestricted rows from that;
for the others it looks for the threshold that top-k, top-p and min-p leave: counting passes over the row until few
candidates are left, which are then gathered and searched by halving.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmtool.errors import KernelError
from lmtool.kernels.triton.launch import allow_next, dependent_launch, wait_for_previous

_CHUNK = 4096
_NUM_CANDIDATES = 4096


@triton.jit
def _mix(x):
    """The 32-bit finalizer of the reference."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _gumbel(seed, step, ids):
    """Gumbel noise, the reference's hash of (seed, step, id)."""
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    first = _mix(low ^ _mix(high ^ 0x9E3779B9))
    second = _mix(first ^ _mix(step.to(tl.uint32) ^ 0x85EBCA6B))
    bits = _mix(_mix(ids.to(tl.uint32) ^ first) + second)
    uniform = ((bits >> 9).to(tl.float32) + 0.5) * (2.0**-23)
    return -tl.log(-tl.log(uniform))


@triton.jit
def _key(x):
    """float32 → int32 in the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _scaled(row_ptr, o_v, V, temperature):
    x = tl.load(row_ptr + o_v, mask=o_v < V, other=float("-inf")).to(tl.float32)
    return tl.div_rn(x, tl.where(temperature > 0, temperature, 1.0))


@triton.jit
def _scan_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seeds_ptr,
    steps_ptr,
    best_ptr,
    best_id_ptr,
    total_ptr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (row, chunk): its largest logit (with noise where nothing restricts the row) and its sum of exps."""
    allow_next(PDL)
    wait_for_previous(PDL)
    row, chunk = tl.program_id(0), tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    is_restricted = _is_restricted(row, top_k_ptr, top_p_ptr, min_p_ptr, V)
    o_v = chunk * CHUNK + tl.arange(0, CHUNK)
    x = _scaled(logits_ptr + row.to(tl.int64) * V, o_v, V, temperature)
    if temperature > 0 and not is_restricted:
        x += _gumbel(tl.load(seeds_ptr + row), tl.load(steps_ptr + row), o_v)
        x = tl.where(o_v < V, x, float("-inf"))
    best, best_id = tl.max(x, axis=0, return_indices=True, return_indices_tie_break_left=True)
    out = row * tl.num_programs(1) + chunk
    tl.store(best_ptr + out, best)
    tl.store(best_id_ptr + out, chunk * CHUNK + best_id)
    if is_restricted:
        base = tl.where(best == float("-inf"), 0.0, best)
        tl.store(total_ptr + out, tl.sum(tl.exp(x - base), axis=0))


@triton.jit
def _is_restricted(row, top_k_ptr, top_p_ptr, min_p_ptr, V):
    top_k = tl.load(top_k_ptr + row)
    return ((top_k > 0) & (top_k < V)) | (tl.load(top_p_ptr + row) < 1) | (tl.load(min_p_ptr + row) > 0)


@triton.jit
def _measure(row_ptr, V, temperature, row_max, pivots, weighted, P: tl.constexpr, BLOCK: tl.constexpr):
    """For each pivot [P]: how many keys of the row reach it, and their weight (probability mass, or their number)."""
    counts = tl.zeros([BLOCK, P], tl.int32)
    weights = tl.zeros([BLOCK, P], tl.float32)
    for start in range(0, V, BLOCK):
        o_v = start + tl.arange(0, BLOCK)
        x = _scaled(row_ptr, o_v, V, temperature)
        reached = (_key(x)[:, None] >= pivots[None, :]) & (o_v < V)[:, None]
        counts += reached.to(tl.int32)
        weights += tl.where(reached, tl.where(weighted, tl.exp(x - row_max), 1.0)[:, None], 0.0)
    return tl.sum(counts, axis=0), tl.sum(weights, axis=0)


@triton.jit
def _narrow(row_ptr, V, temperature, row_max, weighted, target, LIMIT: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr):
    """A range [low, high) of keys that holds the threshold, until one key or LIMIT candidates are left.

    The threshold is the largest key whose reached weight is at least target. → (low, how many keys reach low)
    """
    o_p = tl.arange(0, P)
    low = tl.full([], -2139095041, tl.int32).to(tl.int64)  # the key of -inf: every token reaches it
    high = _key(row_max).to(tl.int64) + 1
    num_reached = V
    # first guesses: what top-k and top-p usually leave lies within a few nats of the maximum
    pivots = _key(row_max - tl.exp2(o_p.to(tl.float32)))
    while (high - low > 1) & (num_reached > LIMIT):
        counts, weights = _measure(row_ptr, V, temperature, row_max, pivots, weighted, P, BLOCK)
        wide_pivots = pivots.to(tl.int64)
        inside = (wide_pivots > low) & (wide_pivots < high)
        holds = weights >= target
        low = tl.maximum(low, tl.max(tl.where(inside & holds, wide_pivots, low), axis=0))
        high = tl.minimum(high, tl.min(tl.where(inside & (holds == 0), wide_pivots, high), axis=0))
        num_reached = tl.minimum(num_reached, tl.min(tl.where(inside & holds, counts, num_reached), axis=0))
        step = tl.maximum((high - low) // (P + 1), 1)
        pivots = tl.minimum(low + step * (o_p + 1), high).to(tl.int32)
    return low, num_reached


@triton.jit
def _gather(row_ptr, V, temperature, low, values_ptr, ids_ptr, BLOCK: tl.constexpr):
    """Values and ids of the tokens whose key reaches low, in the order of their ids."""
    num_stored = 0
    for start in range(0, V, BLOCK):
        o_v = start + tl.arange(0, BLOCK)
        x = _scaled(row_ptr, o_v, V, temperature)
        kept = (_key(x) >= low) & (o_v < V)
        place = num_stored + tl.cumsum(kept.to(tl.int32), axis=0) - 1
        tl.store(values_ptr + place, x, mask=kept)
        tl.store(ids_ptr + place, o_v, mask=kept)
        num_stored += tl.sum(kept.to(tl.int32), axis=0)
    tl.debug_barrier()  # other threads of this program read them back


@triton.jit
def _halve(keys, weights, target, low, high):
    """The largest key in [low, high) whose reached weight is at least target, over candidates in registers."""
    while high - low > 1:
        middle = (low + high) // 2
        if tl.sum(tl.where(keys >= middle, weights, 0.0), axis=0) >= target:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _pick(x, ids, kept, seed, step):
    """The kept token with the largest logit plus noise → (its value, its id)."""
    noisy = tl.where(kept, x + _gumbel(seed, step, ids), float("-inf"))
    best = tl.max(noisy, axis=0)
    return best, tl.min(tl.where(kept & (noisy == best), ids, 2147483647), axis=0)


@triton.jit
def _choose_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seeds_ptr,
    steps_ptr,
    best_ptr,
    best_id_ptr,
    total_ptr,
    values_ptr,
    ids_ptr,
    out_ptr,
    num_chunks,
    V,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
    LIMIT: tl.constexpr,
    P: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (row): the id of the row."""
    allow_next(PDL)
    wait_for_previous(PDL)
    row = tl.program_id(0)
    temperature = tl.load(temperature_ptr + row)
    o_c = tl.arange(0, BLOCK_C)
    best = tl.load(best_ptr + row * num_chunks + o_c, mask=o_c < num_chunks, other=float("-inf"))
    row_max, chunk = tl.max(best, axis=0, return_indices=True, return_indices_tie_break_left=True)
    if (temperature <= 0) | (_is_restricted(row, top_k_ptr, top_p_ptr, min_p_ptr, V) == 0):
        tl.store(out_ptr + row, tl.load(best_id_ptr + row * num_chunks + chunk).to(tl.int64))
        return
    top_k, top_p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    seed, step = tl.load(seeds_ptr + row), tl.load(steps_ptr + row)
    row_ptr = logits_ptr + row.to(tl.int64) * V
    values_ptr += row.to(tl.int64) * LIMIT
    ids_ptr += row.to(tl.int64) * LIMIT
    totals = tl.load(total_ptr + row * num_chunks + o_c, mask=o_c < num_chunks, other=0.0)
    total = tl.sum(tl.where(totals > 0, totals * tl.exp(best - row_max), 0.0), axis=0)

    by_count = (top_k > 0) & (top_k < V)
    target = tl.where(by_count, top_k.to(tl.float32), top_p * total)
    low = tl.full([], -2139095041, tl.int32).to(tl.int64)
    num_reached = V
    high = _key(row_max).to(tl.int64) + 1
    if by_count | (top_p < 1):
        low, num_reached = _narrow(row_ptr, V, temperature, row_max, by_count == 0, target, LIMIT, P, BLOCK)
    floor = tl.where(min_p > 0, row_max + tl.log(tl.where(min_p > 0, min_p, 1.0)), float("-inf"))
    if num_reached <= LIMIT:
        _gather(row_ptr, V, temperature, low, values_ptr, ids_ptr, BLOCK)
        o_l = tl.arange(0, LIMIT)
        x = tl.load(values_ptr + o_l, mask=o_l < num_reached, other=float("-inf"))
        ids = tl.load(ids_ptr + o_l, mask=o_l < num_reached, other=0)
        exists = o_l < num_reached
        keys = _key(x).to(tl.int64)
        mass = tl.where(exists, tl.exp(x - row_max), 0.0)
        if by_count:
            low = _halve(keys, exists.to(tl.float32), target, low, high)
            target = top_p * tl.sum(tl.where(keys >= low, mass, 0.0), axis=0)
        if top_p < 1:
            low = _halve(keys, mass, target, low, high)
        chosen_value, chosen = _pick(x, ids, exists & (keys >= low) & (x >= floor), seed, step)
    else:
        # more tokens than candidates fit are left (min-p alone, a very large top-k, thousands of equal logits)
        if by_count & (top_p < 1):
            count_low = low
            pivots = tl.full([P], 0, tl.int32) + count_low.to(tl.int32)
            _, kept_mass = _measure(row_ptr, V, temperature, row_max, pivots, True, P, BLOCK)
            target = top_p * tl.max(kept_mass, axis=0)
            low, num_reached = _narrow(row_ptr, V, temperature, row_max, True, target, 0, P, BLOCK)
            low = tl.maximum(low, count_low)
        chosen_value = tl.full([], float("-inf"), tl.float32)
        chosen = tl.full([], 0, tl.int32)
        for start in range(0, V, BLOCK):
            o_v = start + tl.arange(0, BLOCK)
            x = _scaled(row_ptr, o_v, V, temperature)
            kept = (o_v < V) & (_key(x) >= low) & (x >= floor)
            value, token = _pick(x, o_v, kept, seed, step)
            chosen = tl.where(value > chosen_value, token, chosen)
            chosen_value = tl.maximum(value, chosen_value)
    tl.store(out_ptr + row, chosen.to(tl.int64))


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    steps: Tensor,
) -> Tensor:
    num_rows, vocab_size = logits.shape
    logits = logits.contiguous()
    ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows == 0:
        return ids
    num_chunks = triton.cdiv(vocab_size, _CHUNK)
    best, totals = (torch.empty((num_rows, num_chunks), dtype=torch.float32, device=logits.device) for _ in range(2))
    best_ids = torch.empty((num_rows, num_chunks), dtype=torch.int32, device=logits.device)
    values = torch.empty((num_rows, _NUM_CANDIDATES), dtype=torch.float32, device=logits.device)
    value_ids = torch.empty((num_rows, _NUM_CANDIDATES), dtype=torch.int32, device=logits.device)
    settings = (temperature, top_k, top_p, min_p, seeds, steps)
    launch = dependent_launch(logits.device)
    _scan_kernel[(num_rows, num_chunks)](
        logits, *settings, best, best_ids, totals, V=vocab_size, CHUNK=_CHUNK, num_warps=8, **launch
    )
    _choose_kernel[(num_rows,)](
        logits,
        *settings,
        best,
        best_ids,
        totals,
        values,
        value_ids,
        ids,
        num_chunks,
        vocab_size,
        BLOCK_C=triton.next_power_of_2(num_chunks),
        BLOCK=2048,
        LIMIT=_NUM_CANDIDATES,
        P=4,
        num_warps=16,
        **launch,
    )
    return ids


@triton.jit
def _penalize_kernel(
    logits_ptr,
    prompt_mask_ptr,
    output_counts_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    allow_next(PDL)
    wait_for_previous(PDL)
    row = tl.program_id(0)
    factor, presence = tl.load(repetition_ptr + row), tl.load(presence_ptr + row)
    frequency = tl.load(frequency_ptr + row)
    if (factor == 1) & (presence == 0) & (frequency == 0):
        return  # a row without penalties costs nothing
    o_v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = o_v < V
    ptrs = row.to(tl.int64) * V + o_v
    x = tl.load(logits_ptr + ptrs, mask=mask, other=0.0)
    count = tl.load(output_counts_ptr + ptrs, mask=mask, other=0)
    in_prompt = tl.load(prompt_mask_ptr + ptrs, mask=mask, other=0) != 0
    penalized = tl.where(x > 0, tl.div_rn(x, factor), x * factor)
    x = tl.where(in_prompt | (count > 0), penalized, x)
    x -= count.to(tl.float32) * frequency + tl.where(count > 0, presence, 0.0)
    tl.store(logits_ptr + ptrs, x, mask=mask)


def penalize_(
    logits: Tensor,
    prompt_mask: Tensor,
    output_counts: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> Tensor:
    num_rows, vocab_size = logits.shape
    if not logits.is_contiguous() or logits.dtype != torch.float32:
        raise KernelError(f"penalize_ works in place on contiguous float32 logits, got {logits.dtype}")
    if num_rows:
        _penalize_kernel[(num_rows, triton.cdiv(vocab_size, _CHUNK))](
            logits,
            prompt_mask,
            output_counts,
            repetition,
            presence,
            frequency,
            V=vocab_size,
            BLOCK=_CHUNK,
            num_warps=8,
            **dependent_launch(logits.device),
        )
    return logits
