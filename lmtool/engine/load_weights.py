"""A checkpoint's weights in memory as the engine runs them: how they are stored, whether they fit, the loaded decoder.

What cannot be loaded is refused before the first tensor is read.
"""

import logging
from functools import partial
from pathlib import Path

import torch

from lmtool import kernels
from lmtool.checkpoint.engine_file import under_engine_file
from lmtool.checkpoint.formats import Checkpoint, open_checkpoint
from lmtool.checkpoint.kv_parameters import check_last_norm, read_kv_parameters
from lmtool.config import EngineConfig
from lmtool.engine.device import choose_device, choose_dtype, free_bytes, memory_short
from lmtool.engine.garbage import no_collection
from lmtool.engine.graphs import StartProgress
from lmtool.errors import ConfigError, MemoryShortError
from lmtool.images.form import read_image_form
from lmtool.layers.group import Group
from lmtool.layers.weights import W4
from lmtool.models.config import ModelConfig
from lmtool.models.decoder import Decoder
from lmtool.models.loader import load_decoder, read_model_config
from lmtool.models.shard import Shard
from lmtool.models.vision import load_tower

_log = logging.getLogger(__name__)
_GIB = 1 << 30


def open_decoder(path: Path, config: EngineConfig, progress: StartProgress | None = None) -> tuple[Decoder, str]:
    """The weights alone, stored as the engine would, and how that is: for who drives the decoder itself.

    Raises as `load_engine` does.
    """
    config = under_engine_file(config, path)
    device = choose_device(config.device)
    checkpoint = open_checkpoint(path)
    try:
        model, keep_int4, dtype = how_stored(checkpoint, config, device)
        decoder = load_weights(checkpoint, model, config, dtype, device, keep_int4, progress)
        bring_kv_parameters(decoder, model, config, path)
    finally:
        checkpoint.close()
    return decoder, stored_as(decoder, keep_int4)


def how_stored(
    checkpoint: Checkpoint, config: EngineConfig, device: torch.device
) -> tuple[ModelConfig, bool, torch.dtype]:
    """The model, whether its 4-bit weights are used as they are, and the dtype of everything else."""
    _check_format(checkpoint, config)
    model = read_model_config(checkpoint.config)
    keep_int4 = _keeps_int4(checkpoint, config, device)
    on_cpu = device.type == "cpu"
    return model, keep_int4, torch.float32 if keep_int4 and on_cpu else choose_dtype(config.dtype, model, device)


def _keeps_int4(checkpoint: Checkpoint, config: EngineConfig, device: torch.device) -> bool:
    """Whether 4-bit weights are used as they are.

    On a CPU unless a dtype was asked for; on a GPU those of AWQ and GPTQ, whose products are in half precision.
    """
    if device.type == "cpu":
        kinds: tuple[str, ...] = ("q4_0", "q4_1", "int4") if config.dtype == "auto" else ()
    else:
        kinds = ("int4",) if config.dtype != "float32" else ()
    return any(checkpoint.dtype(name) in kinds for name in checkpoint.names())


def bring_kv_parameters(decoder: Decoder, model: ModelConfig, config: EngineConfig, path: Path) -> None:
    """Of a static cache, from the workspace; of a rank those of its heads. model: the whole one.

    Raises CheckpointError, and ConfigError for another number of ranks.
    """
    if config.kv_choice != "static":
        return
    parameters = read_kv_parameters(path, model.num_layers, model.num_kv_heads, model.head_dim)
    about = parameters.about
    check_last_norm(path, parameters.last_norm, decoder.final_norm.cpu())
    if about.num_tp != config.tp:
        raise ConfigError(
            f"the K/V parameters of {path} are for --tp {about.num_tp}, this engine has --tp {config.tp}",
            f"make them again: lmtool lite kv_qparams --num-tp {config.tp}",
        )
    session_len = config.session_len or model.max_positions
    if about.granularity == "channel" and session_len > about.seqlen:
        _log.warning(
            "K/V parameters of each channel were calibrated on %d tokens, a session holds %d: KL was 0.001 on "
            "calibrated places and 0.026 beyond (calibrate with --calib-seqlen %d, or give a smaller --session-len)",
            about.seqlen,
            session_len,
            session_len,
        )
    first, last = Shard(decoder.group.rank, decoder.group.size).kv_heads(model) if decoder.group else (0, None)
    decoder.kv_parameters = parameters.metas(slice(first, last))


def bring_vision(decoder: Decoder, checkpoint: Checkpoint) -> None:
    """Of a model that takes pictures, what it sees them with, in the decoder's dtype. Raises CheckpointError."""
    if checkpoint.vision is None:
        return
    form = read_image_form(checkpoint.path)
    assert form is not None, "what has a vision part has a form of pictures"
    full = memory_short(f"the vision tower did not fit on {decoder.device}", "use a smaller or a 4-bit model")
    with full, no_collection():
        decoder.vision = load_tower(checkpoint.vision, form, decoder.dtype, decoder.device)


def _check_format(checkpoint: Checkpoint, config: EngineConfig) -> None:
    if config.model_format is not None and config.model_format != checkpoint.format:
        raise ConfigError(
            f"--model-format is {config.model_format!r}, {checkpoint.path} is {checkpoint.format!r}",
            "leave the flag out: the format is detected",
        )


def stored_as(decoder: Decoder, keep_int4: bool) -> str:
    """How the layers' weights are stored: 'float16', …, 'int4' on a CPU, 'w4a16 g128' on a GPU."""
    if not keep_int4:
        return str(decoder.dtype).removeprefix("torch.")
    matrix = decoder.layers[0].down
    return f"w4a16 g{matrix.tiles.group_size}" if isinstance(matrix, W4) else "int4"


def weight_bytes(model: ModelConfig, itemsize: int, group_size: int | None = None) -> int:
    """Of all weights on a GPU; group_size: the layers' are 4-bit, with four bytes more for each group."""
    if group_size is None:
        return model.num_parameters * itemsize
    ends = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    return ends * itemsize + int((model.num_parameters - ends) * (0.5 + 4 / group_size))


def load_weights(
    checkpoint: Checkpoint,
    model: ModelConfig,
    config: EngineConfig,
    dtype: torch.dtype,
    device: torch.device,
    keep_int4: bool,
    progress: StartProgress | None,
    group: Group | None = None,
) -> Decoder:
    """Raises MemoryShortError, ConfigError and CheckpointError. group: this rank's part alone."""
    if keep_int4 and device.type == "cpu":
        needed = model.num_parameters
    else:
        needed = weight_bytes(model, dtype.itemsize, kernels.W4_LARGEST_GROUP if keep_int4 else None)
    needed //= group.size if group is not None else 1
    free = free_bytes(device)
    if needed > free:
        smaller = "float16" if dtype == torch.float32 else None
        raise MemoryShortError(
            f"the weights need {needed / _GIB:.1f} GiB on {device}, {free / _GIB:.1f} GiB are free",
            f"use --dtype {smaller} or a smaller model" if smaller else "use a smaller or a 4-bit model",
        )
    session_len = config.session_len or model.max_positions
    if config.session_len and config.session_len > model.max_positions and model.rope.kind == "default":
        raise ConfigError(
            f"--session-len {config.session_len} is longer than the model's {model.max_positions} tokens",
            f"give at most {model.max_positions}",
        )
    full = memory_short(
        f"the weights ({needed / _GIB:.1f} GiB) did not fit on {device} ({free / _GIB:.1f} GiB were free)",
        "close what else uses the card, or use a smaller model",
    )
    with full, no_collection():
        return load_decoder(
            checkpoint,
            model,
            dtype=dtype,
            device=device,
            num_positions=session_len,
            keep_int4=keep_int4,
            progress=partial(progress, "loading weights") if progress else None,
            group=group,
        )
