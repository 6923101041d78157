"""A workspace back into a folder of Hugging Face's files: numbers, or AWQ where every code can be said in it."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmtool.checkpoint.formats import PackedInt8, open_checkpoint
from lmtool.checkpoint.manifest import workspace_of
from lmtool.checkpoint.packing import pack_awq
from lmtool.checkpoint.quantized import head_parts
from lmtool.checkpoint.reader import INDEX, SINGLE
from lmtool.checkpoint.tensor_file import TensorFile
from lmtool.checkpoint.vision import copy_picture_files
from lmtool.checkpoint.workspace import Workspace
from lmtool.checkpoint.writer import write_json
from lmtool.convert import compare
from lmtool.convert.job import check_dtype
from lmtool.convert.place import new_folder, refuse_nesting
from lmtool.convert.progress import Progress, silent
from lmtool.convert.stored import as_dtype
from lmtool.convert.to_workspace import SHARD_BYTES
from lmtool.convert.vision import check_vision, vision_tensors
from lmtool.convert.whole import check_weights
from lmtool.errors import ConfigError
from lmtool.models.hf_view import HfView
from lmtool.models.loader import read_model_config
from lmtool.models.source import Source, names_of
from lmtool.tokenizer import load_tokenizer
from lmtool.tokenizer.save import save_tokenizer

CODES = ("int4", "q4_1", "q8_0")  # dtypes of weights that are not numbers
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Exported:
    """What was made. why_numbers: why 4-bit codes were not written as codes; None: they were, or there were none."""

    num_bytes: int
    num_tensors: int
    quantized: bool
    why_numbers: str | None
    difference: compare.Difference | None


def open_workspace(path: Path) -> Workspace:
    """Raises ConfigError for anything else, CheckpointError for one whose weights are not those of its config."""
    if not path.exists() and not workspace_of(path).exists():
        raise ConfigError(f"{path} does not exist", "give a workspace: `lmtool convert MODEL` makes one")
    checkpoint = open_checkpoint(path)
    if not isinstance(checkpoint, Workspace):
        checkpoint.close()
        raise ConfigError(f"{path} is no workspace", "`lmtool convert` makes one of it; then go on from there")
    check_weights(checkpoint, read_model_config(checkpoint.config))
    return checkpoint


def export(
    path: Path,
    destination: Path,
    *,
    dtype: str = "auto",
    dense: bool = False,
    overwrite: bool = False,
    check: bool = True,
    progress: Progress | None = None,
) -> Exported:
    """dtype: of the numbers; 'auto': as stored, float16 for codes that become numbers. dense: all codes do.

    Raises InputError of the kind that fits, and leaves the destination as it was.
    """
    check_dtype(dtype)
    refuse_nesting(workspace_of(path), destination, str(path))
    progress = progress or silent
    with closing(open_workspace(path)) as workspace, new_folder(destination, overwrite=overwrite) as folder:
        model = read_model_config(workspace.config)
        view = HfView(workspace, model)
        why = "--dense was given" if dense else _why_not_awq(workspace)
        packed = {name for name in view.names() if view.dtype(name) in CODES}
        as_codes = {name for name in packed if view.dtype(name) == "int4"} if why is None else set()
        wanted = None if dtype == "auto" else getattr(torch, dtype)
        num_tensors = _write_shards(folder, _all_tensors(view, as_codes, wanted, progress), _most_tensors(view))
        tokenizer = load_tokenizer(path)
        save_tokenizer(tokenizer, path, folder)
        copy_picture_files(workspace_of(path), folder)
        if workspace.generation_config:
            write_json(folder / "generation_config.json", workspace.generation_config)
        made = "float16" if packed - as_codes else workspace.manifest.dtype
        name = made if dtype == "auto" else dtype
        write_json(folder / "config.json", _config(workspace, view, as_codes, name))
        heads = {name for name in packed if int8_head(view, name) is not None}
        exact = wanted == torch.float32 or (wanted is None and not packed - as_codes - (heads if as_codes else set()))
        difference = _check(workspace, folder, exact=exact, progress=progress) if check else None
    num_bytes = sum(file.stat().st_size for file in destination.iterdir())
    return Exported(num_bytes, num_tensors, bool(as_codes), why if packed else None, difference)


def _why_not_awq(workspace: Workspace) -> str | None:
    """AWQ's format knows zero points, one group size, and in features as they come."""
    weights = [
        weight
        for name, weight in workspace.manifest.weights.items()
        if name.startswith("layers.") and weight.kind in ("w4", "int4")
    ]
    if any(weight.kind == "int4" for weight in weights):
        return "AWQ has zero points and these weights have minimums (GGUF's Q4_1)"
    if any("order" in weight.parts for weight in weights):
        return "AWQ cannot say GPTQ's act-order"
    if len({weight.group_size for weight in weights}) > 1:
        return "AWQ has one group size and these weights have several"
    if any(weight.shape[0] % 8 for weight in weights):
        return "AWQ packs out features in eights"
    return None


def _most_tensors(view: HfView) -> int:
    return 4 * len(view.names()) + (len(view.vision.names()) if view.vision is not None else 0)


def _all_tensors(
    view: HfView, as_codes: set[str], dtype: torch.dtype | None, progress: Progress
) -> Iterator[tuple[str, Tensor]]:
    """Under the names of the files: a LLaVA's are those of the form that it came from."""
    tensors = _tensors(view, as_codes, dtype, progress)
    if view.vision is None:
        yield from tensors
        return
    form = view.vision.form
    for name, tensor in tensors:
        yield form.stored(name), tensor
    for name, values in vision_tensors(view.vision, dtype, progress):
        yield form.stored(name), values


def _tensors(
    view: HfView, as_codes: set[str], dtype: torch.dtype | None, progress: Progress
) -> Iterator[tuple[str, Tensor]]:
    names = view.names()
    for done, name in enumerate(names):
        progress("converting", done, len(names))
        if name in as_codes:
            packed = view.packed_int4(name)
            assert packed is not None
            assert packed.zero is not None
            stem = name.removesuffix("weight")
            parts = pack_awq(packed.codes, packed.scale, packed.zero)
            yield from zip((stem + part for part in ("qweight", "qzeros", "scales")), parts, strict=True)
        elif (head := int8_head(view, name)) is not None and as_codes:
            yield from zip(head_parts(name), (head.codes, head.scale[:, 0]), strict=True)
        elif head is None or not view.tied:  # as numbers a head of its own has no place in a tied model
            values = view.tensor(name)
            made = view.dtype(name) in CODES
            yield name, as_dtype(values, dtype or (torch.float16 if made else values.dtype), f"{view.path}: {name}")
    progress("converting", len(names), len(names))


def int8_head(view: HfView, name: str) -> PackedInt8 | None:
    """One scale a row: what `lmtool lite --head-bits 8` makes."""
    packed = view.packed_int8(name)
    return packed if packed is not None and packed.scale.shape[1] == 1 else None


def _write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]], most_tensors: int) -> int:
    """The number of tensors. How many files there will be is known at the end: then they get their names."""
    file_of: dict[str, int] = {}
    sizes: list[int] = []
    following = next(tensors, None)
    while following is not None:
        with TensorFile(folder / f"{len(sizes)}.partial", most_tensors) as file:
            while following is not None and file.num_bytes < SHARD_BYTES:
                file.add(*following)
                file_of[following[0]] = len(sizes)
                following = next(tensors, None)
        sizes.append(file.num_bytes)
    count = len(sizes)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for i, name in enumerate(names):
        (folder / f"{i}.partial").rename(folder / name)
    if count > 1:
        weight_map = {tensor: names[i] for tensor, i in file_of.items()}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map})
    return len(file_of)


def _config(workspace: Workspace, view: HfView, as_codes: set[str], dtype: str) -> dict[str, Any]:
    vision = workspace.vision
    whole = workspace.config if vision is None else vision.config
    config = whole | {"dtype": dtype, "torch_dtype": dtype}
    if as_codes:
        (group_size,) = {weight.group_size for weight in workspace.manifest.weights.values() if weight.kind == "w4"}
        dense = [
            stem
            for name in view.names()
            if name not in as_codes and len(view.shape(name)) == 2
            for stem in (_end(name.removesuffix(".weight")) if vision else name.removesuffix(".weight"),)
            if "embed" not in stem and "wte" not in stem
        ]
        head = {"head_bits": 8} if any(int8_head(view, name) is not None for name in view.names()) else {}
        config["quantization_config"] = head | {
            "quant_method": "awq",
            "bits": 4,
            "group_size": group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": (dense or ["lm_head"]) + (vision.form.vision_modules if vision else []),
        }
    return config


def _end(name: str) -> str:
    """layers.3.mlp.down_proj: what all readers' names of a LLaVA's linear end with."""
    return name[name.index("layers.") :] if "layers." in name else name


def _check(workspace: Workspace, folder: Path, *, exact: bool, progress: Progress) -> compare.Difference:
    with closing(open_checkpoint(folder)) as made:
        model = read_model_config(made.config)
        expected = Source(workspace, model, names_of(workspace), torch.float32, _CPU)
        actual = Source(made, model, names_of(made), torch.float32, _CPU)
        check_vision(workspace, made)
        return compare.check(expected, actual, exact=exact, progress=progress)
