"""A workspace into a GGUF file that llama.cpp and others read: F16, Q8_0, Q4_0 or Q4_1 through the `gguf` package.

Codes that the chosen type can hold are written as they are; everything else is rounded by the package.
"""

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmtool.checkpoint.formats import PackedInt4, PackedInt8, open_checkpoint
from lmtool.checkpoint.gguf_blocks import BLOCK, q4_1_blocks, q8_0_blocks
from lmtool.checkpoint.gguf_config import BLOCK_NAMES, INTERLEAVED_ROPE, ROPE_FREQS, TOP_NAMES
from lmtool.checkpoint.manifest import workspace_of
from lmtool.checkpoint.workspace import Workspace
from lmtool.convert import compare
from lmtool.convert.gguf_metadata import ARCHITECTURES, add_model, add_tokenizer, rope_freqs
from lmtool.convert.place import check_file, new_file, refuse_nesting
from lmtool.convert.progress import Progress, silent
from lmtool.convert.to_hf import open_workspace
from lmtool.errors import CheckpointError, ConfigError
from lmtool.models.config import ModelConfig
from lmtool.models.loader import read_model_config
from lmtool.models.source import Source, names_of
from lmtool.tokenizer import Tokenizer, load_tokenizer
from lmtool.tokenizer.gguf import for_gguf

TYPES = ("F16", "Q8_0", "Q4_0", "Q4_1")
# how much logits may move: what 8 and 4 bits do to a model that was not made for them
_MOST_DIFFERENCE = {"F16": compare.MOST_DIFFERENCE, "Q8_0": compare.MOST_DIFFERENCE, "Q4_0": 0.7, "Q4_1": 0.7}
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class GgufMade:
    num_bytes: int
    num_tensors: int
    type: str
    difference: compare.Difference | None


def export_gguf(
    path: Path,
    destination: Path,
    *,
    kind: str | None = None,
    overwrite: bool = False,
    check: bool = True,
    progress: Progress | None = None,
) -> GgufMade:
    """kind: of the matrices; None: Q4_1 for 4-bit codes, else F16. The file is complete or not there.

    Raises InputError of the kind that fits.
    """
    if kind not in (None, *TYPES):
        raise ConfigError(f"--gguf-type is {kind!r}", "give one of " + ", ".join(TYPES))
    check_file(destination, overwrite=overwrite)
    refuse_nesting(workspace_of(path), destination, str(path))
    progress = progress or silent
    with closing(open_workspace(path)) as workspace:
        if workspace.vision is not None:
            raise ConfigError(
                f"{path} takes pictures, and a GGUF file holds a language model alone",
                "`--to hf` goes back with all that it has",
            )
        model = read_model_config(workspace.config)
        if kind is None:
            kind = (
                "Q4_1"
                if any(weight.kind in ("w4", "int4") for weight in workspace.manifest.weights.values())
                else "F16"
            )
        tokenizer = load_tokenizer(path)
        with new_file(destination, overwrite=overwrite) as partial:
            num_tensors = _write(partial, workspace, model, kind, tokenizer, progress)
            difference = _check(partial, workspace, kind, progress) if check else None
    return GgufMade(destination.stat().st_size, num_tensors, kind, difference)


# ---------------------------------------------------------------------- what is written


@dataclass(frozen=True, slots=True)
class _Planned:
    """A stretch of rows of one of our weights, under GGUF's name and in one of its types."""

    name: str
    ours: str
    first: int
    shape: tuple[int, ...]
    type: str
    heads: int  # of q and k whose rows are to be interleaved; 0: rows stay


def _planned(workspace: Workspace, model: ModelConfig, kind: str) -> Iterator[_Planned]:
    interleaves = ARCHITECTURES[model.architecture] in INTERLEAVED_ROPE
    for ours in workspace.names():
        if ours == "head.weight" and model.tie_word_embeddings:
            continue  # an int8 head of its own, which GGUF has no name for
        shape, first = workspace.shape(ours), 0
        for name, rows, heads in _pieces(ours, shape[0], model):
            piece = (rows, *shape[1:])
            yield _Planned(name, ours, first, piece, _type(ours, piece, kind), heads if interleaves else 0)
            first += rows


def _pieces(ours: str, num_rows: int, model: ModelConfig) -> list[tuple[str, int, int]]:
    """GGUF's names of one of our weights, with how many rows, of how many rotated heads."""
    tops = {"embed": "token_embd.weight", "final_norm": "output_norm.weight", "head.weight": "output.weight"}
    assert {name.split(".")[0] for name in tops.values()} == set(TOP_NAMES)
    if ours in tops:
        return [(tops[ours], num_rows, 0)]
    _, layer, matrix, *rest = ours.split(".")
    suffix = rest[0] if rest else "weight"
    q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    parts = {
        "qkv": [("attn_q", q, model.num_heads), ("attn_k", kv, model.num_kv_heads), ("attn_v", kv, 0)],
        "gate_up": [("ffn_gate", num_rows // 2, 0), ("ffn_up", num_rows // 2, 0)],
        "o": [("attn_output", num_rows, 0)],
        "down": [("ffn_down", num_rows, 0)],
        "attention_norm": [("attn_norm", num_rows, 0)],
        "mlp_norm": [("ffn_norm", num_rows, 0)],
        "q_norm": [("attn_q_norm", num_rows, 0)],
        "k_norm": [("attn_k_norm", num_rows, 0)],
    }[matrix]
    assert all(name in BLOCK_NAMES for name, _, _ in parts)
    return [(f"blk.{layer}.{name}.{suffix}", rows, heads) for name, rows, heads in parts]


def _type(ours: str, shape: tuple[int, ...], kind: str) -> str:
    """Norms and biases in float32; tables never in 4 bits; nothing in blocks that does not fill them."""
    if len(shape) == 1:
        return "F32"
    if shape[1] % BLOCK:
        return "F16"
    return "Q8_0" if kind.startswith("Q4") and not ours.startswith("layers.") else kind


def _write(
    path: Path, workspace: Workspace, model: ModelConfig, kind: str, tokenizer: Tokenizer, progress: Progress
) -> int:
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, ARCHITECTURES[model.architecture])
    add_model(writer, model, kind)
    add_tokenizer(writer, for_gguf(tokenizer, model.vocab_size), tokenizer)
    plan = list(_planned(workspace, model, kind))
    freqs = rope_freqs(model)
    if freqs is not None:
        writer.add_tensor_info(ROPE_FREQS, freqs.shape, freqs.dtype, freqs.nbytes)
    for one in plan:
        number = GGMLQuantizationType[one.type]
        writer.add_tensor_info(one.name, one.shape, np.dtype(np.float32), _num_bytes(one), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if freqs is not None:
        writer.write_tensor_data(freqs)
    for done, one in enumerate(plan):
        progress("converting", done, len(plan))
        writer.write_tensor_data(_data(workspace, model, one))
    writer.flush()
    os.fsync(writer.fout[0].fileno())
    writer.close()
    return len(plan) + (freqs is not None)


def _num_bytes(one: _Planned) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[one.type]]
    return int(np.prod(one.shape)) // block * size


def _data(workspace: Workspace, model: ModelConfig, one: _Planned) -> np.ndarray[Any, Any]:
    """The bytes of a tensor as the type has them."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    rows = slice(one.first, one.first + one.shape[0])

    def moved(part: Tensor) -> Tensor:
        return _interleaved(part[rows], one.heads)

    four, eight = workspace.packed_int4(one.ours), workspace.packed_int8(one.ours)
    if four is not None and four.order is None and one.type == "Q4_1" and _fills(four.codes, four.scale):
        part = PackedInt4(moved(four.codes), moved(four.scale), moved(four.lowest))
        return q4_1_blocks(part)
    if eight is not None and one.type == "Q8_0" and _fills(eight.codes, eight.scale):
        return q8_0_blocks(PackedInt8(moved(eight.codes), moved(eight.scale)))
    values = moved(workspace.tensor(one.ours)).float().contiguous().numpy()
    if one.type == "F32":
        return values
    if one.type == "F16" and not np.isfinite(values.astype(np.float16)).all():
        raise CheckpointError(f"{workspace.path}: {one.ours} holds numbers that F16 cannot", "give --gguf-type Q8_0")
    found: np.ndarray[Any, Any] = quantize(values, GGMLQuantizationType[one.type])
    return found


def _fills(codes: Tensor, scale: Tensor) -> bool:
    return codes.shape[1] // scale.shape[1] % BLOCK == 0


def _interleaved(rows: Tensor, heads: int) -> Tensor:
    """Halves (0, d/2), (1, d/2 + 1), … of each head to pairs (0, 1), (2, 3), …: the order of llama.cpp's Llama."""
    if not heads:
        return rows
    per_head = rows.view(heads, 2, -1, *rows.shape[1:])
    return per_head.transpose(1, 2).reshape(rows.shape)


def _check(path: Path, workspace: Workspace, kind: str, progress: Progress) -> compare.Difference:
    with closing(open_checkpoint(path)) as made:
        models = (read_model_config(checkpoint.config) for checkpoint in (workspace, made))
        expected, actual = (
            Source(checkpoint, model, names_of(checkpoint), torch.float32, _CPU)
            for checkpoint, model in zip((workspace, made), models, strict=True)
        )
        return compare.check(expected, actual, exact=False, most=_MOST_DIFFERENCE[kind], progress=progress)
