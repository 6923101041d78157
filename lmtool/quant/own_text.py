"""Text the model sampled itself, kept in the work dir: a run that goes on sees the same, and need not wait again."""

from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from lmtool.checkpoint.reader import read_json
from lmtool.checkpoint.writer import write_json, write_tensors
from lmtool.quant.calibrate import FOLDER
from lmtool.quant.model_digest import model_digest
from lmtool.quant.options import CalibrationOptions


def own_text(
    work_dir: Path,
    model: Path,
    options: CalibrationOptions,
    sample: Callable[[CalibrationOptions], Tensor],
    *,
    fresh: bool = False,
) -> Tensor:
    """int64 [samples, seqlen]: what an earlier run of this model and these options sampled, else sampled now."""
    folder = work_dir / FOLDER
    tensors, about = folder / "self.safetensors", folder / "self.json"
    key = {
        "model": model_digest(model),
        "samples": options.samples,
        "seqlen": options.seqlen,
        "seed": options.seed,
    }
    if not fresh and about.exists() and read_json(about) == key:
        with safe_open(tensors, framework="pt") as file:
            kept: Tensor = file.get_tensor("ids")
            return kept
    ids = sample(options)
    folder.mkdir(parents=True, exist_ok=True)
    about.unlink(missing_ok=True)  # written last: it says that the text is there
    write_tensors(tensors, {"ids": ids})
    write_json(about, key)
    return ids
