"""A case of `lmtool bench kernels`, and what makes random operands for it. Knows no op and no clock."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmtool.engine.kv_cache import BLOCK_SIZE
from lmtool.models.config import ModelConfig

Arguments = tuple[Any, ...]


def _result_alone(result: Any, arguments: Arguments) -> Any:
    return result


@dataclass(frozen=True, slots=True)
class Case:
    """An op on ``rows`` rows. num_bytes: each input read once, each output written once.

    compared(result, arguments after the call) → the tensors that must be right; library(*arguments): the same product
    by torch, where there is one.
    """

    op: str
    group: str
    detail: str
    rows: int
    make: Callable[[], Arguments]
    num_bytes: float
    flops: float = 0.0
    compared: Callable[[Any, Arguments], Any] = _result_alone
    library: Callable[..., Tensor] | None = None

    @property
    def name(self) -> str:
        return " ".join(word for word in (self.op, self.detail, f"b{self.rows}") if word)


@dataclass(frozen=True, slots=True)
class Maker:
    """Random operands of one dtype on one device; never zeros, which are multiplied faster."""

    model: ModelConfig
    dtype: torch.dtype
    device: torch.device
    context: int

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device).normal_(0, scale)

    def full(self, rows: int, value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((rows,), value, dtype=dtype, device=self.device)

    def cache(self, num_sequences: int) -> tuple[Tensor, Tensor, Tensor]:
        """K and V for sequences of ``context`` tokens in scattered blocks, and their block tables."""
        width = -(-self.context // BLOCK_SIZE)
        shape = (self.model.num_kv_heads, num_sequences * width + 1, BLOCK_SIZE, self.model.head_dim)
        tables = torch.randperm(num_sequences * width, device=self.device) + 1
        return self.normal(*shape), self.normal(*shape), tables.view(num_sequences, width).int()

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.model.num_kv_heads * self.model.head_dim * self.dtype.itemsize
