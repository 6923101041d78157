"""GPTQ rounding (arXiv 2210.17323): column by column, what one rounded wrong the later columns make good.

Columns go in the order of their Gram diagonal (act-order), each on the grid of its own group ("static groups"), so the
file stays in the natural order and needs no g_idx.
"""

import torch
from torch import Tensor

from lmtool.quant.grid import LEVELS, Codes, Grid

DAMPING = 0.01  # of the mean diagonal
_PANEL = 64  # columns whose errors are spread at once over all later ones


def gptq(weight: Tensor, gram: Tensor, grid: Grid, damping: float = DAMPING) -> Codes:
    """weight float32 [N, K], gram [K, K], grid [N, K/g]. Raises LinAlgError where gram is no Gram matrix."""
    num_in = weight.shape[1]
    group_size = num_in // grid.group_count
    order = torch.argsort(gram.diagonal(), descending=True)
    factor = inverse_factor(gram[order][:, order], damping)
    groups = order // group_size
    # one row a column, so that each step reads and writes memory in a row
    left = weight.t()[order].contiguous()
    scale, zero = grid.scale.t()[groups].contiguous(), grid.zero.t()[groups].contiguous()
    codes = torch.empty_like(left)
    for first in range(0, num_in, _PANEL):
        last = min(first + _PANEL, num_in)
        errors = _round_panel(left, codes, scale, zero, factor, first, last)
        left[last:].addmm_(factor[first:last, last:].t(), errors, alpha=-1)
    natural = torch.empty_like(codes)
    natural[order] = codes
    return Codes(natural.t().to(torch.uint8).contiguous(), grid.scale.half(), grid.zero.to(torch.uint8))


def inverse_factor(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """Upper Cholesky factor of (gram + damping · mean diagonal)⁻¹."""
    damped = gram.clone()
    diagonal = damped.diagonal()
    diagonal += damping * diagonal.mean()
    diagonal[diagonal == 0] = 1.0  # a gram of zeros: inputs that never were
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def _round_panel(
    left: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, factor: Tensor, first: int, last: int
) -> Tensor:
    """Round columns first:last (rows of ``left``), spread their errors among themselves; errors [last - first, N]."""
    errors = torch.empty_like(left[first:last])
    for column in range(first, last):
        values = left[column]
        code = (values / scale[column]).round_().add_(zero[column]).clamp_(0, LEVELS)
        codes[column] = code
        error = errors[column - first]
        torch.sub(values, code.sub_(zero[column]).mul_(scale[column]), out=error)
        error /= factor[column, column]
        left[column + 1 : last].addr_(factor[column, column + 1 : last], error, alpha=-1)
    return errors
