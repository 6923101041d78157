"""Shapes of published models by short name, for runs with random weights. Sizes are those of each config.json.

Every shape says float16, which the published figures were measured with; `--dtype` overrides it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from lmtool.errors import ConfigError
from lmtool.models.config import ModelConfig, RopeConfig
from lmtool.models.shard import Shard


def _shape(
    hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int, num_kv_heads: int, vocab_size: int,
    *, theta: float, max_positions: int, **difference: Any
) -> ModelConfig:  # fmt: skip
    head_dim = hidden_size // num_heads
    defaults: dict[str, Any] = {"architecture": "LlamaForCausalLM", "rms_norm_eps": 1e-5}
    return ModelConfig(
        **defaults | difference,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        max_positions=max_positions,
        rope=RopeConfig(theta=theta, dim=head_dim),
    )


SHAPES: dict[str, ModelConfig] = {
    "llama3-8b": _shape(4096, 14336, 32, 32, 8, 128256, theta=500000.0, max_positions=8192),
    "llama3-70b": _shape(8192, 28672, 80, 64, 8, 128256, theta=500000.0, max_positions=8192),
    "llama2-7b": _shape(4096, 11008, 32, 32, 32, 32000, theta=10000.0, max_positions=4096),
    "internlm2-1_8b": _shape(
        2048, 8192, 24, 16, 8, 92544, theta=1e6, max_positions=32768, architecture="InternLM2ForCausalLM"
    ),
    "qwen2.5-0.5b": _shape(
        896, 4864, 24, 14, 2, 151936, theta=1e6, max_positions=32768, architecture="Qwen2ForCausalLM",
        rms_norm_eps=1e-6, tie_word_embeddings=True, qkv_bias=True,
    ),
    "smollm2-135m": _shape(576, 1536, 30, 9, 3, 49152, theta=100000.0, max_positions=8192, tie_word_embeddings=True),
}  # fmt: skip


def find_shape(name: str) -> ModelConfig:
    """Raises ConfigError for a name that is not there."""
    if name not in SHAPES:
        near = get_close_matches(name, SHAPES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"--shape {name!r} is not known", f"{hint}there are {', '.join(SHAPES)}")
    return SHAPES[name]


def part_of(name: str, tp: int) -> ModelConfig:
    """What one of ``tp`` ranks has of the shape of this name. Raises ConfigError where it cannot be shared out so."""
    return Shard(0, tp).local(find_shape(name))


# ---------------------------------------------------------------------- the matrices of a decoder
@dataclass(frozen=True, slots=True)
class Product:
    """A matrix [num_out, num_in] and the op of the kernels' door it is used in; paired: two of them, gate and up."""

    name: str
    op: str
    num_out: int
    num_in: int
    itemsize: int = 2

    @property
    def paired(self) -> bool:
        return self.op == "norm_linear_silu"

    @property
    def num_weights(self) -> int:
        return self.num_out * self.num_in * (2 if self.paired else 1)

    @property
    def weight_bytes(self) -> int:
        return self.num_weights * self.itemsize

    def __str__(self) -> str:
        return f"{self.name} {'2×' if self.paired else ''}{self.num_out}×{self.num_in}"


def products(model: ModelConfig, itemsize: int = 2) -> list[Product]:
    """The five matrices of a decoder, in the order in which a step uses them."""
    hidden, inner, heads = model.hidden_size, model.intermediate_size, model.num_heads * model.head_dim
    return [
        Product("qkv", "norm_linear", model.qkv_size, hidden, itemsize),
        Product("o", "add_linear_", hidden, heads, itemsize),
        Product("gate_up", "norm_linear_silu", inner, hidden, itemsize),
        Product("down", "add_linear_", hidden, inner, itemsize),
        Product("head", "norm_linear", model.vocab_size, hidden, itemsize),
    ]


def all_products(models: Iterable[ModelConfig], itemsize: int = 2) -> list[Product]:
    """Of several models, each size once."""
    found = {(one.num_out, one.num_in, one.paired): one for model in models for one in products(model, itemsize)}
    return list(found.values())
