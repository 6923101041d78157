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
def _logits(row_ptr, o_v, V):
    return tl.load(row_ptr + o_v, mask=o_v < V, other=float("-inf")).to(tl.float32)


@triton.jit
def _sharpness(temperature):
    """exp((x - y) / temperature) = exp2((x - y) · sharpness); greedy rows never use it."""
    return 1.4426950408889634 / tl.where(temperature > 0, temperature, 1.0)


@triton.jit
def _noisy(x, temperature, seed, step, ids):
    """x / temperature + noise: the largest of a row is its sample."""
    return tl.div_rn(x, temperature) + _gumbel(seed, step, ids)


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
    least_ptr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (row, chunk): its largest logit, with noise where nothing restricts the row.

    Where something does, also its sum of exps and its smallest finite logit.
    """
    allow_next(PDL)
    wait_for_previous(PDL)
    row, chunk = tl.program_id(0), tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    is_restricted = _is_restricted(row, top_k_ptr, top_p_ptr, min_p_ptr, V)
    o_v = chunk * CHUNK + tl.arange(0, CHUNK)
    x = _logits(logits_ptr + row.to(tl.int64) * V, o_v, V)
    if temperature > 0 and not is_restricted:
        x = _noisy(x, temperature, tl.load(seeds_ptr + row), tl.load(steps_ptr + row), o_v)
        x = tl.where(o_v < V, x, float("-inf"))
    best, best_id = tl.max(x, axis=0, return_indices=True, return_indices_tie_break_left=True)
    out = row * tl.num_programs(1) + chunk
    tl.store(best_ptr + out, best)
    tl.store(best_id_ptr + out, chunk * CHUNK + best_id)
    if is_restricted:
        base = tl.where(best == float("-inf"), 0.0, best)
        tl.store(total_ptr + out, tl.sum(tl.exp2((x - base) * _sharpness(temperature)), axis=0))
        tl.store(least_ptr + out, tl.min(tl.where(x == float("-inf"), float("inf"), x), axis=0))


@triton.jit
def _is_restricted(row, top_k_ptr, top_p_ptr, min_p_ptr, V):
    top_k = tl.load(top_k_ptr + row)
    return ((top_k > 0) & (top_k < V)) | (tl.load(top_p_ptr + row) < 1) | (tl.load(min_p_ptr + row) > 0)


@triton.jit
def _pivots(low, high, P: tl.constexpr):
    """[P, 1] values that cut low … high into P + 1 equal parts; the last ones may round to an end."""
    return low + (high - low) * ((tl.arange(0, P)[:, None] + 1) / (P + 1.0))


@triton.jit
def _measure(row_ptr, V, sharpness, row_max, pivots, P: tl.constexpr, BLOCK: tl.constexpr):
    """For each pivot: how many logits of the row reach it, and their probability mass (the largest has one).

    sharpness 0 makes the mass a number of tokens.
    """
    counts = tl.zeros([P, BLOCK], tl.int32)
    masses = tl.zeros([P, BLOCK], tl.float32)
    for start in range(0, V, 8 * BLOCK):
        for part in tl.static_range(8):  # eight loads on their way at once
            x = _logits(row_ptr, start + part * BLOCK + tl.arange(0, BLOCK), V)
            # what is not there is -inf and reaches no pivot: pivots are finite
            mass = tl.exp2(tl.maximum(x - row_max, -1e30) * sharpness)
            reached = x[None, :] >= pivots
            counts += reached.to(tl.int32)
            masses += tl.where(reached, mass[None, :], 0.0)
    return tl.sum(counts, axis=1, keep_dims=True), tl.sum(masses, axis=1, keep_dims=True)


@triton.jit
def _narrow(
    row_ptr, V, sharpness, row_max, low, high, target, LIMIT: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr
):
    """Narrow [low, high) around the threshold until it is found or at most LIMIT logits reach low.

    The threshold is the largest value whose reached mass is at least target; low's is, high's is not.
    → (low, how many logits reach it)
    """
    num_reached = V
    is_open = True
    while is_open:
        pivots = _pivots(low, high, P)
        inside = (pivots > low) & (pivots < high)
        counts, masses = _measure(row_ptr, V, sharpness, row_max, pivots, P, BLOCK)
        holds = masses >= target
        new_low = tl.max(tl.where(inside & holds, pivots, low))
        high = tl.min(tl.where(inside & (holds == 0), pivots, high))
        num_reached = tl.minimum(num_reached, tl.min(tl.where(inside & holds, counts, num_reached)))
        low = tl.maximum(low, new_low)
        # when no value lies between the two, low is the threshold
        is_open = (tl.max(inside.to(tl.int32)) > 0) & (num_reached > LIMIT)
    return low, num_reached


@triton.jit
def _gather(row_ptr, V, low, values_ptr, ids_ptr, BLOCK: tl.constexpr):
    """Values and ids of the tokens that reach low, in the order of their ids."""
    num_stored = 0
    for start in range(0, V, BLOCK):
        o_v = start + tl.arange(0, BLOCK)
        x = _logits(row_ptr, o_v, V)
        kept = (x >= low) & (o_v < V)
        num_kept = tl.sum(kept.to(tl.int32), axis=0)
        if num_kept > 0:
            place = num_stored + tl.cumsum(kept.to(tl.int32), axis=0) - 1
            tl.store(values_ptr + place, x, mask=kept)
            tl.store(ids_ptr + place, o_v, mask=kept)
        num_stored += num_kept
    tl.debug_barrier()  # other threads of this program read them back


@triton.jit
def _halve(x, weights, target, low, high):
    """The largest value in [low, high) whose reached weight is at least target, over candidates in registers."""
    middle = low + (high - low) * 0.5
    while (middle > low) & (middle < high):
        holds = tl.sum(tl.where(x >= middle, weights, 0.0), axis=0) >= target
        low = tl.where(holds, middle, low)
        high = tl.where(holds, high, middle)
        middle = low + (high - low) * 0.5
    return low


@triton.jit
def _pick(x, ids, kept, temperature, seed, step):
    """The kept token with the largest logit plus noise → (its value, its id)."""
    noisy = tl.where(kept, _noisy(x, temperature, seed, step, ids), float("-inf"))
    best = tl.max(noisy, axis=0)
    return best, tl.min(tl.where(kept & (noisy == best), ids, 2147483647), axis=0)


@triton.jit
def _pick_from_row(row_ptr, V, temperature, low, seed, step, BLOCK: tl.constexpr):
    """_pick over all tokens of a row that reach low; tiles without any cost one reading."""
    best = tl.full([], float("-inf"), tl.float32)
    chosen = tl.full([], 0, tl.int32)
    for start in range(0, V, BLOCK):
        o_v = start + tl.arange(0, BLOCK)
        x = _logits(row_ptr, o_v, V)
        kept = (o_v < V) & (x >= low)
        if tl.max(kept.to(tl.int32), axis=0) > 0:
            value, token = _pick(x, o_v, kept, temperature, seed, step)
            chosen = tl.where(value > best, token, chosen)
            best = tl.maximum(value, best)
    return chosen


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
    least_ptr,
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
    m_c = o_c < num_chunks
    o_c += row * num_chunks
    best = tl.load(best_ptr + o_c, mask=m_c, other=float("-inf"))
    row_max, chunk = tl.max(best, axis=0, return_indices=True, return_indices_tie_break_left=True)
    is_restricted = _is_restricted(row, top_k_ptr, top_p_ptr, min_p_ptr, V)
    if (temperature <= 0) | (is_restricted == 0) | (row_max == float("-inf")):
        tl.store(out_ptr + row, tl.load(best_id_ptr + row * num_chunks + chunk).to(tl.int64))
        return
    top_k, top_p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    seed, step = tl.load(seeds_ptr + row), tl.load(steps_ptr + row)
    row_ptr = logits_ptr + row.to(tl.int64) * V
    values_ptr += row.to(tl.int64) * LIMIT
    ids_ptr += row.to(tl.int64) * LIMIT
    sharpness = _sharpness(temperature)
    totals = tl.load(total_ptr + o_c, mask=m_c, other=0.0)
    total = tl.sum(tl.where(totals > 0, totals * tl.exp2((best - row_max) * sharpness), 0.0), axis=0)
    low = tl.min(tl.load(least_ptr + o_c, mask=m_c, other=float("inf")), axis=0)
    high = row_max + tl.maximum(tl.abs(row_max), 1.0) * (2.0**-20)  # above every logit

    by_count = (top_k > 0) & (top_k < V)
    target = tl.where(by_count, top_k.to(tl.float32), top_p * total)
    if (by_count == 0) & (top_p < 1):
        # what lies this far below the maximum is, all together, less than the 1 - top_p that may go
        spare = tl.maximum((1.0 - top_p) * total, 1e-30)
        low = tl.maximum(low, row_max - temperature * (tl.log(V.to(tl.float32) / spare) + 1.0))
    floor = low
    if min_p > 0:
        floor = row_max + temperature * tl.log(min_p)
    num_reached = V
    if by_count | (top_p < 1):
        slope = tl.where(by_count, 0.0, sharpness)
        low, num_reached = _narrow(row_ptr, V, slope, row_max, low, high, target, LIMIT, P, BLOCK)
    else:
        low = tl.maximum(low, floor)
        counts, _ = _measure(row_ptr, V, 0.0, row_max, _pivots(low, low, P), P, BLOCK)
        num_reached = tl.max(counts)
    if num_reached <= LIMIT:
        _gather(row_ptr, V, low, values_ptr, ids_ptr, 4 * BLOCK)
        o_l = tl.arange(0, LIMIT)
        exists = o_l < num_reached
        x = tl.load(values_ptr + o_l, mask=exists, other=float("-inf"))
        ids = tl.load(ids_ptr + o_l, mask=exists, other=0)
        mass = tl.where(exists, tl.exp2((x - row_max) * sharpness), 0.0)
        if by_count:
            low = _halve(x, exists.to(tl.float32), target, low, high)
            target = top_p * tl.sum(tl.where(x >= low, mass, 0.0), axis=0)
        if top_p < 1:
            low = _halve(x, mass, target, low, high)
        kept = exists & (x >= tl.maximum(low, floor))
        _, chosen = _pick(x, ids, kept, temperature, seed, step)
    else:
        # more tokens are left than candidates fit: a wide min-p, a very large top-k, thousands of equal logits
        if by_count & (top_p < 1):
            _, kept_mass = _measure(row_ptr, V, sharpness, row_max, _pivots(low, low, P), P, BLOCK)
            target = top_p * tl.max(kept_mass)
            low, num_reached = _narrow(row_ptr, V, sharpness, row_max, low, high, target, 0, P, BLOCK)
        chosen = _pick_from_row(row_ptr, V, temperature, tl.maximum(low, floor), seed, step, 4 * BLOCK)
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
    shape = (num_rows, num_chunks)
    best, totals, least = (torch.empty(shape, dtype=torch.float32, device=logits.device) for _ in range(3))
    best_ids = torch.empty(shape, dtype=torch.int32, device=logits.device)
    values = torch.empty((num_rows, _NUM_CANDIDATES), dtype=torch.float32, device=logits.device)
    value_ids = torch.empty((num_rows, _NUM_CANDIDATES), dtype=torch.int32, device=logits.device)
    settings = (temperature, top_k, top_p, min_p, seeds, steps)
    launch = dependent_launch(logits.device)
    _scan_kernel[(num_rows, num_chunks)](
        logits, *settings, best, best_ids, totals, least, V=vocab_size, CHUNK=_CHUNK, num_warps=8, **launch
    )
    _choose_kernel[(num_rows,)](
        logits,
        *settings,
        best,
        best_ids,
        totals,
        least,
        values,
        value_ids,
        ids,
        num_chunks,
        vocab_size,
        BLOCK_C=triton.next_power_of_2(num_chunks),
        BLOCK=1024,
        LIMIT=_NUM_CANDIDATES,
        P=4,
        num_warps=8,
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
