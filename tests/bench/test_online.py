"""`lmtool bench online` against a real HTTP server that follows a script: counts, causes, arithmetic of the figures."""

import json
import signal
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmtool import cli
from lmtool.bench import online, online_figures
from lmtool.bench.online import WORDS, OnlinePlan, arrivals
from lmtool.bench.online_figures import Outcome
from lmtool.bench.report import read_report
from lmtool.errors import LmtoolError
from tests.bench.fake_server import Answer, serving


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address at which nobody listens: it is taken as long as the test lasts."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def _main(line: str, *more: object) -> int:
    return cli.main(["bench", "online", *line.split(), *map(str, more)])


def _result(tmp_path: Path, url: str, line: str = "", *, code: int = 0) -> dict[str, Any]:
    path = tmp_path / "online.json"
    assert _main(f"{url} {line} --json {path}") == code
    return read_report(path).results[0]


# ---------------------------------------------------------------------- arithmetic
ANSWERED = [
    Outcome(sent_s=1.0, text_s=[1.5, 1.6, 2.1], num_prompt_tokens=10, num_output_tokens=4, counted=True),
    Outcome(sent_s=0.0, text_s=[0.1], num_prompt_tokens=20, num_output_tokens=1, counted=True),
    Outcome(sent_s=2.0, text_s=[2.3, 3.3], num_prompt_tokens=30, num_output_tokens=3, counted=True),
]
FAILED = [Outcome(0.0, failure="HTTP 500"), Outcome(0.5, text_s=[9.0], num_output_tokens=1, failure="HTTP 500")]


def test_figures_are_those_of_vllm() -> None:
    found = online_figures.result("three", [*ANSWERED, *FAILED], 4.0, num_unfinished=2)
    metrics = found["metrics"]
    assert metrics["requests_per_s"]["median"] == 3 / 4
    assert metrics["output_tokens_per_s"]["median"] == 8 / 4
    assert metrics["total_tokens_per_s"]["median"] == 68 / 4
    ttft = metrics["time_to_first_token_s"]
    assert (ttft["mean"], ttft["median"]) == (pytest.approx(0.3), pytest.approx(0.3))
    assert ttft["p90"] == pytest.approx(0.3 + 0.8 * 0.2)
    # (1.1 - 0.5) / 3 and (1.3 - 0.3) / 2; an answer of one token has none
    assert metrics["time_per_output_token_s"]["mean"] == pytest.approx((0.2 + 0.5) / 2)
    assert metrics["inter_token_latency_s"]["mean"] == pytest.approx((0.1 + 0.5 + 1.0) / 3)
    assert metrics["end_to_end_s"]["median"] == pytest.approx(1.1)
    assert metrics["end_to_end_s"]["p99"] == pytest.approx(1.1 + 0.98 * 0.2)
    assert (found["num_requests"], found["num_answered"], found["num_unfinished"]) == (7, 3, 2)
    assert found["failures"] == {"HTTP 500": 2}
    assert len(found["requests"]) == 3


def test_without_answers_there_are_rates_and_no_times() -> None:
    found = online_figures.result("none", FAILED, 2.0)
    assert found["metrics"] == {"requests_per_s": {"median": 0}, "output_tokens_per_s": {"median": 0}}


def test_requests_come_at_once_or_as_a_poisson_process() -> None:
    plan = OnlinePlan(url="http://x", request_rate=5.0)
    times = arrivals(plan, 20_001)
    assert times[0] == 0.0
    gaps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.05), "an exponential's deviation is its mean"
    assert times == arrivals(plan, 20_001)
    assert arrivals(OnlinePlan(url="http://x"), 3) == [0.0] * 3


def test_prompts_are_words_or_ids_of_the_workload() -> None:
    words = OnlinePlan(url="http://x", mix="chat", num_prompts=7).questions()
    ids = OnlinePlan(url="http://x", mix="chat", num_prompts=7, token_ids=50).questions()
    assert [len(str(one.prompt).split()) for one in words] == [len(one.prompt) for one in ids]
    assert {word for one in words for word in str(one.prompt).split()} <= set(WORDS)
    assert {type(i) for one in ids for i in one.prompt} == {int}
    assert max(i for one in ids for i in one.prompt if isinstance(i, int)) < 50
    assert [one.num_new_tokens for one in words] == [one.num_new_tokens for one in ids]
    assert len(set(WORDS)) == len(WORDS) == 98
    shared = OnlinePlan(url="http://x", mix="shared-prefix", num_prompts=2).questions()
    assert str(shared[0].prompt).split()[:2048] == str(shared[1].prompt).split()[:2048]
    assert shared[0].prompt != shared[1].prompt


# ---------------------------------------------------------------------- over HTTP
def test_every_token_is_the_servers_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Answer(texts=("a", "b"), delay_s=0.02)) as server:
        found = _result(tmp_path, server.url, "--num-prompts 5 --input-len 6 --output-len 9 --max-concurrency 2")
        assert server.most_at_once <= 2
        assert len(server.requests) == 5
        for body in server.requests:
            assert body["model"] == "fake-model"
            assert len(body["prompt"].split()) == 6
            assert (body["max_tokens"], body["temperature"], body["stream"]) == (9, 0.0, True)
            assert body["stream_options"] == {"include_usage": True}
            assert body["ignore_eos"] is True
        assert set(server.paths) == {"/v1/completions"}
    assert (found["num_answered"], found["num_generated_tokens"], found["num_prompt_tokens"]) == (5, 45, 35)
    assert (found["num_uncounted"], found["failures"]) == (0, {})
    assert found["name"] == "b5 6/9, 2 at once"
    metrics = found["metrics"]
    assert metrics["output_tokens_per_s"]["median"] == pytest.approx(45 / found["duration_s"])
    # what the server takes at least
    assert metrics["time_to_first_token_s"]["median"] >= 0.02
    assert metrics["inter_token_latency_s"]["median"] > 0
    assert metrics["end_to_end_s"]["median"] >= 0.04
    assert found["duration_s"] >= 3 * 0.04, "five requests, two at a time"
    for row in found["requests"]:
        assert row["end_to_end_s"] >= row["time_to_first_token_s"] > 0
    out = capsys.readouterr().out
    assert "5 of 5 requests answered" in out
    assert "first token (TTFT)" in out
    assert "35 in, 45 out" in out


def test_several_client_processes_send_what_one_would(tmp_path: Path) -> None:
    with serving(Answer(texts=("a", "b"), delay_s=0.02)) as server:
        line = "--num-prompts 7 --output-len 9 --max-concurrency 3 --clients 2"
        found = _result(tmp_path, server.url, line)
        assert server.most_at_once <= 3
        sent = sorted(body["prompt"] for body in server.requests)
    plan = OnlinePlan(url="http://x", num_prompts=7, output_len=9)
    assert sent == sorted(str(question.prompt) for question in plan.questions())
    assert (found["num_answered"], found["num_generated_tokens"], found["failures"]) == (7, 63, {})
    assert found["duration_s"] >= 3 * 0.04, "seven requests, three at a time"
    assert found["client_cpu_share"] > 0


def test_a_client_process_that_dies_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online, "module_command", lambda name: ["/bin/false", name])
    with serving(Answer()) as server, pytest.raises(LmtoolError, match="ended with 1"):
        online.run_online(OnlinePlan(url=server.url, num_prompts=4, num_clients=2))


def test_a_chat_and_its_key(tmp_path: Path) -> None:
    with serving() as server:
        line = "--endpoint chat --num-prompts 2 --input-len 3 --api-key secret --model m --no-ignore-eos"
        found = _result(tmp_path, server.url + "/v1/", line)
        assert set(server.paths) == {"/v1/chat/completions"}
        assert server.requests[0]["messages"][0]["role"] == "user"
        assert server.requests[0]["model"] == "m"
        assert "ignore_eos" not in server.requests[0]
        assert server.headers[0]["Authorization"] == "Bearer secret"
    assert found["num_answered"] == 2
    assert "secret" not in (tmp_path / "online.json").read_text()


def test_token_ids_are_sent_as_they_are(tmp_path: Path) -> None:
    with serving() as server:
        _result(tmp_path, server.url, "--token-ids 500 --num-prompts 1 --input-len 12")
        assert len(server.requests[0]["prompt"]) == 12
        assert all(isinstance(i, int) and 0 <= i < 500 for i in server.requests[0]["prompt"])


def test_without_the_servers_count_pieces_are_counted_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(Answer(usage=False)) as server:
        found = _result(tmp_path, server.url, "--num-prompts 2")
    assert (found["num_generated_tokens"], found["num_uncounted"], found["num_prompt_tokens"]) == (6, 2, None)
    assert "total_tokens_per_s" not in found["metrics"]
    out = capsys.readouterr().out
    assert "2 answers came without the server's own count" in out
    assert "an unknown number in, 6 out" in out


def test_every_failure_is_counted_by_its_cause(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = ["status", "cut", "early", "error", "garbage", "status"]
    answers = [*(Answer(broken=kind) for kind in broken), Answer(texts=()), Answer()]
    with serving(*answers) as server:
        found = _result(tmp_path, server.url, "--num-prompts 9 --max-concurrency 1")
    assert found["num_answered"] == 2
    assert found["failures"] == {
        "HTTP 500: out of memory": 2,
        "the stream broke off: the server closed the connection": 1,
        "the stream broke off: it ends without [DONE]": 1,
        "error in the stream: the engine failed": 1,
        "the stream holds what is no JSON": 1,
        "no text came": 1,
    }
    assert found["num_generated_tokens"] == 2 * 128, "of failed requests no token counts"
    assert "failed 2 times: HTTP 500: out of memory" in capsys.readouterr().out


def test_no_answer_in_time(tmp_path: Path) -> None:
    with serving(Answer(broken="hang"), Answer()) as server:
        found = _result(tmp_path, server.url, "--num-prompts 2 --timeout 5 --max-concurrency 1")
    assert found["failures"] == {"no whole answer within 5 s": 1}
    assert found["num_answered"] == 1


def test_no_request_answered_is_an_error_after_the_figures(
    nobody: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _result(tmp_path, nobody, "--model m --num-prompts 3", code=1)
    assert found["failures"] == {"the connection is refused or the host is not known": 3}
    captured = capsys.readouterr()
    assert "0 of 3 requests answered" in captured.out
    assert "lmtool: error: none of 3 requests was answered" in captured.err


def test_a_server_that_does_not_know_ignore_eos_is_met_by_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    """As `transformers serve` answers."""
    with serving(Answer(broken="status", message="Unexpected fields in the request: {'ignore_eos'}")) as server:
        assert _main(f"{server.url} --num-prompts 2") == 1
    error = capsys.readouterr().err
    assert "HTTP 500: Unexpected fields in the request: {'ignore_eos'}; add --no-ignore-eos" in error


def test_picture_and_json_alone_on_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as server:
        picture = tmp_path / "online.png"
        assert _main(f"{server.url} --num-prompts 4 --request-rate 500 --json - --png {picture}") == 0
    captured = capsys.readouterr()
    values = json.loads(captured.out)
    assert values["engine"] == f"server at {server.url}"
    assert values["results"][0]["name"] == "b4 128/128, 500 req/s"
    assert picture.read_bytes().startswith(b"\x89PNG")
    path = tmp_path / "saved.json"
    path.write_text(captured.out)
    assert cli.main(["bench", "report", str(path), "--png", str(tmp_path / "again.png")]) == 0
    assert "4 of 4 requests answered" in capsys.readouterr().out
    assert cli.main(["bench", "report", str(path), str(path), "--metric", "time_to_first_token_s"]) == 0


def test_ctrl_c_tells_what_was_measured_and_exits_130() -> None:
    with serving(Answer(), Answer(), Answer(broken="hang")) as server:
        command = [sys.executable, "-m", "lmtool", "bench", "online", server.url]
        process = subprocess.Popen(
            [*command, "--num-prompts", "5", "--max-concurrency", "1"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert server.hanging.wait(180), "the third request has begun"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=180)
    assert process.returncode == 130, err
    assert "2 of 5 requests answered" in out
    assert "interrupted: 3 requests were not sent or not finished" in out
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("localhost:8000", "URL is 'localhost:8000'; give one as in http://localhost:8000"),
        ("http://", "URL is 'http://'"),
        ("{url} --num-prompts 0", "--num-prompts is 0; give 1 or more"),
        ("{url} --request-rate 0", "--request-rate is 0; give requests per second, or inf"),
        ("{url} --request-rate fast", "--request-rate is 'fast'"),
        ("{url} --max-concurrency 0", "--max-concurrency is 0"),
        ("{url} --timeout 0", "--timeout is 0; give seconds"),
        ("{url} --seed -1", "--seed is -1"),
        ("{url} --endpoint embeddings", "--endpoint is 'embeddings'; give completions or chat"),
        ("{url} --endpoint chat --token-ids 9", "--token-ids has no place in a chat's messages"),
        ("{url} --mix chta", "--mix 'chta' is not known; give static, chat"),
        ("{url} --mix chat10 --num-prompts 5", "--mix chat10 and --num-prompts both give a number"),
        ("{url} --png /", "/ is a folder"),
        ("{url}", "/v1/models does not answer: the connection is refused or the host is not known; start the server"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(
    line: str, message: str, nobody: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(line.format(url=nobody)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert message in captured.err


def test_a_server_without_models_is_told_to_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as server:
        assert _main(f"{server.url}/other") == 2
    assert "/other/v1/models names no model; give its name with --model" in capsys.readouterr().err


def test_the_client_says_when_it_is_the_bottleneck(capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as server:
        plan = OnlinePlan(url=server.url, num_prompts=1)
        report = online.run_online(plan)
    share = report.results[0]["client_cpu_share"]
    assert share > 0
    assert ("this client was busy" in capsys.readouterr().out) == (share > 0.7)
