"""Which tokens a run calibrates on. What was dear to get, the model's own text or a hub's, is kept in the work dir.

So a run that goes on sees the same text, and `auto_awq` after `calibrate` needs neither the network nor the time again.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from lmtool.checkpoint.reader import read_json
from lmtool.checkpoint.writer import write_json, write_tensors
from lmtool.quant.calibrate import FOLDER
from lmtool.quant.datasets import calibration_ids
from lmtool.quant.model_digest import model_digest
from lmtool.quant.options import HUB_DATASETS, SELF, CalibrationOptions
from lmtool.tokenizer import Tokenizer

Sample = Callable[[CalibrationOptions], Tensor]  # the model's own text, int64 [samples, seqlen]


def calibration_text(
    work_dir: Path,
    model: Path,
    options: CalibrationOptions,
    tokenizer: Tokenizer,
    sample: Sample | None,
    *,
    fresh: bool = False,
) -> Tensor:
    """int64 [samples, seqlen]. Raises ConfigError, as `calibration_ids` and ``sample`` do.

    Files are read each time: they may have changed.
    """
    if options.dataset == SELF and sample is not None:
        return kept(work_dir, model, options, sample, fresh=fresh)
    if options.dataset in HUB_DATASETS and not Path(options.dataset).exists():
        return kept(work_dir, model, options, partial(calibration_ids, tokenizer=tokenizer), fresh=fresh)
    return calibration_ids(options, tokenizer)


def kept(work_dir: Path, model: Path, options: CalibrationOptions, make: Sample, *, fresh: bool = False) -> Tensor:
    """What an earlier run of this model and these options made, else what is made now."""
    folder = work_dir / FOLDER
    tensors, about = folder / "text.safetensors", folder / "text.json"
    key = {
        "model": model_digest(model),
        "dataset": options.dataset,
        "samples": options.samples,
        "seqlen": options.seqlen,
        "seed": options.seed,
    }
    if not fresh and about.exists() and read_json(about) == key:
        with safe_open(tensors, framework="pt") as file:
            ids: Tensor = file.get_tensor("ids")
            return ids
    ids = make(options)
    folder.mkdir(parents=True, exist_ok=True)
    about.unlink(missing_ok=True)  # written last: it says that the text is there
    write_tensors(tensors, {"ids": ids})
    write_json(about, key)
    return ids
