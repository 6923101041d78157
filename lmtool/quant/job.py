"""A job for `pipeline.quantize`: what was asked for, what is refused of it, and what a resumed run must match."""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmtool import __version__
from lmtool.errors import ConfigError, MemoryShortError
from lmtool.images.form import read_image_form
from lmtool.quant.groups import GROUPS
from lmtool.quant.layers import Blocks, skipped_groups
from lmtool.quant.model_digest import model_digest
from lmtool.quant.options import CalibrationOptions, QuantOptions, check_sizes
from lmtool.quant.output import QUALITY
from lmtool.quant.plan import Plan


@dataclass(frozen=True, slots=True)
class Job:
    """What `quantize` was asked for."""

    model: Path
    work_dir: Path
    options: QuantOptions
    calibration: CalibrationOptions
    device: torch.device
    fresh: bool = False
    # how `--calib-dataset self` gets its text, int64 [samples, seqlen]: by an engine, which is not known here
    sample: Callable[[CalibrationOptions], Tensor] | None = None


def check(blocks: Blocks, job: Job) -> list[str]:
    """Refuse what cannot end well; names of the linears that --skip leaves."""
    if blocks.checkpoint.vision is not None:
        read_image_form(blocks.checkpoint.path)  # what its pictures need and there is not would be missed at the end
    in_features, out_features, skipped = {}, {}, []
    for i in range(len(blocks)):
        left = skipped_groups(blocks, i, job.options.skip)
        for group in GROUPS:
            for linear in blocks.linears(i, group):
                if group in left:
                    skipped.append(linear.name)
                else:
                    in_features[linear.name], out_features[linear.name] = linear.num_in, linear.num_out
    if not in_features:
        raise ConfigError(f"--skip {' '.join(job.options.skip)} leaves nothing to quantize", "name fewer linears")
    if job.options.skip and not skipped:
        example = next(iter(in_features))
        raise ConfigError(f"--skip {' '.join(job.options.skip)} names no linear", f"names are like {example}")
    context = blocks.config.max_positions
    if job.options.searches and job.calibration.seqlen > context:
        raise ConfigError(
            f"--calib-seqlen is {job.calibration.seqlen}, the model's context is {context}", "give a smaller one"
        )
    check_sizes(job.options, in_features, out_features)
    _check_work_dir(job)
    return skipped


def _check_work_dir(job: Job) -> None:
    if job.work_dir.exists() and not job.work_dir.is_dir():
        raise ConfigError(f"--work-dir {job.work_dir} is a file", "give a folder")
    if job.model.is_dir() and job.work_dir.resolve() == job.model.resolve():
        raise ConfigError(f"--work-dir {job.work_dir} is the model itself", "give another folder")
    foreign = (job.work_dir / "config.json").exists() and not (job.work_dir / QUALITY).exists()
    if foreign:
        raise ConfigError(f"--work-dir {job.work_dir} holds another model", "give another folder")


def check_disk(work_dir: Path, plan: Plan) -> None:
    """What is done already lies on the disk: only the rest is asked for."""
    needed = plan.disk * (plan.num_blocks - plan.blocks_done) // plan.num_blocks
    free = shutil.disk_usage(work_dir).free
    if free < needed:
        raise MemoryShortError(
            f"{work_dir} has {free / 1e9:.1f} GB free and the run needs {needed / 1e9:.1f}", "give another --work-dir"
        )


def asked_for(job: Job) -> dict[str, Any]:
    """Of what a resumed run must match, all that is known before there is a text."""
    text = asdict(job.calibration) if job.options.searches else {}
    return {
        "lmtool": __version__,
        "model": model_digest(job.model),
        **asdict(job.options),
        "skip": list(job.options.skip),
        **{f"calib_{key}": value for key, value in text.items()},
        "device": job.device.type,
    }


def describe(job: Job, ids: Tensor | None) -> dict[str, Any]:
    """What makes this run this run, in what the report says and in the fingerprint that a resumed one must match."""
    text = None
    if ids is not None:
        digest = hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]
        text = {"dataset": job.calibration.dataset, "samples": ids.shape[0], "seqlen": ids.shape[1], "ids": digest}
    fingerprint = asked_for(job) | {"calib_ids": text and text["ids"]}
    return {"fingerprint": fingerprint, "report": {"model": str(job.model), "calibration": text}}
