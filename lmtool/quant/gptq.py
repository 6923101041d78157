"""GPTQ rounding (arXiv 2210.17323): column by column, what one rounded wrong the later columns make good.

Columns go in the order of their Gram diagonal (act-order), each on the grid of its own group ("static groups"), so the
file stays in the natural order and needs no g_idx.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lmtool.quant.grid import Codes, Grid

# by how much correlations between inputs are taken to be smaller than the calibration text shows them
SHRINKAGE = 0.4
_PANEL = 64  # columns whose errors are spread at once over all later ones


@dataclass(frozen=True, slots=True)
class Feedback:
    """How an error in one column is made good by later ones. order int64 [K]; upper [K, K] in that order.

    upper is the Cholesky factor of the inverse of (1 - λ) G + λ diag(G). Damping by the diagonal itself, not by its
    mean as in the paper: AWQ's scale of the inputs then changes nothing, and one factor serves every scale.
    """

    order: Tensor
    upper: Tensor

    @classmethod
    def of(cls, gram: Tensor, shrinkage: float = SHRINKAGE) -> "Feedback":
        """gram [K, K]. Raises torch's LinAlgError where it is no Gram matrix."""
        order = torch.argsort(gram.diagonal(), descending=True)
        shrunk = gram[order][:, order] * (1 - shrinkage)
        diagonal = gram.diagonal()[order]
        diagonal = torch.where(diagonal == 0, 1.0, diagonal)  # inputs that never were
        shrunk.diagonal().copy_(diagonal)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(shrunk))
        return cls(order, torch.linalg.cholesky(inverse, upper=True))


def gptq(weight: Tensor, feedback: Feedback, grid: Grid, scale: Tensor | None = None) -> Codes:
    """Codes of weight · scale on ``grid`` [N, K/g]; weight float32 [N, K], scale [K], or [N, K] for several at once.

    The arithmetic is that of the weights before they were scaled: there all scales share one feedback.
    """
    num_in, order = weight.shape[1], feedback.order
    groups = order // (num_in // grid.group_count)
    # one row a column, so that each step reads and writes memory in a row
    left = weight.t()[order].contiguous()
    step, zero = grid.scale.t()[groups].contiguous(), grid.zero.t()[groups].contiguous()
    if scale is not None:
        step /= scale[order][:, None] if scale.ndim == 1 else scale.t()[order]
    codes = torch.empty_like(left)
    for first in range(0, num_in, _PANEL):
        last = min(first + _PANEL, num_in)
        errors = _round_panel(left, codes, step, zero, grid.highest, feedback.upper, first, last)
        left[last:].addmm_(feedback.upper[first:last, last:].t(), errors, alpha=-1)
    natural = torch.empty_like(codes)
    natural[order] = codes
    return Codes(natural.t().to(torch.uint8).contiguous(), grid.scale.half(), grid.zero.to(torch.uint8))


def _round_panel(
    left: Tensor, codes: Tensor, step: Tensor, zero: Tensor, highest: int, upper: Tensor, first: int, last: int
) -> Tensor:
    """Round columns first:last (rows of ``left``), spread their errors among themselves; errors [last - first, N]."""
    errors = torch.empty_like(left[first:last])
    for column in range(first, last):
        values = left[column]
        code = (values / step[column]).round_().add_(zero[column]).clamp_(0, highest)
        codes[column] = code
        error = errors[column - first]
        torch.sub(values, code.sub_(zero[column]).mul_(step[column]), out=error)
        error /= upper[column, column]
        left[column + 1 : last].addr_(upper[column, column + 1 : last], error, alpha=-1)
    return errors
