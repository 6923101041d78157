"""A finished `.state/` into a model's folder: weights, tokenizer, what was measured; config.json last."""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmtool import __version__
from lmtool.checkpoint.vision import VisionPart, copy_picture_files
from lmtool.checkpoint.writer import write_json, write_shards
from lmtool.quant.layers import Blocks
from lmtool.quant.options import QuantOptions
from lmtool.quant.state import State
from lmtool.tokenizer import Tokenizer
from lmtool.tokenizer.save import save_tokenizer

QUALITY = "lmtool-quality.json"


def write_model(
    work_dir: Path,
    blocks: Blocks,
    state: State,
    tokenizer: Tokenizer,
    options: QuantOptions,
    dtype: torch.dtype,
    skipped: list[str],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything but `.state/`; the quality report is returned. about: of the model and the calibration text."""
    tensors = _tensors(blocks, state, options, dtype)
    write_shards(work_dir, {name: size for name, (size, _) in tensors.items()}, lambda name: tensors[name][1]())
    save_tokenizer(tokenizer, blocks.checkpoint.path, work_dir)
    if blocks.checkpoint.vision is not None:
        copy_picture_files(blocks.checkpoint.path, work_dir)
    quality = _quality(blocks, state, options, skipped, about)
    write_json(work_dir / QUALITY, quality)
    write_json(work_dir / "config.json", _config(blocks, options, dtype, skipped))
    return quality


def _tensors(
    blocks: Blocks, state: State, options: QuantOptions, dtype: torch.dtype
) -> dict[str, tuple[int, Callable[[], Tensor]]]:
    """Of each tensor of the files, under its name there: its bytes, and how to get it."""
    checkpoint, vision = blocks.checkpoint, blocks.checkpoint.vision
    found: dict[str, tuple[int, Callable[[], Tensor]]] = {}

    def add(name: str, num_bytes: int, load: Callable[[], Tensor]) -> None:
        found[blocks.stored_name(name)] = (num_bytes, load)

    def rounded(name: str) -> Tensor:
        return checkpoint.tensor(name).to(dtype)

    head = blocks.head_tensors() if options.head_bits == 8 else {}
    for name, count in blocks.outer_names().items():
        if not head or name != blocks.head_name:
            add(name, dtype.itemsize * count, partial(rounded, name))
    for name, tensor in head.items():
        add(name, tensor.nbytes, partial(head.__getitem__, name))
    for i in range(len(blocks)):
        for name, size in state.sizes(i).items():
            add(name, size, partial(state.tensor, i, name))
    if vision is not None:
        for name in vision.names():
            add(name, vision.num_bytes_of(name), partial(vision.tensor, name))
    return found


def _config(blocks: Blocks, options: QuantOptions, dtype: torch.dtype, skipped: list[str]) -> dict[str, Any]:
    vision = blocks.checkpoint.vision
    whole = blocks.checkpoint.config if vision is None else vision.written_config
    config = {key: value for key, value in whole.items() if key not in ("torch_dtype", "dtype")}
    said = _said_of_awq if options.format == "awq" else _said_of_gptq
    quantization = said(options, skipped, vision)
    if options.head_bits == 8:
        quantization["head_bits"] = 8
        if not blocks.config.tie_word_embeddings:
            # no head is left that others could read: by this name they refuse, where some would else make one up
            config.pop("auto_map", None)
            config["model_type"] = f"lmtool_{config.get('model_type', 'model')}"
    # transformers 5 reads dtype, vLLM and older readers torch_dtype
    name = str(dtype).removeprefix("torch.")
    return config | {"dtype": name, "torch_dtype": name, "quantization_config": quantization}


def _said_of_awq(options: QuantOptions, skipped: list[str], vision: VisionPart | None) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "bits": options.bits,
        "group_size": options.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head", *(_ends(skipped) + vision.form.vision_modules if vision else skipped)],
    }


def _said_of_gptq(options: QuantOptions, skipped: list[str], vision: VisionPart | None) -> dict[str, Any]:
    """The first version of the format: all readers know it, and some take the second for the first."""
    said: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": options.bits,
        "group_size": options.group_size,
        "sym": options.symmetric,
        "desc_act": False,
        "checkpoint_format": "gptq",
        "lm_head": False,
    }
    # gptqmodel and vLLM leave out what a "-:" pattern matches; vLLM asks for its own fused matrices
    names = dict.fromkeys(other for name in skipped for other in (name, _fused(name)))
    patterns = [f"{re.escape(name)}$" for name in names]
    if vision is not None:  # each of them has a beginning of its own for the language model's names
        patterns = [f".*{re.escape(name)}$" for name in _ends(names)]
        patterns += [f".*{module}" for module in vision.form.vision_modules if "." not in module]
    return said | ({"dynamic": {f"-:{pattern}": {} for pattern in patterns}} if patterns else {})


def _ends(names: Iterable[str]) -> list[str]:
    """layers.3.mlp.down_proj of model.layers.3.mlp.down_proj: what all readers' names of a LLaVA's linear end with."""
    return [name[name.index("layers.") :] for name in names]


def _fused(name: str) -> str:
    """The name of the matrix of which vLLM makes a linear a part."""
    stem, _, last = name.rpartition(".")
    fused = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj")
    fused |= dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj")
    return f"{stem}.{fused.get(last, last)}"


def _quality(
    blocks: Blocks, state: State, options: QuantOptions, skipped: list[str], about: Mapping[str, Any]
) -> dict[str, Any]:
    """The skeleton of the report: `lite eval` adds perplexity, KL and agreement under "evaluation"."""
    layers = [state.report(i) for i in range(len(blocks))]
    return {
        "lmtool": __version__,
        "method": options.method,
        "format": options.format,
        "bits": options.bits,
        "symmetric": options.symmetric,
        "group_size": options.group_size,
        "bits_per_weight": options.bits_per_weight,
        "head_bits": options.head_bits,
        **about,
        **({"vision_bytes": vision.num_bytes} if (vision := blocks.checkpoint.vision) is not None else {}),
        "skipped": skipped,
        "layers": layers,
        "fallbacks": [
            {"linear": name, "reason": entry["note"]}
            for layer in layers
            for entry in layer["linears"]
            if entry["note"]
            for name in entry["names"]
        ],
        "evaluation": None,
    }
