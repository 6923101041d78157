"""One block from numbers to codes: scales, folding, grids, rounding, and what it all cost on the calibration text.

Knows neither files nor the other blocks.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lmtool.models.config import ModelConfig
from lmtool.models.decoder import DecoderLayer
from lmtool.quant import groups
from lmtool.quant.awq import search_scale, smoothing_scale
from lmtool.quant.clip import search_grid
from lmtool.quant.gptq import gptq
from lmtool.quant.gram import Statistics, gram_loss, is_usable
from lmtool.quant.grid import Codes, grid_of, round_to

SCALED = ("smooth", "awq", "best")
CLIPPED = ("awq", "best")
FED_BACK = ("gptq", "best")


@dataclass(frozen=True, slots=True)
class Outcome:
    """A matrix of the block, rounded.

    error_plain, error   plain rounding's and this one's squared error of the output, as a share of the output's
                         energy; None where nothing was calibrated
    note                 why it was rounded plainly after all; '' where it was not
    """

    group: str
    codes: Codes
    error_plain: float | None = None
    error: float | None = None
    note: str = ""


def quantize_block(
    layer: DecoderLayer,
    config: ModelConfig,
    statistics: Mapping[str, Statistics],
    *,
    method: str,
    group_size: int,
    skipped: set[str],
    dtype: torch.dtype,
) -> list[Outcome]:
    """Round every group that is not skipped; ``layer`` is left folded, its weights as they were rounded from.

    statistics: by group, {} for plain rounding; dtype: in which the norms will be stored. A group whose inputs are
    not numbers, or whose search fails, is rounded plainly and says so.
    """
    wanted = [group for group in groups.GROUPS if group not in skipped]
    if not statistics:
        return [_plainly(layer, group, group_size) for group in wanted]
    grams = {group: statistics[group].gram for group in wanted}
    notes = {group: "" if is_usable(grams[group]) else "its inputs are not finite" for group in wanted}
    sound = [group for group in wanted if not notes[group]]
    scales = {
        group: _scale(layer, config, group, grams[group], statistics[group].mean_abs, method, group_size)
        for group in sound
        if method in SCALED
    }
    for group, scale in scales.items():
        scales[group] = groups.fold(layer, config, group, scale, dtype)
    outcomes = []
    for group in wanted:
        if notes[group]:
            outcomes.append(_plainly(layer, group, group_size, notes[group]))
            continue
        outcomes.append(_rounded(layer, group, grams[group], scales.get(group), method, group_size))
    return outcomes


def _scale(
    layer: DecoderLayer,
    config: ModelConfig,
    group: str,
    gram: Tensor,
    mean_abs: Tensor,
    method: str,
    group_size: int,
) -> Tensor:
    weight, shared_by = groups.matrix_of(layer, group).weight, groups.sharing(config, group)
    if method == "smooth":
        return smoothing_scale(weight, mean_abs, group_size, shared_by=shared_by)
    return search_scale(weight, gram, mean_abs, group_size, shared_by=shared_by)[0]


def _rounded(
    layer: DecoderLayer, group: str, gram: Tensor, scale: Tensor | None, method: str, group_size: int
) -> Outcome:
    weight = groups.matrix_of(layer, group).weight
    unscaled = weight if scale is None else weight / scale
    plain = round_to(unscaled, grid_of(unscaled, group_size))
    energy = max(float(gram_loss(unscaled, gram).sum()), 1e-30)
    error_plain = float(gram_loss(plain.dequantize().sub_(unscaled), gram).sum()) / energy
    if scale is not None:  # x / s is what the matrix will see
        gram = gram / scale / scale[:, None]
    grid = search_grid(weight, gram, group_size) if method in CLIPPED else grid_of(weight, group_size)
    note = ""
    try:
        codes = gptq(weight, gram, grid) if method in FED_BACK else round_to(weight, grid)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # torch does not list it
        codes, note = round_to(weight, grid), "its inputs' Gram matrix cannot be factored"
    error = float(gram_loss(codes.dequantize().sub_(weight), gram).sum()) / energy
    return Outcome(group, codes, error_plain, error, note)


def _plainly(layer: DecoderLayer, group: str, group_size: int, note: str = "") -> Outcome:
    weight = groups.matrix_of(layer, group).weight
    return Outcome(group, round_to(weight, grid_of(weight, group_size)), note=note)
