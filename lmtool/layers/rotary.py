"""The table of rotary angles (arXiv 2104.09864) and the three ways to stretch it. Knows no checkpoint."""

import math
from typing import Protocol

import torch
from torch import Tensor


class Rope(Protocol):
    """What the table needs to know; `models.config.RopeConfig` has it."""

    @property
    def theta(self) -> float: ...
    @property
    def dim(self) -> int: ...
    @property
    def kind(self) -> str: ...
    @property
    def factor(self) -> float: ...
    @property
    def low_freq_factor(self) -> float: ...
    @property
    def high_freq_factor(self) -> float: ...
    @property
    def original_max_positions(self) -> int: ...


def cos_sin_table(rope: Rope, num_positions: int, device: torch.device) -> Tensor:
    """[num_positions, dim] float32: cos of dim/2 angles, then sin.

    'dynamic' (NTK) is evaluated once, for ``num_positions``: a K that is in the cache must not change when the
    sequence grows. Up to the trained length it is the plain table, as everywhere.
    """
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), _frequencies(rope, num_positions))
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)


def _frequencies(rope: Rope, num_positions: int) -> Tensor:
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.int64).float() / rope.dim
    if rope.kind == "dynamic" and num_positions > rope.original_max_positions:
        stretch = rope.factor * num_positions / rope.original_max_positions - (rope.factor - 1)
        return 1.0 / (rope.theta * stretch ** (rope.dim / (rope.dim - 2))) ** exponents
    plain = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        return plain / rope.factor
    return _llama3(rope, plain) if rope.kind == "llama3" else plain


def _llama3(rope: Rope, plain: Tensor) -> Tensor:
    """Llama 3.1: long waves are slowed by ``factor``, short ones kept, those between blended."""
    wavelengths = 2 * math.pi / plain
    turns = rope.original_max_positions / wavelengths
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - blend) * plain / rope.factor + blend * plain
    slowed = torch.where(turns < rope.low_freq_factor, plain / rope.factor, blended)
    return torch.where(turns > rope.high_freq_factor, plain, slowed)
