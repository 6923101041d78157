"""InternLM (chat-7b, chat-20b): Llama, with biases on the attention's four matrices where ``bias`` says so."""

from typing import Any

from lmtool.models.config import ModelConfig, Reader, read_decoder
from lmtool.models.llama import NAMES

__all__ = ["NAMES", "read_config"]


def read_config(hf: Reader) -> ModelConfig:
    bias = hf.get(bool, "bias", default=True)
    values: dict[str, Any] = dict(hf.values)
    rotary = hf.table("rotary")  # the later releases' spelling: {"base": 10000, "type": "dynamic"}
    if rotary is not None:
        values["rope_theta"] = rotary.get(float, "base", default=10000.0)
        if rotary.get(str, "type", default="origin") == "dynamic":
            values["rope_scaling"] = {"type": "dynamic", "factor": rotary.get(float, "scaling_factor", default=1.0)}
    return read_decoder(Reader(values), "InternLMForCausalLM", qkv_bias=bias, o_bias=bias)
