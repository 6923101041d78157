"""`ModelConfig`, ours and frozen, and the typed reader that turns a foreign config.json into it.

Does not know checkpoints' files. A family (`llama.py`, …) calls `read_decoder` and states its difference.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from lmtool.errors import CheckpointError

T = TypeVar("T", int, float, str, bool)
_REQUIRED: Any = object()
_IN_WORDS: dict[type, str] = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding. kind: 'default', 'linear', 'dynamic' (NTK) or 'llama3' (piecewise by wavelength)."""

    theta: float
    dim: int
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder's shape. Sizes in elements; ``max_positions`` in tokens; ``sliding_window`` 0: full attention."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_positions: int
    rope: RopeConfig
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    sliding_window: int = 0
    dtype: str = "float16"

    @property
    def qkv_size(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def num_parameters(self) -> int:
        attention = self.hidden_size * (self.qkv_size + self.num_heads * self.head_dim)
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * layer + tables + self.hidden_size


class Reader:
    """Typed access to a config.json: a missing or mistyped key is a CheckpointError that names it."""

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self.values = values
        self._where = where

    @overload
    def get(self, kind: type[T], *names: str) -> T: ...
    @overload
    def get(self, kind: type[T], *names: str, default: T) -> T: ...

    def get(self, kind: type[T], *names: str, default: T = _REQUIRED) -> T:
        """The first of ``names`` that is present and not null, as ``kind``; else ``default``."""
        for name in names:
            value = self.values.get(name)
            if value is None:
                continue
            if kind is float and isinstance(value, int) and not isinstance(value, bool):
                return float(value)
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise CheckpointError(
                    f"{self._where}: {name} is {value!r}", f"{_IN_WORDS[kind]} is expected: the file is damaged"
                )
            return value
        if default is _REQUIRED:
            raise CheckpointError(f"{self._where} has no {' or '.join(names)}", "the model folder is incomplete")
        return default

    def table(self, name: str) -> "Reader | None":
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise CheckpointError(f"{self._where}: {name} is {value!r}", "a table is expected: the file is damaged")
        return Reader(value, f"{self._where} {name}")


def read_rope(hf: Reader, head_dim: int) -> RopeConfig:
    """Rotary settings in both spellings: ``rope_theta`` + ``rope_scaling``, or ``rope_parameters`` (transformers 5)."""
    scaling = hf.table("rope_parameters") or hf.table("rope_scaling") or Reader({})
    default_theta = hf.get(float, "rope_theta", "rotary_emb_base", default=10000.0)
    kind = scaling.get(str, "rope_type", "type", default="default")
    max_positions = hf.get(int, "max_position_embeddings", "seq_length", default=2048)
    if kind not in ("default", "linear", "dynamic", "llama3"):
        raise CheckpointError(f"rope scaling {kind!r} is not supported", "supported: linear, dynamic, llama3")
    fraction = scaling.get(float, "partial_rotary_factor", default=hf.get(float, "partial_rotary_factor", default=1.0))
    return RopeConfig(
        theta=scaling.get(float, "rope_theta", default=default_theta),
        dim=int(head_dim * fraction),
        kind=kind,
        factor=scaling.get(float, "factor", default=1.0),
        low_freq_factor=scaling.get(float, "low_freq_factor", default=1.0),
        high_freq_factor=scaling.get(float, "high_freq_factor", default=4.0),
        original_max_positions=scaling.get(int, "original_max_position_embeddings", default=max_positions),
    )


def read_decoder(hf: Reader, architecture: str, **difference: Any) -> ModelConfig:
    """What all families share, in Hugging Face's names; ``difference`` overrides fields."""
    hidden_size = hf.get(int, "hidden_size")
    num_heads = hf.get(int, "num_attention_heads")
    head_dim = hf.get(int, "head_dim", "kv_channels", default=hidden_size // max(num_heads, 1))  # 0 is refused below
    activation = hf.get(str, "hidden_act", default="silu")
    if activation not in ("silu", "swish"):
        raise CheckpointError(f"config.json: hidden_act is {activation!r}", "only silu is supported")
    shared: dict[str, Any] = {
        "architecture": architecture,
        "vocab_size": hf.get(int, "vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": hf.get(int, "intermediate_size"),
        "num_layers": hf.get(int, "num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": hf.get(int, "num_key_value_heads", default=num_heads),
        "head_dim": head_dim,
        "rms_norm_eps": hf.get(float, "rms_norm_eps", "layer_norm_epsilon", default=1e-6),
        "max_positions": hf.get(int, "max_position_embeddings", "seq_length", default=2048),
        "rope": read_rope(hf, head_dim),
        "tie_word_embeddings": hf.get(bool, "tie_word_embeddings", default=False),
        "dtype": hf.get(str, "dtype", "torch_dtype", default="float16"),
    }
    config = ModelConfig(**(shared | difference))
    _check(config)
    return config


def _check(config: ModelConfig) -> None:
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    for name in sizes:
        if getattr(config, name) < 1:
            raise CheckpointError(f"config.json: {name} is {getattr(config, name)}", "the file is damaged")
    if config.num_heads % config.num_kv_heads:
        raise CheckpointError(
            f"config.json: {config.num_heads} attention heads and {config.num_kv_heads} key/value heads",
            "the first must be a multiple of the second: the file is damaged",
        )
