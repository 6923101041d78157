"""A quantized K/V cache, plain torch: what its form promises, and attention over it against attention over numbers."""

import pytest
import torch

from lmtool.errors import KernelError
from lmtool.kernels import kv_layout
from lmtool.kernels.kv_layout import KV_BLOCK, KV_SCHEMES, halves, numbers, quantize, whole
from lmtool.kernels.reference import attention, kv
from tests.kernels.kv_support import poisoned, sequences, still
from tests.kernels.support import normal

CPU = torch.device("cpu")
HALF_ROUNDING = 2.0**-11


# ------------------------------------------------------------------ the form
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 3e3])
def test_a_number_is_at_most_half_a_step_away(bits, magnitude):
    """And what rounding to float16 adds: of the minimum, and of the scale for each step of the way."""
    x = torch.randn(2000, 64) * magnitude + torch.randn(2000, 1) * 4 * magnitude
    codes, scale, low = quantize(x, bits, -1)
    away = (codes.float() * scale.float() + low.float() - x).abs()
    spread = x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)
    rounding = (x.amin(-1, keepdim=True).abs() + 2 * spread) * HALF_ROUNDING + 2.0**-24 * 2**bits
    assert (away <= scale.float() / 2 + rounding).all()
    assert len(codes.unique()) == 2**bits


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 6e4, 1e-7])
def test_a_vector_of_one_number_is_that_number_in_float16(bits, value):
    x = torch.full((3, 32), value)
    codes, scale, low = quantize(x, bits, -1)
    away = (codes.float() * scale.float() + low.float() - x).abs()
    assert (away <= max(abs(value) * HALF_ROUNDING, 2.0**-25)).all()


def test_numbers_beyond_float16_are_the_nearest_there_are():
    codes, scale, low = quantize(torch.tensor([[-1e6, 0.0, 1e6]]), 8, -1)
    made = codes.float() * scale.float() + low.float()
    assert made.isfinite().all()
    assert made[0, 0] == -65504.0


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_halves_and_whole_are_each_others_inverse(dim):
    codes = torch.randint(0, 16, (4, 6, 8), dtype=torch.uint8)
    packed = halves(codes, dim)
    assert packed.shape[dim] == codes.shape[dim] // 2
    assert torch.equal(whole(packed, dim), codes)


@pytest.mark.parametrize("scheme", KV_SCHEMES)
@pytest.mark.parametrize(("heads", "d"), [(2, 64), (1, 80), (3, 96), (8, 128), (1, 256)])
def test_the_bytes_of_a_block_are_those_of_its_tensors(scheme, heads, d):
    cache = poisoned(scheme, heads, 7, d, CPU)
    of_blocks = [tensor for tensor in cache[:4] if tensor.shape[1] == 7]  # static parameters are one for all blocks
    assert len(of_blocks) == (2 if scheme == "static" else 4)
    assert sum(tensor.nbytes for tensor in of_blocks) == 7 * kv_layout.kv_block_bytes(scheme, heads, d)


def test_what_cannot_be_is_named():
    with pytest.raises(KernelError, match="'int5' is not among int8"):
        kv_layout.kv_shapes("int5", 1, 1, 64)
    with pytest.raises(KernelError, match="needs its parameters"):
        kv_layout.empty_kv("static", 1, 1, 64, CPU)
    with pytest.raises(KernelError, match=r"\(2, 1, 2, 80\), this cache wants \(2, 1, 2, 64\)"):
        kv_layout.empty_kv("static", 2, 1, 64, CPU, (torch.ones(2, 1, 2, 80),) * 2)


# ------------------------------------------------------------------ reading, where all blocks are one cache's
@pytest.mark.parametrize("scheme", ["int8", "k8v4", "static"])
@pytest.mark.parametrize(("lengths", "chunks", "window"), [([130, 1, 64], [70, 1, 64], 0), ([200, 40], [3, 40], 50)])
def test_attention_is_that_over_its_numbers(scheme, lengths, chunks, window):
    cache, tables, seq_lens = sequences(scheme, lengths, 2, 80, torch.float32, CPU)
    k, v = (x.contiguous() for x in numbers(cache, torch.arange(cache.num_blocks)))
    q = normal(len(lengths), 6, 80, dtype=torch.float32, device=CPU)
    torch.testing.assert_close(
        kv.kv_attention_decode(q, cache, tables, seq_lens, 0.1, window),
        attention.attention_decode(q, k, v, tables, seq_lens, 0.1, window),
    )
    q = normal(sum(chunks), 6, 80, dtype=torch.float32, device=CPU)
    bounds = torch.tensor([0, *torch.tensor(chunks).cumsum(0).tolist()], dtype=torch.int32)
    torch.testing.assert_close(
        kv.kv_attention_prefill(q, cache, tables, bounds, seq_lens, max(chunks), 0.1, window),
        attention.attention_prefill(q, k, v, tables, bounds, seq_lens, max(chunks), 0.1, window),
    )


# ------------------------------------------------------------------ four bits when a block is full
class Conversation:
    """One sequence whose blocks become four bits as they fill up; block j is block 3 + 2j of the cache."""

    def __init__(self, length, heads, d):
        self.cache, self.opened = poisoned("int4", heads, 20, d, CPU), poisoned("int8", heads, 3, d, CPU)
        self.table = 3 + 2 * torch.arange(-(-length // KV_BLOCK), dtype=torch.int32)[None]
        self.length = 0

    def decode(self, qkv, window):
        """One token [1, …], in its open block: 2."""
        place = self.length % KV_BLOCK
        q = kv.kv_store(qkv, still(1, self.cache.head_dim, CPU), torch.tensor([2 * KV_BLOCK + place]), self.opened)
        open_block, filled = torch.tensor([2], dtype=torch.int32), self.table[:, self.length // KV_BLOCK]
        kv.kv_copy(self.opened, open_block, self.cache, filled if place == KV_BLOCK - 1 else torch.zeros_like(filled))
        self.length += 1
        seq_lens = torch.tensor([self.length], dtype=torch.int32)
        return kv.kv_attention_decode(q, self.cache, self.table, seq_lens, 0.1, window, None, self.opened, open_block)

    def prefill(self, qkv, window):
        """A chunk [n, …], in fresh blocks from 1 on; what is not full is kept as the open block."""
        start, stop = self.length, self.length + len(qkv)
        first, last = start // KV_BLOCK, (stop - 1) // KV_BLOCK
        fresh = poisoned("int8", self.cache.num_heads, last - first + 2, self.cache.head_dim, CPU)
        blocks = torch.arange(1, last - first + 2, dtype=torch.int32)
        begun, ended = (torch.tensor([int(n % KV_BLOCK > 0)], dtype=torch.int32) for n in (start, stop))
        two = torch.tensor([2], dtype=torch.int32)
        kv.kv_copy(self.opened, two, fresh, begun)
        slots = torch.arange(start, stop) + (1 - first) * KV_BLOCK
        q = kv.kv_store(qkv, still(len(qkv), self.cache.head_dim, CPU), slots, fresh)
        full = (torch.arange(first, last + 1) + 1) * KV_BLOCK <= stop
        kv.kv_copy(fresh, blocks, self.cache, torch.where(full, self.table[0, first : last + 1], 0))
        kv.kv_copy(fresh, blocks[-1:], self.opened, 2 * ended)
        self.length = stop
        bounds, seq_lens = torch.tensor([0, len(qkv)]), torch.tensor([stop], dtype=torch.int32)
        fresh_first = torch.tensor([1 - first], dtype=torch.int32)
        return kv.kv_attention_prefill(
            q, self.cache, self.table, bounds, seq_lens, len(qkv), 0.1, window, fresh, fresh_first
        )


def by_the_rule(qkv, d, window):
    """Each query alone, in float64: its own block's tokens in eight bits, those of blocks before it in four."""
    q, k, v = qkv.view(len(qkv), 3, d).double().unbind(1)
    eight = [
        codes.double() * scale.double() + low.double() for codes, scale, low in (quantize(x, 8, -1) for x in (k, v))
    ]
    out = torch.empty_like(q)
    for p in range(len(q)):
        own = p // KV_BLOCK * KV_BLOCK
        parts = [[], []]
        for j in range(0, own, KV_BLOCK):
            for part, x, dim in zip(parts, eight, (0, 1), strict=True):  # K by channels, V by tokens
                codes, scale, low = quantize(x[j : j + KV_BLOCK], 4, dim)
                part.append(codes.double() * scale.double() + low.double())
        keys, values = (torch.cat((*part, x[own : p + 1])) for part, x in zip(parts, eight, strict=True))
        oldest = max(0, p + 1 - window) if window else 0
        weights = (keys[oldest:] @ q[p] * 0.1).softmax(0)
        out[p] = weights @ values[oldest:]
    return out


@pytest.mark.parametrize("window", [0, 70])
@pytest.mark.parametrize("d", [64, 80])
def test_four_bits_are_read_by_one_rule_however_the_tokens_came(d, window):
    length = 200
    qkv = torch.randn(length, 3 * d)
    expected = by_the_rule(qkv, d, window).float()
    for chunks in ([length], [1] * length, [64, 64, 64, 8], [10, 60, 1, 1, 128], [127, 3, 1, 62, 7], [63, 1, 136]):
        conversation = Conversation(length, 1, d)
        outputs = []
        for i, size in enumerate(chunks):
            rows = qkv[sum(chunks[:i]) :][:size]
            outputs.append((conversation.decode if size == 1 else conversation.prefill)(rows, window))
        torch.testing.assert_close(torch.cat(outputs)[:, 0], expected, rtol=1e-4, atol=1e-5)
