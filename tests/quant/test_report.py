"""The report that stands beside a quantized model: figures of the JSON in Markdown, a picture, a table at the end."""

import json
from pathlib import Path

import pytest

from lmtool import cli
from lmtool.quant.report import markdown
from tests.quant.models import text_file, tiny_folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("report")
    model, text = tiny_folder(folder / "model"), text_file(folder / "text.txt")
    words = f"lite auto_awq {model} --calib-dataset {text} --calib-samples 4 --calib-seqlen 40 --w-group-size 32"
    line = [*words.split(), "--device", "cpu", "--work-dir", str(folder / "out")]
    assert cli.main([*line, "--eval-windows", "3"]) == 0
    return folder / "out", line


def test_what_it_lost_is_measured_and_written(made: tuple[Path, list[str]]) -> None:
    out, _ = made
    quality = json.loads((out / "lmtool-quality.json").read_text())
    found = quality["evaluation"]
    assert found["num_windows"] == 3
    assert found["window_len"] == 128  # the tiny model's context
    assert 0 < found["kl"]["value"] < 1
    assert found["perplexity"]["value"] != found["original_perplexity"]["value"]
    assert quality["run"]["num_blocks"] == 3
    assert quality["run"]["peak_memory_bytes"] > 1e7
    text = (out / "lmtool-quality.md").read_text()
    assert f"| KL to the original, nats a token | {found['kl']['value']:.4f} | {found['kl']['stderr']:.4f} |" in text
    error = quality["layers"][2]["linears"][3]
    assert f"| 2 | down_proj | {error['error_plain']:.3%} | {error['error']:.3%} |" in text
    assert (out / "lmtool-quality.png").read_bytes().startswith(b"\x89PNG")


def test_run_again_it_measures_nothing_and_shows_the_table(
    made: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, line = made
    before = (out / "lmtool-quality.json").read_bytes()
    assert cli.main([*line, "--eval-windows", "3"]) == 0
    assert (out / "lmtool-quality.json").read_bytes() == before
    shown = capsys.readouterr()
    assert "evaluating" not in shown.err
    assert "same likeliest token" in shown.out
    assert shown.out.strip().splitlines()[-1].endswith(f"is ready: lmtool chat {out}")


def test_fallbacks_and_skipped_are_named() -> None:
    quality = {
        "lmtool": "0",
        "model": "m",
        "method": "best",
        "bits": 4,
        "symmetric": True,
        "format": "gptq",
        "head_bits": 8,
        "bits_per_weight": 4.5,
        "group_size": 32,
        "calibration": None,
        "evaluation": None,
        "layers": [],
        "skipped": ["layers.0.down"],
        "fallbacks": [{"linear": "layers.1.up", "reason": "its inputs are not finite"}],
    }
    text = markdown(quality, picture=False)
    assert "| layers.1.up | its inputs are not finite |" in text
    assert "* layers.0.down" in text
    assert "| weights | 4 bits with a fixed zero point in groups of 32 |" in text
    assert "| output head | int8, a scale for each row: lmtool's own |" in text
    assert "What it lost" not in text


def test_eval_windows_below_zero(made: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*made[1], "--eval-windows", "-1"]) == 2
    assert "--eval-windows is -1; give 0 (no evaluation) or more" in capsys.readouterr().err
