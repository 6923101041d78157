"""A finished `.state/` into a model's folder: weights, tokenizer, what was measured; config.json last."""

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
    for i in range(len(blocks)):
        for name, size in state.sizes(i).items():
            block_of[name] = i
            sizes[name] = size

    def load(name: str) -> Tensor:
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
    quantization = {
        "quant_method": "awq",
        "bits": options.bits,
        "group_size": options.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head", *skipped],
    }
    # transformers 5 reads dtype, vLLM and older readers torch_dtype
    name = str(dtype).removeprefix("torch.")
    return config | {"dtype": name, "torch_dtype": name, "quantization_config": quantization}


def _quality(
    blocks: Blocks, state: State, options: QuantOptions, skipped: list[str], about: Mapping[str, Any]
) -> dict[str, Any]:
    """The skeleton of the report: `lite eval` adds perplexity, KL and agreement under "evaluation"."""
    layers = [state.report(i) for i in range(len(blocks))]
    return {
        "lmtool": __version__,
        "method": options.method,
        "bits": options.bits,
        "group_size": options.group_size,
        "bits_per_weight": options.bits + (16 + options.bits) / options.group_size,
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
