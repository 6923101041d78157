"""``lmtool.json``, the manifest of a workspace: its keys, and whether it is true to itself (docs/format.md)."""

from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
import torch

from lmtool import kernels
from lmtool.checkpoint.manifest import MANIFEST
from lmtool.errors import CheckpointError

FORMAT_VERSION = 2
TEXT_VERSION = 1  # of a model that takes no pictures: every lmtool reads that
CONVERT_AGAIN = "convert the model again"
# what a weight of each kind is made of; those in brackets may be absent
PARTS = {
    "dense": ("values",),
    "w4": ("tiles", "order"),
    "int4": ("codes", "scale", "minimum"),
    "int8": ("codes", "scale"),
}
_MAY_BE_ABSENT = {"order"}
VISION = "vision."  # before our names of what a LLaVA sees with


class TensorEntry(msgspec.Struct, forbid_unknown_fields=True):
    """Where a tensor is: ``name`` in ``file``."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    xxh3: str


class WeightEntry(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A weight in the loader's names. group_size: of all kinds but 'dense'; paired: of 'w4'."""

    kind: str
    shape: tuple[int, ...]
    parts: dict[str, TensorEntry]
    group_size: int = 0
    paired: bool = False


class SourceEntry(msgspec.Struct, forbid_unknown_fields=True):
    """What the workspace was made of: a name, its format, and the checksum of each weight file."""

    name: str
    format: str
    files: dict[str, str]


class Manifest(msgspec.Struct, forbid_unknown_fields=True):
    """``lmtool.json``. config: as in the source's config.json; quantization: as lmtool found it, for people; names: of
    a LLaVA, how its files begin what we begin as the key says."""

    format_version: int
    lmtool_version: str
    source: SourceEntry
    config: dict[str, Any]
    generation_config: dict[str, Any]
    dtype: str
    quantization: dict[str, Any] | None
    chat_template: str | None
    weights: dict[str, WeightEntry]
    names: dict[str, str] = {}


class _Version(msgspec.Struct):
    format_version: int


def read_manifest(folder: Path) -> Manifest:
    """``lmtool.json`` of a folder, checked in itself. Raises CheckpointError."""
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
        version = msgspec.json.decode(data, type=_Version).format_version
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", CONVERT_AGAIN) from error
    if version < 1:
        raise CheckpointError(f"{path} is damaged: its format version is {version}", CONVERT_AGAIN)
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, this lmtool reads up to {FORMAT_VERSION}",
            "update lmtool, or convert the model with this one",
        )
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{path} is damaged: {error}", CONVERT_AGAIN) from error
    for name, weight in manifest.weights.items():
        _check_weight(path, name, weight)
    return manifest


def _check_weight(path: Path, name: str, weight: WeightEntry) -> None:
    known = PARTS.get(weight.kind, ())
    needed = set(known) - _MAY_BE_ABSENT
    if not needed or not needed <= set(weight.parts) <= set(known):
        raise CheckpointError(f"{path}: {name} is of kind {weight.kind!r} in {sorted(weight.parts)}", CONVERT_AGAIN)
    if weight.kind != "dense" and not _has_groups(weight):
        raise CheckpointError(f"{path}: {name} has groups of {weight.group_size} in {weight.shape}", CONVERT_AGAIN)
    shapes = _part_shapes(weight)
    for part, entry in weight.parts.items():
        if entry.shape != shapes[part]:
            said = f"{weight.kind!r} {list(weight.shape)} and its {part} {list(entry.shape)}, not {list(shapes[part])}"
            raise CheckpointError(f"{path}: {name} is {said}", CONVERT_AGAIN)
        check_tensor_name(path, entry.name)
        if PurePosixPath(entry.file).name != entry.file or not entry.file.endswith(".safetensors"):
            raise CheckpointError(f"{path} puts {entry.name} into {entry.file!r}, no file of its folder", CONVERT_AGAIN)


def _has_groups(weight: WeightEntry) -> bool:
    g = weight.group_size
    whole = len(weight.shape) == 2 and g >= 1 and weight.shape[0] >= 1 and weight.shape[1] % g == 0
    return whole and (weight.kind != "w4" or kernels.W4_LARGEST_GROUP % g == 0)


def _part_shapes(weight: WeightEntry) -> dict[str, tuple[int, ...]]:
    """What the tensors of a weight have, part by part (docs/format.md)."""
    if weight.kind == "dense":
        return {"values": weight.shape}
    num_out, num_in = weight.shape
    groups = (num_out, num_in // weight.group_size)
    if weight.kind == "w4":
        meta = torch.device("meta")
        tiles = kernels.empty_w4(num_out, num_in, weight.group_size, meta, paired=weight.paired)
        return {"tiles": tuple(tiles.tiles.shape), "order": (num_in,)}
    codes = (num_out, num_in // 2 if weight.kind == "int4" else num_in)
    return {"codes": codes, "scale": groups, "minimum": groups}


def check_tensor_name(where: Path, name: str) -> None:
    """Names become file names and keys elsewhere: nothing but words between dots. Raises CheckpointError."""
    if not all(part and part.replace("_", "").replace("-", "").isalnum() for part in name.split(".")):
        raise CheckpointError(f"{where} holds a tensor named {name!r}", "a name is words between single dots")
