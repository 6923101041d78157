"""How a layer's K and V are stored. A cache of the decoder is one of these; the decoder never learns which.

`DenseKv` holds numbers; `QuantizedStore` codes that are written at once; `Int4Store` four-bit blocks, which are made
when they are full, and beside them each running sequence's open block in eight bits. Knows no names and no scheduling.
"""

from typing import Protocol

import torch
from torch import Tensor

from lmtool import kernels
from lmtool.kernels import QuantizedKv
from lmtool.layers.context import AttentionContext
from lmtool.layers.staging import Staging


class KvStore(Protocol):
    """K and V of one layer. A step is announced, then written, then read: its decodes, its chunks."""

    def begin(self, step: AttentionContext) -> None:
        """Once a step, of its first layer: what all layers share is worked out here."""
        ...

    def write(
        self,
        qkv: Tensor,
        cos_sin: Tensor,
        step: AttentionContext,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
    ) -> Tensor:
        """`kernels.rope_store`: qkv [T, (Hq + 2·Hkv) · D] → q [T, Hq, D], rotated."""
        ...

    def decode(self, q: Tensor, step: AttentionContext, scale: float, window: int) -> Tensor:
        """q of the step's decodes [num_decode, Hq, D] → as much."""
        ...

    def prefill(self, q: Tensor, step: AttentionContext, scale: float, window: int) -> Tensor:
        """q of the step's chunks [T - num_decode, Hq, D] → as much."""
        ...

    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that blocks of this layer hold: each [Hkv, NB, …]."""
        ...


class DenseKv:
    """k, v [Hkv, NB, block_size, D] in the model's dtype."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k = k
        self.v = v

    def begin(self, step: AttentionContext) -> None:
        pass

    def write(
        self,
        qkv: Tensor,
        cos_sin: Tensor,
        step: AttentionContext,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
    ) -> Tensor:
        return kernels.rope_store(qkv, cos_sin, step.slots, self.k, self.v, q_norm, k_norm, eps)

    def decode(self, q: Tensor, step: AttentionContext, scale: float, window: int) -> Tensor:
        tables, seq_lens = step.decoding
        return kernels.attention_decode(q, self.k, self.v, tables, seq_lens, scale, window, step.plan)

    def prefill(self, q: Tensor, step: AttentionContext, scale: float, window: int) -> Tensor:
        tables, seq_lens, bounds = step.chunks
        return kernels.attention_prefill(q, self.k, self.v, tables, bounds, seq_lens, step.max_seqlen_q, scale, window)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.k, self.v


class QuantizedStore:
    """A cache of any scheme but 'int4': a token's codes stand as soon as it is computed."""

    def __init__(self, cache: QuantizedKv) -> None:
        self.cache = cache

    def begin(self, step: AttentionContext) -> None:
        pass

    def write(
        self,
        qkv: Tensor,
        cos_sin: Tensor,
        step: AttentionContext,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
    ) -> Tensor:
        return kernels.kv_store(qkv, cos_sin, step.slots, self.cache, q_norm, k_norm, eps)

    def decode(self, q: Tensor, step: AttentionContext, scale: float, window: int) -> Tensor:
        tables, seq_lens = step.decoding
        return kernels.kv_attention_decode(q, self.cache, tables, seq_lens, scale, window, step.plan)

    def prefill(self, q: Tensor, step: AttentionContext, scale: float, window: int) -> Tensor:
        tables, seq_lens, bounds = step.chunks
        return kernels.kv_attention_prefill(q, self.cache, tables, bounds, seq_lens, step.max_seqlen_q, scale, window)

    def tensors(self) -> tuple[Tensor, ...]:
        codes = (self.cache.k, self.cache.v)
        return codes if self.cache.scheme == "static" else (*codes, self.cache.k_meta, self.cache.v_meta)


class Int4Store:
    """cache 'int4'; opened 'int8', whose block 1 + slot is the open block of the sequence in that slot.

    A query sees its own block as it was written, in eight bits, and those before it in four: whether it was computed
    alone, with its whole prompt or with a part of it.
    """

    def __init__(self, cache: QuantizedKv, opened: QuantizedKv) -> None:
        self.cache = cache
        self.opened = opened

    def begin(self, step: AttentionContext) -> None:
        step.staging = Staging(step, self.cache.num_heads, self.cache.head_dim)

    def write(
        self,
        qkv: Tensor,
        cos_sin: Tensor,
        step: AttentionContext,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
    ) -> Tensor:
        staging, n = step.staging, step.num_decode
        assert staging is not None, "a step begins with its first layer"
        written = []
        if staging.decodes is not None:
            rows = staging.decodes
            written.append(kernels.kv_store(qkv[:n], cos_sin[:n], rows.slots, self.opened, q_norm, k_norm, eps))
            kernels.kv_copy(self.opened, rows.open_blocks, self.cache, rows.sealed)
        if staging.chunks is not None:
            chunks, fresh = staging.chunks, staging.chunks.fresh
            kernels.kv_copy(self.opened, chunks.open_blocks, fresh, chunks.carried)
            written.append(kernels.kv_store(qkv[n:], cos_sin[n:], chunks.slots, fresh, q_norm, k_norm, eps))
            kernels.kv_copy(fresh, chunks.fresh_blocks, self.cache, chunks.sealed)
            kernels.kv_copy(fresh, chunks.last_blocks, self.opened, chunks.kept)
        return written[0] if len(written) == 1 else torch.cat(written)

    def decode(self, q: Tensor, step: AttentionContext, scale: float, window: int) -> Tensor:
        assert step.staging is not None
        assert step.staging.decodes is not None
        tables, seq_lens = step.decoding
        opened = (self.opened, step.staging.decodes.open_blocks)
        return kernels.kv_attention_decode(q, self.cache, tables, seq_lens, scale, window, step.plan, *opened)

    def prefill(self, q: Tensor, step: AttentionContext, scale: float, window: int) -> Tensor:
        assert step.staging is not None
        assert step.staging.chunks is not None
        chunks = step.staging.chunks
        tables, seq_lens, bounds = step.chunks
        return kernels.kv_attention_prefill(
            q,
            self.cache,
            tables,
            bounds,
            seq_lens,
            step.max_seqlen_q,
            scale,
            window,
            chunks.fresh,
            chunks.fresh_first,
        )

    def tensors(self) -> tuple[Tensor, ...]:
        return self.cache.k, self.cache.v, self.cache.k_meta, self.cache.v_meta
