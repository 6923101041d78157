"""The ops of quantized K/V caches, and of whole blocks on their way, as `kernel_cases` has the others."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lmtool import kernels
from lmtool.bench.kernel_maker import Arguments, Case, Maker
from lmtool.kernels import KV_BLOCK, KvScheme, QuantizedKv, empty_kv, kv_block_bytes
from lmtool.kernels.kv_layout import numbers

_SCHEMES: tuple[KvScheme, ...] = ("int8", "k8v4", "int4", "static")
_STEP, _LOW = 2.0**-4, -8.0  # numbers on this grid have the same codes however they are rounded


def kv_cases(maker: Maker, rows: int) -> Iterator[Case]:
    """Writing, sealing, attention of a decode step for each scheme; blocks that are moved."""
    for scheme in _SCHEMES:
        if scheme != "int4":
            yield _store_case(maker, rows, scheme)
        yield _decode_case(maker, rows, scheme)
    yield _copy_case(maker, rows)
    yield from _move_cases(maker, rows)


def _blocks_of(maker: Maker, num_sequences: int) -> int:
    """Of each of so many sequences ``context`` tokens, and nobody's."""
    return num_sequences * -(-maker.context // KV_BLOCK) + 1


def _cache(maker: Maker, scheme: KvScheme, num_blocks: int) -> QuantizedKv:
    """Random codes; scales and minima such that a token's numbers are about as large as a normal one's."""
    heads, dim = maker.model.num_kv_heads, maker.model.head_dim
    parameters = None
    if scheme == "static":
        nothing = torch.zeros(heads, 1, 2, dim, device=maker.device)
        parameters = (nothing, nothing)
    cache = empty_kv(scheme, heads, num_blocks, dim, maker.device, parameters)
    cache.k.random_(0, 256)
    cache.v.random_(0, 256)
    for meta, bits, of_channels in (
        (cache.k_meta, cache.k_bits, scheme in ("int4", "static")),
        (cache.v_meta, cache.v_bits, scheme == "static"),
    ):
        scale, low = (meta[:, :, 0], meta[:, :, 1]) if of_channels else (meta[..., 0], meta[..., 1])
        scale.uniform_(3.0, 4.0).div_(2**bits - 1)
        low.uniform_(-2.0, -1.5)
    return cache


def _tables(maker: Maker, num_sequences: int) -> Tensor:
    count = _blocks_of(maker, num_sequences) - 1
    return (torch.randperm(count, device=maker.device) + 1).view(num_sequences, -1).int()


def _on_grid(maker: Maker, *shape: int) -> Tensor:
    """[..., D] of which each row has the smallest and the largest number of the grid."""
    codes = torch.randint(0, 256, shape, device=maker.device)
    codes[..., 0], codes[..., 1] = 0, 255
    return (codes * _STEP + _LOW).to(maker.dtype)


def _store_case(maker: Maker, rows: int, scheme: KvScheme) -> Case:
    model = maker.model

    def make() -> Arguments:
        cache = _cache(maker, scheme, rows + 1)
        if scheme == "static":
            for meta in (cache.k_meta, cache.v_meta):
                meta[:, :, 0], meta[:, :, 1] = _STEP, _LOW
        num_heads = model.num_heads + 2 * model.num_kv_heads
        qkv = _on_grid(maker, rows, num_heads, model.head_dim).flatten(1)
        still = torch.zeros(rows, model.rope.dim, device=maker.device)  # turned, numbers leave the grid
        still[:, : model.rope.dim // 2] = 1
        slots = (torch.randperm(rows, device=maker.device) + 1) * KV_BLOCK + 5
        return qkv, still, slots, cache

    def written(q: Tensor, arguments: Arguments) -> tuple[Tensor, ...]:
        _, _, slots, cache = arguments
        return q, *(part[:, :, 5] for part in numbers(cache, slots // KV_BLOCK))

    token_bytes = kv_block_bytes(scheme, model.num_kv_heads, model.head_dim) / KV_BLOCK
    q_size = model.num_heads * model.head_dim
    num_bytes = rows * ((model.qkv_size + q_size) * maker.dtype.itemsize + token_bytes + 4 * model.rope.dim + 8)
    return Case("kv_store", "kv", scheme, rows, make, num_bytes, compared=written)


def _copy_case(maker: Maker, rows: int) -> Case:
    """One block of each sequence becomes four bits."""
    model = maker.model

    def make() -> Arguments:
        source = _cache(maker, "int8", rows + 1)
        for codes in (source.k, source.v.transpose(2, 3)):  # every token and every channel has both ends of the grid
            codes[:, :, 0], codes[:, :, 1] = 0, 255
            codes[:, :, 2:, 0], codes[:, :, 2:, 1] = 0, 255
        for meta in (source.k_meta, source.v_meta):
            meta[..., 0], meta[..., 1] = _STEP, _LOW
        blocks = torch.randperm(rows, device=maker.device).int() + 1
        return source, blocks, _cache(maker, "int4", rows + 1), blocks.flip(0)

    def written(_: None, arguments: Arguments) -> tuple[Tensor, ...]:
        return numbers(arguments[2], arguments[3].long())

    heads, dim = model.num_kv_heads, model.head_dim
    both = kv_block_bytes("int8", heads, dim) + kv_block_bytes("int4", heads, dim)
    return Case("kv_copy", "kv", "int8 to int4", rows, make, rows * both, compared=written)


def _decode_case(maker: Maker, rows: int, scheme: KvScheme) -> Case:
    model, context = maker.model, maker.context

    def make() -> Arguments:
        q, scale = maker.normal(rows, model.num_heads, model.head_dim), model.head_dim**-0.5
        lengths = maker.full(rows, context, torch.int32)
        plan = kernels.plan_decode(lengths, model.num_kv_heads)
        cache, tables = _cache(maker, scheme, _blocks_of(maker, rows)), _tables(maker, rows)
        opened: tuple[Any, ...] = ()
        if scheme == "int4":
            opened = (_cache(maker, "int8", rows + 1), torch.arange(1, rows + 1, device=maker.device).int())
        return q, cache, tables, lengths, scale, 0, plan, *opened

    token_bytes = kv_block_bytes(scheme, model.num_kv_heads, model.head_dim) / KV_BLOCK
    q_size = rows * model.num_heads * model.head_dim
    num_bytes = rows * context * token_bytes + 2 * q_size * maker.dtype.itemsize
    return Case("kv_attention_decode", "kv", f"{scheme} over {context}", rows, make, num_bytes, 4.0 * q_size * context)


def kv_prefill_case(maker: Maker) -> Case:
    """One prompt of ``context`` tokens over an int8 cache."""
    model, count = maker.model, maker.context

    def make() -> Arguments:
        q, scale = maker.normal(count, model.num_heads, model.head_dim), model.head_dim**-0.5
        bounds = torch.tensor([0, count], dtype=torch.int32, device=maker.device)
        cache, tables = _cache(maker, "int8", _blocks_of(maker, 1)), _tables(maker, 1)
        return q, cache, tables, bounds, maker.full(1, count, torch.int32), count, scale

    q_size = count * model.num_heads * model.head_dim
    token_bytes = kv_block_bytes("int8", model.num_kv_heads, model.head_dim) / KV_BLOCK
    num_bytes = count * token_bytes + 2 * q_size * maker.dtype.itemsize
    flops = 4.0 * q_size * (count + 1) / 2
    return Case("kv_attention_prefill", "kv", "one prompt", count, make, num_bytes, flops)


def _move_cases(maker: Maker, rows: int) -> Iterator[Case]:
    """Blocks of two layers as they go to the host and come back."""
    model = maker.model
    shape = (model.num_kv_heads, rows + 1, KV_BLOCK, model.head_dim)

    def make() -> Arguments:
        pieces = kernels.block_pieces([maker.normal(*shape) for _ in range(4)])
        rows_there = torch.randint(0, 1 << 30, (rows, pieces.row_words), device=maker.device)
        return pieces, torch.randperm(rows, device=maker.device) + 1, rows_there

    def tensors(_: None, arguments: Arguments) -> tuple[Tensor, ...]:
        return arguments[0].tensors

    num_bytes = 2.0 * rows * 4 * shape[0] * KV_BLOCK * shape[3] * maker.dtype.itemsize
    yield Case("gather_blocks", "kv", "", rows, make, num_bytes, compared=lambda _, after: after[2])
    yield Case("scatter_blocks", "kv", "", rows, make, num_bytes, compared=tensors)
