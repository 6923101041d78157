"""Reports: what is written is read back, peers stand beside us, pictures are pictures."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lmtool.bench import offline, picture, report
from lmtool.bench.compare import Comparison
from lmtool.bench.report import Report
from lmtool.errors import InputError
from tests.bench.test_offline import CONFIG, LIMITS, MIXED
from tests.support import TINY

COMPARED = Comparison(
    name="decode b1",
    ours="int4",
    ours_tokens_per_s=120.0,
    theirs="bfloat16",
    theirs_tokens_per_s=50.0,
    ratio=2.4,
    bar=2.0,
    goal=3.0,
    ok=True,
    limit_tokens_per_s=480.0,
    limit_ratio=0.25,
)
PEER = {
    "format": report.FORMAT,
    "engine": "vLLM 0.24.0",
    "model": "tiny",
    "results": [{"name": "mixed", "metrics": {"output_tokens_per_s": {"median": 1.0}}}],
}


@pytest.fixture(scope="module")
def measured() -> Report:
    loaded = offline.load(TINY, CONFIG, [MIXED])
    results = [offline.measure(loaded, MIXED, max_batch_size=8, limits=LIMITS, repeats=2, warm_up=0)]
    return report.make_report("tiny", loaded.weights, LIMITS, {"repeats": 2}, results, [COMPARED])


def _text(*shown: Any) -> str:
    console = Console(file=StringIO(), width=160)
    for one in shown:
        if isinstance(one, Report):
            report.show(one, console)
        else:
            console.print(one)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_json_holds_everything_and_is_read_back(measured: Report, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(report.to_json(measured))
    values = json.loads(path.read_text())
    assert values["format"] == "lmtool-bench/1"
    assert values["engine"].startswith("lmtool ")
    assert values["commit"]
    assert {"python", "torch", "transformers"} <= set(values["versions"])
    assert values["device"] == "test"
    assert values["limits"]["read_bytes_per_s"] == 1e11
    for name, metric in values["results"][0]["metrics"].items():
        assert set(metric) == {"median", "best", "limit", "ratio"}
        comparable = name not in ("prefill_tokens_per_s", "decode_tokens_per_s")  # the requests differ
        assert (None not in metric.values()) == comparable, name
    assert values["comparisons"][0]["limit_ratio"] == 0.25
    assert report.read_report(path) == measured


def test_tables_show_figures_beside_limits_and_bars(measured: Report) -> None:
    text = _text(measured)
    assert "read 100.0 GB/s" in text
    output = measured.metric("mixed")
    assert f"{report.number(output['median'])} ({output['ratio']:.0%} of {report.number(output['limit'])})" in text
    row = next(line for line in text.splitlines() if "decode b1" in line)
    assert row.split() == [
        "decode",
        "b1",
        "120",
        "50",
        "(bfloat16)",
        "2.40×",
        "2×,",
        "goal",
        "3×",
        "ok",
        "480",
        "(25%)",
    ]


def test_a_peer_stands_beside_us(measured: Report, tmp_path: Path) -> None:
    path = tmp_path / "peer.json"
    path.write_text(json.dumps(PEER))
    text = _text(report.side_by_side([measured, report.read_report(path)]))
    assert "vLLM 0.24.0" in text
    ours = measured.metric("mixed")["median"]
    row = next(line for line in text.splitlines() if "mixed" in line)
    assert row.split() == ["mixed", report.number(ours), "1", f"{ours:.2f}×"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "is no benchmark report"),
        ('{"format": "other"}', "is no benchmark report"),
        (json.dumps({"format": report.FORMAT}), "lacks engine, model, results"),
        (json.dumps({**PEER, "spped": 1}), "it has spped, which no report has"),
        (json.dumps({**PEER, "results": [3]}), "results is not a list of objects with a name"),
        (json.dumps({**PEER, "results": [{"name": "b1", "metrics": {"x": 3}}]}), "b1: x has no median"),
    ],
)
def test_what_is_no_report_is_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        report.read_report(path)
    assert "\n" not in str(caught.value)


def test_numbers_have_three_digits_that_count() -> None:
    assert [report.number(x) for x in (None, 0.4831, 3.0, 19.52, 12345.6)] == ["", "0.48", "3", "19.5", "12,346"]


def test_pictures(measured: Report, tmp_path: Path) -> None:
    import struct

    for name, one in (("all", measured), ("compared", Report(engine="e", model="m", comparisons=measured.comparisons))):
        path = tmp_path / f"{name}.png"
        picture.draw(one, path)
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">II", content[16:24])
        assert (width, height > 200) == (1440 if name == "all" else 840, True)
    with pytest.raises(InputError, match="nothing in the report stands beside a limit"):
        picture.draw(Report(engine="e", model="m"), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
