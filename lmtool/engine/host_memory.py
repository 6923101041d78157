"""The host tier's bytes: how many blocks are asked for, whether the memory is there, and the pinned memory itself."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from weakref import finalize

import torch
from torch import Tensor

from lmtool.config import EngineConfig
from lmtool.engine.device import free_bytes
from lmtool.engine.graphs import StartProgress
from lmtool.errors import MemoryShortError

_GIB = 1 << 30
_CHUNK_BYTES = _GIB  # pinned at once
_FOR_ALL_CONTEXTS = 1  # cudaHostRegisterPortable
_MOST_SHARE = 0.9  # of the free memory: the machine needs some to live on
_MOST_STAGING = _GIB
_STAGING_SHARE = 1 / 32  # of the free device memory


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPlan:
    """num_staging: blocks that the device's memory holds on their way, beside the cache."""

    num_blocks: int
    block_bytes: int
    num_staging: int

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.block_bytes


def check_host_tier(config: EngineConfig) -> None:
    """For all ranks, before anything is loaded. Raises MemoryShortError where the host has not so much memory."""
    if not config.cache_host_gb:
        return
    free = free_bytes(torch.device("cpu"))
    if config.cache_host_gb * _GIB > free * _MOST_SHARE:
        raise MemoryShortError(
            f"--cache-host-gb {config.cache_host_gb:g} asks for more than nine tenths of the {free / _GIB:.1f} GiB "
            "of host memory that are free",
            f"give at most {free * _MOST_SHARE / _GIB:.1f}",
        )


def staging_bytes(config: EngineConfig, device: torch.device, free: int) -> int:
    """What the host tier takes of ``device``'s free memory, on a CPU with the tier itself."""
    if not config.cache_host_gb:
        return 0
    if device.type == "cpu":
        return _own_bytes(config)
    return min(_MOST_STAGING, int(free * _STAGING_SHARE))


def plan_host_tier(config: EngineConfig, block_bytes: int, device: torch.device, staging: int) -> HostPlan | None:
    """None: there is none. staging: `staging_bytes`. Raises MemoryShortError where it holds not one block."""
    if not config.cache_host_gb:
        return None
    if config.tp == 1:  # the model has been loaded meanwhile; of several ranks some have their part already
        check_host_tier(config)
    num_blocks = _own_bytes(config) // block_bytes
    if num_blocks == 0:
        one = config.tp * block_bytes / (1 << 20)
        raise MemoryShortError(
            f"--cache-host-gb {config.cache_host_gb:g} holds not one block of {one:.1f} MiB",
            "give more, or 0: no host tier",
        )
    num_staging = 16 if device.type == "cpu" else max(8, staging // block_bytes)
    return HostPlan(num_blocks=num_blocks, block_bytes=block_bytes, num_staging=num_staging)


def _own_bytes(config: EngineConfig) -> int:
    """A rank's part of the tier."""
    return int(config.cache_host_gb * _GIB) // config.tp


class HostBlocks:
    """uint8 [num_blocks, block_bytes], pinned for a GPU, in chunks of about a GiB."""

    def __init__(self, plan: HostPlan, device: torch.device, progress: StartProgress | None = None) -> None:
        """Raises MemoryShortError."""
        self._per_chunk = per_chunk = max(1, _CHUNK_BYTES // plan.block_bytes)
        self._chunks: list[Tensor] = []
        if device.type == "cuda":
            finalize(self, _unpin, self._chunks).atexit = False
        for first in range(0, plan.num_blocks, per_chunk):
            num_rows = min(per_chunk, plan.num_blocks - first)
            try:
                chunk = torch.empty(num_rows, plan.block_bytes, dtype=torch.uint8)
                if device.type == "cuda":
                    _pin(chunk)
            except RuntimeError as error:
                raise MemoryShortError(
                    f"--cache-host-gb: the host gave {first * plan.block_bytes / _GIB:.1f} GiB of the "
                    f"{plan.num_bytes / _GIB:.1f}: {str(error).splitlines()[0]}",
                    "give less",
                ) from None
            self._chunks.append(chunk)
            if progress is not None and device.type == "cuda":
                progress("pinning host memory", len(self._chunks), -(-plan.num_blocks // per_chunk))

    def runs(self, blocks: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """``blocks`` cut where they are no neighbours: (index in ``blocks``, the rows from there on)."""
        start = 0
        for i in range(1, len(blocks) + 1):
            if i == len(blocks) or blocks[i] != blocks[i - 1] + 1 or blocks[i] % self._per_chunk == 0:
                first = blocks[start] % self._per_chunk
                yield start, self._chunks[blocks[start] // self._per_chunk][first : first + i - start]
                start = i


def _pin(chunk: Tensor) -> None:
    """Memory that was touched by all cores first is pinned in a fifth of the time of torch's own pinned memory."""
    chunk.zero_()
    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(chunk.data_ptr(), chunk.numel(), _FOR_ALL_CONTEXTS))


def _unpin(chunks: Sequence[Tensor]) -> None:
    torch.cuda.synchronize()  # a copy may be under way
    for chunk in chunks:
        torch.cuda.cudart().cudaHostUnregister(chunk.data_ptr())
