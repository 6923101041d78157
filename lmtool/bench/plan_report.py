"""`lmtool bench plan`: a saved curve, a load and its targets → how many replicas, as a table, JSON and a picture."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from lmtool.bench import outputs
from lmtool.bench.plan import Forecast, Load, Sizing, Targets, forecast, size
from lmtool.bench.plan_queue import MOST_UTILIZED
from lmtool.bench.plan_replica import Floats, Replica, read_cells, replica_of
from lmtool.bench.report import Report, make_console, read_report
from lmtool.bench.tables import make_table, number
from lmtool.errors import InputError

FORMAT = "lmtool-plan/1"
_MOST_LINES = 6  # of the picture
_POINTS = 25


def run_plan(
    curve: Path, load: Load, targets: Targets, *, json_file: str | None = None, png: Path | None = None
) -> Sizing:
    """A table on stdout (stderr where the JSON goes to stdout).

    Raises InputError for a file that holds no curve, ConfigError for what was not measured or cannot be reached.
    """
    outputs.check(json_file, png)
    if not curve.exists():
        raise InputError(
            f"there is no curve {curve}", f"start one replica and measure it: lmtool bench curve URL --json {curve}"
        )
    report = read_report(curve)
    replica = replica_of(read_cells(report, str(curve)), load.input_len, load.output_len)
    found = size(replica, load, targets)
    if json_file is not None:
        outputs.put(json.dumps(_as_json(report, replica, load, targets, found), indent=1), json_file)
    if png is not None:
        _draw(report, replica, load, targets, found, png)
    _show(report, replica, load, targets, found, make_console(stderr=json_file == "-"))
    return found


# ---------------------------------------------------------------------- as text
def _show(report: Report, replica: Replica, load: Load, targets: Targets, found: Sizing, console: Console) -> None:
    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    say(" · ".join(part for part in (report.model, report.device, report.engine) if part))
    say(
        f"one replica carries {number(replica.capacity)} requests/s of {load.input_len:g} tokens in,"
        f" {load.output_len:g} out, {replica.most_at_once} at once"
    )
    console.print(_table(found, load, targets))
    for line in _conclusions(found, load):
        say(line)


def _table(found: Sizing, load: Load, targets: Targets) -> Any:
    percent = f"p{targets.percentile:g}"
    columns = "utilization", "at once", "TTFT p50, ms", percent, "ITL p50, ms", percent
    table = make_table(f"replicas for {load.rate:g} req/s", *columns, "")
    for one in found.forecasts:
        verdict = "keeps the targets" if not one.misses else _failure(one)
        table.add_row(str(one.num_replicas), f"{one.utilization:.0%}", *_times(one, load, targets), verdict)
    return table


def _failure(one: Forecast) -> str:
    return "more comes than they carry" if one.state is None else f"too slow: {' and '.join(one.misses)}"


def _times(one: Forecast, load: Load, targets: Targets) -> list[str]:
    if one.state is None:
        return [""] * 5
    both = one.state.first_token, one.state.gap
    return [
        number(_at_once(one, load)),
        *(number(times.percentile(percent) * 1e3) for times in both for percent in (50, targets.percentile)),
    ]


def _at_once(one: Forecast, load: Load) -> float | None:
    """Requests in each replica, on average."""
    if one.state is None:
        return None
    return one.state.mean_at_once / (one.num_replicas if load.routing == "least-queued" else 1)


def _conclusions(found: Sizing, load: Load) -> list[str]:
    needed = found.num_replicas
    lines = [f"{needed} {'replica' if needed == 1 else 'replicas'}; bottleneck: {found.bottleneck}"]
    fewer, others = found.forecast(needed - 1), "the other" if needed == 2 else "the others"
    if fewer is None:
        lines.append("when it dies nobody answers until it is back")
    elif fewer.state is None:
        more = load.rate * (1 - MOST_UTILIZED / fewer.utilization)
        verb = "is" if needed == 2 else "are"
        lines.append(
            f"when one dies, {others} {verb} given {fewer.utilization:.0%} of what can be carried:"
            f" the queue grows by {number(more)} requests a second"
        )
    else:
        slow = " and ".join(fewer.misses)
        lines.append(f"when one dies, {others} can carry the load, but too slowly for the targets ({slow})")
    lines.append(f"with one to spare: {needed + 1} replicas")
    return lines + list(found.notes)


# ---------------------------------------------------------------------- as JSON
def _as_json(report: Report, replica: Replica, load: Load, targets: Targets, found: Sizing) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "model": report.model,
        "device": report.device,
        "engine": report.engine,
        "load": asdict(load),
        "targets": asdict(targets),
        "requests_per_s_of_one": replica.capacity,
        "most_at_once_measured": replica.most_at_once,
        "num_replicas": found.num_replicas,
        "num_replicas_with_a_spare": found.num_replicas + 1,
        "bottleneck": found.bottleneck,
        "notes": list(found.notes),
        "forecasts": [_forecast_as_json(one, load) for one in found.forecasts],
    }


def _forecast_as_json(one: Forecast, load: Load) -> dict[str, Any]:
    values: dict[str, Any] = {
        "num_replicas": one.num_replicas,
        "utilization": one.utilization,
        "misses": list(one.misses),
        "at_once": _at_once(one, load),
    }
    for name, times in (
        ("time_to_first_token_s", one.state and one.state.first_token),
        ("inter_token_latency_s", one.state and one.state.gap),
    ):
        values[name] = {f"p{percent}": times.percentile(percent) for percent in (50, 90, 95, 99)} if times else None
    return values


# ---------------------------------------------------------------------- as a picture
def _draw(report: Report, replica: Replica, load: Load, targets: Targets, found: Sizing, path: Path) -> None:
    """The rate against the first token, for 1 … one more than needed replicas."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    figure.suptitle(
        f"{report.model} · {report.device or report.engine}\n"
        f"prompts of {load.input_len:g} tokens, answers of {load.output_len:g}",
        fontsize=10,
    )
    axes = figure.subplots()
    for count in _counts(found.num_replicas + 1):
        rates = np.linspace(0.02, 1, _POINTS) * MOST_UTILIZED * 0.999 * count * replica.capacity
        name = "1 replica" if count == 1 else f"{count} replicas"
        axes.plot(rates, _first_tokens(replica, load, targets, count, rates), label=name)
    if targets.first_token_s is not None:
        axes.axhline(targets.first_token_s, color="#555555", linewidth=1, linestyle="--")
    axes.axvline(load.rate, color="#555555", linewidth=1, linestyle=":")
    axes.set_yscale("log")
    axes.set_xlabel("requests a second, Poisson")
    axes.set_ylabel(f"first token, p{targets.percentile:g}, s")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=120)


def _counts(most: int) -> list[int]:
    """1 … most, of many some."""
    return sorted({round(count) for count in np.linspace(1, most, min(most, _MOST_LINES))})


def _first_tokens(replica: Replica, load: Load, targets: Targets, count: int, rates: Floats) -> list[float]:
    found = []
    for rate in rates:
        one = forecast(replica, replace(load, rate=float(rate)), targets, count)
        assert one.state is not None, "less than what they carry"
        found.append(one.state.first_token.percentile(targets.percentile))
    return found
