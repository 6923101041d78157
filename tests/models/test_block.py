"""The dense block forward against the decoder and its paged cache: the same model, or calibration sees another."""

from dataclasses import replace

import pytest
import torch

from lmtool.layers.rotary import cos_sin_table
from lmtool.models.block import Block
from lmtool.models.config import ModelConfig
from lmtool.quant.gram import Statistics, gram_loss
from tests.support import TINY, all_logits, tiny_decoder

VARIANTS = {
    "plain": TINY,
    "window": replace(TINY, sliding_window=24),
    "q and k norms, biases": replace(TINY, qk_norm=True, qkv_bias=True, o_bias=True),
    "no groups": replace(TINY, num_kv_heads=4),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_blocks_give_the_decoders_logits(name: str) -> None:
    config: ModelConfig = VARIANTS[name]
    decoder = tiny_decoder(config)
    ids = torch.arange(2 * 70).view(2, 70) * 7 % config.vocab_size
    cos_sin = cos_sin_table(config.rope, 70, torch.device("cpu"))
    with torch.inference_mode():
        hidden = torch.nn.functional.embedding(ids, decoder.embed)
        for layer in decoder.layers:
            hidden = Block(layer, config, cos_sin).forward(hidden)
        logits = decoder.logits(hidden.flatten(0, 1)).view(2, 70, -1)
    for row, sequence in zip(logits, ids.tolist(), strict=True):
        torch.testing.assert_close(row, all_logits(decoder, sequence))


def test_every_matrixs_input_is_seen() -> None:
    decoder = tiny_decoder()
    seen: dict[str, tuple[int, ...]] = {}
    block = Block(decoder.layers[0], TINY, cos_sin_table(TINY.rope, 9, torch.device("cpu")))
    block.forward(torch.randn(3, 9, TINY.hidden_size), lambda name, x: seen.update({name: tuple(x.shape)}))
    inputs = {"qkv": (3, 9, 64), "o": (3, 9, 64), "gate_up": (3, 9, 64), "down": (3, 9, 112)}
    assert seen == inputs | {"k": (3, 2, 9, 16), "v": (3, 2, 9, 16)}


def test_the_loss_on_the_gram_matrix_is_the_loss_on_the_tokens() -> None:
    x = torch.randn(5, 30, 450) * torch.rand(450)  # wider than a panel of the sum
    delta = torch.randn(7, 450)
    statistics = Statistics(450, torch.device("cpu"))
    for part in x:
        statistics.add(part)
    expected = (x.flatten(0, 1) @ delta.t()).square().mean(dim=0)
    torch.testing.assert_close(gram_loss(delta, statistics.gram), expected)
    torch.testing.assert_close(statistics.mean_abs, x.flatten(0, 1).abs().mean(dim=0))
