"""Paged attention: Triton against the reference, over scattered blocks whose unused slots hold NaN."""

import pytest
import torch

from lmtool.errors import KernelError
from lmtool.kernels import layout
from lmtool.kernels.reference import attention as reference
from lmtool.kernels.triton import attention as triton_attention
from tests.kernels.support import DTYPES, assert_close, normal


@pytest.fixture
def _few_items(monkeypatch, device):
    """An interpreted program costs milliseconds, and a plan's unused items are programs too."""
    if device.type == "cpu":
        monkeypatch.setattr(layout, "_TARGET_PROGRAMS", 48)


def paged(lengths, hkv, d, block_size, dtype, device):
    """K and V of sequences in scattered blocks → (k_cache, v_cache, block_tables, seq_lens); all else is NaN."""
    counts = [-(-length // block_size) for length in lengths]
    order = (torch.randperm(sum(counts)) + 1).tolist()  # block 0 belongs to no sequence
    caches = [
        torch.full((hkv, sum(counts) + 1, block_size, d), torch.nan, dtype=dtype, device=device) for _ in range(2)
    ]
    tables = torch.zeros(len(lengths), max(counts) + 2, dtype=torch.int32)
    for i, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        blocks = [order.pop() for _ in range(count)]
        tables[i, :count] = torch.tensor(blocks, dtype=torch.int32)
        for cache in caches:
            for j, block in enumerate(blocks):
                used = min(block_size, length - j * block_size)
                cache[:, block, :used] = normal(hkv, used, d, dtype=dtype, device=device)
    return *caches, tables.to(device), torch.tensor(lengths, dtype=torch.int32, device=device)


# (lengths, q heads, kv heads, head dim, block size, window): one token, padded rows, a group of 7, long beside short
DECODE = [
    ([1], 2, 1, 64, 64, 0),
    ([0, 77, 0, 3], 4, 2, 64, 16, 0),
    ([130, 65], 14, 2, 32, 64, 0),
    ([200], 3, 3, 80, 32, 0),
    ([150, 20], 4, 2, 64, 16, 70),
    ([300, 64, 5], 2, 1, 96, 64, 1),
]
DECODE_GPU = [
    ([5000, 1, 0, 300, 64, 2047] * 3, 32, 8, 128, 64, 0),
    ([4000, 100], 8, 2, 256, 64, 1000),
    ([257] * 256, 32, 8, 128, 64, 0),
]


@pytest.mark.usefixtures("_few_items")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lengths", "hq", "hkv", "d", "block_size", "window"),
    [*DECODE, *(pytest.param(*case, marks=pytest.mark.gpu) for case in DECODE_GPU)],
)
def test_decode(lengths, hq, hkv, d, block_size, window, dtype, device):
    k_cache, v_cache, tables, seq_lens = paged(lengths, hkv, d, block_size, dtype, device)
    q = normal(len(lengths), hq, d, dtype=dtype, device=device)
    arguments = (q, k_cache, v_cache, tables, seq_lens, d**-0.5, window)
    out = triton_attention.attention_decode(*arguments)
    assert_close(out, reference.attention_decode(*arguments))
    assert not out[seq_lens == 0].any()


@pytest.mark.usefixtures("_few_items")
def test_one_plan_serves_every_layer_and_leaves_its_counters_at_zero(device):
    k_cache, v_cache, tables, seq_lens = paged([400, 0, 90], 2, 64, 16, torch.float32, device)
    plan = triton_attention.plan_decode(seq_lens, 2)
    for _ in range(2):
        q = normal(3, 4, 64, dtype=torch.float32, device=device)
        arguments = (q, k_cache, v_cache, tables, seq_lens, 0.125, 0)
        assert_close(triton_attention.attention_decode(*arguments, plan), reference.attention_decode(*arguments))
        assert not plan.arrivals.any()


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("lengths", [[0], [1], [64, 65], [9000, 1, 0, 3, 500], [7] * 40])
def test_plan_covers_every_token_once(lengths, window, device):
    plan = triton_attention.plan_decode(torch.tensor(lengths, dtype=torch.int32, device=device), 8, window)
    expected = reference.plan_decode(torch.tensor(lengths, dtype=torch.int32), 8, window)
    for made, wanted in zip(plan, expected, strict=True):
        assert torch.equal(made.cpu(), wanted)
    for i, length in enumerate(lengths):
        pieces = [item for item in plan.items.tolist() if item[0] == i]
        oldest = max(0, length - window) // 64 * 64 if window else 0
        assert [pieces[0][1], pieces[-1][2]] == [oldest, length]
        assert all(a[2] == b[1] for a, b in zip(pieces, pieces[1:], strict=False))


# (prefixes, chunks, q heads, kv heads, head dim, block size, window)
PREFILL = [
    ([0], [1], 2, 1, 64, 64, 0),
    ([0, 5, 33], [40, 0, 17], 4, 2, 64, 16, 0),
    ([70], [50], 7, 1, 32, 32, 0),
    ([0, 130], [3, 66], 2, 2, 80, 64, 0),
    ([40, 0], [90, 20], 4, 2, 64, 16, 30),
]
PREFILL_GPU = [
    ([0, 1000, 64], [2048, 130, 1], 32, 8, 128, 64, 0),
    ([500], [700], 8, 2, 256, 64, 0),
    ([0], [3000], 8, 8, 96, 64, 1024),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("prefixes", "chunks", "hq", "hkv", "d", "block_size", "window"),
    [*PREFILL, *(pytest.param(*case, marks=pytest.mark.gpu) for case in PREFILL_GPU)],
)
def test_prefill(prefixes, chunks, hq, hkv, d, block_size, window, dtype, device):
    lengths = [prefix + chunk for prefix, chunk in zip(prefixes, chunks, strict=True)]
    k_cache, v_cache, tables, seq_lens = paged(lengths, hkv, d, block_size, dtype, device)
    bounds = torch.tensor([0, *torch.tensor(chunks).cumsum(0).tolist()], dtype=torch.int32, device=device)
    q = normal(sum(chunks), hq, d, dtype=dtype, device=device)
    arguments = (q, k_cache, v_cache, tables, bounds, seq_lens, max(chunks), d**-0.5, window)
    assert_close(triton_attention.attention_prefill(*arguments), reference.attention_prefill(*arguments))


def test_shapes_that_cannot_be_are_named(device):
    k_cache, v_cache, tables, seq_lens = paged([3], 2, 64, 16, torch.float32, device)
    with pytest.raises(KernelError, match="3 query heads cannot share 2"):
        triton_attention.attention_decode(torch.ones(1, 3, 64, device=device), k_cache, v_cache, tables, seq_lens, 1.0)
