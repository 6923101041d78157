"""`lmtool bench curve` against a real HTTP server that follows a script: which requests count, and what is written."""

import json
from pathlib import Path

import pytest

from lmtool import cli
from lmtool.bench.online_figures import Outcome
from lmtool.bench.plan_curve import steady, workload
from lmtool.bench.plan_replica import read_cells
from lmtool.bench.report import read_report
from lmtool.errors import LmtoolError
from tests.bench.fake_server import Answer, serving


def answered(sent_s: float, *text_s: float, num_tokens: int | None = None) -> Outcome:
    return Outcome(sent_s, list(text_s), 10, num_tokens or len(text_s), counted=True)


TWO_AT_ONCE = [
    answered(0.0, 1.0, 2.0),
    answered(0.0, 1.0, 2.0, 3.0),  # two have ended: from here on it counts
    answered(2.0, 2.5, 3.5, 4.5),
    answered(3.0, 4.0, 5.0),
    answered(4.5, 5.5, 6.0, num_tokens=4),  # two tokens in each text
    answered(5.0, 7.0, 8.0),  # the last one is sent: to here
]


def test_the_time_counts_in_which_so_many_were_there() -> None:
    found = steady("cell", TWO_AT_ONCE, 2)
    assert (found["concurrency"], found["num_requests"], found["duration_s"]) == (2, 6, 2.0)
    assert found["output_len"] == pytest.approx((2 + 3 + 3 + 2 + 4 + 2) / 6)
    metrics = found["metrics"]
    # after 3 s and up to 5: 3.5, 4.5, 4.0 and 5.0
    assert metrics["output_tokens_per_s"]["median"] == pytest.approx(4 / 2.0)
    assert metrics["requests_per_s"]["median"] == pytest.approx(2.0 / found["output_len"])
    firsts = metrics["time_to_first_token_s"]
    assert (firsts["min"], firsts["median"], firsts["max"]) == (1.0, 1.0, 2.0)  # of those sent at 3.0, 4.5 and 5.0
    gaps = metrics["inter_token_latency_s"]
    assert (gaps["min"], gaps["max"]) == (1.0, 1.0)


def test_a_request_that_failed_or_was_not_counted_is_no_curve() -> None:
    with pytest.raises(LmtoolError, match=r"cell: 1 of 7 requests failed: HTTP 429; lower --concurrency"):
        steady("cell", [*TWO_AT_ONCE, Outcome(0.0, failure="HTTP 429")], 2)
    with pytest.raises(LmtoolError, match="the server counts no tokens"):
        steady("cell", [*TWO_AT_ONCE, Outcome(0.0, [1.0], num_output_tokens=1)], 2)
    with pytest.raises(LmtoolError, match="raise --rounds"):
        steady("cell", TWO_AT_ONCE[:2], 2)


def test_answers_differ_in_length_and_have_the_mean_that_was_asked_for() -> None:
    lengths = [size.num_new_tokens for size in workload(8, 100, 32, 8, seed=3).sizes]
    assert len(lengths) == 64
    assert sum(lengths) / len(lengths) == pytest.approx(32, abs=0.5)
    assert (min(lengths), max(lengths)) == (1, 63)
    assert lengths != sorted(lengths)
    assert len(workload(1, 100, 32, 8, seed=3).sizes) == 24, "a client alone sends more"


def test_a_file_for_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "curve.json"
    with serving(Answer(texts=("a", "b"), delay_s=0.005)) as server:
        line = f"bench curve {server.url} --concurrency 1,3 --input-lens 5,9 --output-len 4 --rounds 3 --json {path}"
        assert cli.main([*line.split(), "--card", "a card"]) == 0
        assert server.most_at_once == 3
        bodies = server.requests
    assert len(bodies) == 4 * 24, "24 a cell at the least"
    assert {len(body["prompt"].split()) for body in bodies} == {5, 9}
    assert len({body["prompt"] for body in bodies}) == len(bodies), "nothing is found in a cache"
    report = read_report(path)
    assert (report.model, report.device, report.engine) == ("fake-model", "a card", f"server at {server.url}")
    cells = read_cells(report, str(path))
    assert [cell.concurrency for cell in cells] == [1, 3, 1, 3]
    assert all(cell.input_len == 7 for cell in cells), "the server's own count"
    assert all(cell.first_token_s[0] >= 0.005 for cell in cells)
    # requests a second times how long one takes are as many as there are at once, however fast the machine is
    alone, three = (cell["metrics"] for cell in report.results[:2])
    assert _at_once(three) > 1.5 * _at_once(alone)
    out = capsys.readouterr().out
    assert "at once, tokens in/out" in out
    assert "3, 7/4" in out


def _at_once(metrics: dict[str, dict[str, float]]) -> float:
    """Of answers in two pieces."""
    lasts_s = metrics["time_to_first_token_s"]["mean"] + metrics["inter_token_latency_s"]["mean"]
    return metrics["requests_per_s"]["median"] * lasts_s


def test_what_was_measured_is_kept_when_the_server_gives_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "curve.json"
    with serving(*[Answer()] * 24, Answer(broken="status")) as server:
        line = f"bench curve {server.url} --concurrency 1,2 --output-len 4 --json {path}"
        assert cli.main(line.split()) == 1
    assert "2 at once 128/4: 24 of 24 requests failed: HTTP 500: out of memory" in capsys.readouterr().err
    assert [one["concurrency"] for one in json.loads(path.read_text())["results"]] == [1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--concurrency 2,4", "--concurrency has no 1"),
        ("--concurrency 1,1", "--concurrency is 1,1; give different numbers"),
        ("--input-lens 0", "--input-lens is 0"),
        ("--output-len 1", "--output-len is 1; give 2 or more"),
        ("--rounds 2", "--rounds is 2; give 3 or more"),
        ("--clients 0", "--clients is 0; give 1 to 64"),
        ("--timeout 0", "--timeout is 0"),
        ("--seed -1", "--seed is -1"),
        ("--json /no/such/folder/x.json", "there is no folder /no/such/folder"),
        ("", "/v1/models does not answer"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(f"bench curve http://127.0.0.1:9 {flags}".split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert message in captured.err
