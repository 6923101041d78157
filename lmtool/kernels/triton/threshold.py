"""The search for the logit down to which top-k and top-p keep tokens: narrowing an interval, halving candidates.

The threshold is the largest value whose reached weight is at least a target. Knows no grid.
"""

import triton
import triton.language as tl

from lmtool.kernels.triton.noise import load_logits, pick, sharpness_of


@triton.jit
def kth_of(tops, k, low, high):
    """A value from low up that at least k logits reach, since k groups' largest do; low if there are fewer groups."""
    for _ in range(16):
        middle = low + (high - low) * 0.5
        holds = tl.sum((tops >= middle).to(tl.int32), axis=0) >= k
        low = tl.where(holds, middle, low)
        high = tl.where(holds, high, middle)
    return low


@triton.jit
def pivots_between(low, high, P: tl.constexpr):
    """[P, 1] values that cut low … high into P + 1 equal parts; the last ones may round to an end."""
    return low + (high - low) * ((tl.arange(0, P)[:, None] + 1) / (P + 1.0))


@triton.jit
def measure(row_ptr, start, stop, V, sharpness, row_max, pivots, P: tl.constexpr, BLOCK: tl.constexpr):
    """[P] for each pivot: the probability mass (the largest has one) of the logits from start to stop that reach it.

    sharpness 0 makes the mass a number of tokens.
    """
    masses = tl.zeros([P, BLOCK], tl.float32)
    for first in range(start, stop, 4 * BLOCK):
        for part in tl.static_range(4):  # four loads on their way at once
            x = load_logits(row_ptr, first + part * BLOCK + tl.arange(0, BLOCK), V)
            # what is not there is -inf and reaches no pivot: pivots are finite
            mass = tl.exp2(tl.maximum(x - row_max, -1e30) * sharpness)
            masses += tl.where(x[None, :] >= pivots, mass[None, :], 0.0)
    return tl.sum(masses, axis=1)


@triton.jit
def narrowed(low, high, beyond, pivots, masses, target):
    """The interval between the pivots on both sides of the threshold → (low, high, beyond).

    The threshold is the largest value whose reached mass is at least target; low's is, high's is not.
    """
    inside = (pivots > low) & (pivots < high)
    holds = masses >= target
    beyond = tl.max(tl.where(inside & (holds == 0), masses, beyond))
    new_low = tl.max(tl.where(inside & holds, pivots, low))
    high = tl.min(tl.where(inside & (holds == 0), pivots, high))
    return new_low, high, beyond


@triton.jit
def halve(x, weights, beyond, target):
    """The largest of x whose reached weight, and beyond, is at least target; the least of x if none is."""
    least = tl.min(tl.where(x == float("-inf"), float("inf"), x), axis=0)
    most = tl.max(x, axis=0)
    while most > least:
        middle = least + (most - least) * 0.5
        middle = tl.where(middle > least, middle, most)
        holds = beyond + tl.sum(tl.where(x >= middle, weights, 0.0), axis=0) >= target
        # both ends are values of x: equal values end the search at once
        if holds:
            least = tl.min(tl.where(x >= middle, x, float("inf")), axis=0)
        else:
            most = tl.max(tl.where(x < middle, x, float("-inf")), axis=0)
    return least


@triton.jit
def search_row(
    row_ptr, V, low, row_max, total, top_k, top_p, temperature, floor, seed, step, P: tl.constexpr, BLOCK: tl.constexpr
):
    """The sample of a row by one program alone, with as many passes as it takes: for what does not fit the candidates.

    Thousands of equal logits at the threshold, or a top-k of thousands.
    """
    by_count = (top_k > 0) & (top_k < V)
    for is_mass in range(2):  # top-k first, then top-p of what it leaves
        if tl.where(is_mass == 0, by_count, top_p < 1):
            slope = sharpness_of(temperature) * is_mass
            high = row_max + tl.maximum(tl.abs(row_max), 1.0) * (2.0**-20)
            target = tl.where(is_mass == 0, top_k.to(tl.float32), top_p * total)
            is_open = True
            is_first = (is_mass == 1) & by_count
            while is_open:
                # the first pass of a top-p after a top-k only measures what is left
                pivots = pivots_between(low, tl.where(is_first, low, high), P)
                masses = measure(row_ptr, 0, V, V, slope, row_max, pivots, P, BLOCK)[:, None]
                if is_first:
                    target = top_p * tl.max(masses)
                    is_first = False
                else:
                    is_open = tl.max(((pivots > low) & (pivots < high)).to(tl.int32)) > 0
                    low, high, _ = narrowed(low, high, 0.0, pivots, masses, target)
    low = tl.maximum(low, floor)
    best = tl.full([], float("-inf"), tl.float32)
    chosen = tl.full([], 0, tl.int32)
    for start in range(0, V, 4 * BLOCK):
        o_v = start + tl.arange(0, 4 * BLOCK)
        x = load_logits(row_ptr, o_v, V)
        kept = (o_v < V) & (x >= low)
        if tl.max(kept.to(tl.int32), axis=0) > 0:
            value, token = pick(x, o_v, kept, temperature, seed, step)
            chosen = tl.where(value > best, token, chosen)
            best = tl.maximum(value, best)
    return chosen
