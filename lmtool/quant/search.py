"""One block from numbers to codes: scales, folding, grids, rounding, and what it all cost on the calibration text.

Knows neither files nor the other blocks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from lmtool.models.config import ModelConfig
from lmtool.models.decoder import DecoderLayer
from lmtool.quant import groups
from lmtool.quant.awq import search_scale, smoothing_scale
from lmtool.quant.clip import search_grid
from lmtool.quant.gptq import Feedback, gptq
from lmtool.quant.gram import Statistics, gram_loss, is_usable
from lmtool.quant.grid import Codes, Grid, Levels, grid_of, round_to
from lmtool.quant.rtn import rtn

_SCALED = ("smooth", "awq", "best")
_CLIPPED = ("awq", "best")
_FED_BACK = ("gptq", "best")
# how much of the found scale is tried with the whole method: clipping and feedback make good part of what it does
_POWERS = (1.0, 0.5, 0.0)
_MOST_TRIAL_ROWS = 128


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


@dataclass(frozen=True, slots=True)
class Rounding:
    """A method, and what it knows of one input."""

    method: str
    levels: Levels
    gram: Tensor
    mean_abs: Tensor
    feedback: Feedback | None

    @classmethod
    def of(cls, method: str, levels: Levels, gram: Tensor, mean_abs: Tensor) -> "Rounding":
        """Raises torch's LinAlgError where feedback is asked for and the Gram matrix cannot be factored."""
        feedback = Feedback.of(gram) if method in _FED_BACK else None
        return cls(method, levels, gram, mean_abs, feedback)

    def codes(self, weight: Tensor, scale: Tensor | None) -> Codes:
        """Round weight · scale."""
        grid = self.grid(weight, scale)
        if self.feedback is not None:
            return gptq(weight, self.feedback, grid, scale)
        return round_to(weight if scale is None else weight * scale, grid)

    def grid(self, weight: Tensor, scale: Tensor | None) -> Grid:
        scaled = weight if scale is None else weight * scale
        if self.method not in _CLIPPED:
            return grid_of(scaled, self.levels)
        gram = self.gram if scale is None else self.gram / scale / scale[:, None]
        return search_grid(scaled, gram, self.levels)

    def error(self, codes: Codes, weight: Tensor, scale: Tensor | None = None) -> float:
        """Squared error of the output, mean over tokens, summed over rows; weight: before it was scaled."""
        back = codes.dequantize()
        delta = (back if scale is None else back.div_(scale)).sub_(weight)
        return float(gram_loss(delta, self.gram).sum())

    def scale(self, weight: Tensor, shared_by: tuple[int, int] | None) -> Tensor | None:
        """The scale for ``weight``, None where the method has none or none is better."""
        if self.method not in _SCALED:
            return None
        if self.method == "smooth":
            return smoothing_scale(weight, self.mean_abs, self.levels.group_size, shared_by=shared_by)
        found, _ = search_scale(weight, self.gram, self.mean_abs, self.levels, shared_by=shared_by)
        rows = weight[:: -(-weight.shape[0] // _MOST_TRIAL_ROWS)]
        candidates = [found**power for power in _POWERS]
        errors = [
            self.error(codes, rows, scale)
            for codes, scale in zip(self._trials(rows, candidates), candidates, strict=True)
        ]
        return candidates[errors.index(min(errors))]

    def _trials(self, rows: Tensor, scales: list[Tensor]) -> list[Codes]:
        """`codes` for each scale; with feedback all at once, for its steps cost more than its arithmetic."""
        if self.feedback is None:
            return [self.codes(rows, scale) for scale in scales]
        grids = [self.grid(rows, scale) for scale in scales]
        scale, zero = (torch.cat([getattr(grid, part) for grid in grids]) for part in ("scale", "zero"))
        together = Grid(scale, zero, self.levels.highest)
        each_row = torch.cat([scale.expand_as(rows) for scale in scales])
        codes = gptq(rows.repeat(len(scales), 1), self.feedback, together, each_row)
        return [codes.rows(first, first + len(rows)) for first in range(0, len(each_row), len(rows))]


def quantize_block(
    layer: DecoderLayer,
    config: ModelConfig,
    statistics: Mapping[str, Statistics],
    *,
    method: str,
    levels: Levels,
    skipped: set[str],
    dtype: torch.dtype,
) -> list[Outcome]:
    """Round every group that is not skipped; ``layer`` is left folded, its weights as they were rounded from.

    statistics: by group, {} for plain rounding; dtype: in which the norms will be stored. A group whose inputs are
    not numbers, or whose Gram matrix cannot be factored, is rounded plainly and says so.
    """
    wanted = [group for group in groups.GROUPS if group not in skipped]
    if not statistics:
        return [_plainly(layer, group, levels) for group in wanted]
    roundings: dict[str, Rounding] = {}
    notes: dict[str, str] = {}
    for group in wanted:
        gram = statistics[group].gram
        if not is_usable(gram):
            notes[group] = "its inputs are not finite"
            continue
        try:
            roundings[group] = Rounding.of(method, levels, gram, statistics[group].mean_abs)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # torch does not list it
            notes[group] = "the Gram matrix of its inputs cannot be factored"
    scales: dict[str, Tensor] = {}
    for group, rounding in roundings.items():
        scale = rounding.scale(groups.matrix_of(layer, group).weight, groups.sharing(config, group))
        if scale is not None:
            scales[group] = scale
    for group, scale in scales.items():  # after all searches: folding changes rows of another group's matrix
        scales[group] = groups.fold(layer, config, group, scale, dtype)
    return [
        _plainly(layer, group, levels, notes[group])
        if group in notes
        else _rounded(layer, group, roundings[group], scales.get(group))
        for group in wanted
    ]


def _rounded(layer: DecoderLayer, group: str, rounding: Rounding, scale: Tensor | None) -> Outcome:
    scaled = groups.matrix_of(layer, group).weight
    weight = scaled if scale is None else scaled / scale
    energy = max(float(gram_loss(weight, rounding.gram).sum()), 1e-30)
    plain = rounding.error(rtn(weight, rounding.levels), weight)
    codes = rounding.codes(weight, scale)
    error = rounding.error(codes, weight, scale)
    if not isfinite(energy + plain + error):
        return _plainly(layer, group, rounding.levels, "its outputs are not finite")
    return Outcome(group, codes, plain / energy, error / energy)


def _plainly(layer: DecoderLayer, group: str, levels: Levels, note: str = "") -> Outcome:
    weight = groups.matrix_of(layer, group).weight
    return Outcome(group, rtn(weight, levels), note=note)
