"""The 4-bit grid that AWQ's and GPTQ's files can say: w = (code - zero) · scale, a scale and a zero a group.

A matrix is [N, K]: N out features, K in features, G = K / group_size groups along K. Codes are always taken for the
float16 scale that is stored, never for the one it was rounded from.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LEVELS = 15
_SMALLEST_SCALE = 2.0**-24  # float16's smallest number: a group of zeros still has a scale


@dataclass(frozen=True, slots=True)
class Grid:
    """scale float32 [N, G], each exactly a float16; zero float32 [N, G], whole numbers 0..15."""

    scale: Tensor
    zero: Tensor

    @property
    def group_count(self) -> int:
        return self.scale.shape[1]


@dataclass(frozen=True, slots=True)
class Codes:
    """A rounded matrix. codes uint8 [N, K] 0..15; scale float16 [N, G]; zero uint8 [N, G]."""

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def dequantize(self) -> Tensor:
        """float32 [N, K]."""
        grouped = self.codes.view(*self.scale.shape, -1).float()
        return grouped.sub_(self.zero.float()[..., None]).mul_(self.scale.float()[..., None]).flatten(1)

    def rows(self, first: int, last: int) -> "Codes":
        return Codes(self.codes[first:last], self.scale[first:last], self.zero[first:last])


def grid_between(low: Tensor, high: Tensor) -> Grid:
    """The grid whose 16 levels reach from ``low`` to ``high`` [N, G] and hold 0 exactly."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / LEVELS).half().float().clamp_(min=_SMALLEST_SCALE)
    return Grid(scale, torch.round(-low / scale).clamp_(0, LEVELS))


def grid_of(weight: Tensor, group_size: int) -> Grid:
    """Plain rounding's grid: from the smallest to the largest weight of each group. weight float32 [N, K]."""
    low, high = weight.view(weight.shape[0], -1, group_size).aminmax(dim=-1)
    return grid_between(low, high)


def round_to(weight: Tensor, grid: Grid) -> Codes:
    """Each weight to the nearest level of its group."""
    grouped = weight.view(*grid.scale.shape, -1)
    codes = (grouped / grid.scale[..., None]).round_().add_(grid.zero[..., None]).clamp_(0, LEVELS)
    return Codes(codes.flatten(1).to(torch.uint8), grid.scale.half(), grid.zero.to(torch.uint8))


def rounded(weight: Tensor, grid: Grid) -> Tensor:
    """`round_to` and back, float32 [N, K], without making the codes."""
    scale, zero = grid.scale[..., None], grid.zero[..., None]
    levels = (weight.view(*grid.scale.shape, -1) / scale).round_()
    return levels.clamp_(-zero, LEVELS - zero).mul_(scale).flatten(1)
