"""A row's logits with Gumbel noise on them: the largest is the sample. The hash is the reference's, bit for bit."""

import triton
import triton.language as tl


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
def load_logits(row_ptr, o_v, V):
    return tl.load(row_ptr + o_v, mask=o_v < V, other=float("-inf")).to(tl.float32)


@triton.jit
def sharpness_of(temperature):
    """exp((x - y) / temperature) = exp2((x - y) · sharpness); greedy rows never use it."""
    return 1.4426950408889634 / tl.where(temperature > 0, temperature, 1.0)


@triton.jit
def noisy_logits(x, temperature, seed, step, ids):
    """x / temperature + noise: the largest of a row is its sample."""
    return tl.div_rn(x, temperature) + _gumbel(seed, step, ids)


@triton.jit
def pick(x, ids, kept, temperature, seed, step):
    """The kept token with the largest logit plus noise → (its value, its id)."""
    noisy = tl.where(kept, noisy_logits(x, temperature, seed, step, ids), float("-inf"))
    best = tl.max(noisy, axis=0)
    return best, tl.min(tl.where(kept & (noisy == best), ids, 2147483647), axis=0)
