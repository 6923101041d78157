"""Mistral: Llama with a sliding attention window (arXiv 2310.06825)."""

from lmtool.models.config import ModelConfig, Reader, read_decoder
from lmtool.models.llama import NAMES

__all__ = ["NAMES", "read_config"]


def read_config(hf: Reader) -> ModelConfig:
    return read_decoder(hf, "MistralForCausalLM", sliding_window=hf.get(int, "sliding_window", default=0))
