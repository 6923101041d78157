"""The grids that AWQ's and GPTQ's files can say: w = (code - zero) · scale, a scale and a zero a group.

A matrix is [N, K]: N out features, K in features, G = K / group_size groups along K. Codes are always taken for the
float16 scale that is stored, never for the one it was rounded from.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_SMALLEST_SCALE = 2.0**-24  # float16's smallest number: a group of zeros still has a scale


@dataclass(frozen=True, slots=True)
class Levels:
    """How finely a group is rounded: 2**bits levels for each ``group_size`` weights.

    symmetric: the zero point is the middle level, 8 or 128, in every group; else each group has its own.
    """

    group_size: int
    bits: int = 4
    symmetric: bool = False

    @property
    def highest(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def lowest_zero(self) -> int:
        """The smallest zero point. GPTQ's format, which alone has 8 bits, stores zero - 1: 0 would wrap around, and not
        every reader undoes that."""
        return 0 if self.bits == 4 else 1


@dataclass(frozen=True, slots=True)
class Grid:
    """scale float32 [N, G], each exactly a float16; zero float32 [N, G], whole numbers 0..highest, the largest code."""

    scale: Tensor
    zero: Tensor
    highest: int

    @property
    def group_count(self) -> int:
        return self.scale.shape[1]


@dataclass(frozen=True, slots=True)
class Codes:
    """A rounded matrix. codes uint8 [N, K]; scale float16 [N, G]; zero uint8 [N, G]."""

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def dequantize(self) -> Tensor:
        """float32 [N, K]."""
        grouped = self.codes.view(*self.scale.shape, -1).float()
        return grouped.sub_(self.zero.float()[..., None]).mul_(self.scale.float()[..., None]).flatten(1)

    def rows(self, first: int, last: int) -> "Codes":
        return Codes(self.codes[first:last], self.scale[first:last], self.zero[first:last])


def grid_between(low: Tensor, high: Tensor, levels: Levels) -> Grid:
    """The grid that reaches from ``low`` to ``high`` [N, G], its middle at 0 where it is symmetric, and holds 0."""
    if levels.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    low, high = low.clamp(max=0), high.clamp(min=0)
    if levels.lowest_zero:  # a level below 0 in any case
        low = torch.minimum(low, high / (1 - levels.highest))
    scale = ((high - low) / levels.highest).half().float().clamp_(min=_SMALLEST_SCALE)
    if levels.symmetric:
        return Grid(scale, torch.full_like(scale, (levels.highest + 1) / 2), levels.highest)
    return Grid(scale, torch.round(-low / scale).clamp_(levels.lowest_zero, levels.highest), levels.highest)


def grid_of(weight: Tensor, levels: Levels) -> Grid:
    """Plain rounding's grid: from the smallest to the largest weight of each group. weight float32 [N, K]."""
    low, high = weight.view(weight.shape[0], -1, levels.group_size).aminmax(dim=-1)
    return grid_between(low, high, levels)


def round_to(weight: Tensor, grid: Grid) -> Codes:
    """Each weight to the nearest level of its group."""
    grouped = weight.view(*grid.scale.shape, -1)
    codes = (grouped / grid.scale[..., None]).round_().add_(grid.zero[..., None]).clamp_(0, grid.highest)
    return Codes(codes.flatten(1).to(torch.uint8), grid.scale.half(), grid.zero.to(torch.uint8))


def rounded(weight: Tensor, grid: Grid) -> Tensor:
    """`round_to` and back, float32 [N, K], without making the codes."""
    scale, zero = grid.scale[..., None], grid.zero[..., None]
    steps = (weight.view(*grid.scale.shape, -1) / scale).round_()
    return steps.clamp_(-zero, grid.highest - zero).mul_(scale).flatten(1)
