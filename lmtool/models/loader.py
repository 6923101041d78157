"""Checkpoint → `Decoder`: names are translated, shapes checked, missing and unexpected tensors reported at once."""

from contextlib import nullcontext
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch

from lmtool.checkpoint.formats import Checkpoint
from lmtool.checkpoint.staging import Stager
from lmtool.layers.group import Group
from lmtool.models.config import ModelConfig, Reader
from lmtool.models.decoder import Decoder
from lmtool.models.registry import family
from lmtool.models.shard import Shard, ShardView
from lmtool.models.source import Progress, Source, names_of


def read_model_config(config: dict[str, Any]) -> ModelConfig:
    """config.json → ModelConfig. Raises CheckpointError for an unknown architecture or a damaged file."""
    result: ModelConfig = family(config).read_config(Reader(config))
    return result


def last_norm(checkpoint: Checkpoint) -> torch.Tensor:
    """float32 [H]: a model is known by it, however its matrices are stored. Raises CheckpointError."""
    config = read_model_config(checkpoint.config)
    return Source(checkpoint, config, names_of(checkpoint), torch.float32, torch.device("cpu")).tensor("final_norm")


def load_decoder(
    checkpoint: Checkpoint,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    num_positions: int,
    keep_int4: bool = False,
    progress: Progress | None = None,
    group: Group | None = None,
) -> Decoder:
    """Build the decoder on ``device``; with a group this rank's part of it.

    keep_int4: 4-bit matrices stay 4-bit; on a GPU AWQ's and GPTQ's alone. On a GPU files are read ahead of the copies,
    in the background, until all is there.
    """
    names = names_of(checkpoint)
    checkpoint, local = _part(checkpoint, config, names, group)
    with Stager(device) if device.type == "cuda" else nullcontext() as stager:
        source = Source(checkpoint, local, names, dtype, device, keep_int4, stager)
        source.check_names()
        decoder = source.decoder(num_positions, progress)
        source.finish()
    if progress:
        progress(config.num_layers, config.num_layers)
    return in_group(decoder, config, group)


def outline_decoder(
    checkpoint: Checkpoint,
    config: ModelConfig,
    dtype: torch.dtype,
    *,
    keep_int4: bool = False,
    num_layers: int = 2,
    group: Group | None = None,
) -> Decoder:
    """What `load_decoder` makes, with ``num_layers`` layers, on the meta device: shapes and dtypes, and no memory."""
    meta, names = torch.device("meta"), names_of(checkpoint)
    Source(checkpoint, config, names, dtype, meta).check_names()
    few = replace(config, num_layers=min(num_layers, config.num_layers))
    checkpoint, local = _part(checkpoint, few, names, group)
    decoder = Source(checkpoint, local, names, dtype, meta, keep_int4).decoder(num_positions=1)
    return in_group(decoder, few, group.outline() if group is not None else None)


def in_group(decoder: Decoder, whole: ModelConfig, group: Group | None) -> Decoder:
    """The decoder, whose weights are one rank's, as one of the group; its vocabulary is the whole model's."""
    decoder.group = group
    decoder.config = replace(decoder.config, vocab_size=whole.vocab_size)
    return decoder


def _part(
    checkpoint: Checkpoint, config: ModelConfig, names: ModuleType, group: Group | None
) -> tuple[Checkpoint, ModelConfig]:
    if group is None:
        return checkpoint, config
    shard = Shard(group.rank, group.size)
    return ShardView(checkpoint, shard, config, names), shard.local(config)
