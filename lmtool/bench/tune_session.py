"""`lmtool bench kernels --tune` from what was asked to a table in place: check, measure, search, write whole."""

import dataclasses
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lmtool.bench import candidates, limits, outputs, tables
from lmtool.bench.candidates import BUCKETS
from lmtool.bench.report import Report, make_console, make_report
from lmtool.bench.shapes import all_products, part_of
from lmtool.engine.device import choose_device, choose_dtype
from lmtool.errors import ConfigError, DeviceError
from lmtool.kernels.triton import tables as tuning_tables
from lmtool.kernels.triton import tuning

if TYPE_CHECKING:
    from lmtool.bench.tune import Tuned


def run_tune(
    shapes: Sequence[str],
    rows: Sequence[int],
    *,
    tp: int = 1,
    dtype: str = "auto",
    device: str = "auto",
    file: Path | None = None,
    json_file: str | None = None,
) -> None:
    """Measured entries go into ``file`` (default: the user's cache folder), beside those it has for other shapes.

    Raises ConfigError for what cannot be tuned, DeviceError without a card, KernelError where nothing gives the right
    result. Interrupted or failed, it writes nothing.
    """
    models = [part_of(name, tp) for name in shapes]
    buckets = _buckets(rows)
    outputs.check(json_file, None)
    found_device = choose_device(device)
    if found_device.type != "cuda":
        raise DeviceError("--tune measures kernels of an NVIDIA GPU, and the device is a CPU", "give --device cuda")
    weights = choose_dtype(dtype, models[0], found_device)
    if weights.itemsize != 2:
        raise ConfigError("--tune is for 16-bit weights", "give --dtype float16 or bfloat16")
    from lmtool.kernels.triton.launch import arch

    capability = arch(found_device)
    path = file or tuning_tables.user_path(capability)
    kept = tuning_tables.read(path, capability, tuning.CONFIGS) if path.is_file() else []
    measured = limits.measure(found_device)
    started = time.perf_counter()
    tuned = _search(models, buckets, weights, found_device, measured)
    entries = _entries(tuned, capability)
    report = _report(shapes, {"rows": list(rows), "tp": tp}, weights, measured, tuned)
    about = {"device": measured.device, "commit": report.commit or "unknown"}
    about |= {name: version for name, version in report.versions.items() if name in ("torch", "triton")}
    # the newer of two entries for the same is the one that is kept
    merged = {(entry.key, entry.rows): entry for entry in [*kept, *entries]}
    tuning_tables.write(path, capability, list(merged.values()), about)
    if json_file is not None:
        outputs.write(report, json_file, None)
    console = make_console(stderr=json_file == "-")
    console.print(tables.tuned_table(report.results))
    line = f"{len(entries)} entries in {path}, measured in {time.perf_counter() - started:.0f} s"
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _buckets(rows: Iterable[int]) -> list[int]:
    found = sorted({candidates.bucket(count) for count in rows})
    if found[-1] not in BUCKETS:
        raise ConfigError(f"--rows has {max(rows)}", f"--tune is for the kernels of 1 to {BUCKETS[-1]} rows")
    return found


def _search(
    models: Sequence[Any], buckets: Sequence[int], dtype: torch.dtype, device: torch.device, measured: limits.Limits
) -> list["Tuned"]:
    """What is found is told on stderr as it comes."""
    from lmtool.bench.trials import CardTrials, card_of, num_workers
    from lmtool.bench.tune import estimate, tune

    wanted = all_products(models)
    notices = make_console(stderr=True)
    count, seconds = estimate(wanted, buckets, num_workers())
    notices.print(
        f"{len(wanted)} matrices × rows {', '.join(map(str, buckets))}: about {count} candidates,"
        f" compiled by {num_workers()} processes: about {seconds:.0f} s",
        highlight=False,
    )
    trials = CardTrials(models, dtype, device)
    tuned: list[Tuned] = []
    try:
        with notices.status("compiling the first candidates") as status:
            for one in tune(wanted, buckets, trials, card_of(device, measured.read_bytes_per_s), status.update):
                tuned.append(one)
                left_out = f", {len(one.failures)} cannot be used" if one.failures else ""
                notices.print(
                    f"{one.product}, {one.rows} rows: {one.before_time.us:.1f} → {one.time.us:.1f} µs"
                    f" (library {one.library_time.us:.1f}), a step {one.before_time.step_us:.0f} →"
                    f" {one.time.step_us:.0f} ({one.library_time.step_us:.0f}); {one.num_tried} tried{left_out}",
                    highlight=False,
                )
                for failure in one.failures[:1]:
                    notices.print(f"  {failure}", markup=False, highlight=False)
    finally:
        trials.close()
    return tuned


def _entries(tuned: Sequence["Tuned"], capability: int) -> list[tuning_tables.Entry]:
    from lmtool.bench.tune import entries

    return entries(
        tuned,
        lambda p: tuning.max_rows(capability, p.num_out, p.num_in, paired=p.paired, itemsize=p.itemsize),
    )


def _report(
    shapes: Sequence[str],
    settings: dict[str, Any],
    dtype: torch.dtype,
    measured: limits.Limits,
    tuned: Sequence["Tuned"],
) -> Report:
    weights = str(dtype).removeprefix("torch.")
    report = make_report(",".join(shapes), weights, measured, settings)
    results = [_result(one, measured) for one in tuned]
    return dataclasses.replace(report, results=results)


def _result(one: "Tuned", measured: limits.Limits) -> dict[str, Any]:
    """As a result of a report: times in seconds."""
    limit_us = one.product.weight_bytes / measured.read_bytes_per_s * 1e6
    return {
        "name": f"{one.product} b{one.rows}",
        "metrics": {
            "time_s": {"median": one.time.us / 1e6, "limit": limit_us / 1e6, "ratio": limit_us / one.time.us},
            "before_s": {"median": one.before_time.us / 1e6},
            "library_s": {"median": one.library_time.us / 1e6},
            "step_s": {"median": one.time.step_us / 1e6},
            "before_step_s": {"median": one.before_time.step_us / 1e6},
            "library_step_s": {"median": one.library_time.step_us / 1e6},
        },
        "config": list(one.config),
        "before": list(one.before),
    }
