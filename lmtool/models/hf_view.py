"""A workspace under Hugging Face's names, so that whatever reads such a folder reads a workspace too.

The loader's way backwards: what was stacked is cut, what a family moved is moved back.
"""

from typing import Any

import torch
from torch import Tensor

from lmtool.checkpoint.formats import Checkpoint, PackedInt4, PackedInt8, StoredW4
from lmtool.checkpoint.staging import StoredTensor
from lmtool.errors import CheckpointError
from lmtool.models.config import ModelConfig
from lmtool.models.registry import family
from lmtool.models.source import in_stored_order


class HfView:
    """`Checkpoint` over a workspace. Every tensor is made: nothing lies in a file as it is shown."""

    def __init__(self, workspace: Checkpoint, config: ModelConfig) -> None:
        self.path = workspace.path
        self.format = workspace.format
        self.config: dict[str, Any] = workspace.config
        self.generation_config = workspace.generation_config
        self.vision = workspace.vision
        self.tied = config.tie_word_embeddings
        self._workspace = workspace
        self._model = config
        self._names = family(workspace.config)
        present = set(workspace.names())
        # theirs -> (ours with its layer, ours, first row, number of rows)
        self._places: dict[str, tuple[str, str, int, int]] = {}
        for ours, theirs in self._names.NAMES.items():
            for i in range(config.num_layers if "{i}" in ours else 1):
                if ours.format(i=i) in present:
                    self._place(ours, i, theirs)

    def _place(self, ours: str, i: int, theirs: tuple[str, ...]) -> None:
        stored = ours.format(i=i)
        num_rows = self._workspace.shape(stored)[0]
        first = 0
        for name, rows in zip(theirs, _rows(ours, len(theirs), num_rows, self._model), strict=True):
            self._places[name.format(i=i)] = (stored, ours, first, rows)
            first += rows

    def names(self) -> list[str]:
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        stored, _, _, rows = self._at(name)
        return (rows, *self._workspace.shape(stored)[1:])

    def dtype(self, name: str) -> str:
        return self._workspace.dtype(self._at(name)[0])

    def tensor(self, name: str) -> Tensor:
        stored, ours, first, rows = self._at(name)
        values = self._workspace.stored(stored)
        if values is not None:
            return self._moved_back(ours, values.read_slice(0, first, first + rows))
        return self._moved_back(ours, self._workspace.tensor(stored)[first : first + rows])

    def packed_int4(self, name: str, device: torch.device | None = None) -> PackedInt4 | None:
        stored, ours, first, rows = self._at(name)
        packed = self._workspace.packed_int4(stored, device)
        if packed is None:
            return None

        def cut(part: Tensor | None) -> Tensor | None:
            return None if part is None else self._moved_back(ours, part[first : first + rows])

        codes, scale = cut(packed.codes), cut(packed.scale)
        assert codes is not None
        assert scale is not None
        return PackedInt4(codes, scale, cut(packed.minimum), cut(packed.zero), packed.order)

    def stored(self, name: str) -> StoredTensor | None:
        self._at(name)
        return None

    def stored_w4(self, name: str) -> StoredW4 | None:
        self._at(name)
        return None

    def packed_int8(self, name: str) -> PackedInt8 | None:
        stored, ours, first, rows = self._at(name)
        packed = self._workspace.packed_int8(stored)
        if packed is None:
            return None
        parts = (part[first : first + rows] for part in (packed.codes, packed.scale))
        return PackedInt8(*(self._moved_back(ours, part) for part in parts))

    def close(self) -> None:
        self._workspace.close()

    def _at(self, name: str) -> tuple[str, str, int, int]:
        if name not in self._places:
            raise CheckpointError(f"{self.path} holds no tensor {name}")
        return self._places[name]

    def _moved_back(self, ours: str, rows: Tensor) -> Tensor:
        return in_stored_order(self._names, ours, rows, self._model).contiguous()


def _rows(ours: str, num_names: int, num_rows: int, model: ModelConfig) -> list[int]:
    """How many rows each of a family's names has of one of ours."""
    if num_names == 1:
        return [num_rows]
    if ".qkv." in ours:
        return [model.num_heads * model.head_dim, *[model.num_kv_heads * model.head_dim] * 2]
    return [num_rows // num_names] * num_names


def huggingface_names(checkpoint: Checkpoint, config: ModelConfig) -> Checkpoint:
    """A checkpoint that has Hugging Face's names: itself, or a view of a workspace."""
    return HfView(checkpoint, config) if checkpoint.format == "lmtool" else checkpoint
