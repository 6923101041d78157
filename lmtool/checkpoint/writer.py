"""Writing a model folder so that no half of it is ever taken for a model: files are renamed in whole, config.json last.

Does not know what the tensors mean.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from lmtool.checkpoint.reader import INDEX, SINGLE

SHARD_BYTES = 2 << 30


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """One safetensors file, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        partial,
        metadata={"format": "pt", **(metadata or {})},
    )
    _into_place(partial, path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """One JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    _into_place(partial, path)


def write_shards(
    folder: Path, sizes: Mapping[str, int], load: Callable[[str], Tensor], shard_bytes: int = SHARD_BYTES
) -> list[str]:
    """All tensors of a model, in the order of ``sizes`` (name → bytes), one shard in memory at a time.

    Returns the names of the files: model.safetensors alone, or numbered shards and their index.
    """
    shards = _planned(sizes, shard_bytes)
    files = [SINGLE] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(len(shards))]
    for file, names in zip(files, shards, strict=True):
        write_tensors(folder / file, {name: load(name) for name in names})
    if len(shards) == 1:
        return files
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
    return [*files, INDEX]


def _planned(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _shard_name(i: int, count: int) -> str:
    return f"model-{i + 1:05d}-of-{count:05d}.safetensors"


def _into_place(partial: Path, path: Path) -> None:
    """The bytes are on the disk before the name is: a power cut leaves the old file or the new one."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    mask = os.umask(0)
    os.umask(mask)
    partial.chmod(0o666 & ~mask)  # safetensors makes files that only their owner reads
    partial.replace(path)
