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

    shares = _shares(report)
    if not shares:
        raise InputError("nothing in the report stands beside a limit", "--png needs a run of `lmtool bench offline`")
    points = _points(report)
    figure = Figure(figsize=(12 if points else 7, 2.5 + 0.35 * max(len(shares), 4)), layout="constrained")
    made_by = f"{report.engine} {report.commit or ''}".rstrip()
    figure.suptitle(f"{report.model} {report.weights} · {made_by}\n{report.device}", fontsize=10)
    panels = figure.subplots(1, 2 if points else 1, squeeze=False)[0]
    _draw_shares(panels[-1], shares)
    if points:
        _draw_roofline(panels[0], points, report.limits)
    figure.savefig(path, format="png", dpi=120)


def _shares(report: Report) -> list[tuple[str, float, float]]:
    """(name, tok/s, share of the limit)."""
    found = []
    for result in report.results:
        metric = report.headline(result["name"])
        if metric.get("ratio") is not None:
            found.append((result["name"], metric["median"], metric["ratio"]))
    compared = [one for one in report.comparisons if one["limit_ratio"] is not None]
    return found + [(one["name"], one["ours_tokens_per_s"], one["limit_ratio"]) for one in compared]


def _points(report: Report) -> list[tuple[str, float, float]]:
    """(name, operations per byte, operations per second), where the limits and the work are known."""
    if not report.limits:
        return []
    points = []
    for result in report.results:
        if result.get("num_bytes") and result.get("flops"):
            duration_s = sorted(result["durations_s"])[len(result["durations_s"]) // 2]
            points.append((result["name"], result["flops"] / result["num_bytes"], result["flops"] / duration_s))
    return points


def _draw_shares(axes: Any, shares: Sequence[tuple[str, float, float]]) -> None:
    positions = range(len(shares))
    axes.barh(positions, [share * 100 for _, _, share in shares], color=_INK)
    for position, (_, rate, share) in zip(positions, shares, strict=True):
        axes.annotate(f" {share:.0%} · {rate:,.0f} tok/s", (share * 100, position), va="center")
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
    axes.scatter([x for _, x, _ in points], [y / 1e12 for _, _, y in points], color=_INK, zorder=3)
    for name, x, y in points:
        axes.annotate(name, (x, y / 1e12), xytext=(5, -10), textcoords="offset points", fontsize=8)
    axes.set_xlabel("operations per byte (one pass over weights and cache for each step)")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(
        f"read {read / 1e9:,.0f} GB/s · {limits['matmul_dtype']} matmul {peak / 1e12:,.1f} TFLOP/s", fontsize=10
    )
