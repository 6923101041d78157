"""Memory of each rank that all ranks of one machine can write to: CUDA's handles between processes. Knows no model.

torch's own (`torch.distributed._symmetric_memory`) keeps what it learnt of a group under the group's name, so a second
engine of one process waits for ranks that are gone.
"""

import contextlib
import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from lmtool.kernels import Peers

_HANDLE_BYTES = 64  # CUDA_IPC_HANDLE_SIZE
_LAZY_PEER_ACCESS = 1  # cudaIpcMemLazyEnablePeerAccess
_MOST_BYTES = 16 << 20  # of a message; a larger one is several
_PROGRAMS = 4096
_MARK_BYTES = 4096
_DEVICE_TO_HOST = 2  # cudaMemcpyDeviceToHost


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * _HANDLE_BYTES),)


class PeerMemory:
    """Bytes of all ones on each rank; `peers` says where. All ranks make one at the same time."""

    def __init__(self, rank: int, size: int, device: torch.device, all_gather_rows: Callable[[Tensor], Tensor]) -> None:
        """all_gather_rows: `Group`'s. Raises RuntimeError where cards cannot write to each other's memory; the others
        may have it."""
        self._rank, self._size, self._device = rank, size, device
        self._opened: list[int] = []
        self._own = 0
        with torch.cuda.device(device):
            handles = all_gather_rows(self._allocated(2 * size * _MOST_BYTES).to(device)).cpu().view(-1, _HANDLE_BYTES)
            try:
                self._addresses = [self._own if i == rank else self._open(one) for i, one in enumerate(handles)]
                # by a copy: where kernels wait on the whole card, one that set it would wait for them
                self._one = torch.ones(1, dtype=torch.int32, pin_memory=True)
                self.peers = self._empty_peers()
                torch.cuda.synchronize()
            except RuntimeError:
                self.close()
                raise

    def _empty_peers(self) -> Peers:
        return Peers(
            rank=self._rank,
            size=self._size,
            most_bytes=_MOST_BYTES,
            inboxes=torch.tensor(self._addresses, device=self._device),
            calls=torch.zeros(_PROGRAMS, dtype=torch.int32, device=self._device),
            ended=torch.zeros(1, dtype=torch.int32, device=self._device),
        )

    def _allocated(self, num_bytes: int) -> Tensor:
        """The handle that the others open: zeros where there is no memory for it."""
        own, handle = ctypes.c_void_p(), _Handle()
        with contextlib.suppress(RuntimeError):
            _call("cudaMalloc", ctypes.byref(own), ctypes.c_size_t(num_bytes))
            self._own = own.value or 0
            _call("cudaMemset", own, 0xFF, ctypes.c_size_t(num_bytes))
            _call("cudaIpcGetMemHandle", ctypes.byref(handle), own)
        return torch.frombuffer(bytearray(bytes(handle)), dtype=torch.uint8)

    def _open(self, handle: Tensor) -> int:
        """Raises RuntimeError."""
        address = ctypes.c_void_p()
        _call(
            "cudaIpcOpenMemHandle",
            ctypes.byref(address),
            _Handle.from_buffer_copy(bytes(handle.tolist())),
            ctypes.c_uint(_LAZY_PEER_ACCESS),
        )
        self._opened.append(address.value or 0)
        return self._opened[-1]

    def mark(self) -> None:
        """Leave this rank's number with every other: some cards' drivers say that they can, and nothing arrives."""
        with torch.cuda.device(self._device), contextlib.suppress(RuntimeError):
            for other, address in enumerate(self._addresses):
                if other != self._rank:
                    _call("cudaMemset", _slot(address, self._rank), self._rank + 1, ctypes.c_size_t(_MARK_BYTES))
            torch.cuda.synchronize()

    def is_marked(self) -> bool:
        """By all others, once all have done so; what they left is gone then."""
        with torch.cuda.device(self._device), contextlib.suppress(RuntimeError):
            marked = [self._take_mark(other) for other in range(self._size) if other != self._rank]
            return all(marked)
        return False

    def _take_mark(self, other: int) -> bool:
        found, own = ctypes.create_string_buffer(_MARK_BYTES), _slot(self._own, other)
        _call("cudaMemcpy", found, own, ctypes.c_size_t(_MARK_BYTES), _DEVICE_TO_HOST)
        _call("cudaMemset", own, 0xFF, ctypes.c_size_t(_MARK_BYTES))
        torch.cuda.synchronize()
        return found.raw == bytes([other + 1]) * _MARK_BYTES

    def let_go(self) -> None:
        """Kernels that wait for other ranks end; from any thread. What they leave behind is worth nothing."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream(self._device)  # the default one would wait for them
            with torch.cuda.stream(stream):
                self.peers.ended.copy_(self._one, non_blocking=True)
            stream.synchronize()

    def close(self) -> None:
        """Nobody writes here any more, nor does this rank to others. May be called twice."""
        with torch.cuda.device(self._device), contextlib.suppress(RuntimeError):
            while self._opened:
                _call("cudaIpcCloseMemHandle", ctypes.c_void_p(self._opened.pop()))
            own, self._own = self._own, 0
            _call("cudaFree", ctypes.c_void_p(own))


def _slot(address: int, writer: int) -> ctypes.c_void_p:
    """Where ``writer`` writes first in the memory at ``address``."""
    return ctypes.c_void_p(address + writer * _MOST_BYTES)


def _call(name: str, *arguments: object) -> None:
    code = getattr(_runtime(), name)(*arguments)
    if code:
        _runtime().cudaGetLastError()  # or torch's next call would raise it
        raise RuntimeError(f"{name} failed with CUDA's error {code}")


@cache
def _runtime() -> ctypes.CDLL:
    """The library that torch has loaded."""
    with open("/proc/self/maps") as file:
        paths = {line.split()[-1] for line in file if "libcudart" in line}
    if not paths:
        raise RuntimeError("torch has no CUDA runtime")
    return ctypes.CDLL(sorted(paths)[0])
