"""docs/quantize.md and docs/kv-cache.md: every option is described; commands run, with a tiny model for SmolLM2."""

import io
import re
import shlex
from pathlib import Path

import pytest

from lmtool import cli
from tests.quant.models import text_file, tiny_folder

FOLDER = Path(__file__).parents[2] / "docs"
DOCS = (FOLDER / "quantize.md").read_text(encoding="utf-8")
CACHE_DOCS = (FOLDER / "kv-cache.md").read_text(encoding="utf-8")


def lines_of(text: str) -> list[str]:
    return [line for block in re.findall(r"```\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]


LINES = lines_of(DOCS)
# common to commands that take a model
UNIVERSAL = {"--work-dir", "--revision", "--download-dir", "--verbose"}


def test_every_option_is_described() -> None:
    described = set(re.findall(r"--[a-z-]+", DOCS + CACHE_DOCS))
    for name, command in cli.build().commands["lite"].commands.items():
        for param in command.params:
            flags = {flag for flag in param.opts if flag.startswith("--")}
            assert not flags or flags & (described | UNIVERSAL), f"lite {name} {flags}"


@pytest.mark.slow
def test_its_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path / "tiny", hidden_size=128, intermediate_size=128, max_position_embeddings=1024)
    (tmp_path / "my-texts").mkdir()
    text_file(tmp_path / "my-texts" / "a.txt", repeats=60)  # 17 thousand tokens: the page asks for 16 windows of 1024
    assert len(LINES) == 7
    for line in LINES:
        words = shlex.split(line.replace("smollm2-135m", "./tiny"))[1:]
        if words[0] == "chat":
            continue  # needs a terminal or an input; tests/chat
        if words[1] == "auto_awq":
            # 64 x 512 tokens of a tiny model's own text take minutes; what it lost is measured once
            windows = "0" if (tmp_path / "smollm2-4bit").exists() else "2"
            words += ["--fresh", "--calib-seqlen", "32", "--calib-samples", "4", "--eval-windows", windows]
        if words[1] == "calibrate":
            words += ["--calib-seqlen", "32", "--calib-samples", "4"]
        assert cli.main(words) == 0, capsys.readouterr().err
    assert (tmp_path / "loss.json").exists()
    for suffix in ("md", "json", "png"):
        assert (tmp_path / "smollm2-4bit" / f"lmtool-quality.{suffix}").exists()


def test_the_commands_of_the_cache_s_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path / "tiny", max_position_embeddings=1024, model_type="llama")
    ran = 0
    for line in lines_of(CACHE_DOCS):
        words = shlex.split(line.replace("smollm2-135m", "./tiny"))[1:]
        if words[0] == "chat":
            words += ["--prompt", "Hi", "--max-new-tokens", "3"]
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
        if words[:2] == ["lite", "calibrate"]:
            words += ["--calib-seqlen", "32", "--calib-samples", "4"]
        if words[:2] == ["lite", "eval"]:
            words += ["--windows", "1", "--window-len", "128"]
        if words[:2] == ["bench", "kv"]:
            continue  # tests/bench/test_kv.py
        assert cli.main(words) == 0, capsys.readouterr().err
        ran += 1
    assert ran == 8
    assert (tmp_path / "workspace" / "kv_cache.safetensors").exists()
