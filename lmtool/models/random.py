"""A decoder of any shape with random weights, in memory: for benchmarks and tests. Never zeros: they run faster."""

import torch

from lmtool.layers.weights import Dense
from lmtool.models.config import ModelConfig
from lmtool.models.decoder import Decoder, DecoderLayer

_STD = 0.02


def random_decoder(
    config: ModelConfig, *, dtype: torch.dtype, device: torch.device, num_positions: int, seed: int = 0
) -> Decoder:
    """Weights ~ N(0, 0.02²), norms near 1; the same for the same seed and device. On 'meta': the shapes alone."""
    generator = torch.Generator(device).manual_seed(seed) if device.type != "meta" else None

    def normal(*shape: int) -> torch.Tensor:
        empty = torch.empty(shape, dtype=dtype, device=device)
        return empty if generator is None else empty.normal_(0, _STD, generator=generator)

    def norm(size: int) -> torch.Tensor:
        made = normal(size)
        return made if made.is_meta else 1 + made  # torch's arithmetic on meta tensors imports a compiler: seconds

    def matrix(num_out: int, num_in: int, bias: bool) -> Dense:
        return Dense(normal(num_out, num_in), normal(num_out) if bias else None)

    def layer() -> DecoderLayer:
        attention_size = config.num_heads * config.head_dim
        return DecoderLayer(
            attention_norm=norm(config.hidden_size),
            qkv=matrix(config.qkv_size, config.hidden_size, config.qkv_bias),
            o=matrix(config.hidden_size, attention_size, config.o_bias),
            mlp_norm=norm(config.hidden_size),
            gate_up=matrix(2 * config.intermediate_size, config.hidden_size, False),
            down=matrix(config.hidden_size, config.intermediate_size, False),
            q_norm=norm(config.head_dim) if config.qk_norm else None,
            k_norm=norm(config.head_dim) if config.qk_norm else None,
        )

    embed = normal(config.vocab_size, config.hidden_size)
    head = Dense(embed if config.tie_word_embeddings else normal(config.vocab_size, config.hidden_size))
    layers = [layer() for _ in range(config.num_layers)]
    return Decoder(config, embed, layers, norm(config.hidden_size), head, num_positions)
