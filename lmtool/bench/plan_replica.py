"""`Replica`: what one server does with so many requests at once, out of the cells that `bench curve` measured.

Between two numbers of requests, and between two lengths of prompts, figures lie on a line. Lengths that were not
measured are refused or, answers up to twice as long or half as short, reckoned and named. Knows no arrivals.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmtool.bench.report import Report
from lmtool.errors import ConfigError, InputError

Floats = NDArray[np.float64]

# where `online_figures.spread` says how long at most such a share of the times was
SHARES = {"min": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
_AS_MEASURED = 0.1  # lengths that differ by less are the same: words are not all one token
_MOST_STRETCHED = 2.0


@dataclass(frozen=True, slots=True)
class Cell:
    """One measured cell. Times: quantiles at `SHARES` [5]; seconds. mean_*: over requests, over gaps."""

    concurrency: int
    input_len: float
    output_len: float
    requests_per_s: float
    first_token_s: Floats
    gap_s: Floats
    mean_first_token_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """Row n - 1 is with n requests at once, n = 1 … N: requests_per_s [N], first_token_s and gap_s [N, 5] at `SHARES`.

    prompt_share: of the machine's time that prompts take with N at once. notes: what was reckoned and not measured.
    """

    requests_per_s: Floats
    first_token_s: Floats
    gap_s: Floats
    prompt_share: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def most_at_once(self) -> int:
        """That were measured."""
        return len(self.requests_per_s)

    @property
    def capacity(self) -> float:
        """Requests a second with as many at once as were measured."""
        return float(self.requests_per_s[-1])

    @property
    def work_variation(self) -> float:
        """Of a request's work, squared deviation over squared mean: prompts are alike, answers exponential."""
        return (1 - self.prompt_share) ** 2

    def together(self, count: int) -> "Replica":
        """So many of them behind a front that sends each request to the one with the fewest: as one, row by requests
        at all of them. With n at k replicas each has n / k; who finds n there comes to one that has the n / k-th part,
        rounded down.
        """
        most = self.most_at_once
        each = np.arange(1, count * most + 1) / count
        rows = np.arange(count * most) // count
        known = np.arange(1, most + 1)
        rates = np.interp(each, np.arange(most + 1), [0.0, *self.requests_per_s])
        gaps = np.stack([np.interp(each, known, column) for column in self.gap_s.T], axis=1)
        return replace(self, requests_per_s=count * rates, first_token_s=self.first_token_s[rows], gap_s=gaps)


# ---------------------------------------------------------------------- out of a report
def read_cells(report: Report, path: str) -> list[Cell]:
    """Raises InputError for a report of something else."""
    try:
        cells = [_cell(result) for result in report.results]
    except (KeyError, TypeError, ValueError):
        cells = []
    if not cells:
        raise InputError(f"{path} holds no curve of a server", f"measure one: lmtool bench curve URL --json {path}")
    return cells


def _cell(result: dict[str, Any]) -> Cell:
    metrics = result["metrics"]
    first, gaps = metrics["time_to_first_token_s"], metrics["inter_token_latency_s"]
    return Cell(
        concurrency=int(result["concurrency"]),
        input_len=float(result["input_len"]),
        output_len=float(result["output_len"]),
        requests_per_s=float(metrics["requests_per_s"]["median"]),
        first_token_s=np.array([float(first[name]) for name in SHARES]),
        gap_s=np.array([float(gaps[name]) for name in SHARES]),
        mean_first_token_s=float(first["mean"]),
    )


# ---------------------------------------------------------------------- for one load's lengths
def replica_of(cells: Sequence[Cell], input_len: float, output_len: float) -> Replica:
    """What a replica does with requests of these mean lengths.

    Raises ConfigError where they lie too far outside of what was measured, or cells are missing.
    """
    notes: list[str] = []
    rows = [_for_answers(cell, output_len, notes) for cell in _between_lengths(cells, input_len)]
    measured = np.array([row.concurrency for row in rows], dtype=float)
    at_once = np.arange(1, measured[-1] + 1)

    def on_lines(values: Sequence[Floats]) -> Floats:
        table = np.array(values)  # [cells, 5]
        return np.stack([np.interp(at_once, measured, column) for column in table.T], axis=1)

    return Replica(
        requests_per_s=np.interp(at_once, measured, [row.requests_per_s for row in rows]),
        first_token_s=on_lines([row.first_token_s for row in rows]),
        gap_s=on_lines([row.gap_s for row in rows]),
        prompt_share=min(rows[0].mean_first_token_s * rows[-1].requests_per_s, 1.0),
        notes=notes,
    )


def _between_lengths(cells: Sequence[Cell], input_len: float) -> list[Cell]:
    """A cell for each number at once, by how many there are."""
    by_number: dict[int, list[Cell]] = {}
    for cell in sorted(cells, key=lambda one: (one.concurrency, one.input_len)):
        by_number.setdefault(cell.concurrency, []).append(cell)
    if 1 not in by_number:
        raise ConfigError("the curve has no cell with one request at once", "measure with --concurrency 1,…")
    return [_on_a_line(row, input_len) for row in by_number.values()]


def _on_a_line(row: Sequence[Cell], input_len: float) -> Cell:
    """Of cells that differ in the length of their prompts. What a request takes of the machine grows evenly with it."""
    shortest, longest = row[0].input_len, row[-1].input_len
    if not shortest * (1 - _AS_MEASURED) <= input_len <= longest * (1 + _AS_MEASURED):
        raise ConfigError(
            f"--in is {input_len:g}, prompts of {_range(shortest, longest)} tokens were measured with"
            f" {row[0].concurrency} at once",
            f"measure such ones, too: lmtool bench curve URL --input-lens …,{input_len:.0f}",
        )
    lengths = [cell.input_len for cell in row]

    def at(values: Sequence[float]) -> float:
        return float(np.interp(input_len, lengths, values))

    def each_at(values: Sequence[Floats]) -> Floats:
        return np.array([at(column) for column in np.array(values).T])

    return Cell(
        concurrency=row[0].concurrency,
        input_len=input_len,
        output_len=at([cell.output_len for cell in row]),
        requests_per_s=1 / at([1 / cell.requests_per_s for cell in row]),
        first_token_s=each_at([cell.first_token_s for cell in row]),
        gap_s=each_at([cell.gap_s for cell in row]),
        mean_first_token_s=at([cell.mean_first_token_s for cell in row]),
    )


def _range(least: float, most: float) -> str:
    return f"{least:.0f}" if round(least) == round(most) else f"{least:.0f} to {most:.0f}"


def _for_answers(cell: Cell, output_len: float, notes: list[str]) -> Cell:
    """With answers of another length: each further token takes as long as those that were measured took.

    By Little's law n requests at once at a rate X stay n / X each, of which all but the first token's time is theirs.
    """
    measured = cell.output_len
    if abs(output_len - measured) <= _AS_MEASURED * measured:
        return cell
    if not measured / _MOST_STRETCHED <= output_len <= measured * _MOST_STRETCHED:
        raise ConfigError(
            f"--out is {output_len:g}, answers of {measured:.0f} tokens were measured",
            f"measure such ones: lmtool bench curve URL --output-len {output_len:.0f}",
        )
    note = f"extrapolated: answers of {output_len:g} tokens out of answers of {measured:.0f}"
    if note not in notes:
        notes.append(note)
    stay_s = cell.concurrency / cell.requests_per_s
    token_s = max(stay_s - cell.mean_first_token_s, 0.0) / max(measured - 1, 1)
    stay_s += (output_len - measured) * token_s
    return Cell(
        cell.concurrency,
        cell.input_len,
        output_len,
        cell.concurrency / stay_s,
        cell.first_token_s,
        cell.gap_s,
        cell.mean_first_token_s,
    )
