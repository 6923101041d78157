"""Qwen3: Llama with RMSNorm over each query and key head, and a head dim of its own."""

from lmtool.models.config import ModelConfig, Reader, read_decoder
from lmtool.models.llama import NAMES
from lmtool.models.qwen2 import refuse_mixed_window

__all__ = ["NAMES", "read_config"]


def read_config(hf: Reader) -> ModelConfig:
    refuse_mixed_window(hf)
    bias = hf.get(bool, "attention_bias", default=False)
    return read_decoder(hf, "Qwen3ForCausalLM", qk_norm=True, qkv_bias=bias, o_bias=bias)
