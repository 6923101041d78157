"""The grid and the three ways to round to it: on correlated inputs, where they differ."""

import pytest
import torch
from torch import Tensor

from lmtool.checkpoint.packing import pack_awq, pack_gptq, unpack_awq, unpack_gptq
from lmtool.quant.awq import search_scale
from lmtool.quant.clip import search_grid
from lmtool.quant.gptq import Feedback, gptq
from lmtool.quant.gram import Statistics, gram_loss
from lmtool.quant.grid import Codes, Levels, grid_of, round_to, rounded
from lmtool.quant.rtn import rtn

GROUP = 32
LEVELS = Levels(GROUP)
OTHERS = {
    "8 bits": Levels(GROUP, bits=8),
    "symmetric": Levels(GROUP, symmetric=True),
    "8 bits, symmetric": Levels(GROUP, 8, True),
}


def inputs(num_in: int = 128, num_tokens: int = 600) -> Statistics:
    """Correlated, with a few channels that are much larger, as a language model's are."""
    mix = torch.randn(num_in, num_in) / num_in**0.5 + torch.eye(num_in)
    x = torch.randn(num_tokens, num_in) @ mix
    x[:, ::17] *= 20
    statistics = Statistics(num_in, torch.device("cpu"))
    statistics.add(x)
    return statistics


def loss(codes: Codes, weight: Tensor, gram: Tensor) -> float:
    return float(gram_loss(codes.dequantize() - weight, gram).sum())


def test_rounding_is_to_the_stored_scale_and_no_further_than_half_of_it() -> None:
    weight = torch.randn(24, 96) * 0.05
    codes = rtn(weight, LEVELS)
    assert codes.scale.dtype == torch.float16
    error = (codes.dequantize() - weight).abs().view(24, 3, GROUP)
    # the zero point is whole, so an end of the range may lie half a step outside the grid
    assert (error <= codes.scale.float()[..., None] * 1.001).all()
    assert (error.median(dim=-1).values <= codes.scale.float() / 2).all()


def test_zero_stays_zero_and_groups_of_one_sign_or_of_zeros_have_a_grid() -> None:
    weight = torch.rand(8, 3 * GROUP) + 1
    weight[:, GROUP : 2 * GROUP] *= -1
    weight[:, 2 * GROUP :] = 0
    weight[:, ::7] = 0
    back = rtn(weight, LEVELS).dequantize()
    assert torch.equal(back == 0, weight == 0)
    torch.testing.assert_close(back, weight, atol=2 / 15, rtol=0)


def test_codes_survive_awqs_packing() -> None:
    codes = rtn(torch.randn(40, 96), LEVELS)
    again = unpack_awq(*pack_awq(codes.codes, codes.scale, codes.zero))
    assert all(torch.equal(a, b) for a, b in zip(again, (codes.codes, codes.scale, codes.zero), strict=True))


def test_rounded_is_what_the_codes_say() -> None:
    weight = torch.randn(16, 64)
    grid = grid_of(weight, LEVELS)
    torch.testing.assert_close(rounded(weight, grid), round_to(weight, grid).dequantize())


def test_the_scale_search_lowers_the_loss_and_says_by_how_much() -> None:
    statistics, weight = inputs(), torch.randn(64, 128) * 0.05
    scale, share = search_scale(weight, statistics.gram, statistics.mean_abs, LEVELS)
    back = rtn(weight * scale, LEVELS).dequantize() / scale
    searched = float(gram_loss(back - weight, statistics.gram).sum())
    plain = loss(rtn(weight, LEVELS), weight, statistics.gram)
    assert searched < 0.7 * plain
    assert share == pytest.approx(searched / plain, rel=1e-4)


def test_heads_of_a_group_share_their_scale() -> None:
    statistics, weight = inputs(), torch.randn(64, 128)
    scale, _ = search_scale(weight, statistics.gram, statistics.mean_abs, LEVELS, shared_by=(2, 4))
    heads = scale.view(2, 4, 16)
    assert (heads == heads[:, :1]).all()
    assert not (heads[0, 0] == heads[0, 0, 0]).all()


def test_the_clip_search_lowers_the_loss() -> None:
    statistics = inputs()
    weight = torch.randn(64, 128) ** 3 * 0.01  # heavy tails: what clipping is for
    clipped = round_to(weight, search_grid(weight, statistics.gram, LEVELS))
    assert loss(clipped, weight, statistics.gram) < 0.9 * loss(rtn(weight, LEVELS), weight, statistics.gram)


@pytest.mark.parametrize("num_in", [96, 160])  # whole panels, and a part of one
def test_gptq_beats_plain_rounding_on_the_same_grid(num_in: int) -> None:
    statistics, weight = inputs(num_in), torch.randn(64, num_in) * 0.05
    grid = grid_of(weight, LEVELS)
    codes = gptq(weight, Feedback.of(statistics.gram), grid)
    assert torch.equal(codes.scale.float(), grid.scale)
    assert loss(codes, weight, statistics.gram) < 0.6 * loss(round_to(weight, grid), weight, statistics.gram)


def test_gptq_is_plain_rounding_where_inputs_are_independent() -> None:
    weight = torch.randn(32, 64)
    grid = grid_of(weight, LEVELS)
    assert torch.equal(gptq(weight, Feedback.of(torch.eye(64)), grid).codes, round_to(weight, grid).codes)
    assert torch.equal(gptq(weight, Feedback.of(torch.zeros(64, 64)), grid).codes, round_to(weight, grid).codes)


def test_one_feedback_serves_every_scale_of_the_inputs() -> None:
    gram, weight = inputs(64).gram, torch.randn(16, 64)
    size = torch.logspace(0, 1, 64) / gram.diagonal().sqrt()
    gram = gram * size * size[:, None]
    scale = torch.exp(0.2 * torch.rand(64).sort().values)  # the order of the columns stays
    grid = grid_of(weight * scale, LEVELS)
    of_the_scaled = gptq(weight * scale, Feedback.of(gram / scale / scale[:, None]), grid)
    shared = gptq(weight, Feedback.of(gram), grid, scale)
    assert (of_the_scaled.codes == shared.codes).float().mean() > 0.99  # ties may fall either way
    by_row = gptq(weight, Feedback.of(gram), grid, scale.expand_as(weight))
    assert torch.equal(by_row.codes, shared.codes)


# ------------------------------------------------------------------ the grids of GPTQ's format


@pytest.mark.parametrize("levels", OTHERS.values(), ids=OTHERS)
def test_other_levels_reach_what_they_say(levels: Levels) -> None:
    weight = torch.randn(24, 96) * 0.05
    weight[3:6] = weight[3:6].abs()
    weight[6, :GROUP] = 0
    codes = rtn(weight, levels)
    middle = 1 << (levels.bits - 1)
    assert int(codes.codes.max()) <= levels.highest
    assert (codes.zero == middle).all() if levels.symmetric else codes.zero.unique().numel() > 4
    if levels.bits == 8:
        assert int(codes.zero.min()) >= 1  # stored as zero - 1
    error = (codes.dequantize() - weight).abs().view(24, 3, GROUP)
    assert (error <= codes.scale.float()[..., None] * 1.001).all()
    again = unpack_gptq(*pack_gptq(codes.codes, codes.scale, codes.zero, bits=levels.bits), bits=levels.bits)
    assert all(torch.equal(a, b) for a, b in zip(again, (codes.codes, codes.scale, codes.zero), strict=True))
    grid = grid_of(weight, levels)
    torch.testing.assert_close(rounded(weight, grid), round_to(weight, grid).dequantize())


@pytest.mark.parametrize("levels", OTHERS.values(), ids=OTHERS)
def test_the_searches_lower_the_loss_on_other_levels(levels: Levels) -> None:
    statistics, weight = inputs(), torch.randn(64, 128) ** 3 * 0.01
    gram = statistics.gram
    plain = loss(rtn(weight, levels), weight, gram)
    scale, share = search_scale(weight, gram, statistics.mean_abs, levels)
    assert share < 0.8
    searched = float(gram_loss(rtn(weight * scale, levels).dequantize() / scale - weight, gram).sum())
    assert share == pytest.approx(searched / plain, rel=1e-3)
    grid = search_grid(weight, gram, levels)
    clipped = round_to(weight, grid)
    # 8 bits have nothing to clip; what is searched is the loss of each group alone
    assert loss(clipped, weight, gram) < (0.95 if levels.bits == 4 else 1.01) * plain
    assert loss(gptq(weight, Feedback.of(gram), grid), weight, gram) < 0.7 * loss(clipped, weight, gram)


def test_8_bits_are_far_finer_than_4() -> None:
    statistics, weight = inputs(), torch.randn(64, 128)
    four, eight = (loss(rtn(weight, Levels(GROUP, bits)), weight, statistics.gram) for bits in (4, 8))
    assert eight < four / 200  # 17² = 289
