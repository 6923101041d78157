"""docs/benchmarks.md names every mix, shape, option and field; its peer's file is one that we read."""

import re
from dataclasses import fields
from pathlib import Path

from lmtool.bench.report import Report, read_report
from lmtool.bench.shapes import SHAPES
from lmtool.bench.workloads import MIXES

DOCS = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text(encoding="utf-8")


def test_every_name_is_described() -> None:
    names = [*MIXES, *SHAPES, *(field.name for field in fields(Report))]
    assert [name for name in names if f"`{name}`" not in DOCS] == []


def test_the_peers_example_is_a_report(tmp_path: Path) -> None:
    example = re.search(r"```json\n(.*?)```", DOCS, re.DOTALL)
    assert example is not None
    path = tmp_path / "peer.json"
    path.write_text(example[1])
    assert read_report(path).metric("chat1000", "requests_per_s") == {"median": 54.6}
