"""Figures as Rich tables: one style and one way to write numbers. Knows not how anything was measured."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
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


def curve_table(results: Sequence[dict[str, Any]]) -> Table:
    """Of `bench curve`: a row for each number of requests at once and length of prompts; times in ms."""
    columns = "req/s", "output tok/s", "TTFT p50, ms", "p99", "ITL p50", "p99"
    table = make_table("at once, tokens in/out", *columns)
    for result in results:
        metrics = result["metrics"]
        first, between = metrics["time_to_first_token_s"], metrics["inter_token_latency_s"]
        table.add_row(
            f"{result['concurrency']}, {number(result['input_len'])}/{number(result['output_len'])}",
            scaled(metrics["requests_per_s"], 1),
            scaled(metrics["output_tokens_per_s"], 1),
            *(scaled(times, 1e3, key) for times in (first, between) for key in ("median", "p99")),
        )
    return table


_TIMES = {
    "time_to_first_token_s": "first token (TTFT)",
    "time_per_output_token_s": "a later token (TPOT)",
    "inter_token_latency_s": "between texts (ITL)",
    "end_to_end_s": "end to end",
}
_BUSY_CLIENT = 0.7  # of one core, from which on the client's own time may be in the figures


def show_online(result: dict[str, Any], console: Console) -> None:
    """Of `bench online`: rates, times in ms, and whatever went wrong, with how often."""
    metrics = result["metrics"]
    table = make_table(f"{result['name']}, ms", "mean", "p50", "p90", "p99")
    for name, label in _TIMES.items():
        if name in metrics:
            table.add_row(label, *(scaled(metrics[name], 1e3, key) for key in ("mean", "median", "p90", "p99")))
    if table.rows:
        console.print(table)
    for line in _online_lines(result):
        console.print(line, markup=False, highlight=False)


def _online_lines(result: dict[str, Any]) -> list[str]:
    metrics, prompt_tokens = result["metrics"], result["num_prompt_tokens"]
    total = f", {scaled(metrics['total_tokens_per_s'], 1)} with prompts" if "total_tokens_per_s" in metrics else ""
    lines = [
        f"{result['num_answered']} of {result['num_requests']} requests answered in {result['duration_s']:.2f} s:"
        f" {scaled(metrics['requests_per_s'], 1)} requests/s,"
        f" {scaled(metrics['output_tokens_per_s'], 1)} output tokens/s{total}",
        f"tokens: {'an unknown number' if prompt_tokens is None else f'{prompt_tokens:,}'} in,"
        f" {result['num_generated_tokens']:,} out",
    ]
    if result["num_uncounted"]:
        lines.append(
            f"{result['num_uncounted']} answers came without the server's own count (usage):"
            " their tokens are the pieces of text that came, which may hold several each"
        )
    lines += [f"failed {count} times: {cause}" for cause, count in result["failures"].items()]
    if result["num_unfinished"]:
        lines.append(f"interrupted: {result['num_unfinished']} requests were not sent or not finished")
    if result["num_answered"] and result.get("client_cpu_share", 0) > _BUSY_CLIENT:
        lines.append(
            f"this client was busy for {result['client_cpu_share']:.0%} of the time:"
            " the server may be faster than these figures say"
        )
    return lines
