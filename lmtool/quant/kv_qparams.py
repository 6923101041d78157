"""`lite kv_qparams`: what `lite calibrate` saw of K and V, as the parameters of a static int8 cache.

LMDeploy 0.1's formulas: zero = (min + max) / 2, scale = (max - min) / 255, q = round((x - zero) / scale); symmetric
zero = 0, scale = absmax / 127.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from lmtool.checkpoint.formats import open_checkpoint
from lmtool.checkpoint.kv_parameters import (
    GRANULARITIES,
    LAST_NORM,
    KvAbout,
    KvParameters,
    check_last_norm,
    write_kv_parameters,
)
from lmtool.checkpoint.manifest import MANIFEST, workspace_of
from lmtool.checkpoint.reader import read_json
from lmtool.errors import CheckpointError, ConfigError
from lmtool.models.loader import last_norm, read_model_config
from lmtool.quant.calibrate import FOLDER


def kv_qparams(
    work_dir: Path, workspace: Path, *, symmetric: bool, granularity: str, num_tp: int
) -> tuple[Path, KvAbout]:
    """Write the parameters into a workspace. granularity: 'tensor', 'head' or 'channel' (of each layer and rank).

    Raises ConfigError for a granularity or a number of ranks that cannot be, CheckpointError where nothing was
    calibrated, where ``workspace`` is none, and where the two are of different models.
    """
    if granularity not in GRANULARITIES:
        raise ConfigError(f"--granularity is {granularity!r}", "give one of " + ", ".join(GRANULARITIES))
    about, seen = _calibration(work_dir)
    workspace = workspace_of(workspace)
    if not (workspace / MANIFEST).exists():
        raise CheckpointError(f"{workspace} is no workspace", "make one first: lmtool convert MODEL")
    checkpoint = open_checkpoint(workspace)
    try:
        model = read_model_config(checkpoint.config)
        norm = last_norm(checkpoint)
    finally:
        checkpoint.close()
    shape = (model.num_kv_heads, model.head_dim)
    theirs = seen["layers.0.k.min"].shape
    if about["layers"] != model.num_layers or theirs != shape:
        raise CheckpointError(
            f"{work_dir} was calibrated with another model: {about['layers']} layers of {list(theirs)}, "
            f"{workspace} has {model.num_layers} of {list(shape)}",
            "calibrate the model that the workspace was made of",
        )
    check_last_norm(work_dir / FOLDER, seen[LAST_NORM], norm)
    _check_ranks(num_tp, model.num_kv_heads)
    layers = [
        (
            *_scale_and_zero(seen, f"layers.{i}.k", granularity, symmetric, num_tp),
            *_scale_and_zero(seen, f"layers.{i}.v", granularity, symmetric, num_tp),
        )
        for i in range(model.num_layers)
    ]
    told = KvAbout(granularity=granularity, symmetric=symmetric, num_tp=num_tp, seqlen=about["text"]["seqlen"])
    return write_kv_parameters(workspace, KvParameters(layers, norm, told)), told


def _check_ranks(num_tp: int, num_kv_heads: int) -> None:
    fewer, more = sorted((num_tp, num_kv_heads))
    if num_tp < 1 or more % fewer:
        raise ConfigError(
            f"--num-tp is {num_tp}, the model has {num_kv_heads} key/value heads",
            f"give a divisor or a multiple of {num_kv_heads}",
        )


def _calibration(work_dir: Path) -> tuple[dict, dict[str, Tensor]]:  # type: ignore[type-arg]
    folder = work_dir / FOLDER
    if not (folder / "about.json").exists():
        raise CheckpointError(f"{work_dir} holds no calibration", f"lmtool lite calibrate MODEL --work-dir {work_dir}")
    try:
        about, seen = read_json(folder / "about.json"), load_file(folder / "key_value.safetensors")
        int(about["layers"]), int(about["text"]["seqlen"]), seen["layers.0.k.min"], seen[LAST_NORM]
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise CheckpointError(f"{folder} does not hold what K and V were: {error}", "calibrate again") from error
    return about, seen


def _scale_and_zero(
    seen: dict[str, Tensor], name: str, granularity: str, symmetric: bool, num_tp: int
) -> tuple[Tensor, Tensor]:
    """float32 [Hkv, D] each, equal where a scale is shared."""
    low, high = seen[f"{name}.min"].float(), seen[f"{name}.max"].float()
    low, high = _shared(low, granularity, num_tp, torch.amin), _shared(high, granularity, num_tp, torch.amax)
    if symmetric:
        scale, zero = torch.maximum(low.abs(), high.abs()) / 127, torch.zeros_like(low)
    else:
        scale, zero = (high - low) / 255, (high + low) / 2
    return scale.contiguous(), zero.contiguous()


def _shared(values: Tensor, granularity: str, num_tp: int, reduce) -> Tensor:  # type: ignore[no-untyped-def]
    """values [Hkv, D] → the same shape, one number for all that share a scale."""
    if granularity == "channel":
        return values
    if granularity == "head":
        return reduce(values, dim=1, keepdim=True).expand_as(values)
    ranks = values.view(min(num_tp, len(values)), -1)  # where there are more of them, some share a head
    return reduce(ranks, dim=1, keepdim=True).expand_as(ranks).reshape(values.shape)
