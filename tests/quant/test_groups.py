"""Folding: whatever the scales, the block computes what it computed."""

from dataclasses import replace

import pytest
import torch

from lmtool.layers.rotary import cos_sin_table
from lmtool.models.block import Block
from lmtool.quant import groups
from tests.support import TINY, tiny_decoder

VARIANTS = {
    "plain": TINY,
    "biases": replace(TINY, qkv_bias=True, o_bias=True),
    "no groups": replace(TINY, num_kv_heads=4),
    "one key head, norms": replace(TINY, num_kv_heads=1, qk_norm=True),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", VARIANTS)
def test_folding_keeps_the_function(name: str, dtype: torch.dtype) -> None:
    config = VARIANTS[name]
    layer = tiny_decoder(config).layers[0]
    for norm in (layer.attention_norm, layer.mlp_norm):  # as a file holds them
        norm.copy_(norm.to(dtype))
    layer.mlp_norm[5] = 0
    block = Block(layer, config, cos_sin_table(config.rope, 40, torch.device("cpu")))
    hidden = torch.randn(2, 40, config.hidden_size)
    before = block.forward(hidden)
    for group in groups.GROUPS:
        num_in = groups.matrix_of(layer, group).weight.shape[1]
        scale = torch.exp(torch.randn(num_in))
        shared = groups.sharing(config, group)
        if shared:
            scale = scale.view(*shared, -1)[:, :1].expand(*shared, config.head_dim).flatten()
        unscaled = groups.matrix_of(layer, group).weight.clone()
        applied = groups.fold(layer, config, group, scale, dtype)
        torch.testing.assert_close(groups.matrix_of(layer, group).weight, unscaled * applied)
        moved = layer.mlp_norm != 0 if group == "gate_up" else torch.full_like(scale, True, dtype=torch.bool)
        torch.testing.assert_close(applied[moved], scale[moved], rtol=0.01, atol=0.0)
    for norm in (layer.attention_norm, layer.mlp_norm):
        torch.testing.assert_close(norm, norm.to(dtype).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(block.forward(hidden), before, rtol=1e-5, atol=1e-5)
