"""Attention over a quantized cache: Triton against the reference, and the reference against what it promises."""

import pytest
import torch

from lmtool.errors import KernelError
from lmtool.kernels import layout
from lmtool.kernels.kv_layout import KV_SCHEMES
from lmtool.kernels.reference import kv as reference
from lmtool.kernels.triton import kv as triton_kv
from lmtool.kernels.triton import tuning
from lmtool.kernels.triton.attention import launch_decode
from lmtool.kernels.triton.paged import quantized
from lmtool.kernels.triton.plan import plan_decode
from tests.kernels.kv_support import elsewhere, poisoned, sealed, sequences
from tests.kernels.support import assert_close, normal


@pytest.fixture(autouse=True)
def _few_tiles(monkeypatch, device):
    """An interpreted tile costs milliseconds, as does a program without one: a plan's unused items."""
    if device.type == "cpu":
        monkeypatch.setattr(layout, "_TARGET_PROGRAMS", 16)
        for name in ("kv_decode_config", "kv_prefill_config"):
            monkeypatch.setattr(tuning, name, lambda *_, **__: tuning.AttentionConfig(32, 64, 4, 1))


def in_types(cases, on_gpu):
    """On a CPU float32 and, of two cases, float16; on a GPU also larger ones, in half precision."""
    few = [pytest.param(*case, torch.float32) for case in cases]
    few += [pytest.param(*case, torch.float16) for case in cases[1:3]]
    many = [(*case, dtype) for case in on_gpu for dtype in (torch.float16, torch.bfloat16)]
    return [*few, *(pytest.param(*case, marks=pytest.mark.gpu) for case in many)]


def prepared(scheme, lengths, first, hkv, d, dtype, device):
    """(cache, tables, seq_lens, own, own_firsts); first[s]: of 'int4', from which block on the own cache has them."""
    written = sequences("int8" if scheme == "int4" else scheme, lengths, hkv, d, dtype, device)
    if scheme != "int4":
        return *written, None, None
    return sealed(written), *written[1:], *elsewhere(written, first)


def decode(q, cache, tables, seq_lens, scale, window, plan=None, opened=None, open_blocks=None):
    """The kernel that serves every type and card, whatever a door would choose."""
    return launch_decode(q, quantized(cache, opened, open_blocks), tables, seq_lens, scale, window, plan)


# (lengths, q heads, kv heads, head dim, window): padded rows, 1 to 3 tokens in the last block and 64, a group of 7
DECODE = [
    ([1], 2, 1, 64, 0),
    ([0, 77, 0, 3], 4, 2, 64, 0),
    ([130, 65, 128], 7, 1, 32, 0),
    ([67], 3, 3, 80, 0),
    ([150, 20], 4, 2, 64, 70),
    ([200, 64, 5], 2, 1, 96, 1),
    ([66], 1, 1, 256, 0),
]
DECODE_GPU = [
    ([5000, 1, 0, 300, 64, 2047] * 3, 32, 8, 128, 0),
    ([4000, 100], 8, 2, 256, 1000),
    ([257] * 256, 32, 8, 128, 0),
    ([1000, 64], 28, 4, 128, 0),
]


@pytest.mark.parametrize("scheme", KV_SCHEMES)
@pytest.mark.parametrize(
    ("lengths", "hq", "hkv", "d", "window", "dtype"),
    in_types(DECODE, DECODE_GPU),
)
def test_decode(lengths, hq, hkv, d, window, dtype, scheme, device):
    last = [max(length - 1, 0) // 64 for length in lengths]
    cache, tables, seq_lens, opened, firsts = prepared(scheme, lengths, last, hkv, d, dtype, device)
    own = () if opened is None else (opened, firsts + torch.tensor(last, dtype=torch.int32, device=device))
    q = normal(len(lengths), hq, d, dtype=dtype, device=device)
    arguments = (q, cache, tables, seq_lens, d**-0.5, window, None, *own)
    out = decode(*arguments)
    assert_close(out, reference.kv_attention_decode(*arguments))
    assert not out[seq_lens == 0].any()


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_one_plan_serves_every_layer_and_leaves_its_counters_at_zero(scheme, device):
    lengths = [400, 0, 90]
    cache, tables, seq_lens, opened, firsts = prepared(scheme, lengths, [6, 0, 1], 2, 64, torch.float32, device)
    own = () if opened is None else (opened, firsts + torch.tensor([6, 0, 1], dtype=torch.int32, device=device))
    plan = plan_decode(seq_lens, 2)
    for _ in range(2):
        q = normal(3, 4, 64, dtype=torch.float32, device=device)
        arguments = (q, cache, tables, seq_lens, 0.125, 0, plan, *own)
        assert_close(decode(*arguments), reference.kv_attention_decode(*arguments))
        assert not plan.arrivals.any()


# (prefixes, chunks, q heads, kv heads, head dim, window): inside a block, across its end, over several blocks
PREFILL = [
    ([0], [1], 2, 1, 64, 0),
    ([0, 5, 33], [40, 0, 17], 4, 2, 64, 0),
    ([110], [25], 7, 1, 32, 0),
    ([0, 120], [3, 74], 1, 1, 80, 0),
    ([40, 0], [92, 64], 2, 1, 64, 30),
    ([63], [3], 2, 1, 96, 0),
    ([60], [8], 1, 1, 256, 20),
]
PREFILL_GPU = [
    ([0, 1000, 64], [2048, 130, 1], 32, 8, 128, 0),
    ([500], [700], 8, 2, 256, 0),
    ([0], [3000], 8, 8, 96, 1024),
    ([100], [900], 28, 4, 128, 0),
    ([37], [16500], 1, 1, 128, 0),
]


@pytest.mark.parametrize("scheme", KV_SCHEMES)
@pytest.mark.parametrize(
    ("prefixes", "chunks", "hq", "hkv", "d", "window", "dtype"),
    in_types(PREFILL, PREFILL_GPU),
)
def test_prefill(prefixes, chunks, hq, hkv, d, window, dtype, scheme, device):
    lengths = [prefix + chunk for prefix, chunk in zip(prefixes, chunks, strict=True)]
    first = [prefix // 64 for prefix in prefixes]
    cache, tables, seq_lens, *own = prepared(scheme, lengths, first, hkv, d, dtype, device)
    bounds = torch.tensor([0, *torch.tensor(chunks).cumsum(0).tolist()], dtype=torch.int32, device=device)
    q = normal(sum(chunks), hq, d, dtype=dtype, device=device)
    arguments = (q, cache, tables, bounds, seq_lens, max(chunks), d**-0.5, window, *own)
    assert_close(triton_kv.kv_attention_prefill(*arguments), reference.kv_attention_prefill(*arguments))


@pytest.mark.parametrize("window", [0, 40, 100])
def test_queries_of_three_blocks_at_once(window, monkeypatch, device):
    """As many as the largest configuration takes: each of them sees its own block and those before it elsewhere."""
    config = tuning.AttentionConfig(128, 32, 8, 1)
    monkeypatch.setattr(tuning, "kv_prefill_config", lambda *_, **__: config)
    cache, tables, seq_lens, *own = prepared("int4", [250], [0], 1, 64, torch.float32, device)
    bounds = torch.tensor([0, 200], dtype=torch.int32, device=device)
    q = normal(200, 1, 64, dtype=torch.float32, device=device)
    arguments = (q, cache, tables, bounds, seq_lens, 200, 0.125, window, *own)
    assert_close(triton_kv.kv_attention_prefill(*arguments), reference.kv_attention_prefill(*arguments))


def test_open_blocks_of_another_form_are_named(device):
    four, opened = (poisoned(scheme, hkv, 2, 64, device) for scheme, hkv in (("int4", 2), ("int8", 1)))
    q, blocks = torch.ones(1, 2, 64, device=device), torch.ones(1, dtype=torch.int32, device=device)
    with pytest.raises(KernelError, match="open blocks are 'int8', 2 heads of 64; these are 'int8', 1 of 64"):
        triton_kv.kv_attention_decode(q, four, blocks[None], blocks, 1.0, 0, None, opened, blocks)
