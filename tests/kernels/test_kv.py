"""A quantized K/V cache: Triton against the reference, over scattered blocks; all that was not written is poison."""

import pytest
import torch

from lmtool.errors import KernelError
from lmtool.kernels.kv_layout import KV_BLOCK, whole
from lmtool.kernels.reference import kv as reference
from lmtool.kernels.triton import kv as triton_kv
from tests.kernels.kv_support import poisoned, sequences, still
from tests.kernels.support import DTYPES, assert_close, normal

# (tokens, q heads, kv heads, head dim, rotated dims): grouped heads, head dims that are filled up, part rotated
SHAPES = [
    (1, 4, 2, 64, 64),
    (3, 9, 3, 80, 80),
    (5, 4, 4, 32, 16),
    (2, 2, 1, 256, 256),
    (2, 10, 10, 96, 96),
    pytest.param((300, 32, 8, 128, 128), marks=pytest.mark.gpu),
]


def codes_of(cache):
    """K and V as codes, a byte each."""
    k = whole(cache.k, -1) if cache.k_bits == 4 else cache.k
    return k, whole(cache.v, 2) if cache.v_bits == 4 else cache.v


def assert_same_cache(actual, expected):
    """To the last bit, what was not written included; but a number between two codes may go to either."""
    for x, y in ((actual.k_meta, expected.k_meta), (actual.v_meta, expected.v_meta)):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
    for x, y in zip(codes_of(actual), codes_of(expected), strict=True):
        apart = (x.int() - y.int()).abs()
        assert apart.max() <= 1
        assert (apart > 0).sum() <= max(1, x.numel() // 2000)


def on_cpu(cache):
    """On a GPU torch divides by a number as it multiplies with its inverse: what is expected is computed on a CPU."""
    return cache._replace(**{name: getattr(cache, name).cpu().clone() for name in cache._fields[:4]})


def stored_twice(shape, dtype, scheme, has_norm, cos_sin, device):
    """The same tokens, a few heads of one number throughout → (q, cache) of Triton and of the reference."""
    tokens, hq, hkv, d, _ = shape
    qkv = normal(tokens, hq + 2 * hkv, d, dtype=dtype, device=device, scale=3.0)
    qkv[-1, hq:] = qkv[-1, hq:, :1]
    num_blocks = 2 + tokens // KV_BLOCK
    slots = (torch.randperm((num_blocks - 1) * KV_BLOCK)[:tokens] + KV_BLOCK).to(device)
    norms = [normal(d, dtype=dtype, device=device) for _ in range(2)] if has_norm else [None, None]
    cache = poisoned(scheme, hkv, num_blocks, d, device)
    expected = on_cpu(cache)
    q = triton_kv.kv_store(qkv.flatten(1), cos_sin, slots, cache, *norms, 1e-5)
    there = [None if tensor is None else tensor.cpu() for tensor in (qkv.flatten(1), cos_sin, slots, *norms)]
    expected_q = reference.kv_store(*there[:3], expected, *there[3:], 1e-5)
    return (q.cpu(), on_cpu(cache)), (expected_q, expected)


@pytest.mark.parametrize("scheme", ["int8", "k8v4", "static"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_store_of_what_is_not_turned_is_exact(shape, dtype, scheme, device):
    tokens, _, _, d, _ = shape
    (q, cache), (expected_q, expected) = stored_twice(shape, dtype, scheme, False, still(tokens, d, device), device)
    assert torch.equal(q, expected_q)
    assert_same_cache(cache, expected)


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("scheme", ["int8", "static"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_store(shape, dtype, scheme, has_norm, device):
    """A turned number may be rounded otherwise, and with it its code, its head's scale and minimum; V is exact."""
    tokens, _, _, _, r = shape
    angles = torch.rand(tokens, r // 2) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1).to(device)
    (q, cache), (expected_q, expected) = stored_twice(shape, dtype, scheme, has_norm, cos_sin, device)
    assert_close(q, expected_q)
    assert_same_cache(cache._replace(k=expected.k, k_meta=expected.k_meta), expected)
    rounding = 4 * (torch.finfo(dtype).eps if dtype == torch.bfloat16 else torch.finfo(torch.float16).eps)
    torch.testing.assert_close(cache.k_meta, expected.k_meta, rtol=rounding, atol=1e-6, equal_nan=True)
    apart = (cache.k.int() - expected.k.int()).abs()
    few = 0.1 if dtype == torch.bfloat16 else 0.02
    assert apart.max() <= 1
    assert (apart > 0).sum() <= few * tokens * cache.num_heads * cache.head_dim


COPIES = [([130, 64], 2, 64), ([200], 1, 80), ([128, 70], 3, 96), ([64], 1, 256), ([64, 128], 2, 128)]


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize(("lengths", "hkv", "d"), COPIES)
def test_copy(lengths, hkv, d, scheme, device):
    """Full blocks and one that is not wanted; to 'int8' also blocks that are not full."""
    written = sequences("int8", lengths, hkv, d, torch.float16, device)
    counts = [length // KV_BLOCK if scheme == "int4" else -(-length // KV_BLOCK) for length in lengths]
    sources = torch.cat([table[:count] for table, count in zip(written.tables, counts, strict=True)])
    targets = torch.randperm(len(sources) + 3, dtype=torch.int32)[: len(sources)].to(device)
    targets[targets == 0] = len(sources) + 3
    targets[len(targets) // 2] = 0
    made = poisoned(scheme, hkv, len(sources) + 4, d, device)
    expected = on_cpu(made)
    triton_kv.kv_copy(written.cache, sources, made, targets)
    reference.kv_copy(on_cpu(written.cache), sources.cpu(), expected, targets.cpu())
    assert_same_cache(on_cpu(made), expected)


def test_more_copies_than_programs(monkeypatch, device):
    monkeypatch.setattr(triton_kv, "_COPIES_AT_ONCE", 4)
    written = sequences("int8", [64 * 5], 2, 32, torch.float16, device)
    targets = torch.tensor([3, 0, 1, 5, 2], dtype=torch.int32, device=device)
    made = poisoned("int8", 2, 6, 32, device)
    expected = on_cpu(made)
    triton_kv.kv_copy(written.cache, written.tables[0, :5], made, targets)
    reference.kv_copy(on_cpu(written.cache), written.tables[0, :5].cpu(), expected, targets.cpu())
    assert_same_cache(on_cpu(made), expected)


def test_what_cannot_be_written_is_named(device):
    eight, four, other = (poisoned(scheme, 2, 2, d, device) for scheme, d in (("int8", 64), ("int4", 64), ("int8", 96)))
    blocks = torch.ones(1, dtype=torch.int32, device=device)
    qkv, slots = torch.ones(1, 5 * 64, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(KernelError, match="heads of 64"):
        triton_kv.kv_store(qkv[:, 1:], still(1, 64, device), slots, eight)
    with pytest.raises(KernelError, match="'int8' cache"):
        triton_kv.kv_store(qkv, still(1, 64, device), slots, four)
    with pytest.raises(KernelError, match="not int4 to int8"):
        triton_kv.kv_copy(four, blocks, eight, blocks)
    with pytest.raises(KernelError, match=r"\(2, 64\) do not fit into a cache of \(2, 96\)"):
        triton_kv.kv_copy(eight, blocks, other, blocks)
