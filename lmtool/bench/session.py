"""A benchmark from beginning to end: check what was asked, measure the machine, load, run, report.

What can be refused is refused before anything is measured.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lmtool.bench import compare, limits, offline, outputs, workloads
from lmtool.bench.picture import draw
from lmtool.bench.report import Report, make_console, make_report, read_report, show, show_limits, side_by_side
from lmtool.bench.shapes import find_shape
from lmtool.bench.workloads import Workload
from lmtool.checkpoint.engine_file import under_engine_file
from lmtool.checkpoint.hub import resolve_model
from lmtool.config import EngineConfig
from lmtool.engine.device import choose_device
from lmtool.engine.setup import LoadedEngine
from lmtool.errors import ConfigError
from lmtool.models.config import ModelConfig

if TYPE_CHECKING:
    from lmtool.bench.transformers_peer import TransformersPeer

_PEER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure; lengths in tokens. ``model`` or ``shape`` is None. Raises ConfigError, which names the flag."""

    model: str | None
    shape: str | None = None
    group_size: int | None = None
    against: str | None = None
    mixes: tuple[str, ...] = ("static",)
    batches: tuple[int, ...] = (1, 8)
    input_len: int = 128
    output_len: int = 256
    prefill_len: int = 512
    repeats: int = 3
    warm_up: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        lowest = {"input_len": 1, "output_len": 2, "prefill_len": 0, "repeats": 1, "warm_up": 0, "seed": 0}
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}", f"give {least} or more")
        if min(self.batches) < 1:
            raise ConfigError(f"--batches has {min(self.batches)}", "give 1 or more")
        if self.group_size is not None and (self.shape is None or self.group_size not in (32, 64, 128)):
            raise ConfigError(f"--w-group-size is {self.group_size}", "give 32, 64 or 128, and a --shape")
        if self.group_size is not None and self.against:
            raise ConfigError("--against compares the same numbers on both sides", "leave --w-group-size out")
        if self.against not in (None, "transformers"):
            raise ConfigError(f"--against {self.against!r} is not known", "give transformers")
        if self.against and self.mixes != ("static",):
            raise ConfigError("--against compares static batches and a prefill", "leave --mix out")

    def workloads(self) -> list[Workload]:
        found: list[Workload] = []
        for name in self.mixes:
            if name == "static":
                found += [workloads.static(batch, self.input_len, self.output_len) for batch in self.batches]
                found += [workloads.prefill(self.prefill_len)] if self.prefill_len else []
            else:
                found.append(workloads.mix(name, self.seed))
        return found

    def source(self) -> Path | ModelConfig:
        return find_shape(self.shape) if self.shape else resolve_model(str(self.model))


def run_offline(plan: Plan, config: EngineConfig, *, json_file: str | None = None, png: Path | None = None) -> Report:
    """Tables on stdout (stderr where the JSON goes to stdout), what is being done on stderr."""
    if plan.against and config.tp > 1:
        raise ConfigError(f"--tp is {config.tp}, and transformers runs as one process", "leave out --against or --tp")
    wanted = plan.workloads()
    offline.wants_prefix_cache(wanted)
    outputs.check(json_file, png)
    source, device = plan.source(), choose_device(config.device)
    if isinstance(source, Path):
        config = under_engine_file(config, source)
    notices = make_console(stderr=True)
    with notices.status("measuring this machine") as status:
        measured = limits.measure(device)
        status.update("loading")
        loaded = offline.load(
            source,
            config,
            wanted,
            lambda what, done, total: status.update(f"{what}: {done} of {total}"),
            plan.group_size,
        )
        try:
            report = _measure(plan, config, source, loaded, measured, wanted, status.update)
        finally:
            offline.free(loaded)
    outputs.write(report, json_file, png)
    show(report, notices if json_file == "-" else make_console())
    return report


def _measure(
    plan: Plan,
    config: EngineConfig,
    source: Path | ModelConfig,
    loaded: LoadedEngine,
    measured: limits.Limits,
    wanted: list[Workload],
    progress: Callable[[str], None],
) -> Report:
    results, comparisons = [], []
    if plan.against:
        on_cpu = loaded.device.type == "cpu"
        cases = compare.cases(plan.batches, plan.input_len, plan.output_len, plan.prefill_len, cpu=on_cpu)
        progress("building transformers' models")
        peers = _peers(source, loaded)
        comparisons = compare.compare(loaded, peers, cases, limits=measured, repeats=plan.repeats, progress=progress)
    else:
        for workload in wanted:
            progress(workload.name)
            results.append(
                offline.measure(
                    loaded,
                    workload,
                    max_batch_size=config.max_batch_size,
                    num_ranks=config.tp,
                    limits=measured,
                    repeats=plan.repeats,
                    warm_up=plan.warm_up,
                    seed=plan.seed,
                )
            )
    settings = {"plan": asdict(plan), "engine": config.settings()}
    return make_report(plan.shape or str(plan.model), loaded.weights, measured, settings, results, comparisons)


def _peers(source: Path | ModelConfig, loaded: LoadedEngine) -> list["TransformersPeer"]:
    """On a CPU each dtype, on a GPU ours."""
    from lmtool.bench.transformers_peer import TransformersPeer

    dtypes = _PEER_DTYPES if loaded.device.type == "cpu" else (getattr(torch, loaded.weights),)
    return [TransformersPeer(source, dtype, loaded.device) for dtype in dtypes]


def run_limits(device: str, *, json_file: str | None = None) -> None:
    outputs.check(json_file, None)
    found = asdict(limits.measure(choose_device(device)))
    if json_file is not None:
        outputs.put(json.dumps(found, indent=1), json_file)
    if json_file != "-":
        make_console().print(found["device"], highlight=False)
        show_limits(found, make_console())


def show_reports(files: list[Path], metric: str, *, png: Path | None = None) -> None:
    outputs.check(None, png)
    reports = [read_report(file) for file in files]
    if len(reports) == 1:
        show(reports[0], make_console())
    else:
        known = {name for report in reports for result in report.results for name in result.get("metrics", {})}
        if metric not in known:
            raise ConfigError(
                f"--metric {metric!r} is in none of the reports", f"give one of {', '.join(sorted(known))}"
            )
        make_console().print(side_by_side(reports, metric))
    if png is not None:
        draw(reports[0], png)
