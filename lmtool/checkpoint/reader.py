"""A folder of Hugging Face files: configuration, and tensors one by one out of sharded safetensors.

Nothing is read before it is asked for, and it is read into memory of its own: of a mapped file every page that was
touched would count as ours. Does not know model families.
"""

import json
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from lmtool.checkpoint.formats import PackedInt4, PackedInt8, StoredW4
from lmtool.checkpoint.staging import StoredTensor
from lmtool.errors import CheckpointError

if TYPE_CHECKING:
    from lmtool.checkpoint.vision import VisionPart

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DOWNLOAD_AGAIN = "download the model again"

DTYPE_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; CheckpointError naming the file when it is absent, unreadable or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing", "give the folder that holds it, or download it again") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}", DOWNLOAD_AGAIN) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, not an object", DOWNLOAD_AGAIN)
    return value


class HfCheckpoint:
    """`Checkpoint` over a folder: one safetensors file, or several with or without an index."""

    format = "hf"
    vision: "VisionPart | None" = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / "config.json")
        generation = path / "generation_config.json"
        self.generation_config = read_json(generation) if generation.exists() else {}
        self._shards: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        self._starts: dict[str, dict[str, int]] = {}  # file → name → first byte; read when first asked for
        files, index = _weight_files(path)
        for file in files:
            self._shards[file] = open_shard(path / file)
            for name in self._shards[file].keys():  # noqa: SIM118  safe_open is not iterable
                if name in self._file_of:
                    raise CheckpointError(
                        f"tensor {name} is in both {self._file_of[name]} and {file} of {path}",
                        "leave the files of one model in the folder",
                    )
                self._file_of[name] = file
        _check_index(path, index, self._file_of)

    def names(self) -> list[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        stored = self._slice(name).get_dtype()
        return DTYPE_NAMES.get(stored, stored.lower())

    def tensor(self, name: str) -> torch.Tensor:
        stored = self.stored(name)
        if stored is not None:
            return stored.read()
        tensor: torch.Tensor = self._shard(name).get_tensor(name)
        return tensor

    def stored(self, name: str) -> StoredTensor | None:
        dtype = getattr(torch, self.dtype(name), None)
        if not isinstance(dtype, torch.dtype):
            return None
        file = self._file_of[name]
        if file not in self._starts:
            self._starts[file] = tensor_starts(self.path / file)
        return StoredTensor(self.path / file, self._starts[file][name], self.shape(name), dtype)

    def stored_w4(self, name: str) -> StoredW4 | None:
        return None

    def packed_int4(self, name: str, device: torch.device | None = None) -> PackedInt4 | None:
        self._shard(name)
        return None

    def packed_int8(self, name: str) -> PackedInt8 | None:
        return None

    def close(self) -> None:
        self._shards.clear()

    def _shard(self, name: str) -> Any:
        if name not in self._file_of:
            raise CheckpointError(f"{self.path} holds no tensor {name}")
        return self._shards[self._file_of[name]]

    def _slice(self, name: str) -> Any:
        return self._shard(name).get_slice(name)


def _weight_files(folder: Path) -> tuple[list[str], dict[str, str]]:
    """File names, and the index's tensor name -> file name ({} without an index)."""
    if (folder / INDEX).exists():
        index = _read_index(folder / INDEX)
        files = sorted(set(index.values()))
    elif (folder / SINGLE).exists():
        index, files = {}, [SINGLE]
    else:
        index, files = {}, sorted(file.name for file in folder.glob("*.safetensors"))
        files += _absent_numbered_shards(files)
    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        partly = " (an unfinished download is beside it)" if any(folder.rglob("*.incomplete")) else ""
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(files)} weight files: {', '.join(missing[:3])}{partly}",
            DOWNLOAD_AGAIN,
        )
    return files, index


def _absent_numbered_shards(files: list[str]) -> list[str]:
    """Names that 'model-00002-of-00003.safetensors' promises and that are not there."""
    promised = set()
    for file in files:
        match = re.fullmatch(r"(.*-)(\d+)(-of-)(\d+)(\.safetensors)", file)
        if match:
            before, digits, middle, count, after = match.groups()
            for number in range(1, int(count) + 1):
                promised.add(f"{before}{number:0{len(digits)}d}{middle}{count}{after}")
    return sorted(promised - set(files))


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} holds no weight_map", DOWNLOAD_AGAIN)
    for name, file in weight_map.items():
        # an index comes from the network: it may name files of this folder, nothing else
        if not isinstance(file, str) or PurePosixPath(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path} maps {name} to {file!r}, which is not a safetensors file of this folder", DOWNLOAD_AGAIN
            )
    return weight_map


def open_shard(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        with path.open("rb") as file:
            start = file.read(64)
        if start.startswith(b"version https://git-lfs"):
            raise CheckpointError(
                f"{path} is a Git LFS pointer, not the weights", "run `git lfs pull` in that folder"
            ) from error
        raise CheckpointError(
            f"{path} is corrupt or cut off ({path.stat().st_size} bytes): {error}", DOWNLOAD_AGAIN
        ) from error


def tensor_starts(path: Path) -> dict[str, int]:
    """Name → first byte in the file, whose header `safe_open` has checked: its length in 8 bytes, then JSON."""
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_size))
    header.pop("__metadata__", None)
    return {name: 8 + header_size + entry["data_offsets"][0] for name, entry in header.items()}


def _check_index(folder: Path, index: dict[str, str], file_of: dict[str, str]) -> None:
    wrong = [name for name, file in index.items() if file_of.get(name) != file]
    if wrong:
        raise CheckpointError(
            f"{folder / INDEX} and the files disagree on {len(wrong)} tensors, such as {wrong[0]}",
            DOWNLOAD_AGAIN,
        )
