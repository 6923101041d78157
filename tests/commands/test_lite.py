"""`lmtool lite` as it is typed: the course's lines, and what is refused in one line."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lmtool import cli
from lmtool.quant.report import clear_model
from tests.quant.models import text_file, tiny_folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny_folder(tmp_path / "model")
    text_file(tmp_path / "text.txt")
    (tmp_path / "model" / "config.toml").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lite(line: str) -> int:
    return cli.main(["lite", *line.split()])


def test_the_course_s_auto_awq(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "auto_awq --model model --w_bits 4 --w_group_size 32 --work_dir ./quant_output --calib_dataset text.txt"
    assert lite(f"{line} --calib-samples 6 --calib-seqlen 40 --search_scale True") == 0
    shown = capsys.readouterr()
    assert "quant_output is ready: lmtool chat quant_output" in shown.out
    assert "down_proj" in shown.out
    assert "plan: 3 blocks, 240 tokens of calibration text; memory for a block" in " ".join(shown.err.split())
    config = json.loads((here / "quant_output" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "awq"


@pytest.mark.parametrize(
    ("flags", "bits", "symmetric", "said"),
    [
        ("--w_bits 8", 8, False, "AWQ's cannot say 8 bits"),
        ("--w_sym True", 4, True, "AWQ's cannot say a fixed zero point"),
        ("--w-bits 8 --w-sym", 8, True, "AWQ's cannot say 8 bits and a fixed zero point"),
    ],
)
def test_what_awq_cannot_say_is_written_in_gptqs_format(
    flags: str, bits: int, symmetric: bool, said: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"auto_awq model --calib-samples 0 --w-group-size 32 --eval-windows 0 --work-dir out {flags}"
    assert lite(line) == 0
    assert f"written in GPTQ's format: {said}" in capsys.readouterr().err
    said_of_weights = json.loads((here / "out" / "config.json").read_text())["quantization_config"]
    assert said_of_weights["quant_method"] == "gptq"
    assert (said_of_weights["bits"], said_of_weights["sym"]) == (bits, symmetric)
    assert (
        lite("auto_awq model --calib-samples 0 --w-group-size 32 --eval-windows 0 --work-dir plain --w_sym False") == 0
    )
    assert "GPTQ" not in capsys.readouterr().err


def test_the_course_s_calibrate_and_then_auto_awq_in_its_folder(here: Path) -> None:
    line = "calibrate --model model --calib_dataset text.txt --calib_samples 5 --calib_seqlen 32 --work_dir out"
    assert lite(line) == 0
    before = load_file(here / "out" / "calibration" / "key_value.safetensors")
    assert before["layers.2.v.absmax"].shape == (2, 16)
    assert lite("auto-awq model --calib-samples 0 --w-group-size 32 --eval-windows 0 --work-dir out") == 0
    assert (here / "out" / "config.json").exists()
    assert (here / "out" / "calibration" / "key_value.safetensors").exists()


def test_auto_awq_takes_the_text_that_calibrate_took(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typed = "--calib-dataset text.txt --calib-samples 5 --calib-seqlen 32 --seed 3"
    assert lite(f"calibrate model {typed} --work-dir out") == 0
    quantize = "auto_awq model --w-group-size 32 --eval-windows 0 --work-dir"
    assert lite(f"{quantize} out") == 0
    text = f"{here / 'text.txt'}, 5 × 32 tokens"
    assert f"the text is that of `lite calibrate` in this work dir ({text})" in capsys.readouterr().err
    assert lite(f"{quantize} typed {typed}") == 0
    assert "lite calibrate" not in capsys.readouterr().err
    both = [(here / name / "model.safetensors").read_bytes() for name in ("out", "typed")]
    assert both[0] == both[1]
    assert lite(f"{quantize} out --fresh --calib-samples 3") == 0
    assert f"`lite calibrate` took another text in this work dir ({text}): it is not used" in capsys.readouterr().err
    quality = json.loads((here / "out" / "lmtool-quality.json").read_text())
    assert (quality["calibration"]["samples"], quality["calibration"]["seqlen"]) == (3, 32)


def test_fresh_leaves_nothing_of_the_old_model(here: Path) -> None:
    line = "auto_awq model --w-group-size 32 --work-dir out --calib-samples"
    assert lite(f"{line} 0 --eval-windows 2") == 0
    (here / "out" / "mine.txt").write_text("a user's")
    reports = [here / "out" / f"lmtool-quality.{suffix}" for suffix in ("json", "md", "png")]
    assert all(report.exists() for report in reports)
    clear_model(here / "out")
    assert {file.name for file in (here / "out").iterdir()} >= {"mine.txt", "tokenizer.json"}
    assert not any(file.exists() for file in (*reports, here / "out" / "config.json"))
    assert list((here / "out").glob("*.safetensors")) == []
    assert lite(f"{line} 2 --fresh --calib-dataset text.txt --calib-seqlen 32 --eval-windows 0") == 0
    assert json.loads(reports[0].read_text())["method"] == "best"
    assert "What it lost" not in reports[1].read_text()


def test_other_options_are_refused_before_the_model_writes_a_text(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lite("auto_awq model --calib-samples 0 --w-group-size 32 --eval-windows 0 --work-dir out") == 0
    capsys.readouterr()
    assert lite("auto_awq model --w-group-size 32 --calib-seqlen 64 --work-dir out") == 2
    shown = capsys.readouterr().err
    assert (
        "out holds a run with other options: method (rtn then, best now), calib_dataset (None then, self now)" in shown
    )
    assert shown.count("\n") == 1  # no bar, no plan
    assert not (here / "out" / "calibration").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("auto_awq model --w-group-size 32", "--calib-seqlen is 512, the model's context is 128; give a smaller one"),
        (
            "auto_awq model --w-group-size 32 --calib-seqlen 64 --calib-dataset none.txt",
            "--calib-dataset none.txt does not exist; give a file or a folder",
        ),
        (
            "auto_awq model --w-group-size 32 --calib-seqlen 64 --calib-dataset model/config.toml",
            "is none of .txt, .md, .jsonl, .json",
        ),
        ("auto_awq model --calib-samples 0", "--w-group-size 128 does not divide the 64 inputs of model.layers.0"),
        ("auto_awq model --w-bits 3", "--w-bits is 3; give 4 or 8"),
        ("auto_awq model --head-bits 4", "--head-bits is 4; give 8 or 16"),
        ("auto_awq model --w-group-size 48", "--w-group-size is 48; give 32, 64 or 128"),
        ("auto_awq model --method magic", "--method is 'magic'; give one of rtn, smooth, awq, gptq, best"),
        ("auto_awq model --skip (", "--skip '('"),
        ("auto_awq model --dtype float32", "--dtype is 'float32'; give one of auto, float16, bfloat16"),
        ("auto_awq model --calib-samples -1", "--calib-samples is -1; give 0 (plain rounding) or more"),
        ("auto_awq nowhere --calib-samples 0", "'nowhere' is no folder or .gguf file here"),
        ("calibrate model --calib-samples 0", "--calib-samples is 0; give 1 or more"),
        ("calibrate model", "--calib-seqlen is 512, the model's context is 128; give a smaller one"),
    ],
)
def test_refused_in_one_line(line: str, message: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lite(line) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert message in shown.err
    assert not (here / "work_dir").exists()


def test_an_unfinished_work_dir_is_not_taken_for_a_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lite("auto_awq model --calib-samples 0 --w-group-size 32 --eval-windows 0 --work-dir out") == 0
    (here / "out" / "config.json").unlink()
    capsys.readouterr()
    assert lite("auto_awq out --calib-samples 0 --work-dir twice") == 2
    assert "out holds an unfinished quantization; run the same `lmtool lite auto_awq` again" in capsys.readouterr().err
