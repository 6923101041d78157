"""A safetensors file that is written one tensor at a time, so that a model of any size passes through a little memory.

(safetensors' own ``save_file`` takes all tensors of a file at once.) Room is kept for the header, which comes last.
"""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from lmtool.errors import CheckpointError

# of a tensor's line in the header: its name, dtype, up to four dimensions and two offsets
_LINE_BYTES = 320
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class TensorFile:
    """A context manager; the file is complete once it ends without an error. Not renamed: the folder is."""

    def __init__(self, path: Path, most_tensors: int) -> None:
        self.path = path
        self.num_bytes = 0
        self._entries: dict[str, dict[str, object]] = {}
        self._room = -(-(_LINE_BYTES * most_tensors + 64) // 4096) * 4096 - 8
        self._file = path.open("wb")
        self._file.seek(8 + self._room)

    def add(self, name: str, tensor: Tensor) -> str:
        """Write it; the checksum of its bytes."""
        data = tensor_bytes(tensor)
        start = self.num_bytes
        self._file.write(data)
        self.num_bytes += len(data)
        self._entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, self.num_bytes],
        }
        return checksum(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._write_header()
        finally:
            self._file.close()

    def _write_header(self) -> None:
        header = json.dumps({"__metadata__": {"format": "pt"}} | self._entries).encode()
        if len(header) > self._room:
            raise CheckpointError(f"the header of {self.path} needs {len(header)} bytes and {self._room} were kept")
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        self._file.flush()
        os.fsync(self._file.fileno())


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Its numbers, little-endian, row by row."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def checksum(data: memoryview) -> str:
    """XXH3 of 128 bits, in hex: finds damage, proves nothing about who wrote it."""
    import xxhash

    return xxhash.xxh3_128_hexdigest(data)
