"""After a quantization: what it lost beside the original, and the report that says so."""

import resource
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmtool.commands import lite_eval
from lmtool.config import EngineConfig

if TYPE_CHECKING:
    from lmtool.quant.job import Job

WINDOW_LEN = 512


class Meter:
    """What this process needed since the meter was made: seconds, seconds of CPU, and its peak memory so far."""

    def __init__(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def read(self, num_blocks: int) -> dict[str, Any]:
        return {
            "num_blocks": num_blocks,
            "seconds": time.perf_counter() - self._started[0],
            "cpu_seconds": time.process_time() - self._started[1],
            "peak_memory_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        }


def finish(job: "Job", quality: dict[str, Any], eval_windows: int, device: str) -> dict[str, Any]:
    """Evaluate where that was asked for and not done yet, and write the report; the report's content."""
    from lmtool.quant.report import write_report

    picture = find_spec("matplotlib") is not None
    done = quality["evaluation"]
    if eval_windows and (done is None or done["num_windows"] != eval_windows):
        write_report(job.work_dir, quality, picture=picture)  # what is known is not lost if this is interrupted
        _, quality["evaluation"] = lite_eval.run(
            job.work_dir,
            job.model,
            None,
            windows=eval_windows,
            window_len=min(WINDOW_LEN, context_of(job.work_dir)),
            chunk_tokens=None,
            config=EngineConfig(device=device),
        )
    write_report(job.work_dir, quality, picture=picture)
    return quality


def context_of(model: Path) -> int:
    """The longest sequence that a checkpoint was made for, tokens."""
    from lmtool.checkpoint.formats import open_checkpoint
    from lmtool.models.loader import read_model_config

    checkpoint = open_checkpoint(model)
    try:
        return read_model_config(checkpoint.config).max_positions
    finally:
        checkpoint.close()
