"""A decoder of any shape with random weights, in memory: for benchmarks and tests. Never zeros: they run faster."""

import torch

from lmtool import kernels
from lmtool.kernels.w4_layout import WORDS
from lmtool.layers.weights import W4, Dense, Matrix
from lmtool.models.config import ModelConfig
from lmtool.models.decoder import Decoder, DecoderLayer

_STD = 0.02


def random_decoder(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    num_positions: int,
    seed: int = 0,
    group_size: int | None = None,
) -> Decoder:
    """Weights ~ N(0, 0.02²), norms near 1; the same for the same seed and device. On 'meta': the shapes alone.

    group_size: the layers' matrices are 4-bit codes in groups of so many, about as large.
    """
    generator = torch.Generator(device).manual_seed(seed) if device.type != "meta" else None

    def normal(*shape: int) -> torch.Tensor:
        empty = torch.empty(shape, dtype=dtype, device=device)
        return empty if generator is None else empty.normal_(0, _STD, generator=generator)

    def norm(size: int) -> torch.Tensor:
        made = normal(size)
        return made if made.is_meta else 1 + made  # torch's arithmetic on meta tensors imports a compiler: seconds

    def matrix(num_out: int, num_in: int, bias: bool, paired: bool = False) -> Matrix:
        added = normal(num_out) if bias else None
        if group_size is None:
            return Dense(normal(num_out, num_in), added)
        tiles = kernels.empty_w4(num_out, num_in, group_size, device, paired=paired)
        if generator is not None:
            fill_w4_(tiles, generator)
        return W4(tiles, added)

    def layer() -> DecoderLayer:
        attention_size = config.num_heads * config.head_dim
        return DecoderLayer(
            attention_norm=norm(config.hidden_size),
            qkv=matrix(config.qkv_size, config.hidden_size, config.qkv_bias),
            o=matrix(config.hidden_size, attention_size, config.o_bias),
            mlp_norm=norm(config.hidden_size),
            gate_up=matrix(2 * config.intermediate_size, config.hidden_size, False, paired=True),
            down=matrix(config.hidden_size, config.intermediate_size, False),
            q_norm=norm(config.head_dim) if config.qk_norm else None,
            k_norm=norm(config.head_dim) if config.qk_norm else None,
        )

    embed = normal(config.vocab_size, config.hidden_size)
    head = Dense(embed if config.tie_word_embeddings else normal(config.vocab_size, config.hidden_size))
    layers = [layer() for _ in range(config.num_layers)]
    return Decoder(config, embed, layers, norm(config.hidden_size), head, num_positions)


def fill_w4_(weight: kernels.W4Tiles, generator: torch.Generator) -> None:
    """Random codes, whose deviation is 4.6; scales and zero points that make it 0.02."""
    device = weight.tiles.device
    words, meta = weight.tiles.split((WORDS, weight.tiles.shape[2] - WORDS), dim=2)
    words.random_(-(1 << 31), 1 << 31, generator=generator)
    scale = torch.empty(meta.shape, device=device).uniform_(0.8, 1.2, generator=generator).mul_(_STD / 4.6)
    zero = torch.randint(5, 11, meta.shape, dtype=torch.int32, device=device, generator=generator)
    meta.copy_(scale.half().view(torch.int16).to(torch.int32) & 0xFFFF | zero << 16)
