"""`--calib-dataset self`: text out of the model, the same each time, kept for a run that goes on; hub names offline."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmtool import cli
from lmtool.commands.lite_self import sampler
from lmtool.errors import ConfigError
from lmtool.quant.datasets import calibration_ids
from lmtool.quant.hub_datasets import hub_texts
from lmtool.quant.kept_text import calibration_text, kept
from lmtool.quant.options import CalibrationOptions
from lmtool.tokenizer import load_tokenizer
from tests.quant.models import tiny_folder

OPTIONS = CalibrationOptions(samples=5, seqlen=40)


def test_the_text_is_the_models_own_and_the_seed_says_which(tmp_path: Path) -> None:
    sample = sampler(tiny_folder(tmp_path / "model"), "cpu")
    ids = sample(OPTIONS)
    assert ids.shape == (5, 40)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, sample(OPTIONS))
    assert len({tuple(row) for row in ids.tolist()}) == 5
    other = sample(CalibrationOptions(samples=5, seqlen=40, seed=1))
    assert not torch.equal(ids, other)


def test_likely_tokens_come_often(tmp_path: Path) -> None:
    """A model that always wants one token goes round in circles, and that is said."""
    model = tiny_folder(tmp_path / "model", tie_word_embeddings=False)
    tensors = load_file(model / "model.safetensors")
    embed = torch.ones_like(tensors["model.embed_tokens.weight"])
    head = torch.zeros_like(tensors["lm_head.weight"])
    head[7] = 100.0
    zeros = {name: torch.zeros_like(t) for name, t in tensors.items() if "layers." in name and t.ndim == 2}
    save_file(
        tensors | zeros | {"model.embed_tokens.weight": embed, "lm_head.weight": head}, model / "model.safetensors"
    )
    with pytest.raises(
        ConfigError, match="repeats itself in 5 of 5 samples of its own text; give --calib-dataset FILE"
    ):
        sampler(model, "cpu")(OPTIONS)


def test_it_is_kept_in_the_work_dir(tmp_path: Path) -> None:
    model, out = tiny_folder(tmp_path / "model"), tmp_path / "out"
    sampled: list[CalibrationOptions] = []

    def sample(options: CalibrationOptions) -> torch.Tensor:
        sampled.append(options)
        return torch.arange(options.samples * options.seqlen).view(options.samples, -1) + options.seed

    first = kept(out, model, OPTIONS, sample)
    assert torch.equal(kept(out, model, OPTIONS, sample), first)
    assert len(sampled) == 1
    kept(out, model, CalibrationOptions(samples=5, seqlen=40, seed=1), sample)
    kept(out, model, CalibrationOptions(samples=5, seqlen=40, seed=1), sample, fresh=True)
    assert len(sampled) == 3


def test_a_command_without_any_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = tiny_folder(tmp_path / "model"), tmp_path / "out"
    words = ["lite", "auto_awq", str(model), "--work-dir", str(out), "--device", "cpu", "--w-group-size", "32"]
    sizes = ["--calib-samples", "4", "--calib-seqlen", "40", "--eval-windows", "0"]
    assert cli.main([*words, *sizes]) == 0
    written = (out / "model.safetensors").read_bytes()
    assert cli.main([*words, *sizes, "--fresh"]) == 0
    assert (out / "model.safetensors").read_bytes() == written
    assert cli.main(["lite", "calibrate", str(model), "--work-dir", str(out), *sizes[:4], "--device", "cpu"]) == 0
    capsys.readouterr()


# ------------------------------------------------------------------ names of the hub


def test_what_came_from_the_hub_is_kept_and_a_file_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = tiny_folder(tmp_path / "model"), tmp_path / "out"
    tokenizer, rows = load_tokenizer(model), [{"text": "the quick brown fox " * 60}]
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *a, **o: rows))

    def text(dataset: str, **options: Any) -> torch.Tensor:
        asked = CalibrationOptions(dataset=dataset, samples=2, seqlen=20)
        return calibration_text(out, model, asked, tokenizer, None, **options)

    first = text("c4")
    rows[0]["text"] = "the lazy dog " * 90
    assert torch.equal(text("c4"), first)
    assert not torch.equal(text("c4", fresh=True), first)
    (tmp_path / "a.txt").write_text("the quick brown fox " * 60)
    before = text(str(tmp_path / "a.txt"))
    (tmp_path / "a.txt").write_text("the lazy dog " * 90)
    assert not torch.equal(text(str(tmp_path / "a.txt")), before)


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    tokenizer = load_tokenizer(tiny_folder(tmp_path / "model"))
    with pytest.raises(ConfigError, match=r"c4 needs the library datasets; pip install 'lmtool\[lite\]', or give"):
        calibration_ids(CalibrationOptions(dataset="c4"), tokenizer)


def test_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: Any, **options: Any) -> Any:
        raise ConnectionError("couldn't reach\nthe hub")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    for name in ("c4", "ptb", "wikitext2", "pileval"):
        message = f"{name} cannot be read from the hub .couldn't reach the hub.; give --calib-dataset self, or"
        with pytest.raises(ConfigError, match=message) as caught:
            list(hub_texts(name, 100))
        assert "\n" not in str(caught.value)


def test_no_more_than_is_needed_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = iter([{"text": "four"}, {"text": "  "}, {"text": "more"}, {"text": "not read"}])
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *a, **o: rows))
    assert list(hub_texts("c4", 8)) == ["four", "more"]
    assert next(rows) == {"text": "not read"}
