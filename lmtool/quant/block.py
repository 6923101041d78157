"""One decoder block over whole sequences, without a cache: what calibration runs, tested equal to the decoder's layer.

Stages instead of one function: between them stand the four inputs of the block's matrices, which calibration reads and
sequential rounding changes. Shapes: S sequences of L tokens, hidden states float32 [S, L, H].
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lmtool import kernels
from lmtool.models.config import ModelConfig
from lmtool.models.decoder import DecoderLayer

# name of a linear's input, see `groups.GROUPS`; its rows [S, L, K]
Observe = Callable[[str, Tensor], None]


class Block:
    """A layer, and what it needs to know to run by itself."""

    def __init__(self, layer: DecoderLayer, config: ModelConfig, cos_sin: Tensor) -> None:
        """cos_sin [L, R] float32, as `layers.rotary.cos_sin_table` makes it."""
        self.layer = layer
        self.config = config
        self._cos_sin = cos_sin

    def forward(self, hidden: Tensor, observe: Observe | None = None) -> Tensor:
        """hidden [S, L, H] → the next block's; ``observe`` is shown each input on the way."""
        see = observe or (lambda name, rows: None)
        x = self.attention_input(hidden)
        see("qkv", x)
        x = self.attend(self.layer.qkv.linear(x))
        see("o", x)
        hidden = hidden + self.layer.o.linear(x)
        x = self.mlp_input(hidden)
        see("gate_up", x)
        x = self.activate(self.layer.gate_up.linear(x))
        see("down", x)
        return hidden + self.layer.down.linear(x)

    def attention_input(self, hidden: Tensor) -> Tensor:
        return kernels.rms_norm(hidden, self.layer.attention_norm, self.config.rms_norm_eps)

    def mlp_input(self, hidden: Tensor) -> Tensor:
        return kernels.rms_norm(hidden, self.layer.mlp_norm, self.config.rms_norm_eps)

    def activate(self, gate_up: Tensor) -> Tensor:
        """[S, L, 2·I] → [S, L, I]."""
        return kernels.silu_mul(gate_up)

    def attend(self, qkv: Tensor) -> Tensor:
        """qkv [S, L, (Hq + 2·Hkv) · D] → [S, L, Hq · D], each token seeing those before it in its sequence."""
        q, k, v = self.split(qkv)
        window = self.config.sliding_window
        mask = _window_mask(qkv.shape[1], window, qkv.device) if 0 < window < qkv.shape[1] else None
        attended = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.config.head_dim**-0.5, enable_gqa=True
        )
        return attended.transpose(1, 2).flatten(2)

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [S, Hq, L, D], rotated; k, rotated, and v [S, Hkv, L, D], as a cache would hold them."""
        num_seqs, length, _ = qkv.shape
        # a cache of S blocks of L tokens: the same op as the engine's writes it
        cache = [qkv.new_empty(self.config.num_kv_heads, num_seqs, length, self.config.head_dim) for _ in range(2)]
        q = kernels.rope_store(
            qkv.reshape(num_seqs * length, -1),
            self._cos_sin[:length].repeat(num_seqs, 1),
            torch.arange(num_seqs * length, device=qkv.device),
            cache[0],
            cache[1],
            self.layer.q_norm,
            self.layer.k_norm,
            self.config.rms_norm_eps,
        )
        k, v = (rows.transpose(0, 1) for rows in cache)
        return q.view(num_seqs, length, -1, self.config.head_dim).transpose(1, 2), k, v


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    places = torch.arange(length, device=device)
    back = places[:, None] - places[None]
    return (back >= 0) & (back < window)
