"""`lite calibrate`: what flows through a model on calibration text, for whoever chooses parameters from it later.

Writes `calibration/` of a work dir: key_value.safetensors, per layer the K (rotated, as a cache holds it) and V of each
head and dimension, and the model's last norm; inputs.safetensors, per layer the channels of each linear's input;
about.json, of which text.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmtool import kernels
from lmtool.checkpoint.formats import open_checkpoint
from lmtool.checkpoint.kv_parameters import LAST_NORM
from lmtool.checkpoint.reader import read_json
from lmtool.checkpoint.writer import write_json, write_tensors
from lmtool.errors import CheckpointError, ConfigError
from lmtool.layers.rotary import cos_sin_table
from lmtool.models.block import Block
from lmtool.models.loader import last_norm
from lmtool.quant.groups import GROUPS
from lmtool.quant.layers import Blocks
from lmtool.quant.model_digest import model_digest
from lmtool.quant.options import CalibrationOptions

FOLDER = "calibration"
Progress = Callable[[int, int], None]  # blocks done, blocks in all


class Extremes:
    """Smallest, largest and largest absolute value seen, for each entry of the kept dimensions."""

    def __init__(self) -> None:
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def add(self, values: Tensor) -> None:
        """values [T, ...]: seen over T."""
        low, high = values.aminmax(dim=0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def tensors(self, name: str) -> dict[str, Tensor]:
        assert self.low is not None
        assert self.high is not None
        largest = torch.maximum(self.low.abs(), self.high.abs())
        return {f"{name}.min": self.low.cpu(), f"{name}.max": self.high.cpu(), f"{name}.absmax": largest.cpu()}


def calibrate(
    model: Path,
    work_dir: Path,
    ids: Tensor,
    options: CalibrationOptions,
    *,
    device: torch.device,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run the model over ids [samples, seqlen] int64 and write what was seen; the content of about.json.

    options: where ids came from; of them ``batch_size`` is used here, the rest is written down.
    Raises CheckpointError for a model that cannot be read or is quantized already.
    """
    checkpoint = open_checkpoint(model)
    key_value: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    try:
        blocks = Blocks(checkpoint, device)
        key_value[LAST_NORM] = last_norm(checkpoint)
        table = cos_sin_table(blocks.config.rope, ids.shape[1], device)
        with torch.inference_mode(), kernels.force("reference"):
            hidden = blocks.embed(ids.to(device)).cpu()
            for i in range(len(blocks)):
                seen = _run_block(Block(blocks.load(i), blocks.config, table), hidden, options.batch_size, device)
                for name in ("k", "v"):
                    key_value |= seen[name].tensors(f"layers.{i}.{name}")
                for group in GROUPS:
                    for linear in blocks.linears(i, group):
                        inputs |= seen[group].tensors(linear.name)
                if progress:
                    progress(i + 1, len(blocks))
    finally:
        checkpoint.close()
    folder = work_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "key_value.safetensors", key_value)
    write_tensors(folder / "inputs.safetensors", {name: tensor.clone() for name, tensor in inputs.items()})
    text = asdict(options)
    if Path(options.dataset).exists():  # the next command may be typed somewhere else
        text["dataset"] = str(Path(options.dataset).resolve())
    about = {"model": str(model), "model_digest": model_digest(model), "layers": len(blocks), "text": text}
    write_json(folder / "about.json", about)
    return about


def calibrated_with(work_dir: Path, model: Path) -> CalibrationOptions | None:
    """On which text ``work_dir`` was calibrated; None where it was not, or for another model."""
    about = work_dir / FOLDER / "about.json"
    if not about.exists():
        return None
    found = read_json(about)
    if found.get("model_digest") != model_digest(model):
        return None
    try:
        return CalibrationOptions(**found["text"])
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{about} does not say on which text", "calibrate again, or remove it") from error


def _run_block(block: Block, hidden: Tensor, batch_size: int, device: torch.device) -> dict[str, Extremes]:
    """hidden [S, L, H] becomes the next block's, in place."""
    seen = {name: Extremes() for name in (*GROUPS, "k", "v")}

    def observe(name: str, x: Tensor) -> None:
        # [S, Hkv, L, D] → [S · L, Hkv, D]; [S, L, K] → [S · L, K]
        seen[name].add(x.transpose(1, 2).flatten(0, 1) if name in ("k", "v") else x.flatten(0, 1))

    for batch in hidden.split(batch_size):
        batch.copy_(block.forward(batch.to(device), observe))
    return seen
