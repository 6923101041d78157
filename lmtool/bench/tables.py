"""Figures as Rich tables: one style and one way to write numbers. Knows not how anything was measured."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table


def make_table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def number(value: float | None) -> str:
    """Three digits that count; empty where nothing was measured."""
    if value is None:
        return ""
    if value >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def scaled(metric: dict[str, Any], factor: float, key: str = "median") -> str:
    """A figure in another unit; empty where it was not measured."""
    value = metric.get(key)
    return "" if value is None or value != value else number(value * factor)


def tuned_table(results: Sequence[dict[str, Any]]) -> Table:
    """Of `bench kernels --tune`: what was used before, what is best, and what the library needs, in µs.

    The last three columns are those of a decode step of few layers, by which it was decided.
    """
    columns = "before", "µs", "now", "µs", "of the limit", "library", "step before", "now", "library"
    table = make_table("matrix, rows", *columns)
    for result in results:
        metrics = result["metrics"]
        time = metrics["time_s"]
        table.add_row(
            result["name"],
            " ".join(map(str, result["before"])),
            scaled(metrics["before_s"], 1e6),
            " ".join(map(str, result["config"])),
            scaled(time, 1e6),
            f"{time['ratio']:.0%}",
            *(scaled(metrics[name], 1e6) for name in ("library_s", "before_step_s", "step_s", "library_step_s")),
        )
    return table


def kernels_table(results: Sequence[dict[str, Any]]) -> Table:
    """Of `bench kernels`: each op's time, its limit, and the library's product where there is one, in µs."""
    table = make_table("op, rows", "µs", "limit µs", "of the limit", "library's product µs", "library / ours")
    for result in results:
        time, library = result["metrics"]["time_s"], result["metrics"].get("library_s", {})
        ratio = time.get("ratio")
        table.add_row(
            result["name"],
            scaled(time, 1e6),
            scaled(time, 1e6, "limit"),
            "" if ratio is None else f"{ratio:.0%}",
            scaled(library, 1e6),
            f"{library['median'] / time['median']:.2f}×" if library else "",
        )
    return table
