"""The fast decode attention over a quantized cache against the reference, over scattered blocks of poisoned memory."""

import pytest
import torch

from lmtool.errors import KernelError
from lmtool.kernels import layout
from lmtool.kernels.kv_layout import KV_BLOCK, KvScheme, QuantizedKv, empty_kv, halves, quantize, to_codes
from lmtool.kernels.reference import kv as reference
from lmtool.kernels.triton import kv as triton_kv
from lmtool.kernels.triton import kv_decode
from lmtool.kernels.triton.plan import plan_decode
from tests.kernels.support import assert_close, normal


@pytest.fixture(autouse=True)
def _few_items(monkeypatch, device):
    """An interpreted program costs a second, and a plan's unused items are programs too."""
    if device.type == "cpu":
        monkeypatch.setattr(layout, "_TARGET_PROGRAMS", 24)


def write(cache: QuantizedKv, block: int, k, v) -> None:
    """Tokens k, v [Hkv, n, D] from a block's start on; of 'int4' all 64. What is not written stays poisoned."""
    missing = (0, cache.padded_dim - cache.head_dim)
    tokens = k.shape[1]
    for x, bits, codes, meta, is_v in (
        (k, cache.k_bits, cache.k, cache.k_meta, False),
        (v, cache.v_bits, cache.v, cache.v_meta, True),
    ):
        x = torch.nn.functional.pad(x.float(), missing)
        if cache.scheme == "static":
            x = to_codes(x, meta[:, 0, :1], meta[:, 0, 1:], bits)
        elif cache.scheme == "int4" and not is_v:
            x, scale, low = quantize(x, bits, 1)
            meta[:, block] = torch.cat((scale, low), dim=1)
        else:
            _, scale, low = quantize(x[..., : cache.head_dim], bits, -1)
            x = to_codes(x, scale, low, bits)
            meta[:, block, :tokens] = torch.cat((scale, low), dim=-1)
        x = halves(x, -1) if bits == 4 else x
        (codes[:, block].transpose(1, 2) if is_v else codes[:, block])[:, :tokens] = x


def poisoned(scheme: KvScheme, hkv: int, num_blocks: int, d: int, device) -> QuantizedKv:
    parameters = None
    if scheme == "static":
        parameters = tuple(
            torch.stack((torch.rand(hkv, 1, d) * 0.02 + 0.01, -3 * torch.rand(hkv, 1, d) - 0.5), dim=2).half()
            for _ in range(2)
        )
    cache = empty_kv(scheme, hkv, num_blocks, d, device, parameters)
    cache.k.fill_(255)
    cache.v.fill_(255)
    if scheme != "static":
        cache.k_meta.fill_(torch.nan)
        cache.v_meta.fill_(torch.nan)
    return cache


def filled(scheme: KvScheme, lengths, hkv, d, device, open_scheme: KvScheme | None = None):
    """Sequences in scattered blocks → (cache, tables, seq_lens, opened, open_blocks)."""
    counts = [-(-length // KV_BLOCK) for length in lengths]
    order = (torch.randperm(sum(counts)) + 1).tolist()  # block 0 belongs to no sequence
    cache = poisoned(scheme, hkv, sum(counts) + 1, d, device)
    opened = poisoned(open_scheme, hkv, len(lengths) + 1, d, device) if open_scheme else None
    tables = torch.zeros(len(lengths), max(counts) + 2, dtype=torch.int32)
    open_blocks = (torch.randperm(len(lengths)) + 1).int()
    channels = 1 + 4 * torch.rand(1, 1, d)  # some are larger, as K's are
    for i, length in enumerate(lengths):
        for j in range(counts[i]):
            used = min(KV_BLOCK, length - j * KV_BLOCK)
            k, v = (normal(hkv, used, d, dtype=torch.float16, device=device) for _ in range(2))
            k = k * channels.to(device, torch.float16)
            v[:, 0] = 0.75  # a constant vector
            is_open = opened is not None and j == counts[i] - 1
            tables[i, j] = order.pop()
            if opened is not None and is_open:
                write(opened, int(open_blocks[i]), k, v)
            else:
                write(cache, int(tables[i, j]), k, v)
    lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    return cache, tables.to(device), lens, opened, open_blocks.to(device) if opened is not None else None


# (scheme, lengths, q heads, kv heads, head dim, window): one token, padded rows, groups of 1 to 12, pieces, windows
CASES = [
    ("int8", [1], 1, 1, 64, 0),
    ("int8", [0, 66], 4, 1, 128, 0),
    ("int8", [193], 7, 1, 96, 0),
    ("int8", [130], 12, 1, 64, 0),
    ("int8", [150, 20], 8, 2, 32, 70),
    ("k8v4", [129, 0], 4, 1, 64, 0),
    ("k8v4", [67], 4, 1, 128, 0),
    ("k8v4", [100], 1, 1, 80, 65),
    ("int4", [129, 64, 1, 0], 4, 1, 64, 0),
    ("int4", [66], 7, 1, 128, 0),
    ("int4", [130], 8, 1, 96, 100),
    ("int4", [195], 2, 1, 32, 2),
    ("static", [0, 67], 4, 1, 64, 0),
    ("static", [66], 12, 2, 80, 40),
]
CASES_GPU = [
    (scheme, lengths, hq, hkv, d, window)
    for scheme in ("int8", "k8v4", "int4", "static")
    for lengths, hq, hkv, d, window in (
        ([5000, 1, 0, 300, 64, 2047] * 3, 32, 8, 128, 0),
        ([257] * 256, 14, 2, 64, 0),
        ([4000, 100], 12, 12, 96, 1000),
        ([8192], 48, 4, 128, 0),
    )
]


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("scheme", "lengths", "hq", "hkv", "d", "window"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.gpu) for case in CASES_GPU)],
)
def test_decode(scheme, lengths, hq, hkv, d, window, dtype, device):
    cache, tables, lens, opened, open_blocks = filled(
        scheme, lengths, hkv, d, device, "int8" if scheme == "int4" else None
    )
    q = normal(len(lengths), hq, d, dtype=dtype, device=device)
    assert kv_decode.serves(q, cache)
    rest = (tables, lens, d**-0.5, window, None, opened, open_blocks)
    out = kv_decode.kv_attention_decode(q, cache, *rest)
    # q times a channel's scale of K is rounded once more, as if q had been: of logits, which go to 12 here, 2^-11
    loosen = 4.0 if scheme == "int4" else 1.0
    assert_close(out, reference.kv_attention_decode(q.float(), cache, *rest).to(dtype), loosen=loosen)
    assert not out[lens == 0].any()


def test_one_plan_serves_every_layer_and_leaves_its_counters_at_zero(device):
    cache, tables, lens, _, _ = filled("int8", [193, 0, 3], 2, 32, device)
    plan = plan_decode(lens, 2)
    assert plan.spans[0, 1] > 1  # pieces that are merged
    for _ in range(2):
        q = normal(3, 4, 32, dtype=torch.float16, device=device)
        rest = (tables, lens, 0.2, 0)
        out = kv_decode.kv_attention_decode(q, cache, *rest, plan)
        assert_close(out, reference.kv_attention_decode(q.float(), cache, *rest).half())
        assert not plan.arrivals.any()


def test_queries_of_any_size_and_of_zeros(device):
    cache, tables, lens, _, _ = filled("int8", [5, 5], 1, 32, device)
    q = normal(2, 2, 32, dtype=torch.float16, device=device)
    q[0] *= 3000  # scores beyond float16
    q[1] = 0
    out = triton_kv.kv_attention_decode(q, cache, tables, lens, 1.0)
    assert_close(out, reference.kv_attention_decode(q.float(), cache, tables, lens, 1.0).half())


def test_heads_that_cannot_be_shared_are_named(device):
    cache, tables, lens, _, _ = filled("int8", [5], 2, 32, device)
    with pytest.raises(KernelError, match="3 query heads cannot share 2"):
        triton_kv.kv_attention_decode(torch.ones(1, 3, 32, device=device).half(), cache, tables, lens, 1.0)


def test_what_it_does_not_serve(device):
    cache = empty_kv("int8", 1, 2, 64, device)
    assert not kv_decode.serves(torch.ones(1, 1, 64, device=device), cache)  # float32
    wide = empty_kv("int8", 1, 2, 256, device)
    assert not kv_decode.serves(torch.ones(1, 1, 256, device=device, dtype=torch.float16), wide)
