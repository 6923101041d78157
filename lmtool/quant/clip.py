"""The clip search: a group's grid may stop short of its largest weight, which then rounds worse and all others better.

The loss is the group's own block of the Gram matrix, so all groups of all rows are searched at once.
"""

import torch
from torch import Tensor

from lmtool.quant.grid import Grid, Levels, grid_between

SHRINKS = tuple(1 - 0.05 * i for i in range(11))  # 1.0 … 0.5


def search_grid(weight: Tensor, gram: Tensor, levels: Levels) -> Grid:
    """For each group the grid, of those between shrunk bounds, with the least loss. weight [N, K], gram [K, K]."""
    grouped = weight.view(weight.shape[0], -1, levels.group_size)
    low, high = grouped.aminmax(dim=-1)
    by_group = grouped.transpose(0, 1).contiguous()  # [G, N, g]: the layout of a batched product
    blocks = torch.stack(_diagonal_blocks(gram, levels.group_size))
    best = grid_between(low, high, levels)
    best_loss = torch.full_like(low, torch.inf)
    for shrink in SHRINKS:
        grid = grid_between(low * shrink, high * shrink, levels)
        delta = _rounded_by_group(by_group, grid).sub_(by_group)
        loss = torch.bmm(delta, blocks).mul_(delta).sum(dim=-1).t()
        better = loss < best_loss
        best_loss = torch.where(better, loss, best_loss)
        scale, zero = torch.where(better, grid.scale, best.scale), torch.where(better, grid.zero, best.zero)
        best = Grid(scale, zero, grid.highest)
    return best


def _diagonal_blocks(gram: Tensor, group_size: int) -> list[Tensor]:
    starts = range(0, gram.shape[0], group_size)
    return [gram[i : i + group_size, i : i + group_size] for i in starts]


def _rounded_by_group(by_group: Tensor, grid: Grid) -> Tensor:
    """by_group [G, N, g] to the nearest levels of grid [N, G]."""
    scale, zero = grid.scale.t()[..., None], grid.zero.t()[..., None]
    steps = (by_group / scale).round_()
    return steps.clamp_(-zero, grid.highest - zero).mul_(scale)
