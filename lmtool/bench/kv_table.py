"""`lmtool bench kv`: one conversation of 512 tokens in the engine, with 4-bit weights, with an int8 K/V cache, with
both, and through transformers: memory and tokens a second. Each row is a process of its own (`kv_row`).
"""

import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from lmtool.bench import outputs
from lmtool.bench.kv_row import Row, Seen
from lmtool.bench.report import make_console
from lmtool.bench.tables import make_table, number
from lmtool.child import module_command, module_environment
from lmtool.errors import ConfigError, LmtoolError

ENGINE, W4, KV, BOTH, PEER = "engine", "+ W4A16", "+ KV int8", "+ both", "transformers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is run: ``model`` in numbers and ``quantized`` in 4 bits, or a shape. None: that row is left out."""

    model: str | None
    quantized: str | None
    shape: str | None
    group_size: int
    context: int
    output_len: int

    def __post_init__(self) -> None:
        if self.context < 16:
            raise ConfigError(f"--context is {self.context}", "give 16 or more")
        if not 2 <= self.output_len < self.context:
            raise ConfigError(
                f"--output-len is {self.output_len}", f"give 2 or more, less than --context {self.context}"
            )


def rows(subject: Subject, engine: dict[str, Any], prompts: list[list[int]], *, dense_dtype: str) -> list[Row]:
    """engine: settings of all rows; dense_dtype: of the weights where they are not 4-bit."""
    settings = {**engine, "session_len": subject.context, "max_batch_size": 1, "prefix_caching": False}

    def row(name: str, *, four_bits: bool = False, kv: str = "model", peer: bool = False) -> Row:
        return Row(
            name=name,
            model=subject.quantized if four_bits else subject.model,
            shape=subject.shape,
            group_size=subject.group_size if four_bits and subject.shape else None,
            peer=peer,
            engine={**settings, "kv_dtype": kv, "dtype": engine["dtype"] if four_bits else dense_dtype},
            prompts=prompts,
            output_len=subject.output_len,
        )

    found = [row(ENGINE)]
    if subject.quantized or subject.shape:
        found.append(row(W4, four_bits=True))
    found.append(row(KV, kv="int8"))
    if subject.quantized or subject.shape:
        found.append(row(BOTH, four_bits=True, kv="int8"))
    return [*found, row(PEER, peer=True)]


def run(wanted: Sequence[Row], progress: Callable[[str], None]) -> tuple[list[Seen], list[str]]:
    """And why a row is not there: what transformers cannot load. Raises LmtoolError with what a row's process said."""
    seen, missing = [], []
    for row in wanted:
        try:
            seen.append(_in_a_process(row, progress))
        except LmtoolError as error:
            if not row.peer:
                raise
            missing.append(str(error))
    return seen, missing


def _in_a_process(row: Row, progress: Callable[[str], None]) -> Seen:
    progress(row.name)
    done = subprocess.run(
        module_command("lmtool.bench.kv_row"),
        input=json.dumps(asdict(row)),
        capture_output=True,
        text=True,
        env=module_environment(),
        check=False,
    )
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise LmtoolError(f"the process of row {row.name!r} ended with {done.returncode}: {last[0]}") from None
    if "seen" not in answer:
        raise LmtoolError(f"row {row.name!r}: {answer['cause']}", answer["fix"])
    return Seen(**answer["seen"])


# ---------------------------------------------------------------------- what is shown
def table_of(seen: Sequence[Seen], title: str) -> Table:
    base = seen[0]
    found = make_table("", "weights", "decode tok/s", "", "first token ms", "peak MiB", "", "cache MiB", "KiB a token")
    found.title = title
    for one in seen:
        found.add_row(
            one.name,
            one.weights,
            number(one.decode_tokens_per_s),
            f"{one.decode_tokens_per_s / base.decode_tokens_per_s:.2f}×",
            number(one.time_to_first_token_s * 1e3),
            number(one.peak_bytes / (1 << 20)),
            f"{one.peak_bytes / base.peak_bytes:.2f}×",
            number(one.cache_bytes / (1 << 20) if one.cache_bytes is not None else None),
            number(one.per_token_bytes / 1024 if one.per_token_bytes is not None else None),
        )
    return found


def show(
    seen: Sequence[Seen], subject: Subject, about: dict[str, Any], json_file: str | None, png: Path | None
) -> None:
    if json_file is not None:
        outputs.put(
            json.dumps({**about, "subject": asdict(subject), "rows": [asdict(one) for one in seen]}, indent=1),
            json_file,
        )
    if png is not None:
        draw(seen, about["model"], png)
    if json_file != "-":
        make_console().print(table_of(seen, about["model"]))


def draw(seen: Sequence[Seen], title: str, path: Path) -> None:
    """Speed and memory as bars, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.8 + 0.45 * len(seen)), layout="constrained")
    figure.suptitle(title, fontsize=10)
    panels = figure.subplots(1, 2, sharey=True)
    sides = (
        ("decode, tokens/s", [one.decode_tokens_per_s for one in seen], "#1f77b4"),
        ("peak memory, MiB", [one.peak_bytes / (1 << 20) for one in seen], "#d97706"),
    )
    for axes, (label, values, color) in zip(panels, sides, strict=True):
        axes.barh(range(len(seen)), values, color=color)
        for i, value in enumerate(values):
            axes.annotate(f" {value:,.0f}", (value, i), va="center")
        axes.set_xlim(0, 1.2 * max(values))
        axes.set_xlabel(label)
    panels[0].set_yticks(range(len(seen)), [one.name for one in seen])
    panels[0].invert_yaxis()
    figure.savefig(path, format="png", dpi=120)
