"""A rank's weights in memory, and its kernels on their way: out of files, or random ones in a shape."""

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lmtool import kernels
from lmtool.checkpoint.engine_file import under_engine_file
from lmtool.checkpoint.formats import open_checkpoint
from lmtool.config import EngineConfig
from lmtool.engine.device import choose_device, choose_dtype, free_bytes, memory_short
from lmtool.engine.device_runner import DeviceRunner
from lmtool.engine.graphs import StartProgress
from lmtool.engine.kv_cache import outline_plan
from lmtool.engine.load_weights import (
    bring_kv_parameters,
    bring_vision,
    how_stored,
    load_weights,
    stored_as,
    weight_bytes,
)
from lmtool.errors import ConfigError, MemoryShortError
from lmtool.layers.group import Group
from lmtool.models.config import ModelConfig
from lmtool.models.decoder import Decoder
from lmtool.models.loader import in_group, outline_decoder
from lmtool.models.random import random_decoder
from lmtool.models.shard import Shard

if TYPE_CHECKING:
    from lmtool.kernels.triton.precompile import Precompilation

_GIB = 1 << 30
_DEFAULT_BATCHED_TOKENS = {"cuda": 8192, "cpu": 512}


@dataclass(frozen=True, slots=True)
class Part:
    """model: the whole one; stored_as: 'float16', 'int4', …"""

    decoder: Decoder
    model: ModelConfig
    stored_as: str
    generation_defaults: Mapping[str, Any]
    compiling: "Precompilation | None"


@contextmanager
def stored_part(
    path: Path, config: EngineConfig, device: torch.device, group: Group | None, progress: StartProgress | None
) -> Iterator[Part]:
    """What of a model's files is this rank's. Raises as `load_engine` does."""
    with closing(open_checkpoint(path)) as checkpoint:
        model, keep_int4, dtype = how_stored(checkpoint, config, device)
        compiling = None
        if device.type == "cuda":
            outline = outline_decoder(checkpoint, model, dtype, keep_int4=keep_int4, group=group)
            compiling = compile_steps(outline, config, device)
        with closing(compiling) if compiling else nullcontext():
            decoder = load_weights(checkpoint, model, config, dtype, device, keep_int4, progress, group)
            bring_kv_parameters(decoder, model, config, path)
            bring_vision(decoder, checkpoint)
            yield Part(decoder, model, stored_as(decoder, keep_int4), checkpoint.generation_config, compiling)


@contextmanager
def random_part(
    model: ModelConfig, config: EngineConfig, device: torch.device, group: Group | None, group_size: int | None
) -> Iterator[Part]:
    """Random weights; group_size: 4-bit ones, in groups of so many. Raises MemoryShortError and ConfigError."""
    if group_size is not None and device.type == "cpu":
        raise ConfigError(
            "--w-group-size is for a GPU's 4-bit kernels", "leave it out, or give a checkpoint with --model"
        )
    dtype = choose_dtype(config.dtype, model, device)
    local = Shard(group.rank, group.size).local(model) if group is not None else model
    needed, free = weight_bytes(local, dtype.itemsize, group_size), free_bytes(device)
    if needed > free:
        raise MemoryShortError(
            f"the weights need {needed / _GIB:.1f} GiB on {device}, {free / _GIB:.1f} GiB are free",
            "give a smaller --shape",
        )
    few = replace(local, num_layers=min(2, model.num_layers))
    outline = random_decoder(few, dtype=dtype, device=torch.device("meta"), num_positions=1, group_size=group_size)
    in_group(outline, model, group.outline() if group is not None else None)
    compiling = compile_steps(outline, config, device)
    with closing(compiling) if compiling else nullcontext():
        num_positions = config.session_len or model.max_positions
        with memory_short(f"the weights ({needed / _GIB:.1f} GiB) did not fit on {device}", "give a smaller --shape"):
            decoder = random_decoder(
                local, dtype=dtype, device=device, num_positions=num_positions, group_size=group_size
            )
        in_group(decoder, model, group)
        yield Part(decoder, model, stored_as(decoder, group_size is not None), {}, compiling)


def batched_tokens(config: EngineConfig, device: torch.device) -> int:
    """The token budget of one step."""
    return config.max_batched_tokens or _DEFAULT_BATCHED_TOKENS[device.type]


def compile_steps(outline: Decoder, config: EngineConfig, device: torch.device) -> "Precompilation | None":
    """Begin to compile what a decoder like ``outline`` (on the meta device, two layers will do) needs on ``device``.

    The cache's size is not known yet; no kernel is compiled for it.
    """
    session_len = config.session_len or outline.config.max_positions
    plan = outline_plan(config, session_len)
    budget = batched_tokens(config, device)

    def rehearse() -> None:
        DeviceRunner(outline, plan, max_batch_size=config.max_batch_size).rehearse(budget)

    return kernels.compile_ahead(rehearse, device, outline.dtype, outline.config.head_dim)


def compile_model(path: Path, config: EngineConfig, progress: StartProgress | None = None) -> None:
    """Compile what a model needs for the card at hand into the user's cache, so that a start compiles nothing.

    Raises as `load_engine` does.
    """
    config = under_engine_file(config, path)
    device = choose_device("cuda" if config.device == "auto" else config.device)
    with closing(open_checkpoint(path)) as checkpoint:
        model, keep_int4, dtype = how_stored(checkpoint, config, device)
        compiling = compile_steps(outline_decoder(checkpoint, model, dtype, keep_int4=keep_int4), config, device)
    if compiling is not None:
        with closing(compiling):
            compiling.wait(partial(progress, "compiling kernels") if progress else None)
