"""Stored tensors onto a device at the speed of the link: files are read in pieces by several threads, ahead of the
copies, through a few pinned buffers.

Where a tensor is read to is the caller's, so matrices that belong together are filled in place; numbers are cast on
the device. On a CPU the same pieces go the same way, without pinned memory and without streams.
"""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from math import prod
from pathlib import Path
from queue import SimpleQueue
from threading import BoundedSemaphore
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from lmtool.errors import CheckpointError

PIECE_BYTES = 16 << 20
NUM_READERS = 8
_BUFFERS_PER_READER = 2  # one is filled while the other is copied: 256 MiB of pinned memory in all


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Numbers as they lie in ``file`` from byte ``start`` on: contiguous, little-endian."""

    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """Into memory of its own: unlike a mapped file it goes when the tensor does. Raises CheckpointError."""
        out = torch.empty(self.num_bytes, dtype=torch.uint8)
        with _opened(self.file) as descriptor:
            _read(self.file, descriptor, out, self.start)
        return out.view(self.dtype).view(self.shape)

    def read_slice(self, dim: int, start: int, stop: int) -> Tensor:
        """Elements start … stop - 1 along ``dim``: only their bytes are read."""
        before, after = prod(self.shape[:dim]), prod(self.shape[dim + 1 :]) * self.dtype.itemsize
        out = torch.empty((before, (stop - start) * after), dtype=torch.uint8)
        with _opened(self.file) as descriptor:
            for i in range(before):
                _read(self.file, descriptor, out[i], self.start + (i * self.shape[dim] + start) * after)
        return out.view(self.dtype).view((*self.shape[:dim], stop - start, *self.shape[dim + 1 :]))


class _Buffer:
    """Host memory for one piece, and the stream on which it leaves."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.bytes = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=on_gpu)
        self._device = device
        self._stream = torch.cuda.Stream(device) if on_gpu else None

    def wait(self) -> None:
        """Until what it held has been copied."""
        if self._stream is not None:
            self._stream.synchronize()

    def copy_to(self, out: Tensor, dtype: torch.dtype, after: torch.cuda.Event | None) -> None:
        """Its first bytes, numbers of ``dtype``, → out, once the work before ``after`` is done."""
        numbers = self.bytes[: out.numel() * dtype.itemsize].view(dtype)
        with self._on_stream():
            if self._stream is not None and after is not None:
                self._stream.wait_event(after)
            if dtype != out.dtype:
                numbers = numbers.to(self._device, non_blocking=True)
            out.copy_(numbers, non_blocking=True)

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


class Stager:
    """Fills tensors of ``device`` from files, in the background until `wait`. Used as a context manager."""

    def __init__(self, device: torch.device, *, piece_bytes: int = PIECE_BYTES, num_readers: int = NUM_READERS) -> None:
        self._device = device
        self._piece_bytes = piece_bytes
        self._pool = ThreadPoolExecutor(num_readers, thread_name_prefix="read")
        self._buffers: SimpleQueue[_Buffer | None] = SimpleQueue()
        for _ in range(num_readers * _BUFFERS_PER_READER):
            self._buffers.put(None)  # pinning memory takes time: each is made by the reader that first needs it
        self._ahead = BoundedSemaphore(4 * num_readers)  # so that progress is not far from what has arrived
        self._pieces: list[Future[None]] = []
        self._files: dict[Path, int] = {}

    def fill(self, out: Tensor, stored: StoredTensor) -> None:
        """out, contiguous and of stored's shape in any float dtype, holds the numbers after `wait`.

        Returns early; raises what reading an earlier piece raised.
        """
        flat = out.view(-1)
        step = self._piece_bytes // stored.dtype.itemsize
        after = None
        if self._device.type == "cuda":  # out's memory may still be in use by what was launched before
            after = torch.cuda.Event()
            after.record(torch.cuda.current_stream(self._device))
        for first in range(0, flat.numel(), step):
            self._submit(flat[first : first + step], stored, stored.start + first * stored.dtype.itemsize, after)

    def wait(self) -> None:
        """Until every tensor is filled. Raises CheckpointError for a file that cannot be read, or torch's errors."""
        for piece in self._pieces:
            piece.result()
        self._pieces = []
        self._synchronize()

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _submit(self, out: Tensor, stored: StoredTensor, start: int, after: torch.cuda.Event | None) -> None:
        self._ahead.acquire()
        while self._pieces and self._pieces[0].done():
            self._pieces.pop(0).result()
        descriptor = self._descriptor(stored.file)
        piece = self._pool.submit(self._move, out, stored, descriptor, start, after)
        piece.add_done_callback(lambda _: self._ahead.release())
        self._pieces.append(piece)

    def _move(
        self, out: Tensor, stored: StoredTensor, descriptor: int, start: int, after: torch.cuda.Event | None
    ) -> None:
        buffer = self._buffers.get()  # the one that was given back first: its copy is the likeliest to be over
        try:
            buffer = buffer or _Buffer(self._piece_bytes, self._device)
            buffer.wait()
            num_bytes = out.numel() * stored.dtype.itemsize
            _read(stored.file, descriptor, buffer.bytes[:num_bytes], start)
            buffer.copy_to(out, stored.dtype, after)
        finally:
            self._buffers.put(buffer)

    def _descriptor(self, file: Path) -> int:
        if file not in self._files:
            try:
                self._files[file] = os.open(file, os.O_RDONLY)
            except OSError as error:
                raise _unreadable(file, error.strerror or str(error)) from error
        return self._files[file]

    def close(self) -> None:
        """What has not begun is left out. May be called twice."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._synchronize()  # nothing may still be written to memory that is given up next
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def _opened(file: Path) -> Iterator[int]:
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError as error:
        raise _unreadable(file, error.strerror or str(error)) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _read(file: Path, descriptor: int, out: Tensor, start: int) -> None:
    """Bytes of the file from ``start`` on → out, all of it."""
    view = out.numpy().data
    done = 0
    while done < len(view):
        try:
            count = os.preadv(descriptor, [view[done:]], start + done)
        except OSError as error:
            raise _unreadable(file, error.strerror or str(error)) from error
        if count == 0:
            raise _unreadable(file, f"it ends at byte {start + done}")
        done += count


def _unreadable(file: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{file} cannot be read: {why}", "is the disk in order? else download the model again")
