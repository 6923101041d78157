"""The one decoder: embedding → N × (norm, attention, norm, MLP) → norm → head. Knows no family by name."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmtool.layers.attention import attention
from lmtool.layers.context import AttentionContext
from lmtool.layers.group import Group
from lmtool.layers.kv_store import KvStore
from lmtool.layers.rotary import cos_sin_table
from lmtool.layers.weights import Matrix
from lmtool.models.config import ModelConfig
from lmtool.models.vision import VisionTower


@dataclass(slots=True)
class Inserted:
    """Rows that are no tokens' embeddings. rows [n] int64: which of a step's; values [n, H]."""

    rows: Tensor
    values: Tensor


@dataclass(slots=True)
class DecoderLayer:
    attention_norm: Tensor
    qkv: Matrix
    o: Matrix
    mlp_norm: Tensor
    gate_up: Matrix
    down: Matrix
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


class Decoder:
    """Six ops a layer, each one kernel on a GPU. The residual stream is updated in place."""

    def __init__(
        self,
        config: ModelConfig,
        embed: Tensor,
        layers: Sequence[DecoderLayer],
        final_norm: Tensor,
        head: Matrix,
        num_positions: int,
    ) -> None:
        """embed [V, H]; head a matrix [V, H]; num_positions: the longest sequence the engine admits, tokens."""
        self.config = config
        self.embed = embed
        self.layers = list(layers)
        self.final_norm = final_norm
        self.head = head
        # k_meta and v_meta of each layer, where the model brings a static K/V quantization
        self.kv_parameters: Sequence[tuple[Tensor, Tensor]] | None = None
        self.vision: VisionTower | None = None
        # the other ranks, where each holds a part of every matrix (`shard.py`)
        self.group: Group | None = None
        self.cos_sin = cos_sin_table(config.rope, num_positions, embed.device)

    @property
    def device(self) -> torch.device:
        return self.embed.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.dtype

    def forward(
        self,
        ids: Tensor,
        step: AttentionContext,
        caches: Sequence[KvStore],
        wanted: Tensor | None = None,
        inserted: Inserted | None = None,
    ) -> Tensor:
        """ids [T] int64 → the residual stream after the last layer [T, H]; K and V of the tokens are cached.

        wanted [n] int64: the rows that are returned [n, H]; the last layer computes nothing else for the others
        than their K and V (a prompt's chunk needs one row at most: that is 3 % of a 30-layer model).
        inserted: what pictures have in place of embeddings.
        """
        config = self.config
        hidden = self._embedded(ids)
        if inserted is not None:
            hidden.index_copy_(0, inserted.rows, inserted.values)
        cos_sin = self.cos_sin.index_select(0, step.positions)
        scale = config.head_dim**-0.5
        caches[0].begin(step)
        for layer, cache in zip(self.layers, caches, strict=True):
            qkv = layer.qkv.norm_linear(hidden, layer.attention_norm, config.rms_norm_eps)
            q = cache.write(qkv, cos_sin, step, layer.q_norm, layer.k_norm, config.rms_norm_eps)
            if wanted is not None and layer is self.layers[-1] and not len(wanted):
                return hidden[:0]
            attended = attention(q, cache, step, scale, config.sliding_window)
            if wanted is not None and layer is self.layers[-1]:
                hidden, attended = hidden.index_select(0, wanted), attended.index_select(0, wanted)
            self._add_(layer.o, hidden, attended)
            gated = layer.gate_up.norm_linear_silu(hidden, layer.mlp_norm, config.rms_norm_eps)
            self._add_(layer.down, hidden, gated)
        return hidden

    def _embedded(self, ids: Tensor) -> Tensor:
        if self.group is None:
            return torch.nn.functional.embedding(ids, self.embed)
        own = ids - self.group.rank * len(self.embed)
        is_own = (own >= 0) & (own < len(self.embed))
        rows = torch.nn.functional.embedding(own.clamp(0, len(self.embed) - 1), self.embed)
        return self.group.all_reduce_(rows.masked_fill_(~is_own[:, None], 0))

    def _add_(self, matrix: Matrix, hidden: Tensor, x: Tensor) -> None:
        """hidden += the matrix times x, of which each rank has a part."""
        if self.group is None:
            matrix.add_linear_(hidden, x)
        else:
            self.group.add_all_reduce_(hidden, matrix.linear(x))

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, H] → float32 logits [n, V]."""
        return self.scores(hidden).float()

    def scores(self, hidden: Tensor) -> Tensor:
        """The logits in the model's dtype: `sample` widens them as it reads."""
        scores = self.own_scores(hidden)
        if self.group is None:
            return scores
        return self.group.all_gather(scores)[:, : self.config.vocab_size].contiguous()

    def own_scores(self, hidden: Tensor) -> Tensor:
        """Of a rank its part of the vocabulary [n, V / size]; some of the last one's belong to no token."""
        return self.head.norm_linear(hidden, self.final_norm, self.config.rms_norm_eps)
