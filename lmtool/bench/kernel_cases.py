"""Every op of the kernels' door in the sizes of a model: arguments, and the bytes and operations it cannot do without.

Knows no clock. A case makes its arguments anew each time it is asked, so that its caller can have many sets of them.
`kv_cases` has those of quantized caches.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lmtool import kernels
from lmtool.bench.kernel_maker import Arguments, Case, Maker
from lmtool.bench.kv_cases import kv_cases, kv_prefill_case
from lmtool.bench.shapes import Product, products
from lmtool.engine.kv_cache import BLOCK_SIZE
from lmtool.kernels.layout import POSITION
from lmtool.kernels.w4_layout import GROUP_SIZES
from lmtool.models.random import fill_w4_

_EPS = 1e-5


def cases(maker: Maker, rows: Sequence[int]) -> Iterator[Case]:
    """All ops for each number of rows; a prompt's attention once."""
    for count in rows:
        yield from linear_cases(maker, count)
        yield from w4_cases(maker, count)
        yield from norm_cases(maker, count)
        yield rope_case(maker, count)
        yield from decode_cases(maker, count)
        yield from kv_cases(maker, count)
        yield from sample_cases(maker, count)
        yield from step_cases(maker, count)
    yield prefill_case(maker)
    yield kv_prefill_case(maker)


# ---------------------------------------------------------------------- products
def linear_cases(maker: Maker, rows: int) -> Iterator[Case]:
    size = maker.dtype.itemsize
    for one in products(maker.model, size):
        weight_rows = one.num_weights // one.num_in

        def operands(n: int = one.num_out, k: int = one.num_in, m: int = weight_rows) -> tuple[Tensor, Tensor, Tensor]:
            return maker.normal(rows, k), maker.normal(rows, n), maker.normal(m, k, scale=k**-0.5)

        def add(operands: Callable[[], tuple[Tensor, ...]] = operands) -> Arguments:
            x, residual, weight = operands()
            return residual, x, weight

        def norm(operands: Callable[[], tuple[Tensor, ...]] = operands, k: int = one.num_in) -> Arguments:
            x, _, weight = operands()
            return x, maker.normal(k), _EPS, weight

        def plain(operands: Callable[[], tuple[Tensor, ...]] = operands) -> Arguments:
            x, _, weight = operands()
            return x, weight

        read = one.weight_bytes + rows * one.num_in * size
        written, flops = rows * one.num_out * size, 2.0 * rows * one.num_weights
        detail = str(one)
        if one.op == "add_linear_":
            yield Case(one.op, "linear", detail, rows, add, read + 2 * written, flops, library=_library_of_add)
        else:
            yield Case(one.op, "linear", detail, rows, norm, read + written, flops, library=_library_of_norm)
        if one.name == "o":
            yield Case("linear", "linear", detail, rows, plain, read + written, flops, library=_library)


def _library(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight)


def _library_of_add(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return _library(x, weight)


def _library_of_norm(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor) -> Tensor:
    return _library(x, weight)


_W4_OPS = {
    "norm_linear": "norm_w4_linear",
    "norm_linear_silu": "norm_w4_linear_silu",
    "add_linear_": "add_w4_linear_",
}


def w4_cases(maker: Maker, rows: int) -> Iterator[Case]:
    """The layers' matrices in 4 bits, a word of scale and zero for each group; the head is not quantized."""
    size = maker.dtype.itemsize
    for one in products(maker.model, size):
        group = next((g for g in reversed(GROUP_SIZES) if one.num_in % g == 0), None)
        if one.name == "head" or group is None:
            continue

        def weight(one: Product = one, group: int = group) -> kernels.W4Tiles:
            num_rows = one.num_weights // one.num_in
            made = kernels.empty_w4(num_rows, one.num_in, group, maker.device, paired=one.paired)
            fill_w4_(made, torch.Generator(maker.device).manual_seed(rows))
            return made

        def make(one: Product = one, weight: Callable[[], kernels.W4Tiles] = weight) -> Arguments:
            x, residual = maker.normal(rows, one.num_in), maker.normal(rows, one.num_out)
            return (residual, x, weight()) if one.op == "add_linear_" else (x, maker.normal(one.num_in), _EPS, weight())

        def plain(k: int = one.num_in, weight: Callable[[], kernels.W4Tiles] = weight) -> Arguments:
            return maker.normal(rows, k), weight()

        def expand(weight: Callable[[], kernels.W4Tiles] = weight) -> Arguments:
            return weight(), maker.dtype

        stored, flops = one.num_weights * (0.5 + 4 / group), 2.0 * rows * one.num_weights
        outer = rows * (one.num_in + one.num_out * (2 if one.op == "add_linear_" else 1)) * size
        yield Case(_W4_OPS[one.op], "w4", str(one), rows, make, stored + outer, flops)
        if one.name == "o":
            yield Case("w4_linear", "w4", str(one), rows, plain, stored + outer, flops)
            yield Case("w4_expand", "w4", str(one), rows, expand, stored + one.weight_bytes)


def norm_cases(maker: Maker, rows: int) -> Iterator[Case]:
    hidden, inner, size = maker.model.hidden_size, maker.model.intermediate_size, maker.dtype.itemsize
    made = (2 * rows + 1) * hidden * size
    yield Case("rms_norm", "norm", "", rows, lambda: (maker.normal(rows, hidden), maker.normal(hidden), _EPS), made)
    yield Case("silu_mul", "norm", "", rows, lambda: (maker.normal(rows, 2 * inner),), 3 * rows * inner * size)


# ---------------------------------------------------------------------- positions and attention
def rope_case(maker: Maker, rows: int) -> Case:
    model, rotated = maker.model, maker.model.rope.dim

    def make() -> Arguments:
        k_cache, v_cache, tables = maker.cache(rows)
        last = (maker.context - 1) % BLOCK_SIZE
        slots = tables[:, -1].long() * BLOCK_SIZE + last
        angles = maker.normal(rows, rotated // 2, dtype=torch.float32)
        cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
        return maker.normal(rows, model.qkv_size), cos_sin, slots, k_cache, v_cache

    def written(q: Tensor, arguments: Arguments) -> tuple[Tensor, ...]:
        _, _, slots, *caches = arguments
        return q, *(cache.flatten(1, 2)[:, slots] for cache in caches)

    num_bytes = rows * (2 * model.qkv_size * maker.dtype.itemsize + 4 * rotated + 8)
    return Case("rope_store", "rope", "", rows, make, num_bytes, compared=written)


def decode_cases(maker: Maker, rows: int) -> Iterator[Case]:
    model, context = maker.model, maker.context

    def lengths() -> Tensor:
        return maker.full(rows, context, torch.int32)

    def attention() -> Arguments:
        k_cache, v_cache, tables = maker.cache(rows)
        q, scale = maker.normal(rows, model.num_heads, model.head_dim), model.head_dim**-0.5
        plan = kernels.plan_decode(lengths(), model.num_kv_heads)
        return q, k_cache, v_cache, tables, lengths(), scale, 0, plan

    yield Case("plan_decode", "attention", "", rows, lambda: (lengths(), model.num_kv_heads), 4 * rows)
    q_size = rows * model.num_heads * model.head_dim
    yield Case(
        "attention_decode",
        "attention",
        f"over {context}",
        rows,
        attention,
        rows * context * maker.kv_bytes_per_token + 2 * q_size * maker.dtype.itemsize,
        4.0 * q_size * context,
    )


def prefill_case(maker: Maker) -> Case:
    """One prompt of ``context`` tokens."""
    model, count = maker.model, maker.context

    def make() -> Arguments:
        k_cache, v_cache, tables = maker.cache(1)
        q, scale = maker.normal(count, model.num_heads, model.head_dim), model.head_dim**-0.5
        bounds = torch.tensor([0, count], dtype=torch.int32, device=maker.device)
        return q, k_cache, v_cache, tables, bounds, maker.full(1, count, torch.int32), count, scale

    q_size = count * model.num_heads * model.head_dim
    num_bytes = count * maker.kv_bytes_per_token + 2 * q_size * maker.dtype.itemsize
    flops = 4.0 * q_size * (count + 1) / 2
    return Case("attention_prefill", "attention", "one prompt", count, make, num_bytes, flops)


# ---------------------------------------------------------------------- the end of a step
SAMPLING = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "temperature": (0.8, 0, 1.0, 0.0),
    "top-k 40, top-p 0.8": (0.8, 40, 0.8, 0.0),
}


def sample_cases(maker: Maker, rows: int) -> Iterator[Case]:
    vocab = maker.model.vocab_size
    seen = rows * vocab * (1 + 4 + 2 * 4)  # mask, counts, logits in and out

    def penalties() -> Arguments:
        mask = torch.rand(rows, vocab, device=maker.device) < 0.01
        counts = torch.randint(0, 2, (rows, vocab), dtype=torch.int32, device=maker.device)
        strengths = (maker.full(rows, value) for value in (1.1, 0.5, 0.2))
        return maker.normal(rows, vocab, scale=2.5, dtype=torch.float32), mask, counts, *strengths

    def masks() -> Arguments:
        words = torch.randint(-(1 << 31), 1 << 31, (rows, -(-vocab // 32)), dtype=torch.int32, device=maker.device)
        every_row = torch.arange(rows, dtype=torch.int32, device=maker.device)
        return maker.normal(rows, vocab, scale=2.5, dtype=torch.float32), every_row, words

    yield Case("penalize_", "sample", "", rows, penalties, seen)
    # half of the tokens are allowed: their logits are neither read nor written
    half = rows * (vocab * 4 // 2 + vocab // 8)
    yield Case("mask_", "sample", "", rows, masks, half, compared=lambda _, after: after[0].clamp_min(-100))
    for label, (temperature, top_k, top_p, min_p) in SAMPLING.items():

        def make(values: tuple[float, ...] = (temperature, top_p, min_p), top_k: int = top_k) -> Arguments:
            t, p, m = (maker.full(rows, value) for value in values)
            seeds = torch.arange(rows, device=maker.device) * 0x123456789AB
            logits = maker.normal(rows, vocab, scale=2.5)
            return logits, t, maker.full(rows, top_k, torch.int32), p, m, seeds, seeds % 1000

        yield Case("sample", "sample", label, rows, make, rows * vocab * maker.dtype.itemsize)


def step_cases(maker: Maker, rows: int) -> Iterator[Case]:
    width = -(-maker.context // BLOCK_SIZE)

    def state() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        slots = torch.randperm(rows, device=maker.device).int()
        longs = torch.randint(1, 1000, (4, rows), device=maker.device)
        longs[POSITION] = maker.context - 1
        words = maker.full(4 * rows, 1.0).view(torch.int32).view(4, rows)
        tables = torch.randint(1, 1000, (rows, width), dtype=torch.int32, device=maker.device)
        return slots, longs, words, tables

    def advance() -> Arguments:
        slots, longs, _, _ = state()
        ids = torch.randint(0, maker.model.vocab_size, (rows,), device=maker.device)
        return slots, ids, maker.normal(rows, maker.model.vocab_size), longs, maker.model.vocab_size

    gathered = rows * (4 + 2 * (4 * 8 + 4 * 4 + 4 * width) + 8 + 4)
    yield Case("step_rows", "step", "", rows, lambda: (*state(), BLOCK_SIZE), gathered)
    changed = rows * (4 + 2 * 8 + 2 * 3 * 8 + maker.dtype.itemsize)
    yield Case("advance_", "step", "", rows, advance, changed, compared=lambda _, after: (after[1], after[3]))


GROUPS = ("linear", "w4", "norm", "rope", "attention", "kv", "sample", "step")
