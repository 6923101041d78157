"""`Report`: what was measured, where, and on what; as JSON and back, and as tables. Knows not how it was measured."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lmtool import __version__
from lmtool.bench.compare import Comparison
from lmtool.bench.limits import Limits
from lmtool.bench.offline import Result
from lmtool.bench.tables import curve_table, kernels_table, make_table, number, show_online, tuned_table
from lmtool.errors import InputError

FORMAT = "lmtool-bench/1"
_PACKAGES = ("torch", "triton", "transformers", "numpy")
_HEADLINE = "output_tokens_per_s"
_WIDTH = 140


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One run of a benchmark, plain values only. A peer's may leave out all but ``engine``, ``model`` and ``results``.

    results      as `offline.Result`; of a peer ``name`` and, in ``metrics``, whatever was measured
    comparisons  as `compare.Comparison`
    """

    engine: str
    model: str
    weights: str = ""
    device: str = ""
    commit: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, Any] = field(default_factory=dict)
    results: list[dict[str, Any]] = field(default_factory=list)
    comparisons: list[dict[str, Any]] = field(default_factory=list)

    def metric(self, result_name: str, metric: str = _HEADLINE) -> dict[str, Any]:
        """median, best, limit, ratio; empty where it was not measured."""
        found = next((result for result in self.results if result["name"] == result_name), {})
        values: dict[str, Any] = found.get("metrics", {}).get(metric, {})
        return values

    def headline(self, result_name: str) -> dict[str, Any]:
        """The metric that sums a result up: output, or prefill where nothing else was done; tokens per second."""
        return self.metric(result_name) or self.metric(result_name, "prefill_tokens_per_s")


def make_report(
    model: str,
    weights: str,
    limits: Limits | None,
    settings: dict[str, Any],
    results: Sequence[Result] = (),
    comparisons: Sequence[Comparison] = (),
) -> Report:
    """The measured, with the versions and the commit it was measured with."""
    return Report(
        engine=f"lmtool {__version__}",
        model=model,
        weights=weights,
        device=limits.device if limits else "",
        commit=_commit(),
        versions=_versions(),
        settings=settings,
        limits=asdict(limits) if limits else {},
        results=[asdict(result) for result in results],
        comparisons=[asdict(comparison) for comparison in comparisons],
    )


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """Of the checkout that this package lies in, '+' where it has changes; None where there is none."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


# ---------------------------------------------------------------------- JSON
def to_json(report: Report) -> str:
    return json.dumps({"format": FORMAT, **asdict(report)}, indent=1)


def read_report(path: Path) -> Report:
    """Raises InputError for a file that is not a report, saying what is wrong with it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist", "give files that `lmtool bench offline --json FILE` wrote") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(
            f"{path} cannot be read: {error}", "give a file that `lmtool bench offline --json` wrote"
        ) from None
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise InputError(f"{path} is no benchmark report", f'it must be an object with "format": "{FORMAT}"')
    problem = _problem(values)
    if problem:
        raise InputError(f"{path}: {problem}", "docs/benchmarks.md describes the file")
    return Report(**values)


def _problem(values: dict[str, Any]) -> str | None:
    known = {one.name for one in fields(Report)}
    if unknown := sorted(set(values) - known):
        return f"it has {', '.join(unknown)}, which no report has"
    if missing := sorted({"engine", "model", "results"} - set(values)):
        return f"it lacks {', '.join(missing)}"
    results = values["results"]
    if not isinstance(results, list) or not all(isinstance(one, dict) and "name" in one for one in results):
        return "results is not a list of objects with a name"
    for one in results:
        for name, metric in one.get("metrics", {}).items():
            if not isinstance(metric, dict) or not isinstance(metric.get("median"), int | float):
                return f"{one['name']}: {name} has no median"
    return None


# ---------------------------------------------------------------------- tables
def show(report: Report, console: Console) -> None:
    """Everything in a report, as tables."""
    parts = report.model, report.weights, report.device, f"{report.engine} {report.commit or ''}".rstrip()
    console.print(" · ".join(part for part in parts if part), markup=False, highlight=False)
    if report.limits:
        show_limits(report.limits, console)
    if report.results:
        if "failures" in report.results[0]:
            show_online(report.results[0], console)
        else:
            console.print(_table_of(report))
    if report.comparisons:
        console.print(_comparison_table(report.comparisons))


def show_limits(limits: dict[str, Any], console: Console) -> None:
    """One line: what the machine does at best."""
    gap = limits.get("launch_gap_s")
    read, copy = limits["read_bytes_per_s"] / 1e9, limits["copy_bytes_per_s"] / 1e9
    line = (
        f"limits here: read {read:,.1f} GB/s · copy {copy:,.1f} GB/s"
        f" · {limits['matmul_dtype']} matmul {limits['matmul_flops_per_s'] / 1e12:,.2f} TFLOP/s"
    )
    console.print(line + (f" · kernel gap {gap * 1e6:.2f} µs" if gap else ""), markup=False, highlight=False)


# key in `metrics` → what stands above it
_COLUMNS = {
    "output_tokens_per_s": "output tok/s",
    "decode_tokens_per_s": "decode tok/s",
    "prefill_tokens_per_s": "prefill tok/s",
    "requests_per_s": "req/s",
}


def _table_of(report: Report) -> Table:
    """What was measured says which: a server's curve, a search, ops, or the engine's workloads."""
    if "concurrency" in report.results[0]:
        return curve_table(report.results)
    metrics = report.results[0].get("metrics", {})
    if "before_s" in metrics:
        return tuned_table(report.results)
    return kernels_table(report.results) if "time_s" in metrics else _results_table(report)


def _results_table(report: Report) -> Table:
    table = make_table("median (of the limit)", *_COLUMNS.values(), "first token ms", "steps")
    for result in report.results:
        first = report.metric(result["name"], "time_to_first_token_s")
        table.add_row(
            result["name"],
            *(_with_limit(report.metric(result["name"], name)) for name in _COLUMNS),
            number(first["median"] * 1e3 if first else None),
            number(result.get("num_steps")),
        )
    return table


def _with_limit(metric: dict[str, Any]) -> str:
    if metric.get("limit") is None:
        return number(metric.get("median"))
    return f"{number(metric['median'])} ({metric['ratio']:.0%} of {number(metric['limit'])})"


def _comparison_table(comparisons: Sequence[dict[str, Any]]) -> Table:
    stored = comparisons[0]["ours"]
    table = make_table("tok/s", f"lmtool ({stored})", "transformers (best dtype)", "ratio", "bar", "", "our limit")
    for one in comparisons:
        goal = f", goal {one['goal']:g}×" if one["goal"] else ""
        limit = one["limit_tokens_per_s"]
        table.add_row(
            one["name"],
            number(one["ours_tokens_per_s"]),
            f"{number(one['theirs_tokens_per_s'])} ({one['theirs']})",
            f"{one['ratio']:.2f}×",
            f"{one['bar']:g}×{goal}" if one["bar"] else "",
            {True: "ok", False: "short", None: ""}[one["ok"]],
            f"{number(limit)} ({one['limit_ratio']:.0%})" if limit else "",
        )
    return table


def side_by_side(reports: Sequence[Report], metric: str = _HEADLINE) -> Table:
    """One column for each report, and the first over the best of the others."""
    names = list(dict.fromkeys(result["name"] for report in reports for result in report.results))
    unit = metric.replace("_per_s", "/s").replace("_", " ")
    last = ["first / best other"] if len(reports) > 1 else []
    table = make_table(
        unit, *(f"{report.engine}\n{report.model} {report.weights}".rstrip() for report in reports), *last
    )
    for name in names:
        values = [report.metric(name, metric).get("median") for report in reports]
        if not any(values):
            continue
        others = [value for value in values[1:] if value]
        ratio = f"{values[0] / max(others):.2f}×" if values[0] and others else ""
        table.add_row(name, *map(number, values), *([ratio] if last else []))
    return table


def make_console(*, stderr: bool = False) -> Console:
    """As wide as its terminal; wide enough for the tables where there is none."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=_WIDTH)
