"""The ranks of one model, and the few things that they say to each other. Knows neither models nor shapes."""

from typing import Protocol

import torch
import torch.distributed
from torch import Tensor

# newer releases of torch have given it another name
_all_gather = getattr(torch.distributed, "all_gather_single", None) or torch.distributed.all_gather_into_tensor


class Group(Protocol):
    """Ranks 0 … size - 1 call the same methods in the same order."""

    rank: int
    size: int

    def all_reduce_(self, values: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        ...

    def all_gather(self, values: Tensor) -> Tensor:
        """[n, v] of each rank → [n, size · v], side by side in the order of ranks."""
        ...

    def exchange(self, values: Tensor) -> Tensor:
        """[size · m, v] of each rank → [m, size · v]: of every rank its values of this rank's m rows, side by side."""
        ...

    def all_gather_rows(self, values: Tensor) -> Tensor:
        """[m] of each rank → [size · m], in the order of ranks."""
        ...

    def least(self, number: int) -> int:
        """Of the ranks' numbers the smallest; waits for all."""
        ...


class TorchGroup:
    """torch.distributed's default group: NCCL between GPUs, gloo between CPUs."""

    def __init__(self, device: torch.device) -> None:
        self.rank = torch.distributed.get_rank()
        self.size = torch.distributed.get_world_size()
        self._device = device

    def all_reduce_(self, values: Tensor) -> Tensor:
        torch.distributed.all_reduce(values)
        return values

    def all_gather(self, values: Tensor) -> Tensor:
        out = values.new_empty((self.size, *values.shape))
        _all_gather(out.view(-1, *values.shape[1:]), values.contiguous())
        return out.transpose(0, 1).flatten(1)

    def exchange(self, values: Tensor) -> Tensor:
        out = values.new_empty((self.size, len(values) // self.size, values.shape[1]))
        torch.distributed.all_to_all_single(out.view(values.shape), values.contiguous())
        return out.transpose(0, 1).flatten(1)

    def all_gather_rows(self, values: Tensor) -> Tensor:
        out = values.new_empty(self.size * len(values))
        _all_gather(out, values)
        return out

    def least(self, number: int) -> int:
        found = torch.tensor([number], dtype=torch.int64, device=self._device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MIN)
        return int(found.item())


class AloneGroup:
    """A rank whose others are not there: shapes are those of the group, numbers are not. For outlines on 'meta'."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def all_reduce_(self, values: Tensor) -> Tensor:
        return values

    def all_gather(self, values: Tensor) -> Tensor:
        return values.new_empty((values.shape[0], self.size * values.shape[1]))

    def exchange(self, values: Tensor) -> Tensor:
        return values.new_empty((len(values) // self.size, self.size * values.shape[1]))

    def all_gather_rows(self, values: Tensor) -> Tensor:
        return values.new_empty(self.size * len(values))

    def least(self, number: int) -> int:
        return number
