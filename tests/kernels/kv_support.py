"""Quantized caches for tests: written by the reference, sequences in scattered blocks, all else poisoned."""

from typing import NamedTuple

import torch
from torch import Tensor

from lmtool.kernels.kv_layout import KV_BLOCK, KvScheme, QuantizedKv, empty_kv
from lmtool.kernels.reference import kv as reference
from tests.kernels.support import normal


class Sequences(NamedTuple):
    """Sequences of the given lengths: all their tokens in ``cache``, whose block 0 and unused places are poison."""

    cache: QuantizedKv
    tables: Tensor
    seq_lens: Tensor


def parameters(hkv: int, d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of a static cache: for normal numbers, of which a few lie outside; one channel has no scale."""
    made = []
    for _ in range(2):
        scale = 4.0 / 255 + torch.rand(hkv, 1, 1, d) / 100
        scale[..., d // 2] = 0.0
        made.append(torch.cat((scale, -127 * scale + torch.randn(hkv, 1, 1, d) / 10), dim=2).half().to(device))
    return made[0], made[1]


def poisoned(scheme: KvScheme, hkv: int, num_blocks: int, d: int, device: torch.device) -> QuantizedKv:
    """Codes are 255, scales and minima NaN: the tests' memory is poisoned."""
    return empty_kv(scheme, hkv, num_blocks, d, device, parameters(hkv, d, device) if scheme == "static" else None)


def still(tokens: int, d: int, device: torch.device) -> Tensor:
    """cos_sin [T, D] that turns nothing: what is written is then exact."""
    return torch.cat((torch.ones(tokens, d // 2), torch.zeros(tokens, d // 2)), dim=1).to(device)


def sequences(
    scheme: KvScheme, lengths: list[int], hkv: int, d: int, dtype: torch.dtype, device: torch.device
) -> Sequences:
    """K and V are normal; now and then a head of a token is one number throughout. Not for 'int4': see `sealed`."""
    counts = [-(-length // KV_BLOCK) for length in lengths]
    order = (torch.randperm(sum(counts)) + 1).tolist()
    tables = torch.zeros(len(lengths), max(counts) + 2, dtype=torch.int32)
    slots = []
    for i, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        tables[i, :count] = torch.tensor([order.pop() for _ in range(count)], dtype=torch.int32)
        places = torch.arange(length)
        slots.append(tables[i].long()[places // KV_BLOCK] * KV_BLOCK + places % KV_BLOCK)
    kv = normal(sum(lengths), 2 * hkv, d, dtype=dtype, device=device)
    kv[::7] = kv[::7, :, :1]
    q = torch.zeros(sum(lengths), 1, d, dtype=dtype, device=device)
    cache = poisoned(scheme, hkv, sum(counts) + 1, d, device)
    qkv = torch.cat((q, kv), dim=1).flatten(1)
    reference.kv_store(qkv, still(len(qkv), d, device), torch.cat(slots).to(device), cache)
    return Sequences(cache, tables.to(device), torch.tensor(lengths, dtype=torch.int32, device=device))


def sealed(written: Sequences) -> QuantizedKv:
    """An 'int4' cache with the sequences' blocks but their last ones, full or not."""
    cache = written.cache
    four = poisoned("int4", cache.num_heads, cache.num_blocks, cache.head_dim, cache.k.device)
    last = (written.seq_lens.clamp_min(1) - 1) // KV_BLOCK
    for table, count in zip(written.tables, last.tolist(), strict=True):
        reference.kv_copy(cache, table[:count], four, table[:count])
    return four


def elsewhere(written: Sequences, first: list[int]) -> tuple[QuantizedKv, Tensor]:
    """An 'int8' cache with blocks first[s] … of each sequence side by side; also where their blocks 0 would be."""
    cache, device = written.cache, written.cache.k.device
    counts = [max(0, -(-length // KV_BLOCK) - j) for length, j in zip(written.seq_lens.tolist(), first, strict=True)]
    other = poisoned("int8", cache.num_heads, sum(counts) + 3, cache.head_dim, device)
    firsts, at = [], sum(counts) + 3
    for table, j, count in zip(written.tables, first, counts, strict=True):
        at -= count
        firsts.append(at - j)
        targets = torch.arange(at, at + count, dtype=torch.int32, device=device)
        reference.kv_copy(cache, table[j : j + count], other, targets)
    return other, torch.tensor(firsts, dtype=torch.int32, device=device)
