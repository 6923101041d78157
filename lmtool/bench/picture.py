"""A report as a PNG: the roofline with a point for each workload, and each workload's share of its limit.

Draws with matplotlib's objects and no global state. Knows not how anything was measured.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmtool.bench.report import Report
from lmtool.errors import InputError

_INK, _ROOF = "#1f77b4", "#555555"


def draw(report: Report, path: Path) -> None:
    """Write the picture. Raises InputError where no figure of the report has a limit beside it."""
    from matplotlib.figure import Figure

    if any(result.get("requests") for result in report.results):
        _draw_requests(report, path)
        return
    shares = _shares(report)
    if not shares:
        raise InputError("nothing in the report stands beside a limit", "--png needs a run of `lmtool bench`")
    points = _points(report)
    figure = Figure(figsize=(12 if points else 7, 2.5 + 0.35 * max(len(shares), 4)), layout="constrained")
    made_by = f"{report.engine} {report.commit or ''}".rstrip()
    figure.suptitle(f"{report.model} {report.weights} · {made_by}\n{report.device}", fontsize=10)
    panels = figure.subplots(1, 2 if points else 1, squeeze=False)[0]
    _draw_shares(panels[-1], shares)
    if points:
        _draw_roofline(panels[0], points, report.limits)
    figure.savefig(path, format="png", dpi=120)


def _shares(report: Report) -> list[tuple[str, str, float]]:
    """(name, figure, share of the limit)."""
    found = []
    for result in report.results:
        rate, time = report.headline(result["name"]), report.metric(result["name"], "time_s")
        if rate.get("ratio") is not None:
            found.append((result["name"], f"{rate['median']:,.0f} tok/s", rate["ratio"]))
        elif time.get("ratio") is not None:
            found.append((result["name"], f"{time['median'] * 1e6:,.1f} µs", time["ratio"]))
    compared = [one for one in report.comparisons if one["limit_ratio"] is not None]
    return found + [(one["name"], f"{one['ours_tokens_per_s']:,.0f} tok/s", one["limit_ratio"]) for one in compared]


def _points(report: Report) -> list[tuple[str, float, float]]:
    """(name, operations per byte, operations per second), where the limits and the work are known.

    Ops are named by their group: there are too many to write beside each point.
    """
    if not report.limits:
        return []
    points = []
    for result in report.results:
        if result.get("num_bytes") and result.get("flops"):
            duration_s = sorted(result["durations_s"])[len(result["durations_s"]) // 2]
            name = result.get("group", result["name"])
            points.append((name, result["flops"] / result["num_bytes"], result["flops"] / duration_s))
    return points


def _draw_shares(axes: Any, shares: Sequence[tuple[str, str, float]]) -> None:
    positions = range(len(shares))
    axes.barh(positions, [share * 100 for _, _, share in shares], color=_INK)
    for position, (_, figure, share) in zip(positions, shares, strict=True):
        axes.annotate(f" {share:.0%} · {figure}", (share * 100, position), va="center")
    axes.set_yticks(positions, [name for name, _, _ in shares])
    axes.invert_yaxis()
    axes.axvline(100, color=_ROOF, linewidth=1)
    axes.set_xlim(0, max(140, *(share * 140 for _, _, share in shares)))
    axes.set_xlabel("share of what this machine allows, %")


def _draw_roofline(axes: Any, points: Sequence[tuple[str, float, float]], limits: dict[str, Any]) -> None:
    read, peak = limits["read_bytes_per_s"], limits["matmul_flops_per_s"]
    ridge = peak / read
    left = min(ridge, *(x for _, x, _ in points)) / 4
    right = max(ridge, *(x for _, x, _ in points)) * 4
    axes.loglog([left, ridge, right], [left * read / 1e12, peak / 1e12, peak / 1e12], color=_ROOF)
    names = list(dict.fromkeys(name for name, _, _ in points))
    for i, name in enumerate(names):
        found = [(x, y / 1e12) for one, x, y in points if one == name]
        color = _INK if len(found) == 1 else f"C{i}"
        axes.scatter([x for x, _ in found], [y for _, y in found], color=color, label=name, zorder=3)
    if len(names) < len(points):
        axes.legend(fontsize=8)
    else:
        for name, x, y in points:
            axes.annotate(name, (x, y / 1e12), xytext=(5, -10), textcoords="offset points", fontsize=8)
    axes.set_xlabel("operations per byte (one pass over weights and cache for each step)")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(
        f"read {read / 1e9:,.0f} GB/s · {limits['matmul_dtype']} matmul {peak / 1e12:,.1f} TFLOP/s", fontsize=10
    )


# ---------------------------------------------------------------------- a server's answers
def _draw_requests(report: Report, path: Path) -> None:
    """Which share of the requests was at least so fast, and how many tokens each got."""
    from matplotlib.figure import Figure

    result = report.results[0]
    rows = sorted(result["requests"], key=lambda row: row["sent_s"])
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    figure.suptitle(f"{report.model} · {report.engine}\n{result['name']}", fontsize=10)
    shares, times = figure.subplots(1, 2)
    for name, label in (("time_to_first_token_s", "first token"), ("end_to_end_s", "end to end")):
        values = sorted(row[name] * 1e3 for row in rows)
        shares.step(values, [(i + 1) / len(values) * 100 for i in range(len(values))], label=label, where="post")
        times.scatter([row["sent_s"] for row in rows], [row[name] * 1e3 for row in rows], s=8, label=label)
    shares.set_xscale("log")
    shares.set_xlabel("ms")
    shares.set_ylabel("requests that took no longer, %")
    times.set_xlabel("sent, s after the first")
    times.set_ylabel("ms")
    for axes in (shares, times):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=120)
