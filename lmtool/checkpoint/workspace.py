"""The engine's own format: a folder whose tensors have our names and lie as the kernels want them (docs/format.md).

``lmtool.json`` names every weight, how it is stored, and the checksum of each of its tensors. Does not know model
families.
"""

from pathlib import Path

import torch
from torch import Tensor

from lmtool import kernels
from lmtool.checkpoint.formats import Checkpoint, PackedInt4, PackedInt8, StoredW4
from lmtool.checkpoint.llava_config import architecture_of, language_config, stated_tower
from lmtool.checkpoint.llava_names import NameForm
from lmtool.checkpoint.manifest import MANIFEST
from lmtool.checkpoint.reader import DTYPE_NAMES, open_shard, tensor_starts
from lmtool.checkpoint.staging import StoredTensor
from lmtool.checkpoint.tensor_file import checksum, tensor_bytes
from lmtool.checkpoint.vision import VisionPart
from lmtool.checkpoint.workspace_manifest import CONVERT_AGAIN, VISION, TensorEntry, WeightEntry, read_manifest
from lmtool.errors import CheckpointError
from lmtool.kernels.w4_layout import W4Tiles


class Workspace:
    """`Checkpoint` over a workspace, whose names are the loader's own."""

    format = "lmtool"
    vision: VisionPart | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        self.config = self.manifest.config
        self.generation_config = self.manifest.generation_config
        self._weights = self.manifest.weights
        self._stored = self._find_tensors()
        if architecture_of(self.config) is not None:
            self._split()

    def names(self) -> list[str]:
        return [name for name in self._weights if not name.startswith(VISION)]

    def all_names(self) -> list[str]:
        """Of what it sees with, too: for whoever reads all that there is."""
        return list(self._weights)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weight(name).shape

    def dtype(self, name: str) -> str:
        """A dense weight's dtype; 'int4' with zero points, 'q4_1' with minimums, 'q8_0'."""
        weight = self._weight(name)
        return {"w4": "int4", "int4": "q4_1", "int8": "q8_0"}.get(weight.kind) or weight.parts["values"].dtype

    def tensor(self, name: str) -> Tensor:
        """Of a quantized weight the numbers that its codes stand for, float32."""
        weight = self._weight(name)
        if weight.kind == "dense":
            return self._part(name, "values").read()
        if (codes := self.packed_int8(name)) is not None:
            return codes.dequantize()
        packed = self.packed_int4(name)
        assert packed is not None
        dense = packed.dequantize()
        return dense if packed.order is None else dense[:, packed.order.argsort()]

    def stored(self, name: str) -> StoredTensor | None:
        return self._part(name, "values") if self._weight(name).kind == "dense" else None

    def stored_w4(self, name: str) -> StoredW4 | None:
        weight = self._weight(name)
        if weight.kind != "w4":
            return None
        num_out, num_in = weight.shape
        order = self._part(name, "order") if "order" in weight.parts else None
        return StoredW4(self._part(name, "tiles"), num_out, num_in, weight.group_size, weight.paired, order)

    def packed_int4(self, name: str, device: torch.device | None = None) -> PackedInt4 | None:
        weight = self._weight(name)
        if weight.kind not in ("w4", "int4"):
            return None
        parts = {part: self._part(name, part).read().to(device or "cpu") for part in weight.parts}
        if weight.kind == "int4":
            return PackedInt4(split_nibbles(parts["codes"]), parts["scale"].float(), parts["minimum"].float())
        num_out, num_in = weight.shape
        codes, scale, zero = kernels.unpack_w4(W4Tiles(parts["tiles"], num_out, num_in, weight.paired))
        return PackedInt4(codes, scale, None, zero, parts.get("order"))

    def packed_int8(self, name: str) -> PackedInt8 | None:
        if self._weight(name).kind != "int8":
            return None
        return PackedInt8(self._part(name, "codes").read(), self._part(name, "scale").read())

    def close(self) -> None:
        """Nothing is held open."""

    def verify(self, name: str) -> None:
        """Read a weight's bytes again. Raises CheckpointError where they are not those that were written."""
        for part, entry in self._weight(name).parts.items():
            if checksum(tensor_bytes(self._part(name, part).read())) != entry.xxh3:
                raise CheckpointError(
                    f"{self.path / entry.file}: the bytes of {entry.name} are not those that were written",
                    f"the file is damaged: {CONVERT_AGAIN}",
                )

    def part_bytes(self, name: str) -> int:
        """Of a weight in its files."""
        return sum(self._part(name, part).num_bytes for part in self._weight(name).parts)

    def _split(self) -> None:
        """Of a LLaVA: the language model's part is what a workspace is of, the other is its `vision`."""
        whole, form = self.config, NameForm(self.manifest.names)
        tower = stated_tower(whole)
        if tower is None or not form.is_whole:
            raise CheckpointError(f"{self.path / MANIFEST} does not say what it sees with", CONVERT_AGAIN)
        places: dict[str, tuple[Checkpoint, str]] = {
            name.removeprefix(VISION): (self, name) for name in self._weights if name.startswith(VISION)
        }
        self.vision = VisionPart(whole, tower, places, form, self.path)
        self.config = language_config(whole)

    def _weight(self, name: str) -> WeightEntry:
        if name not in self._weights:
            raise CheckpointError(f"{self.path} holds no weight {name}")
        return self._weights[name]

    def _part(self, name: str, part: str) -> StoredTensor:
        return self._stored[self._weights[name].parts[part].name]

    def _find_tensors(self) -> dict[str, StoredTensor]:
        entries = [entry for weight in self._weights.values() for entry in weight.parts.values()]
        found: dict[str, StoredTensor] = {}
        for file in sorted({entry.file for entry in entries}):
            found |= self._tensors_of(file, [entry for entry in entries if entry.file == file])
        return found

    def _tensors_of(self, file: str, entries: list[TensorEntry]) -> dict[str, StoredTensor]:
        path = self.path / file
        if not path.exists():
            raise CheckpointError(f"{path} is missing", CONVERT_AGAIN)
        shard, starts = open_shard(path), tensor_starts(path)
        found = {}
        for entry in entries:
            if entry.name not in starts:
                raise CheckpointError(f"{path} holds no tensor {entry.name}", CONVERT_AGAIN)
            part = shard.get_slice(entry.name)
            has = (DTYPE_NAMES.get(part.get_dtype(), part.get_dtype()), tuple(part.get_shape()))
            if has != (entry.dtype, entry.shape):
                raise CheckpointError(
                    f"{path}: {entry.name} is {has[0]} {list(has[1])}, {MANIFEST} says {entry.dtype} "
                    f"{list(entry.shape)}",
                    CONVERT_AGAIN,
                )
            found[entry.name] = StoredTensor(path, starts[entry.name], entry.shape, getattr(torch, entry.dtype))
        return found


def split_nibbles(packed: Tensor) -> Tensor:
    """uint8 [N, K / 2] → codes uint8 [N, K]: in feature 2i in the low half of byte i."""
    pairs = packed.to(torch.int16)  # both halves at once: a third of the time of filling every other byte
    return (pairs & 15).bitwise_or_((pairs >> 4).bitwise_left_shift_(8)).view(torch.uint8)


def join_nibbles(codes: Tensor) -> Tensor:
    """The inverse of `split_nibbles`."""
    return codes[:, 0::2] | codes[:, 1::2] << 4
