"""Qwen2 and Qwen2.5: Llama with biases on q, k and v."""

from lmtool.errors import CheckpointError
from lmtool.models.config import ModelConfig, Reader, read_decoder
from lmtool.models.llama import NAMES

__all__ = ["NAMES", "read_config", "refuse_mixed_window"]


def refuse_mixed_window(hf: Reader) -> None:
    """Qwen's configs can give a window to some layers only; no published checkpoint turns it on."""
    if hf.get(bool, "use_sliding_window", default=False):
        raise CheckpointError(
            "config.json: use_sliding_window is true, for some layers only", "set it to false: attention is full then"
        )


def read_config(hf: Reader) -> ModelConfig:
    refuse_mixed_window(hf)
    return read_decoder(hf, "Qwen2ForCausalLM", qkv_bias=True)
