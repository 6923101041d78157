"""docs/format.md: its commands run, it names every key, kind, setting and file, and every option is described."""

import json
import re
import shlex
from pathlib import Path

import msgspec
import pytest

from lmtool import cli
from lmtool.checkpoint import workspace_manifest
from lmtool.checkpoint.engine_file import SETTINGS
from lmtool.models.own_names import NAMES
from tests.models.test_quantized import quantize
from tests.quant.models import tiny_folder

DOCS = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
LINES = [line for block in re.findall(r"```sh\n(.*?)```", DOCS, re.DOTALL) for line in block.splitlines()]


def test_its_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_folder(Path("tiny"))
    quantize(tiny_folder(Path("Qwen2.5-7B-AWQ"), "Qwen2ForCausalLM", intermediate_size=128), "awq")
    assert len(LINES) == 6
    for line in LINES:
        words = [word for word in shlex.split(line.partition("#")[0])[1:] if word != "--warm"]  # which needs a card
        if words[0] != "chat":  # which needs a terminal; tests/commands/test_chat.py
            assert cli.main([word.replace("smollm2-135m", "./tiny") for word in words]) == 0, capsys.readouterr().err
    assert {"lmtool.json", "engine.toml", "weights-00001.safetensors"} <= {path.name for path in Path("qwen").iterdir()}
    manifest = json.loads(Path("qwen/lmtool.json").read_text())
    assert manifest["source"]["format"] == "awq"
    assert set(manifest["weights"]["layers.0.qkv.weight"]["parts"]) == {"tiles"}


def test_it_names_what_there_is() -> None:
    kinds = (
        workspace_manifest.Manifest,
        workspace_manifest.WeightEntry,
        workspace_manifest.TensorEntry,
        workspace_manifest.SourceEntry,
    )
    names = {field.name for kind in kinds for field in msgspec.structs.fields(kind)}
    names |= {*workspace_manifest.PARTS, *SETTINGS} | {
        part for parts in workspace_manifest.PARTS.values() for part in parts
    }
    names |= {ours.removeprefix("layers.{i}") for ours in NAMES}
    assert [name for name in sorted(names) if f"`{name}" not in DOCS and f"`layers.i{name}`" not in DOCS] == []
    assert f"version {workspace_manifest.FORMAT_VERSION}" in DOCS


@pytest.mark.parametrize("command", ["convert", "inspect"])
def test_every_option_has_a_help_text(command: str) -> None:
    for param in cli.build().commands[command].params:
        assert getattr(param, "help", None), param.name
