"""One decoder block over whole sequences, without a cache: what calibration runs, tested equal to the decoder's layer.

Whoever calibrates is shown the inputs of the block's matrices on the way. Shapes: S sequences of L tokens, hidden
states float32 [S, L, H].
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lmtool import kernels
from lmtool.models.config import ModelConfig
from lmtool.models.decoder import DecoderLayer

# "qkv", "o", "gate_up", "down": the input of that matrix [S, L, K]; "k", "v": what a cache would hold [S, Hkv, L, D]
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
        x = kernels.rms_norm(hidden, self.layer.attention_norm, self.config.rms_norm_eps)
        see("qkv", x)
        q, k, v = self.split(self.layer.qkv.linear(x))
        see("k", k)
        see("v", v)
        x = self.attend(q, k, v)
        see("o", x)
        hidden = hidden + self.layer.o.linear(x)
        x = kernels.rms_norm(hidden, self.layer.mlp_norm, self.config.rms_norm_eps)
        see("gate_up", x)
        x = kernels.silu_mul(self.layer.gate_up.linear(x))
        see("down", x)
        return hidden + self.layer.down.linear(x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `split` gives them → [S, L, Hq · D], each token seeing those before it in its sequence."""
        length, window = q.shape[2], self.config.sliding_window
        mask = _window_mask(length, window, q.device) if 0 < window < length else None
        attended = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.config.head_dim**-0.5, enable_gqa=True
        )
        return attended.transpose(1, 2).flatten(2)

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """qkv [S, L, (Hq + 2·Hkv) · D] → q [S, Hq, L, D] and k [S, Hkv, L, D], both rotated, and v [S, Hkv, L, D]."""
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
