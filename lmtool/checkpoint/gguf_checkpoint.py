"""`Checkpoint` over one GGUF file: HF's names, HF's order of rows, dequantized or as 4-bit codes.

K-quants and the like are unpacked by the `gguf` package. Does not know model families.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lmtool.checkpoint.formats import PackedInt4, PackedInt8, StoredW4
from lmtool.checkpoint.gguf_blocks import unpack_int4, unpack_int8
from lmtool.checkpoint.gguf_config import INTERLEAVED_ROPE, ROPE_FREQS, hf_config, hf_name
from lmtool.checkpoint.gguf_file import GgufFile
from lmtool.checkpoint.staging import StoredTensor
from lmtool.errors import CheckpointError

if TYPE_CHECKING:
    from lmtool.checkpoint.vision import VisionPart


class GgufCheckpoint:
    format = "gguf"
    vision: "VisionPart | None" = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = GgufFile(path)
        self.config = hf_config(self.file)
        self.generation_config: dict[str, Any] = {}
        self._stored_names = {hf_name(name): name for name in self.file.tensors if name != ROPE_FREQS}
        self._interleaved = self.file.metadata["general.architecture"] in INTERLEAVED_ROPE

    def names(self) -> list[str]:
        return list(self._stored_names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.file.tensors[self._stored(name)].shape

    def dtype(self, name: str) -> str:
        return self.file.tensors[self._stored(name)].type.name

    def tensor(self, name: str) -> torch.Tensor:
        return self._half_split_rows(name, self._dense(self._stored(name)))

    def stored(self, name: str) -> StoredTensor | None:
        self._stored(name)
        return None

    def stored_w4(self, name: str) -> StoredW4 | None:
        return None

    def packed_int4(self, name: str, device: torch.device | None = None) -> PackedInt4 | None:
        stored = self._stored(name)
        kind = self.file.tensors[stored].type.name
        if kind not in ("q4_0", "q4_1"):
            return None
        codes, scale, minimum = unpack_int4(self.file.blocks(stored), kind)
        return PackedInt4(*(self._half_split_rows(name, part).to(device or "cpu") for part in (codes, scale, minimum)))

    def packed_int8(self, name: str) -> PackedInt8 | None:
        stored = self._stored(name)
        if self.file.tensors[stored].type.name != "q8_0":
            return None
        packed = unpack_int8(self.file.blocks(stored))
        return PackedInt8(self._half_split_rows(name, packed.codes), self._half_split_rows(name, packed.scale))

    def close(self) -> None:
        """Nothing to do: the mapping goes with the last view of it."""

    def _stored(self, name: str) -> str:
        if name not in self._stored_names:
            raise CheckpointError(f"{self.path} holds no tensor {name}")
        return self._stored_names[name]

    def _dense(self, stored: str) -> torch.Tensor:
        entry = self.file.tensors[stored]
        blocks = self.file.blocks(stored)
        if entry.type.name in ("float32", "float16", "bfloat16"):
            return torch.from_numpy(blocks).view(getattr(torch, entry.type.name)).view(entry.shape)
        if entry.type.name in ("q4_0", "q4_1"):
            # the package takes 1.1 s for SmolLM2's 210 matrices, this 0.3 s
            return PackedInt4(*unpack_int4(blocks, entry.type.name)).dequantize().view(entry.shape)
        if entry.type.name == "q8_0":
            return unpack_int8(blocks).dequantize().view(entry.shape)
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        dense = dequantize(blocks, GGMLQuantizationType(entry.type_id))
        return torch.from_numpy(dense).view(entry.shape)

    def _half_split_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Undo the converter's order of q and k: pairs (0, 1), (2, 3), … back to halves (0, d/2), (1, d/2 + 1), …"""
        if not self._interleaved or ".self_attn." not in name:
            return rows
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if heads is None:
            return rows
        per_head = rows.view(self.config[heads], -1, 2, *rows.shape[1:])  # [heads, d/2, 2, …]
        return per_head.transpose(1, 2).reshape(rows.shape)
