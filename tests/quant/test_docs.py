"""docs/quantize.md: every option is described, and its commands run as they stand, a tiny model in SmolLM2's place."""

import re
import shlex
from pathlib import Path

import pytest

from lmtool import cli
from tests.quant.models import text_file, tiny_folder

DOCS = (Path(__file__).parents[2] / "docs" / "quantize.md").read_text(encoding="utf-8")
LINES = [line for block in re.findall(r"```\n(.*?)```", DOCS, re.DOTALL) for line in block.splitlines()]
# common to commands that take a model
UNIVERSAL = {"--work-dir", "--revision", "--download-dir", "--verbose"}


def test_every_option_is_described() -> None:
    described = set(re.findall(r"--[a-z-]+", DOCS))
    for name, command in cli.build().commands["lite"].commands.items():
        for param in command.params:
            flags = {flag for flag in param.opts if flag.startswith("--")}
            assert not flags or flags & (described | UNIVERSAL), f"lite {name} {flags}"


@pytest.mark.slow
def test_its_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path / "tiny", hidden_size=128, intermediate_size=128, max_position_embeddings=1024)
    (tmp_path / "my-texts").mkdir()
    text_file(tmp_path / "my-texts" / "a.txt", repeats=1200)
    assert len(LINES) == 7
    for line in LINES:
        words = shlex.split(line.replace("smollm2-135m", "./tiny"))[1:]
        if words[0] == "chat":
            continue  # needs a terminal or an input; tests/chat
        if words[1] == "auto_awq":
            # 64 x 512 tokens of a tiny model's own text take minutes
            words += ["--fresh", "--calib-seqlen", "32", "--calib-samples", "4", "--eval-windows", "2"]
        if words[1] == "calibrate":
            words += ["--calib-seqlen", "32", "--calib-samples", "4"]
        assert cli.main(words) == 0, capsys.readouterr().err
    assert (tmp_path / "loss.json").exists()
    for suffix in ("md", "json", "png"):
        assert (tmp_path / "smollm2-4bit" / f"lmtool-quality.{suffix}").exists()
