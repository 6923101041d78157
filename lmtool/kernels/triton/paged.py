"""A paged cache as the attention kernels are told of it, whether it holds numbers or codes."""

from typing import NamedTuple

from torch import Tensor

from lmtool.errors import KernelError
from lmtool.kernels.kv_layout import KV_BLOCK, QuantizedKv
from lmtool.kernels.layout import PIECE_ALIGN

LOG2_E = 1.4426950408889634
MIN_ROWS = 16  # of a tensor-core product


class Own(NamedTuple):
    """Beside blocks of four bits, an 'int8' cache of what is not four bits yet, read instead: see `Paged`."""

    k: Tensor | None = None
    v: Tensor | None = None
    k_meta: Tensor | None = None
    v_meta: Tensor | None = None
    blocks: Tensor | None = None


class Paged(NamedTuple):
    """``num_tokens``: those that a head has room for; ``scheme``: 'dense', or one of kv_layout's with its metas.

    own: where a sequence's blocks are that a query sees as they were written, of a decode the last one, [B] int32, of a
    chunk that of each query, [S] int32: where the sequence's first block would be.
    """

    k: Tensor
    v: Tensor
    k_meta: Tensor | None
    v_meta: Tensor | None
    num_heads: int
    num_tokens: int
    block_size: int
    scheme: str
    own: Own = Own()
    own_num_tokens: int = 0


def dense(k_cache: Tensor, v_cache: Tensor) -> Paged:
    """k_cache, v_cache [Hkv, NB, block_size, D]."""
    num_heads, num_blocks, block_size, _ = k_cache.shape
    return Paged(k_cache, v_cache, None, None, num_heads, num_blocks * block_size, block_size, "dense")


def quantized(cache: QuantizedKv, own: QuantizedKv | None, own_blocks: Tensor | None) -> Paged:
    """Raises KernelError for an own cache of another form."""
    paged = Paged(*cache[:4], cache.num_heads, cache.num_blocks * KV_BLOCK, KV_BLOCK, cache.scheme)
    if own is None or own_blocks is None:
        return paged
    if (own.scheme, own.num_heads, own.head_dim) != ("int8", cache.num_heads, cache.head_dim):
        raise KernelError(
            f"attention: open blocks are 'int8', {cache.num_heads} heads of {cache.head_dim}; these are"
            f" {own.scheme!r}, {own.num_heads} of {own.head_dim}"
        )
    return paged._replace(own=Own(*own[:4], own_blocks), own_num_tokens=own.num_blocks * KV_BLOCK)


def check(num_q_heads: int, num_kv_heads: int, block_size: int) -> None:
    """Raises KernelError for heads that cannot be shared evenly and for blocks that tiles do not fit into."""
    if num_q_heads % num_kv_heads:
        raise KernelError(f"attention: {num_q_heads} query heads cannot share {num_kv_heads} key/value heads evenly")
    if block_size < MIN_ROWS or block_size & (block_size - 1) or PIECE_ALIGN % min(block_size, 64):
        raise KernelError(
            f"attention: a cache block holds 16, 32, 64 or more (a power of two) tokens, not {block_size}"
        )
