"""InternLM2 and 2.5: Llama under other names, with q, k and v fused group by group in ``wqkv``."""

import torch
from torch import Tensor

from lmtool.models.config import ModelConfig, Reader, read_decoder

NAMES: dict[str, tuple[str, ...]] = {
    "embed": ("model.tok_embeddings.weight",),
    "final_norm": ("model.norm.weight",),
    "head.weight": ("output.weight",),
    "layers.{i}.attention_norm": ("model.layers.{i}.attention_norm.weight",),
    "layers.{i}.qkv.weight": ("model.layers.{i}.attention.wqkv.weight",),
    "layers.{i}.qkv.bias": ("model.layers.{i}.attention.wqkv.bias",),
    "layers.{i}.o.weight": ("model.layers.{i}.attention.wo.weight",),
    "layers.{i}.o.bias": ("model.layers.{i}.attention.wo.bias",),
    "layers.{i}.mlp_norm": ("model.layers.{i}.ffn_norm.weight",),
    "layers.{i}.gate_up.weight": (
        "model.layers.{i}.feed_forward.w1.weight",
        "model.layers.{i}.feed_forward.w3.weight",
    ),
    "layers.{i}.down.weight": ("model.layers.{i}.feed_forward.w2.weight",),
}


def read_config(hf: Reader) -> ModelConfig:
    bias = hf.get(bool, "bias", default=False)
    return read_decoder(hf, "InternLM2ForCausalLM", qkv_bias=bias, o_bias=bias)


def ungroup_qkv(wqkv: Tensor, config: ModelConfig) -> Tensor:
    """[Hkv · (G + 2) · D, …], each group being its G query heads, then k, then v → all q, all k, all v."""
    group = config.num_heads // config.num_kv_heads
    parts = wqkv.view(config.num_kv_heads, group + 2, config.head_dim, *wqkv.shape[1:])
    q, k, v = parts[:, :group], parts[:, group : group + 1], parts[:, group + 1 :]
    return torch.cat([part.flatten(0, 2) for part in (q, k, v)])


TRANSFORMS = {"layers.{i}.qkv.weight": ungroup_qkv, "layers.{i}.qkv.bias": ungroup_qkv}
