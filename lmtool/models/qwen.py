"""Qwen 1 (`QWenLMHeadModel`): Llama under GPT-2's names, a fused ``c_attn`` with bias, and w1/w2 as up/gate.

Its log-n attention and dynamic NTK act only past the trained length: the context ends there.
"""

from typing import Any

from lmtool.models.config import ModelConfig, Reader, read_decoder

NAMES: dict[str, tuple[str, ...]] = {
    "embed": ("transformer.wte.weight",),
    "final_norm": ("transformer.ln_f.weight",),
    "head.weight": ("lm_head.weight",),
    "layers.{i}.attention_norm": ("transformer.h.{i}.ln_1.weight",),
    "layers.{i}.qkv.weight": ("transformer.h.{i}.attn.c_attn.weight",),
    "layers.{i}.qkv.bias": ("transformer.h.{i}.attn.c_attn.bias",),
    "layers.{i}.o.weight": ("transformer.h.{i}.attn.c_proj.weight",),
    "layers.{i}.mlp_norm": ("transformer.h.{i}.ln_2.weight",),
    "layers.{i}.gate_up.weight": ("transformer.h.{i}.mlp.w2.weight", "transformer.h.{i}.mlp.w1.weight"),
    "layers.{i}.down.weight": ("transformer.h.{i}.mlp.c_proj.weight",),
}


def read_config(hf: Reader) -> ModelConfig:
    values: dict[str, Any] = dict(hf.values)
    values["intermediate_size"] = hf.get(int, "intermediate_size") // 2  # theirs counts gate and up together
    values["max_position_embeddings"] = hf.get(int, "seq_length", "max_position_embeddings", default=2048)
    return read_decoder(Reader(values), "QWenLMHeadModel", qkv_bias=True)
