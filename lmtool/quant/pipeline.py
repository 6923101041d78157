"""`lite auto_awq`: block by block from a checkpoint to a quantized one, resumable after each block.

A work dir is shared with `calibrate`: statistics under `calibration/`, resumable state under `.state/`, the model's
files at the top. Does not know the command line, Rich or the engine.
"""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from lmtool import kernels
from lmtool.checkpoint.formats import open_checkpoint
from lmtool.checkpoint.reader import read_json
from lmtool.errors import MemoryShortError
from lmtool.layers.rotary import cos_sin_table
from lmtool.models.block import Block
from lmtool.quant.gram import Statistics
from lmtool.quant.groups import GROUPS
from lmtool.quant.job import Job, asked_for, check, check_disk, describe
from lmtool.quant.kept_text import calibration_text
from lmtool.quant.layers import Blocks, skipped_groups
from lmtool.quant.options import QuantOptions
from lmtool.quant.output import QUALITY, write_model
from lmtool.quant.plan import Plan, plan_run
from lmtool.quant.report import clear_model
from lmtool.quant.search import Outcome, quantize_block
from lmtool.quant.state import State, refuse_difference
from lmtool.tokenizer import load_tokenizer


class Listener(Protocol):
    """Who watches a run."""

    def planned(self, plan: Plan) -> None: ...

    def block_done(self, block: int, report: Mapping[str, Any], seconds: float) -> None: ...

    def writing(self) -> None: ...


def quantize(job: Job, listener: Listener) -> dict[str, Any]:
    """Run a job, or go on with it; the content of lmtool-quality.json.

    Raises ConfigError, CheckpointError, TokenizerError or MemoryShortError, each before anything is written where
    that can be known.
    """
    if job.calibration.samples == 0:
        job = replace(job, options=replace(job.options, method="rtn"))
    checkpoint = open_checkpoint(job.model)
    try:
        blocks = Blocks(checkpoint, job.device)
        skipped = check(blocks, job)
        tokenizer = load_tokenizer(job.model)
        if not job.fresh:
            refuse_difference(job.work_dir, asked_for(job))  # before a text is read or even written
        ids = _ids(job, tokenizer)
        about = describe(job, ids)
        shape = (*ids.shape, blocks.config.hidden_size) if ids is not None else (0,)
        done = _finished(job, about)
        if done is not None:
            return done
        state = State(job.work_dir, about["fingerprint"], shape, fresh=job.fresh)
        num_tokens = ids.numel() if ids is not None else 0
        plan = plan_run(blocks, job.calibration, job.options, num_tokens, state.blocks_done)
        listener.planned(plan)
        check_disk(job.work_dir, plan)
        dtype = _stored_dtype(blocks, job.options)
        # said aloud even where nothing changes: until then MKL takes fewer when the machine is busy
        torch.set_num_threads(state.num_threads(torch.get_num_threads()))
        with torch.inference_mode(), kernels.force("reference"):
            _run_blocks(blocks, job, state, ids, dtype, listener)
        listener.writing()
        quality = write_model(job.work_dir, blocks, state, tokenizer, job.options, dtype, skipped, about["report"])
        state.drop_blocks()
        return quality
    except torch.OutOfMemoryError as error:
        raise MemoryShortError(
            f"a block does not fit on {job.device}: {' '.join(str(error).split())[:120]}",
            "give a smaller --batch-size or --calib-seqlen, or --device cpu",
        ) from error
    finally:
        checkpoint.close()


# ------------------------------------------------------------------ the blocks


def _run_blocks(
    blocks: Blocks, job: Job, state: State, ids: Tensor | None, dtype: torch.dtype, listener: Listener
) -> None:
    first = state.blocks_done
    if ids is not None and first == 0 and not state.has_hidden(0):
        state.new_hidden(0).copy_(blocks.embed(ids.to(job.device)))
        state.keep_hidden(0)
    for i in range(first, len(blocks)):
        started = time.perf_counter()
        layer = blocks.load(i)
        statistics: dict[str, Statistics] = {}
        if ids is not None:
            table = cos_sin_table(blocks.config.rope, ids.shape[1], job.device)
            statistics = _calibrate(Block(layer, blocks.config, table), state, i, job)
        skipped = skipped_groups(blocks, i, job.options.skip)
        outcomes = quantize_block(
            layer,
            blocks.config,
            statistics,
            method=job.options.method,
            levels=job.options.levels,
            skipped=skipped,
            dtype=dtype,
        )
        tensors = blocks.dense_tensors(i, layer, skipped, dtype)
        for outcome in outcomes:
            tensors |= blocks.quantized_tensors(i, outcome.group, outcome.codes, job.options)
        report = {"layer": i, "linears": [_entry(blocks, i, outcome) for outcome in outcomes]}
        state.commit(i, tensors, report)
        listener.block_done(i, report, time.perf_counter() - started)


def _calibrate(block: Block, state: State, i: int, job: Job) -> dict[str, Statistics]:
    """Statistics of block i's four inputs; the hidden states behind it are left for the next."""
    statistics: dict[str, Statistics] = {}

    def observe(name: str, x: Tensor) -> None:
        if name not in GROUPS:
            return
        if name not in statistics:
            statistics[name] = Statistics(x.shape[-1], x.device)
        statistics[name].add(x)

    hidden, following = state.hidden(i), state.new_hidden(i + 1)
    for batch, room in zip(
        hidden.split(job.calibration.batch_size), following.split(job.calibration.batch_size), strict=True
    ):
        room.copy_(block.forward(batch.to(job.device), observe))
    state.keep_hidden(i + 1)
    return statistics


def _entry(blocks: Blocks, i: int, outcome: Outcome) -> dict[str, Any]:
    return {
        "group": outcome.group,
        "names": [linear.name for linear in blocks.linears(i, outcome.group)],
        "error_plain": outcome.error_plain,
        "error": outcome.error,
        "note": outcome.note,
    }


# ------------------------------------------------------------------ around them


def _ids(job: Job, tokenizer: Any) -> Tensor | None:
    if not job.options.searches:
        return None
    return calibration_text(job.work_dir, job.model, job.calibration, tokenizer, job.sample, fresh=job.fresh)


def _finished(job: Job, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """The report of a finished run of this very command; None where there is work to do. ``--fresh`` clears the old."""
    if job.fresh:
        clear_model(job.work_dir)
    if not (job.work_dir / "config.json").exists():
        return None
    state = State(job.work_dir, about["fingerprint"], (0,), fresh=False)  # refuses a run with other options
    state.drop_blocks()
    return read_json(job.work_dir / QUALITY)


def _stored_dtype(blocks: Blocks, options: QuantOptions) -> torch.dtype:
    """Of norms, embedding and head: what was asked for, else the source's own half precision, else float16."""
    if options.dtype != "auto":
        return torch.float16 if options.dtype == "float16" else torch.bfloat16
    name = next(iter(blocks.outer_names()))
    return torch.bfloat16 if blocks.checkpoint.dtype(name) == "bfloat16" else torch.float16
