"""Plain rounding: every weight to the nearest level, no data. What the other methods are measured against."""

from torch import Tensor

from lmtool.quant.grid import Codes, Levels, grid_of, round_to


def rtn(weight: Tensor, levels: Levels) -> Codes:
    """weight float32 [N, K]."""
    return round_to(weight, grid_of(weight, levels))
