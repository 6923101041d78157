"""The ranks of one model, and the two things that they say to each other. Knows neither models nor shapes."""

from typing import Protocol

import torch
import torch.distributed
from torch import Tensor


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


class TorchGroup:
    """torch.distributed's default group: NCCL between GPUs, gloo between CPUs."""

    def __init__(self) -> None:
        self.rank = torch.distributed.get_rank()
        self.size = torch.distributed.get_world_size()

    def all_reduce_(self, values: Tensor) -> Tensor:
        torch.distributed.all_reduce(values)
        return values

    def all_gather(self, values: Tensor) -> Tensor:
        out = values.new_empty((self.size, *values.shape))
        torch.distributed.all_gather_into_tensor(out.view(-1, *values.shape[1:]), values.contiguous())
        return out.transpose(0, 1).flatten(1)
