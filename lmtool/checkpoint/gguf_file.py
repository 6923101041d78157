"""The GGUF container: typed metadata, then tensors, in one memory-mapped file.

Reads the header by itself: the `gguf` package's reader makes an object of every token of the vocabulary (6 s for
SmolLM2 on two cores, against 0.1 s here). Source of the layout: docs/gguf.md of ggml, versions 2 and 3.
Does not know models or tokenizers: names and types are as stored.
"""

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from lmtool.errors import CheckpointError

DOWNLOAD_AGAIN = "download the file again"
STRING, ARRAY = 8, 9
# value type -> (struct format, numpy dtype)
SCALARS = {
    0: ("<B", "<u1"),
    1: ("<b", "<i1"),
    2: ("<H", "<u2"),
    3: ("<h", "<i2"),
    4: ("<I", "<u4"),
    5: ("<i", "<i4"),
    6: ("<f", "<f4"),
    7: ("<?", "?"),
    10: ("<Q", "<u8"),
    11: ("<q", "<i8"),
    12: ("<d", "<f8"),
}


@dataclass(frozen=True, slots=True)
class BlockType:
    """How ggml stores numbers: `block_len` of them in `block_bytes` bytes."""

    name: str
    block_len: int
    block_bytes: int


BLOCK_TYPES = {
    0: BlockType("float32", 1, 4),
    1: BlockType("float16", 1, 2),
    2: BlockType("q4_0", 32, 18),
    3: BlockType("q4_1", 32, 20),
    6: BlockType("q5_0", 32, 22),
    7: BlockType("q5_1", 32, 24),
    8: BlockType("q8_0", 32, 34),
    12: BlockType("q4_k", 256, 144),
    13: BlockType("q5_k", 256, 176),
    14: BlockType("q6_k", 256, 210),
    30: BlockType("bfloat16", 1, 2),
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies. `shape` is in torch's order, the last dimension contiguous."""

    shape: tuple[int, ...]
    type_id: int
    type: BlockType
    offset: int
    num_bytes: int


class GgufFile:
    """Header of one file.

    metadata  key -> int, float, bool, str, or numpy array; arrays of strings are read by `strings`
    tensors   name -> TensorEntry
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._bytes = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}", DOWNLOAD_AGAIN) from error
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorEntry] = {}
        self._string_arrays: dict[str, tuple[int, int]] = {}  # key -> (offset, count)
        cursor = _Cursor(self._bytes)
        try:
            self._read_header(cursor)
        except (struct.error, UnicodeDecodeError, ValueError) as error:
            raise CheckpointError(
                f"{path} is cut off or corrupt: its header is broken at byte {cursor.offset}", DOWNLOAD_AGAIN
            ) from error
        self._check_extents()

    def strings(self, key: str) -> list[str]:
        """An array of strings of the metadata; KeyError when there is none of this name."""
        offset, count = self._string_arrays[key]
        try:
            return _Cursor(self._bytes, offset).strings(count)
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: {key} is not UTF-8", DOWNLOAD_AGAIN) from error

    def has_strings(self, key: str) -> bool:
        return key in self._string_arrays

    def blocks(self, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The stored bytes, uint8 [rows, bytes of a row], in memory of their own."""
        entry = self.tensors[name]
        flat = np.fromfile(self.path, np.uint8, entry.num_bytes, offset=entry.offset)
        rows = prod(entry.shape[:-1])
        return flat.reshape(rows, entry.num_bytes // rows)

    def _read_header(self, cursor: "_Cursor") -> None:
        if bytes(self._bytes[:4]) != b"GGUF":
            beginning = bytes(self._bytes[:64])
            if beginning.startswith(b"version https://git-lfs"):
                raise CheckpointError(
                    f"{self.path} is a Git LFS pointer, not the weights", "run `git lfs pull` in that folder"
                )
            raise CheckpointError(f"{self.path} is not a GGUF file: it begins with {beginning[:4]!r}", DOWNLOAD_AGAIN)
        cursor.offset = 4
        version = cursor.read("<I")
        if version not in (2, 3):
            what = "big-endian" if version in (2 << 24, 3 << 24) else f"GGUF version {version}"
            raise CheckpointError(f"{self.path} is {what}", "convert it to little-endian GGUF version 3")
        num_tensors, num_keys = cursor.read("<Q"), cursor.read("<Q")
        for _ in range(num_keys):
            key = cursor.string()
            self._read_value(cursor, key)
        entries = [(cursor.string(), *self._read_entry(cursor)) for _ in range(num_tensors)]
        alignment = int(self.metadata.get("general.alignment", 32))
        if alignment <= 0 or alignment % 8:
            raise CheckpointError(f"{self.path}: general.alignment is {alignment}", DOWNLOAD_AGAIN)
        start = -(-cursor.offset // alignment) * alignment
        for name, dims, type_id, offset in entries:
            if name in self.tensors:
                raise CheckpointError(f"{self.path} holds tensor {name} twice", DOWNLOAD_AGAIN)
            self.tensors[name] = self._entry(name, dims, type_id, start + offset)

    def _read_value(self, cursor: "_Cursor", key: str) -> None:
        kind = cursor.read("<I")
        if kind == STRING:
            self.metadata[key] = cursor.string()
        elif kind in SCALARS:
            self.metadata[key] = cursor.read(SCALARS[kind][0])
        elif kind == ARRAY:
            item_kind, count = cursor.read("<I"), cursor.read("<Q")
            if item_kind == STRING:
                self._string_arrays[key] = (cursor.offset, count)
                cursor.skip_strings(count)
            elif item_kind in SCALARS:
                self.metadata[key] = cursor.numbers(SCALARS[item_kind][1], count)
            else:
                raise CheckpointError(
                    f"{self.path}: {key} is an array of type {item_kind}", "only arrays of scalars are known"
                )
        else:
            raise CheckpointError(f"{self.path}: {key} has the unknown type {kind}", DOWNLOAD_AGAIN)

    def _read_entry(self, cursor: "_Cursor") -> tuple[tuple[int, ...], int, int]:
        num_dims = cursor.read("<I")
        if not 1 <= num_dims <= 4:
            raise ValueError(num_dims)
        dims = tuple(cursor.read("<Q") for _ in range(num_dims))
        return dims, cursor.read("<I"), cursor.read("<Q")

    def _entry(self, name: str, dims: tuple[int, ...], type_id: int, offset: int) -> TensorEntry:
        if type_id not in BLOCK_TYPES:
            known = ", ".join(kind.name for kind in BLOCK_TYPES.values())
            raise CheckpointError(
                f"{self.path}: tensor {name} is stored as {_ggml_name(type_id)}", f"take a file made of {known}"
            )
        kind = BLOCK_TYPES[type_id]
        if dims[0] % kind.block_len or prod(dims) == 0:
            raise CheckpointError(f"{self.path}: tensor {name} has the impossible shape {dims}", DOWNLOAD_AGAIN)
        num_bytes = prod(dims) // kind.block_len * kind.block_bytes
        return TensorEntry(dims[::-1], type_id, kind, offset, num_bytes)

    def _check_extents(self) -> None:
        if not self.tensors:
            raise CheckpointError(f"{self.path} holds no tensors", "give a file with the model's weights")
        size = self._bytes.size
        for name, entry in self.tensors.items():
            if entry.offset + entry.num_bytes > size:
                raise CheckpointError(
                    f"{self.path} is cut off: tensor {name} ends at byte {entry.offset + entry.num_bytes}, "
                    f"the file at {size}",
                    DOWNLOAD_AGAIN,
                )


def _ggml_name(type_id: int) -> str:
    from gguf import GGMLQuantizationType

    try:
        return str(GGMLQuantizationType(type_id).name)
    except ValueError:
        return f"unknown type {type_id}"


class _Cursor:
    """A position in the bytes. Reading past the end raises struct.error or ValueError."""

    def __init__(self, data: np.ndarray[Any, np.dtype[np.uint8]], offset: int = 0) -> None:
        self._data = memoryview(data.data)
        self.offset = offset

    def read(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._data, self.offset)
        self.offset += struct.calcsize(form)
        return value

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        # a loop over 100,000 strings: locals instead of attributes halve its time
        data, offset, length_at = self._data, self.offset, struct.Struct("<Q").unpack_from
        found = []
        for _ in range(count):
            start = offset + 8
            offset = start + length_at(data, offset)[0]
            if offset > len(data):
                raise ValueError(offset)
            found.append(str(data[start:offset], "utf-8"))
        self.offset = offset
        return found

    def skip_strings(self, count: int) -> None:
        data, offset, length_at = self._data, self.offset, struct.Struct("<Q").unpack_from
        for _ in range(count):
            offset += 8 + length_at(data, offset)[0]
        if offset > len(data):
            raise ValueError(offset)
        self.offset = offset

    def numbers(self, dtype: str, count: int) -> np.ndarray[Any, np.dtype[Any]]:
        values = np.frombuffer(self._data, dtype=dtype, count=count, offset=self.offset)
        self.offset += values.nbytes
        return values
