"""The ranks of one model, and the few things that they say to each other. Knows neither models nor shapes."""

import logging
from typing import Protocol

import torch
import torch.distributed
from torch import Tensor

from lmtool import kernels
from lmtool.kernels import VECTOR_BYTES, Peers
from lmtool.layers.peer_memory import PeerMemory

_log = logging.getLogger(__name__)

# newer releases of torch have given it another name
_all_gather = getattr(torch.distributed, "all_gather_single", None) or torch.distributed.all_gather_into_tensor

# by one rank to all others: reckoned for four ranks from what two were measured with (docs/log.md)
_MOST_SENT_BYTES = 6 << 20


class Group(Protocol):
    """Ranks 0 … size - 1 call the same methods in the same order."""

    rank: int
    size: int

    def all_reduce_(self, values: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        ...

    def add_all_reduce_(self, hidden: Tensor, part: Tensor) -> Tensor:
        """hidden, which is the same on all ranks, += the sum over all ranks of part; part is worth nothing then."""
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

    def outline(self) -> "AloneGroup":
        """Of the same shapes, on 'meta', with nobody to wait for."""
        ...


class TorchGroup:
    """torch.distributed's default group: NCCL between GPUs, gloo between CPUs. Close it.

    GPUs of one machine that can write to each other's memory have a kernel for the sums behind every layer's parts.
    """

    def __init__(self, device: torch.device, *, one_machine: bool = True) -> None:
        self.rank = torch.distributed.get_rank()
        self.size = torch.distributed.get_world_size()
        self._device = device
        self._memory = self._peer_memory() if device.type == "cuda" and one_machine else None

    def _peer_memory(self) -> PeerMemory | None:
        """None where one of the ranks has none, or cannot reach another's: sums are slower then, and as right."""
        memory: PeerMemory | None = None
        try:
            memory = PeerMemory(self.rank, self.size, self._device, self.all_gather_rows)
        except RuntimeError as error:
            _log.debug("cards do not write to each other's memory: %s", str(error).splitlines()[0])
        if self.least(memory is not None) and memory is not None:
            memory.mark()
            self.least(0)
            if self.least(memory.is_marked()):
                return memory
            _log.warning("what cards write to each other's memory does not arrive: NCCL adds up, which is slower")
        if memory is not None:
            memory.close()
        return None

    def all_reduce_(self, values: Tensor) -> Tensor:
        torch.distributed.all_reduce(values)
        return values

    def add_all_reduce_(self, hidden: Tensor, part: Tensor) -> Tensor:
        memory = self._memory if kernels.is_capturable(part.device, part.dtype, 0) else None
        if memory is not None and _crosses_by_kernel(part, self.size):
            return kernels.add_all_reduce_(hidden, part, memory.peers)
        return hidden.add_(self.all_reduce_(part))

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

    def outline(self) -> "AloneGroup":
        return AloneGroup(self.rank, self.size, self._memory.peers.on_meta() if self._memory is not None else None)

    def let_go(self) -> None:
        """A rank is gone: kernels that wait for it end. From any thread."""
        if self._memory is not None:
            self._memory.let_go()

    def close(self) -> None:
        """The others are gone, and nothing that was launched uses their memory any more."""
        if self._memory is not None:
            self._memory.close()


def _crosses_by_kernel(part: Tensor, size: int) -> bool:
    """Each rank sends all of its part to every other: between many ranks only small ones are sooner there that way."""
    return part.nbytes % VECTOR_BYTES == 0 and (size == 2 or part.nbytes * (size - 1) <= _MOST_SENT_BYTES)


class AloneGroup:
    """A rank whose others are not there: shapes are those of the group, numbers are not. For outlines on 'meta'."""

    def __init__(self, rank: int, size: int, peers: Peers | None = None) -> None:
        """peers: of the group's kernel, if it has one, on 'meta'."""
        self.rank, self.size = rank, size
        self._peers = peers

    def all_reduce_(self, values: Tensor) -> Tensor:
        return values

    def add_all_reduce_(self, hidden: Tensor, part: Tensor) -> Tensor:
        if self._peers is not None and _crosses_by_kernel(part, self.size):
            return kernels.add_all_reduce_(hidden, part, self._peers)
        return hidden.add_(part)

    def all_gather(self, values: Tensor) -> Tensor:
        return values.new_empty((values.shape[0], self.size * values.shape[1]))

    def exchange(self, values: Tensor) -> Tensor:
        return values.new_empty((len(values) // self.size, self.size * values.shape[1]))

    def all_gather_rows(self, values: Tensor) -> Tensor:
        return values.new_empty(self.size * len(values))

    def least(self, number: int) -> int:
        return number

    def outline(self) -> "AloneGroup":
        return self
