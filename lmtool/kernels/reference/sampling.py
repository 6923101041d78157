"""Penalties and sampling, plain torch. No row's result depends on another row."""

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
# how many candidates are sorted before the whole vocabulary is: enough for nearly every top-p in use
_NUM_CANDIDATES = 1024


def penalize_(
    logits: Tensor,
    prompt_mask: Tensor,
    output_counts: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> Tensor:
    in_answer = output_counts > 0
    seen = prompt_mask | in_answer
    factor = repetition[:, None]
    penalized = torch.where(logits > 0, logits / factor, logits * factor)
    logits.copy_(torch.where(seen, penalized, logits))
    return logits.sub_(output_counts * frequency[:, None] + in_answer * presence[:, None])


def mask_(logits: Tensor, rows: Tensor, words: Tensor) -> Tensor:
    bits = (words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=words.device)) & 1
    allowed = bits.reshape(len(rows), -1)[:, : logits.shape[1]] != 0
    logits[rows.long()] = logits[rows.long()].masked_fill(~allowed, -torch.inf)
    return logits


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    steps: Tensor,
) -> Tensor:
    ids = torch.argmax(logits, dim=1)
    settings = zip(temperature.tolist(), top_k.tolist(), top_p.tolist(), min_p.tolist(), strict=True)
    for i, (t, k, p, m) in enumerate(settings):
        if t > 0:
            kept, kept_ids = _survivors(logits[i] / t, k, p, m)
            noise = _gumbel(int(seeds[i]), int(steps[i]), kept_ids)
            ids[i] = kept_ids[torch.argmax(kept + noise)]
    return ids


def _survivors(row: Tensor, top_k: int, top_p: float, min_p: float) -> tuple[Tensor, Tensor]:
    """row [V] → (logits, ids) of the tokens that top-k, then top-p, then min-p leave."""
    if not (0 < top_k < row.shape[0] or top_p < 1 or min_p > 0):
        return row, torch.arange(row.shape[0], device=row.device)
    threshold = row.max() + torch.log(torch.tensor(min_p)) if min_p > 0 else row.new_tensor(-torch.inf)
    num_top = row.shape[0]
    if 0 < top_k < row.shape[0]:
        num_top = top_k
        threshold = torch.maximum(threshold, torch.topk(row, top_k).values[-1])
    if top_p < 1:
        threshold = torch.maximum(threshold, _top_p_threshold(row, num_top, top_p))
    kept_ids = torch.nonzero(row >= threshold)[:, 0]
    return row[kept_ids], kept_ids


def _top_p_threshold(row: Tensor, num_top: int, top_p: float) -> Tensor:
    """The smallest logit in the smallest set, among the ``num_top`` largest, whose probability reaches top_p."""
    limited = num_top < row.shape[0]
    width = num_top if limited else min(_NUM_CANDIDATES, row.shape[0])
    values = torch.topk(row, width).values
    if limited:  # ties with the last one kept by top-k count as kept
        values = row[row >= values[-1]].sort(descending=True).values
    total = torch.logsumexp(values if limited else row, dim=0)
    cumulative = torch.exp(values - total).cumsum(0)
    if not limited and cumulative[-1] < top_p:
        values = row.sort(descending=True).values
        cumulative = torch.exp(values - total).cumsum(0)
    num_kept = int((cumulative < top_p).sum()) + 1
    return values[min(num_kept, values.shape[0]) - 1]


def _mix(x: Tensor) -> Tensor:
    """A 32-bit finalizer (two multiply-xorshift rounds, "lowbias32") on values held in int64."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)


def _gumbel(seed: int, step: int, ids: Tensor) -> Tensor:
    """Gumbel noise [len(ids)] float32, a hash of (seed, step, id)."""
    low, high = seed & _MASK32, (seed >> 32) & _MASK32
    words = torch.tensor([low, high, step & _MASK32], device=ids.device)
    first = _mix(words[0] ^ _mix(words[1] ^ 0x9E3779B9))
    second = _mix(first ^ _mix(words[2] ^ 0x85EBCA6B))
    bits = _mix((_mix((ids & _MASK32) ^ first) + second) & _MASK32)
    # 23 bits: with 24 the largest would round to one, whose noise is infinite
    uniform = ((bits >> 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))
