"""A finished `.state/` into a model's folder: weights, tokenizer, what was measured; config.json last."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmtool import __version__
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
    block_of: dict[str, int] = {}
    sizes: dict[str, int] = {name: 2 * count for name, count in blocks.outer_names().items()}
    head = blocks.head_tensors() if options.head_bits == 8 else {}
    if head:
        sizes = {name: size for name, size in sizes.items() if name != blocks.head_name}
        sizes |= {name: tensor.nbytes for name, tensor in head.items()}
    for i in range(len(blocks)):
        for name, size in state.sizes(i).items():
            block_of[name] = i
            sizes[name] = size

    def load(name: str) -> Tensor:
        if name in head:
            return head[name]
        if name in block_of:
            return state.tensor(block_of[name], name)
        return blocks.checkpoint.tensor(name).to(dtype)

    write_shards(work_dir, sizes, load)
    save_tokenizer(tokenizer, blocks.checkpoint.path, work_dir)
    quality = _quality(blocks, state, options, skipped, about)
    write_json(work_dir / QUALITY, quality)
    write_json(work_dir / "config.json", _config(blocks, options, dtype, skipped))
    return quality


def _config(blocks: Blocks, options: QuantOptions, dtype: torch.dtype, skipped: list[str]) -> dict[str, Any]:
    config = {key: value for key, value in blocks.checkpoint.config.items() if key not in ("torch_dtype", "dtype")}
    quantization = _said_of_awq(options, skipped) if options.format == "awq" else _said_of_gptq(options, skipped)
    if options.head_bits == 8:
        quantization["head_bits"] = 8
        if not blocks.config.tie_word_embeddings:
            # no head is left that others could read: by this name they refuse, where some would else make one up
            config.pop("auto_map", None)
            config["model_type"] = f"lmtool_{config.get('model_type', 'model')}"
    # transformers 5 reads dtype, vLLM and older readers torch_dtype
    name = str(dtype).removeprefix("torch.")
    return config | {"dtype": name, "torch_dtype": name, "quantization_config": quantization}


def _said_of_awq(options: QuantOptions, skipped: list[str]) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "bits": options.bits,
        "group_size": options.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head", *skipped],
    }


def _said_of_gptq(options: QuantOptions, skipped: list[str]) -> dict[str, Any]:
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
    return said | ({"dynamic": {f"-:{re.escape(name)}$": {} for name in names}} if skipped else {})


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
