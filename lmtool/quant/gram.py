"""What a linear's input looks like: its Gram matrix, all that the searches need to know of the calibration text.

The squared error of a product is exact on it: mean over tokens of |dW x|² = tr(dW G dWᵀ), G = XᵀX / T. So no search
touches the tokens again, and its cost does not grow with them.
"""

import torch
from torch import Tensor

_PANEL = 192  # columns; below the diagonal of panels G is the mirror of what is above


class Statistics:
    """Of one input: gram float32 [K, K], |x| summed [K], and the tokens that went in."""

    def __init__(self, num_in: int, device: torch.device) -> None:
        self.num_tokens = 0
        self._sum = torch.zeros(num_in, num_in, device=device)
        self._absolute = torch.zeros(num_in, device=device)

    def add(self, x: Tensor) -> None:
        """x [..., K] float32."""
        x = x.flatten(0, -2)
        self.num_tokens += x.shape[0]
        self._absolute += x.abs().sum(dim=0)
        transposed = x.t()
        for first in range(0, x.shape[1], _PANEL):
            panel = self._sum[first : first + _PANEL, first:]
            panel.addmm_(transposed[first : first + _PANEL], x[:, first:])

    @property
    def gram(self) -> Tensor:
        """XᵀX / T, symmetric."""
        upper = self._sum.triu()
        return (upper + upper.triu(1).t()).div_(max(self.num_tokens, 1))

    @property
    def mean_abs(self) -> Tensor:
        return self._absolute / max(self.num_tokens, 1)


def gram_loss(delta: Tensor, gram: Tensor) -> Tensor:
    """Mean over tokens of (delta x)², for each row: delta [N, K], gram [K, K] → [N]."""
    return (delta @ gram).mul_(delta).sum(dim=1)


def is_usable(gram: Tensor) -> bool:
    """False where an activation was NaN or inf, or its square."""
    return bool(torch.isfinite(gram).all())
