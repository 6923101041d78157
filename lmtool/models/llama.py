"""Llama 1, 2, 3, CodeLlama, Yi, Vicuna, SmolLM2: the family that the others differ from."""

from lmtool.models.config import ModelConfig, Reader, read_decoder

# our name -> the checkpoint's; several names are stacked along the output axis, in this order
NAMES: dict[str, tuple[str, ...]] = {
    "embed": ("model.embed_tokens.weight",),
    "final_norm": ("model.norm.weight",),
    "head.weight": ("lm_head.weight",),
    "layers.{i}.attention_norm": ("model.layers.{i}.input_layernorm.weight",),
    "layers.{i}.qkv.weight": tuple(f"model.layers.{{i}}.self_attn.{x}_proj.weight" for x in "qkv"),
    "layers.{i}.qkv.bias": tuple(f"model.layers.{{i}}.self_attn.{x}_proj.bias" for x in "qkv"),
    "layers.{i}.q_norm": ("model.layers.{i}.self_attn.q_norm.weight",),
    "layers.{i}.k_norm": ("model.layers.{i}.self_attn.k_norm.weight",),
    "layers.{i}.o.weight": ("model.layers.{i}.self_attn.o_proj.weight",),
    "layers.{i}.o.bias": ("model.layers.{i}.self_attn.o_proj.bias",),
    "layers.{i}.mlp_norm": ("model.layers.{i}.post_attention_layernorm.weight",),
    "layers.{i}.gate_up.weight": ("model.layers.{i}.mlp.gate_proj.weight", "model.layers.{i}.mlp.up_proj.weight"),
    "layers.{i}.down.weight": ("model.layers.{i}.mlp.down_proj.weight",),
}


def read_config(hf: Reader) -> ModelConfig:
    bias = hf.get(bool, "attention_bias", default=False)
    return read_decoder(hf, "LlamaForCausalLM", qkv_bias=bias, o_bias=bias)
