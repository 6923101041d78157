"""`lmtool bench` from its words to its exit code; errors come before anything is measured."""

import json
from pathlib import Path

import pytest

from lmtool import cli
from lmtool.bench import limits, session, shapes
from tests.bench.test_offline import LIMITS
from tests.bench.test_report import PEER
from tests.support import TINY


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny shape by name, and limits that are measured in milliseconds."""
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    monkeypatch.setattr(limits, "_CPU_BUFFER_BYTES", 8 << 20)
    monkeypatch.setattr(limits, "_CPU_MATMUL_SIZE", 128)
    monkeypatch.setattr(limits, "_LEAST_S", 0)


def _main(line: str, *more: object) -> int:
    return cli.main([*line.split(), *map(str, more)])


SMALL = "bench offline --shape tiny --device cpu --dtype float32 --cache-gb 0.05 --repeats 1 --prefill-len 20"


def test_offline_writes_table_json_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = tmp_path / "report.json", tmp_path / "report.png"
    line = f"{SMALL} --batches 1,3 --input-len 12 --output-len 5 --mix static,chat4"
    assert _main(line, "--json", files[0], "--png", files[1]) == 0
    out = capsys.readouterr().out
    assert "b3 12/5" in out
    assert "limits here: read" in out
    values = json.loads(files[0].read_text())
    assert [(r["name"], r["num_requests"]) for r in values["results"]] == [
        ("b1 12/5", 1),
        ("b3 12/5", 3),
        ("prefill 20", 1),
        ("chat4", 4),
    ]
    assert values["results"][1]["num_generated_tokens"] == 15
    assert values["settings"]["engine"]["max_batch_size"] == 256
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert _main("bench report", files[0], "--png", tmp_path / "again.png") == 0
    assert "b3 12/5" in capsys.readouterr().out


def test_offline_against_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(f"{SMALL} --against transformers --batches 1,8 --input-len 12 --output-len 4 --json -") == 0
    captured = capsys.readouterr()
    values = json.loads(captured.out)  # stdout is the JSON and nothing else
    assert [one["name"] for one in values["comparisons"]] == ["decode b1", "decode b8", "prefill 20"]
    assert [one["bar"] for one in values["comparisons"]] == [2.0, 1.4, None]
    assert {one["theirs"] for one in values["comparisons"]} <= {"float32", "bfloat16", "float16"}
    assert "transformers (best dtype)" in captured.err


def test_offline_on_several_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.limits, "measure", lambda device: LIMITS)  # far above any machine's
    path = tmp_path / "tp.json"
    assert _main(f"{SMALL} --tp 2 --batches 3 --input-len 12 --output-len 5 --warm-up 0", "--json", path) == 0
    values = json.loads(path.read_text())
    assert values["weights"] == "float32, in 2 parts"
    assert values["settings"]["engine"]["tp"] == 2
    assert values["results"][0]["num_generated_tokens"] == 15
    assert 0 < values["results"][0]["metrics"]["output_tokens_per_s"]["ratio"] < 1, "stands beside its limit"


def test_limits(capsys: pytest.CaptureFixture[str]) -> None:
    assert _main("bench limits --device cpu") == 0
    assert "GB/s" in capsys.readouterr().out
    assert _main("bench limits --device cpu --json -") == 0
    assert json.loads(capsys.readouterr().out)["read_bytes_per_s"] > 0


def test_reports_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "peer.json"
    path.write_text(json.dumps(PEER))
    assert _main("bench report", path, path) == 0
    assert "first / best other" in capsys.readouterr().out
    assert _main("bench report --metric speed", path, path) == 2
    assert "--metric 'speed' is in none of the reports; give one of output_tokens_per_s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("offline --shape llama3", "--shape 'llama3' is not known; did you mean llama3-8b?"),
        ("offline --shape tiny --model m", "--model and --shape were both given"),
        ("offline --model no-such-model", "'no-such-model' is no folder"),
        ("offline --against vllm", "--against 'vllm' is not known; give transformers"),
        ("offline --against transformers --mix chat100", "leave --mix out"),
        ("offline --shape tiny --tp 2 --rank-hosts here", "--rank-hosts: 'here' is no address; give HOST:PORT"),
        ("offline --against transformers --tp 2", "--tp is 2, and transformers runs as one process"),
        ("offline --mix chta", "--mix 'chta' is not known; give static, chat"),
        ("offline --mix static,shared-prefix4", "run it by itself"),
        ("offline --batches 1,x", "--batches is '1,x'; give numbers with commas"),
        ("offline --batches 0", "--batches has 0; give 1 or more"),
        ("offline --output-len 1", "--output-len is 1; give 2 or more"),
        ("offline --repeats 0", "--repeats is 0; give 1 or more"),
        ("offline --dtype int3", "--dtype is 'int3'"),
        ("offline --device tpu", "--device is 'tpu'"),
        ("offline --json /no/such/folder/x.json", "there is no folder /no/such/folder; create it first"),
        ("offline --png /", "/ is a folder; give the name of a file"),
        ("report /no/such.json", "/no/such.json does not exist"),
        ("report a.json b.json --png x.png", "--png draws one report"),
        ("limits --device tpu", "--device is 'tpu'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(
    line: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing_is_measured(*_: object) -> None:
        raise AssertionError("measured before it was checked")

    monkeypatch.setattr(session.limits, "measure", nothing_is_measured)
    assert _main(f"bench {line}") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert message in captured.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--w-group-size", "128"], "--w-group-size is 128; give 32, 64 or 128, and a --shape"),
        (["--shape", "tiny", "--w-group-size", "48"], "--w-group-size is 48; give 32, 64 or 128"),
        (["--shape", "tiny", "--w-group-size", "128", "--device", "cpu"], "--w-group-size is for a GPU's"),
        (["--shape", "tiny", "--w-group-size", "128", "--against", "transformers"], "leave --w-group-size out"),
    ],
)
def test_four_bit_shapes_that_cannot_be_are_refused(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main("bench offline", *flags) == 2
    assert message in " ".join(capsys.readouterr().err.split())
