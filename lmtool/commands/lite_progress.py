"""What a user sees of a quantization: the plan, a bar with errors and time left, the table at the end."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from lmtool.quant.plan import Plan

_MIB = 1 << 20


class QuantProgress:
    """A `quant.pipeline.Listener` on stderr; the last table goes to stdout."""

    def __init__(self, work_dir: Path) -> None:
        self._work_dir = work_dir
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} blocks"),
            TextColumn("{task.fields[errors]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self._console,
        )
        self._task: TaskID | None = None
        self._plan: Plan | None = None
        self._started = time.perf_counter()
        self._timed = False
        self.num_blocks_run = 0

    def __enter__(self) -> "QuantProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._bar.stop()

    def planned(self, plan: "Plan") -> None:
        self._plan = plan
        text = f"{plan.num_tokens:,} tokens of calibration text" if plan.num_tokens else "no calibration text"
        self._console.print(
            f"plan: {plan.num_blocks} blocks, {text}; memory for a block {_size(plan.device)}, hidden states "
            f"{_size(plan.hidden)} (mapped from the work dir), disk {_size(plan.disk)} while it runs, "
            f"{_size(plan.output)} for the model; the time is known after one block",
            highlight=False,
        )
        for note in plan.notes:
            self._console.print(note, highlight=False)
        if plan.blocks_done:
            self._console.print(f"{plan.blocks_done} blocks are done already: going on", highlight=False)
        self._bar.start()
        self._task = self._bar.add_task(
            "quantizing", total=plan.num_blocks, completed=plan.blocks_done, errors="first block: a dry run"
        )

    def block_done(self, block: int, report: Mapping[str, Any], seconds: float) -> None:
        assert self._task is not None
        assert self._plan is not None
        self.num_blocks_run += 1
        if not self._timed:
            left = self._plan.num_blocks - block - 1
            self._console.print(f"a block takes {seconds:.1f} s: about {seconds * left:.0f} s for the other {left}")
            self._timed = True
        self._bar.update(self._task, completed=block + 1, errors=_errors(report))
        for entry in report["linears"]:
            if entry["note"]:
                names = ", ".join(entry["names"])
                self._console.print(f"[yellow]{names}: {entry['note']}; rounded plainly[/]", highlight=False)

    def writing(self) -> None:
        if self._task is not None:
            self._bar.update(self._task, description="writing")

    def show(self, quality: Mapping[str, Any]) -> None:
        """The table of a finished run, on stdout."""
        table = Table(title=f"{self._work_dir}: {quality['bits_per_weight']:.2f} bits a weight, {quality['method']}")
        table.add_column("linears")
        table.add_column("error, plain rounding", justify="right")
        table.add_column(f"error, {quality['method']}", justify="right")
        table.add_column("ratio", justify="right")
        for group, (plain, error) in _by_group(quality).items():
            ratio = f"{error / plain:.2f}" if plain else "–"
            table.add_row(group, f"{plain:.2%}", f"{error:.2%}", ratio)
        if table.row_count:
            Console().print(table)
        if quality["evaluation"]:
            Console().print(_losses(quality["evaluation"]))
        fallbacks = quality["fallbacks"]
        note = f"; {len(fallbacks)} linears were rounded plainly, see lmtool-quality.json" if fallbacks else ""
        ready = f"{self._work_dir} is ready: lmtool chat {self._work_dir}{note}"
        Console().print(ready, highlight=False, soft_wrap=True)


@contextmanager
def block_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr that is told (blocks done, blocks in all)."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} blocks"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(stderr=True),
    )
    task = bar.add_task(what, total=None)
    with bar:
        yield lambda done, count: bar.update(task, completed=done, total=count)


def _errors(report: Mapping[str, Any]) -> str:
    measured = [entry for entry in report["linears"] if entry["error"] is not None]
    if not measured:
        return "rounded"
    plain = sum(entry["error_plain"] for entry in measured) / len(measured)
    error = sum(entry["error"] for entry in measured) / len(measured)
    return f"error {plain:.2%} → {error:.2%}"


def _losses(found: Mapping[str, Any]) -> Table:
    table = Table(title=f"{found['text']['name']}, {found['num_windows']} windows of {found['window_len']} tokens")
    for name in ("", "original", "quantized", "± standard error"):
        table.add_column(name, justify="right" if name else "left")

    def error(figure: Mapping[str, Any], form: str) -> str:
        return "–" if figure["stderr"] is None else form.format(figure["stderr"])

    perplexity = found["perplexity"]
    original = f"{found['original_perplexity']['value']:.3f}"
    table.add_row("perplexity", original, f"{perplexity['value']:.3f}", error(perplexity, "{:.3f}"))
    for name, key, form in (
        ("KL, nats a token", "kl", "{:.4f}"),
        ("loss less the original's", "delta_nll", "{:.4f}"),
        ("same likeliest token", "top1_agreement", "{:.2%}"),
    ):
        table.add_row(name, "", form.format(found[key]["value"]), error(found[key], form))
    return table


def _by_group(quality: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Mean over the blocks of what was measured."""
    pairs: dict[str, list[tuple[float, float]]] = {}
    for layer in quality["layers"]:
        for entry in layer["linears"]:
            if entry["error"] is not None:
                names = ", ".join(name.split(".")[-1] for name in entry["names"])
                pairs.setdefault(names, []).append((entry["error_plain"], entry["error"]))
    return {
        names: (sum(p for p, _ in found) / len(found), sum(e for _, e in found) / len(found))
        for names, found in pairs.items()
    }


def _size(num_bytes: int) -> str:
    return f"{num_bytes / _MIB:,.0f} MiB" if num_bytes < 10 << 30 else f"{num_bytes / (1 << 30):,.1f} GiB"
