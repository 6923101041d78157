"""Sampling in Triton: no sort of the vocabulary, no row's result depends on another row.

`_scan_kernel` reads every logit once and ends the greedy and the unrestricted rows. For the others top-k, top-p and
min-p leave the logits above some threshold, which is enclosed between two values, low and high: by the largest logits
of small groups (a top-k leaves few), else by `_narrow_kernel`, which measures what reaches each of a few pivots.
`_gather_kernel` samples among the tokens above high and collects those between the two; `_choose_kernel`, one program a
row, finds the threshold among them. Every grid is fixed and nothing is read back, so a CUDA graph can hold all of it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmtool.kernels.triton.launch import allow_next, arrival_counters, dependent_launch, wait_for_previous
from lmtool.kernels.triton.noise import load_logits, noisy_logits, pick, sharpness_of
from lmtool.kernels.triton.penalties import mask_, penalize_
from lmtool.kernels.triton.threshold import halve, kth_of, measure, narrowed, pivots_between, search_row

__all__ = ["mask_", "penalize_", "sample"]

_CHUNK = 4096
_GROUPS = 16  # of a chunk: each one's largest logit is kept
_NUM_CANDIDATES = 2048
_NUM_PIVOTS = 16
_NUM_ROUNDS = 2  # each makes the interval 17 times narrower
_FEW_PROGRAMS = 1024
# a row's interval: low, high, the weight of what reaches high, the largest logit, the sum of exps (the largest has one)
_STATE = 5
# one number a row out of an array that lies anywhere: a variant of every kernel for each place would gain nothing
_SETTINGS = ["temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "seeds_ptr", "steps_ptr"]


@triton.jit(do_not_specialize_on_alignment=_SETTINGS)
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
    group_ptr,
    state_ptr,
    arrivals_ptr,
    V,
    CHUNK: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (row, chunk): its largest logit, with noise where nothing restricts the row.

    Where something does, also its sum of exps, its smallest finite logit and the largest of each group; the last of the
    row's programs to finish makes the first interval of these.
    """
    allow_next(PDL)
    wait_for_previous(PDL)
    row, chunk, num_chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    temperature = tl.load(temperature_ptr + row)
    is_restricted = (temperature > 0) & _is_restricted(row, top_k_ptr, top_p_ptr, min_p_ptr, V)
    o_v = chunk * CHUNK + tl.arange(0, CHUNK)
    x = load_logits(logits_ptr + row.to(tl.int64) * V, o_v, V)
    if (temperature > 0) & (is_restricted == 0):
        x = noisy_logits(x, temperature, tl.load(seeds_ptr + row), tl.load(steps_ptr + row), o_v)
        x = tl.where(o_v < V, x, float("-inf"))
    best, best_id = tl.max(x, axis=0, return_indices=True, return_indices_tie_break_left=True)
    out = row * num_chunks + chunk
    tl.store(best_ptr + out, best)
    tl.store(best_id_ptr + out, chunk * CHUNK + best_id)
    if is_restricted:
        sharpness = sharpness_of(temperature)
        base = tl.where(best == float("-inf"), 0.0, best)
        tl.store(total_ptr + out, tl.sum(tl.exp2((x - base) * sharpness), axis=0))
        tl.store(least_ptr + out, tl.min(tl.where(x == float("-inf"), float("inf"), x), axis=0))
        groups = tl.max(tl.reshape(x, [GROUPS, CHUNK // GROUPS]), axis=1)
        tl.store(group_ptr + out * GROUPS + tl.arange(0, GROUPS), groups)
        tl.debug_barrier()  # every thread's part is written before this program is counted
        if tl.atomic_add(arrivals_ptr + row, 1, sem="acq_rel") == num_chunks - 1:
            tl.store(arrivals_ptr + row, 0)
            o_c = tl.arange(0, BLOCK_C)
            m_c = o_c < num_chunks
            o_c += row * num_chunks
            bests = tl.load(best_ptr + o_c, mask=m_c, other=float("-inf"), cache_modifier=".cg")
            totals = tl.load(total_ptr + o_c, mask=m_c, other=0.0, cache_modifier=".cg")
            row_max = tl.max(bests, axis=0)
            total = tl.sum(tl.where(totals > 0, totals * tl.exp2((bests - row_max) * sharpness), 0.0), axis=0)
            low = tl.min(tl.load(least_ptr + o_c, mask=m_c, other=float("inf"), cache_modifier=".cg"), axis=0)
            high = row_max + tl.maximum(tl.abs(row_max), 1.0) * (2.0**-20)  # above every logit
            top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
            if (top_k > 0) & (top_k < V):
                o_g = tl.arange(0, BLOCK_C * GROUPS)
                m_g = o_g < num_chunks * GROUPS
                tops = tl.load(
                    group_ptr + row * num_chunks * GROUPS + o_g, mask=m_g, other=float("-inf"), cache_modifier=".cg"
                )
                low = kth_of(tops, top_k, low, row_max)
            elif top_p < 1:
                # what lies this far below the maximum is, all together, less than the 1 - top_p that may go
                spare = tl.maximum((1.0 - top_p) * total, 1e-30)
                low = tl.maximum(low, row_max - temperature * (tl.log(V.to(tl.float32) / spare) + 1.0))
            else:
                low = row_max + temperature * tl.log(tl.load(min_p_ptr + row))
                high = low
            _store_state(state_ptr, row, low, high, 0.0)
            tl.store(state_ptr + 5 * row + 3, row_max)
            tl.store(state_ptr + 5 * row + 4, total)


@triton.jit
def _store_state(state_ptr, row, low, high, beyond):
    """beyond: the weight of what reaches high."""
    tl.store(state_ptr + 5 * row, low)
    tl.store(state_ptr + 5 * row + 1, high)
    tl.store(state_ptr + 5 * row + 2, beyond)


@triton.jit
def _is_restricted(row, top_k_ptr, top_p_ptr, min_p_ptr, V):
    top_k = tl.load(top_k_ptr + row)
    return ((top_k > 0) & (top_k < V)) | (tl.load(top_p_ptr + row) < 1) | (tl.load(min_p_ptr + row) > 0)


@triton.jit(do_not_specialize_on_alignment=_SETTINGS)
def _narrow_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    mass_ptr,
    state_ptr,
    arrivals_ptr,
    V,
    CHUNK: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
    P: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (row, i): what of its chunks reaches P pivots between low and high; the last one moves low and high.

    Rows whose top-k the groups' largest logits have answered, and rows without top-k and top-p, have nothing to do.
    """
    allow_next(PDL)
    wait_for_previous(PDL)
    row, part, num_parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    temperature = tl.load(temperature_ptr + row)
    top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    by_count = (top_k > 0) & (top_k < V)
    is_open = tl.where(by_count, top_k * 2 > tl.cdiv(V, CHUNK) * GROUPS, top_p < 1)
    if (temperature <= 0) | (is_open == 0):
        return
    low, high = tl.load(state_ptr + 5 * row), tl.load(state_ptr + 5 * row + 1)
    beyond, row_max = tl.load(state_ptr + 5 * row + 2), tl.load(state_ptr + 5 * row + 3)
    slope = tl.where(by_count, 0.0, sharpness_of(temperature))
    row_ptr = logits_ptr + row.to(tl.int64) * V
    size = tl.cdiv(tl.cdiv(V, CHUNK), num_parts) * CHUNK
    start, stop = part * size, tl.minimum((part + 1) * size, V)
    masses = measure(row_ptr, start, stop, V, slope, row_max, pivots_between(low, high, P), P, BLOCK)
    o_p = tl.arange(0, P)
    tl.store(mass_ptr + (row * num_parts + part) * P + o_p, masses)
    tl.debug_barrier()  # every thread's part is written before this program is counted
    if tl.atomic_add(arrivals_ptr + row, 1, sem="acq_rel") == num_parts - 1:
        tl.store(arrivals_ptr + row, 0)
        o_c = tl.arange(0, BLOCK_C)
        parts = (row * num_parts + o_c)[None, :] * P + o_p[:, None]
        m_c = (o_c < num_parts)[None, :]
        row_masses = tl.sum(
            tl.load(mass_ptr + parts, mask=m_c, other=0.0, cache_modifier=".cg"), axis=1, keep_dims=True
        )
        total = tl.load(state_ptr + 5 * row + 4)
        target = tl.where(by_count, top_k.to(tl.float32), top_p * total)
        low, high, beyond = narrowed(low, high, beyond, pivots_between(low, high, P), row_masses, target)
        _store_state(state_ptr, row, low, high, beyond)


@triton.jit(do_not_specialize_on_alignment=_SETTINGS)
def _gather_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seeds_ptr,
    steps_ptr,
    best_ptr,
    best_id_ptr,
    count_ptr,
    values_ptr,
    ids_ptr,
    state_ptr,
    group_ptr,
    V,
    CHUNK: tl.constexpr,
    GROUPS: tl.constexpr,
    SEGMENT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (row, i): the tokens of its chunks that reach low, by id.

    A chunk has room for SEGMENT of them. Where there are more, those above high are sampled here, and only those
    between the two are kept; the number of these is told in any case.
    """
    allow_next(PDL)
    wait_for_previous(PDL)
    row = tl.program_id(0)
    temperature = tl.load(temperature_ptr + row)
    if (temperature <= 0) | (_is_restricted(row, top_k_ptr, top_p_ptr, min_p_ptr, V) == 0):
        return
    low, high = tl.load(state_ptr + 5 * row), tl.load(state_ptr + 5 * row + 1)
    row_max = tl.load(state_ptr + 5 * row + 3)
    if row_max == float("-inf"):
        return
    top_k = tl.load(top_k_ptr + row)
    if (top_k > 0) & (top_k < V):
        high = float("inf")  # a top-p after it is measured over all that are left: they are all gathered
    sure = tl.maximum(high, _floor(row, min_p_ptr, row_max, temperature))
    num_chunks = tl.cdiv(V, CHUNK)
    o_x = tl.arange(0, CHUNK)
    for chunk in range(tl.program_id(1), num_chunks, tl.num_programs(1)):
        out = row * num_chunks + chunk
        # groups whose largest logit is too small are not read again
        largest = tl.load(group_ptr + out * GROUPS + o_x // (CHUNK // GROUPS))
        o_v = chunk * CHUNK + o_x
        m_v = (largest >= low) & (o_v < V)
        row_ptr = logits_ptr + row.to(tl.int64) * V
        x = tl.load(row_ptr + o_v, mask=m_v, other=float("-inf")).to(tl.float32)
        found = x >= low
        num_found = tl.sum(found.to(tl.int32), axis=0)
        best = tl.full([], float("-inf"), tl.float32)
        best_id = tl.full([], 2147483647, tl.int32)
        if num_found > SEGMENT:
            kept = (x >= sure) & m_v
            if tl.max(kept.to(tl.int32), axis=0) > 0:
                best, best_id = pick(x, o_v, kept, temperature, tl.load(seeds_ptr + row), tl.load(steps_ptr + row))
            found = found & (x < high)
            num_found = tl.sum(found.to(tl.int32), axis=0)
        if num_found > 0:
            place = tl.cumsum(found.to(tl.int32), axis=0) - 1
            found = found & (place < SEGMENT)
            tl.store(values_ptr + out.to(tl.int64) * SEGMENT + place, x, mask=found)
            tl.store(ids_ptr + out.to(tl.int64) * SEGMENT + place, o_v, mask=found)
        tl.store(count_ptr + out, num_found)
        tl.store(best_ptr + out, best)
        tl.store(best_id_ptr + out, best_id)


@triton.jit
def _floor(row, min_p_ptr, row_max, temperature):
    """What min-p leaves is at least this."""
    min_p = tl.load(min_p_ptr + row)
    floor = tl.full([], float("-inf"), tl.float32)
    if min_p > 0:
        floor = row_max + temperature * tl.log(min_p)
    return floor


@triton.jit(do_not_specialize_on_alignment=_SETTINGS)
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
    count_ptr,
    values_ptr,
    ids_ptr,
    state_ptr,
    out_ptr,
    num_chunks,
    V,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
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
    best = tl.load(best_ptr + row * num_chunks + o_c, mask=m_c, other=float("-inf"))
    best, chunk = tl.max(best, axis=0, return_indices=True, return_indices_tie_break_left=True)
    best_id = tl.load(best_id_ptr + row * num_chunks + chunk)
    is_restricted = (temperature > 0) & _is_restricted(row, top_k_ptr, top_p_ptr, min_p_ptr, V)
    row_max = tl.full([], float("-inf"), tl.float32)
    if is_restricted:
        row_max = tl.load(state_ptr + 5 * row + 3)
    if row_max == float("-inf"):
        tl.store(out_ptr + row, best_id.to(tl.int64))
        return
    top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    seed, step = tl.load(seeds_ptr + row), tl.load(steps_ptr + row)
    floor = _floor(row, min_p_ptr, row_max, temperature)
    low, high, beyond = (
        tl.load(state_ptr + 5 * row),
        tl.load(state_ptr + 5 * row + 1),
        tl.load(state_ptr + 5 * row + 2),
    )
    total = tl.load(state_ptr + 5 * row + 4)
    counts = tl.load(count_ptr + row * num_chunks + o_c, mask=m_c, other=0)
    if tl.max(counts, axis=0) <= SEGMENT:
        o_s = tl.arange(0, SEGMENT)
        exists = o_s[None, :] < counts[:, None]
        places = (row * num_chunks + o_c).to(tl.int64)[:, None] * SEGMENT + o_s[None, :]
        shape: tl.constexpr = [BLOCK_C * SEGMENT]
        x = tl.reshape(tl.load(values_ptr + places, mask=exists, other=float("-inf")), shape)
        ids = tl.reshape(tl.load(ids_ptr + places, mask=exists, other=0), shape)
        mass = tl.exp2(tl.maximum(x - row_max, -1e30) * sharpness_of(temperature))
        target = top_p * total
        if (top_k > 0) & (top_k < V):
            low = halve(x, (x > float("-inf")).to(tl.float32), 0.0, top_k.to(tl.float32))
            x = tl.where(x >= low, x, float("-inf"))
            mass = tl.where(x >= low, mass, 0.0)
            target = top_p * tl.sum(mass, axis=0)
            beyond = 0.0
            high = float("inf")
        if top_p < 1:
            # what reaches high has been weighed already
            low = halve(tl.where(x < high, x, float("-inf")), tl.where(x < high, mass, 0.0), beyond, target)
            low = tl.minimum(low, high)
        kept = x >= tl.maximum(low, floor)
        value, token = pick(x, ids, kept, temperature, seed, step)
        best_id = tl.where((value > best) | ((value == best) & (token < best_id)), token, best_id)
    else:
        row_ptr = logits_ptr + row.to(tl.int64) * V
        best_id = search_row(row_ptr, V, low, row_max, total, top_k, top_p, temperature, floor, seed, step, P, BLOCK)
    tl.store(out_ptr + row, best_id.to(tl.int64))


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
    block_c = triton.next_power_of_2(num_chunks)
    segment = max(1, _NUM_CANDIDATES // block_c)

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty((num_rows, *shape), dtype=dtype, device=logits.device)

    best, totals, least = scratch(num_chunks), scratch(num_chunks), scratch(num_chunks)
    best_ids, counts = scratch(num_chunks, dtype=torch.int32), scratch(num_chunks, dtype=torch.int32)
    groups, masses, state = scratch(num_chunks, _GROUPS), scratch(num_chunks, _NUM_PIVOTS), scratch(_STATE)
    values, value_ids = scratch(num_chunks, segment), scratch(num_chunks, segment, dtype=torch.int32)
    restrictions = (temperature, top_k, top_p)
    settings = (*restrictions, min_p, seeds, steps)
    arrivals = arrival_counters(logits.device)
    launch = dependent_launch(logits.device) | {"num_warps": 8}
    sizes = {"CHUNK": _CHUNK, "GROUPS": _GROUPS, "BLOCK_C": block_c}
    grid = (num_rows, num_chunks)
    # a row without restrictions has no work in the next three: few programs end sooner than many
    few = (num_rows, max(1, min(num_chunks, _FEW_PROGRAMS // num_rows)))
    _scan_kernel[grid](
        logits, *settings, best, best_ids, totals, least, groups, state, arrivals, vocab_size, **sizes, **launch
    )
    for _ in range(_NUM_ROUNDS):
        _narrow_kernel[few](
            logits, *restrictions, masses, state, arrivals, vocab_size, BLOCK=256, P=_NUM_PIVOTS, **sizes, **launch
        )
    found = (best, best_ids, counts, values, value_ids, state)
    _gather_kernel[few](
        logits, *settings, *found, groups, vocab_size, CHUNK=_CHUNK, GROUPS=_GROUPS, SEGMENT=segment, **launch
    )
    _choose_kernel[(num_rows,)](
        logits,
        *settings,
        *found,
        ids,
        num_chunks,
        vocab_size,
        BLOCK_C=block_c,
        BLOCK=1024,
        SEGMENT=segment,
        P=4,
        **launch,
    )
    return ids
