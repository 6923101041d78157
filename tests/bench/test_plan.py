"""`lmtool bench plan`: its queue against known formulas, its predictions against a machine of known speed."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmtool import cli
from lmtool.bench import plan_curve
from lmtool.bench.plan import FIRST_TOKEN, GAP, RATE, Load, Sizing, Targets, forecast, size
from lmtool.bench.plan_queue import steady_state
from lmtool.bench.plan_replica import Replica, read_cells, replica_of
from lmtool.bench.report import Report, to_json
from lmtool.errors import ConfigError
from tests.bench.machine import closed_loop, poisson

IN, OUT, SLOTS = 100, 32, 16


def step_s(num_going_on: int, num_joining: int) -> float:
    """A step reads the weights once (20 ms), each sequence adds a millisecond and each prompt 60."""
    return 0.02 + 0.001 * (num_going_on + num_joining) + 0.06 * num_joining


def curve(input_len: float = IN, step=step_s, at_once=(1, 2, 4, 8, SLOTS)) -> Report:
    """As `bench curve` would have measured that machine."""
    results = []
    for concurrency in at_once:
        sizes = plan_curve.workload(concurrency, IN, OUT, 12, seed=concurrency).sizes
        outcomes = closed_loop(step, SLOTS, concurrency, [one.num_new_tokens for one in sizes])
        results.append({**plan_curve.steady("cell", outcomes, concurrency), "input_len": input_len})
    return Report(engine="a machine", model="tiny", device="paper", results=results)


@pytest.fixture(scope="module")
def report() -> Report:
    return curve()


@pytest.fixture(scope="module")
def measured(report: Report) -> Replica:
    return replica_of(read_cells(report, "curve"), IN, OUT)


def flat(rates: list[float], first_s: float = 0.1, gap_s: float = 0.01) -> Replica:
    def table(value: float) -> Any:
        return np.full((len(rates), 5), value)

    return Replica(requests_per_s=np.array(rates), first_token_s=table(first_s), gap_s=table(gap_s))


# ---------------------------------------------------------------------- the queue
def test_one_server_is_the_queue_of_the_textbooks() -> None:
    """M/M/1: used for a share u of the time, u / (1 - u) are there."""
    state = steady_state(flat([2.0]), 1.5)
    assert state.mean_at_once == pytest.approx(0.75 / 0.25, rel=1e-5)
    assert state.beyond == pytest.approx(0.75, rel=1e-5)
    # who finds n waits for n to end, half a second each: P(n >= k) = 0.75 ** k
    for percent in (50, 90, 99):
        found = math.ceil(math.log(1 - percent / 100) / math.log(0.75)) - 1
        assert state.first_token.percentile(percent) == pytest.approx(0.1 + 0.5 * found, abs=0.5)


def test_several_servers_are_erlangs() -> None:
    """M/M/c: the probability that all are busy is Erlang's C."""
    servers, offered = 8, 6.0
    state = steady_state(flat([float(n) for n in range(1, servers + 1)]), offered)
    terms = [offered**k / math.factorial(k) for k in range(servers + 1)]
    waiting = terms[-1] * servers / (servers - offered)
    assert state.beyond == pytest.approx(waiting / (sum(terms[:-1]) + waiting), rel=1e-6)


def test_prompts_alone_make_a_shorter_queue() -> None:
    """Where work is all alike a queue is about half as long as where it is exponential (M/D/1)."""
    even = replace(flat([2.0]), prompt_share=1.0)
    exponential, alike = (steady_state(one, 1.8).mean_at_once for one in (flat([2.0]), even))
    assert alike == pytest.approx(0.9 + 0.9**2 / (2 * 0.1), rel=0.15)
    assert exponential == pytest.approx(9.0, rel=1e-3)


def test_several_behind_one_queue_are_one_that_is_larger() -> None:
    together = flat([2.0, 3.0]).together(2)
    assert together.requests_per_s.tolist() == [2.0, 4.0, 5.0, 6.0]
    # the third and fourth find one at each
    uneven = replace(flat([2.0, 3.0]), first_token_s=np.array([[0.1] * 5, [0.2] * 5])).together(2)
    assert uneven.first_token_s[:, 0].tolist() == [0.1, 0.1, 0.2, 0.2]
    assert steady_state(flat([2.0]).together(3), 5.0).beyond < steady_state(flat([2.0]), 5.0 / 3).beyond


# ---------------------------------------------------------------------- predictions
@pytest.mark.parametrize(
    ("num_replicas", "used", "routing"),
    [
        (1, 0.3, "least-queued"),
        (1, 0.6, "least-queued"),
        (1, 0.9, "least-queued"),
        (3, 0.7, "least-queued"),
        (2, 0.5, "random"),
    ],
)
def test_what_is_predicted_comes_true(measured: Replica, num_replicas: int, used: float, routing: str) -> None:
    """Medians within a quarter, tails within a third."""
    rate = used * num_replicas * measured.capacity
    load = Load(rate=rate, input_len=IN, output_len=OUT, routing=routing)
    state = forecast(measured, load, Targets(first_token_s=10, gap_s=None), num_replicas).state
    assert state is not None
    seen = poisson(step_s, SLOTS, rate, OUT, num_replicas, routing=routing)
    firsts = [one.time_to_first_token_s for one in seen]
    gaps = [gap for one in seen for gap in one.gaps_s]
    assert state.first_token.percentile(50) == pytest.approx(np.percentile(firsts, 50), rel=1 / 4)
    assert state.first_token.percentile(99) == pytest.approx(np.percentile(firsts, 99), rel=1 / 3)
    assert state.gap.percentile(50) == pytest.approx(np.percentile(gaps, 50), rel=1 / 4)
    assert state.gap.percentile(99) == pytest.approx(np.percentile(gaps, 99), rel=1 / 3)


def test_the_number_that_is_said_is_the_one_that_is_needed(measured: Replica) -> None:
    """Driven with as many replicas the machine keeps the target; with one less it does not."""
    load, targets = Load(rate=8.0, input_len=IN, output_len=OUT), Targets(first_token_s=0.4, gap_s=None)
    found = size(measured, load, targets)
    assert 2 <= found.num_replicas <= 6

    def p99(num_replicas: int) -> float:
        seen = poisson(step_s, SLOTS, load.rate, OUT, num_replicas, routing="least-queued", count=4000)
        return float(np.percentile([one.time_to_first_token_s for one in seen], 99))

    assert p99(found.num_replicas) <= 0.4 < p99(found.num_replicas - 1)


# ---------------------------------------------------------------------- how many
def needed(replica: Replica, rate: float, **targets: float | None) -> Sizing:
    given = {"first_token_s": None, "gap_s": None, **targets}
    return size(replica, Load(rate=rate, input_len=IN, output_len=OUT), Targets(**given))  # type: ignore[arg-type]


def test_the_rate_the_first_token_or_the_gap_asks_for_more() -> None:
    assert needed(flat([2.0]), 1.0, first_token_s=60.0).num_replicas == 1
    by_rate = needed(flat([2.0]), 5.0, first_token_s=60.0)
    assert (by_rate.num_replicas, by_rate.bottleneck) == (3, RATE)
    assert [one.num_replicas for one in by_rate.forecasts] == [2, 3, 4]
    assert by_rate.forecasts[0].state is None
    assert not by_rate.forecasts[2].misses
    sooner = needed(flat([2.0]), 5.0, first_token_s=0.7)
    assert sooner.num_replicas > 3
    assert sooner.bottleneck == FIRST_TOKEN
    crowded = replace(flat([2.0, 4.0]), gap_s=np.array([[0.01] * 5, [0.03] * 5]))
    closer = needed(crowded, 3.0, gap_s=0.02)
    assert closer.bottleneck == GAP
    assert closer.num_replicas > needed(crowded, 3.0, gap_s=0.04).num_replicas


def test_what_even_an_empty_replica_misses_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--target-ttft is 0.05 s, an empty replica takes 0.1 s \(p99\); give more"):
        needed(flat([2.0]), 1.0, first_token_s=0.05)
    with pytest.raises(ConfigError, match=r"--target-itl is 5 ms, an empty replica takes 10 ms"):
        needed(flat([2.0]), 1.0, gap_s=0.005)


def test_a_queue_longer_than_was_measured_is_named() -> None:
    found = needed(flat([2.0]), 1.0, first_token_s=60.0)
    assert found.notes == (
        "extrapolated: 50% of the requests find 1 or more at each replica, the most that was measured",
    )
    assert needed(flat([2.0] * 40), 1.0, first_token_s=60.0).notes == ()


# ---------------------------------------------------------------------- lengths
def test_between_two_lengths_of_prompts_figures_lie_on_a_line(report: Report) -> None:
    def longer(num_going_on: int, num_joining: int) -> float:
        return step_s(num_going_on, num_joining) + 0.06 * num_joining

    both = Report(engine="", model="", results=[*report.results, *curve(200, longer).results])
    cells = read_cells(both, "curve")
    short, middle, long = (replica_of(cells, length, OUT) for length in (100, 150, 200))
    assert 1 / middle.requests_per_s == pytest.approx(
        (1 / short.requests_per_s + 1 / long.requests_per_s) / 2, rel=0.05
    )
    assert middle.first_token_s == pytest.approx((short.first_token_s + long.first_token_s) / 2)
    assert (middle.notes, replica_of(cells, 95, OUT).notes) == ([], []), "nearly as long is as long"
    with pytest.raises(ConfigError, match=r"--in is 400, prompts of 100 to 200 tokens were measured with 1 at once"):
        replica_of(cells, 400, OUT)


def test_answers_of_another_length_are_reckoned_and_named(report: Report) -> None:
    cells = read_cells(report, "curve")
    longer = replica_of(cells, IN, 2 * OUT)
    assert longer.notes == [f"extrapolated: answers of {2 * OUT} tokens out of answers of {OUT}"]
    # alone: the prompt's 81 ms, then 21 ms for each further token
    assert 1 / longer.requests_per_s[0] == pytest.approx(0.081 + 0.021 * (2 * OUT - 1), rel=0.03)
    with pytest.raises(ConfigError, match=r"--out is 65, answers of 32 tokens were measured"):
        replica_of(cells, IN, 2 * OUT + 1)


# ---------------------------------------------------------------------- the command
@pytest.fixture
def saved(report: Report, tmp_path: Path) -> Path:
    path = tmp_path / "curve.json"
    path.write_text(to_json(report))
    return path


def test_table_json_and_picture(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = tmp_path / "plan.json", tmp_path / "plan.png"
    words = ["bench", "plan", "--curve", saved, "--rate", 20, "--in", IN, "--out", OUT, "--target-ttft", 0.4]
    assert cli.main([str(word) for word in (*words, "--target-itl", 500, "--json", files[0], "--png", files[1])]) == 0
    out = capsys.readouterr().out
    values = json.loads(files[0].read_text())
    count = values["num_replicas"]
    assert values["num_replicas_with_a_spare"] == count + 1
    assert [one["num_replicas"] for one in values["forecasts"]] == [count - 1, count, count + 1]
    assert f"{count} replicas; bottleneck:" in out
    assert f"with one to spare: {count + 1} replicas" in out
    kept = values["forecasts"][1]
    assert kept["time_to_first_token_s"]["p99"] <= 0.4
    assert kept["utilization"] == pytest.approx(20 / count / values["requests_per_s_of_one"])
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert cli.main(["bench", "report", str(saved)]) == 0
    assert "at once, tokens in/out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--rate 0 --in 100 --out 32 --target-ttft 1", "--rate is 0; give a number above 0"),
        ("--rate 1 --in -1 --out 32 --target-ttft 1", "--in is -1"),
        ("--rate 1 --in 100 --out 32", "there is no target; give --target-ttft SECONDS"),
        ("--rate 1 --in 100 --out 32 --target-itl 0", "--target-itl is 0"),
        (
            "--rate 1 --in 100 --out 32 --target-ttft 1 --percentile 98",
            "--percentile is 98; give one of 50, 90, 95, 99",
        ),
        (
            "--rate 1 --in 100 --out 32 --target-ttft 1 --routing even",
            "--routing is 'even'; give least-queued or random",
        ),
        ("--rate 1 --in 300 --out 32 --target-ttft 1", "--in is 300, prompts of 100 tokens were measured"),
        ("--rate 1 --in 100 --out 32 --target-ttft 0.01", "--target-ttft is 0.01 s, an empty replica takes"),
        ("--rate 90000 --in 100 --out 32 --target-ttft 1", "1,024 replicas do not keep the targets"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(
    flags: str, message: str, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "plan", "--curve", str(saved), *flags.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert message in captured.err


def test_without_a_curve_it_says_what_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.json"
    other.write_text(to_json(Report(engine="vLLM", model="m", results=[{"name": "b1", "metrics": {}}])))
    for path in (tmp_path / "none.json", other):
        line = f"bench plan --curve {path} --rate 1 --in 100 --out 32 --target-ttft 1"
        assert cli.main(line.split()) == 2
        assert f"lmtool bench curve URL --json {path}" in capsys.readouterr().err
