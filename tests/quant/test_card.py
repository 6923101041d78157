"""Quantizing and evaluating on a card: the CPU's figures, up to the order of its sums."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lmtool import cli
from lmtool.bench.evaluate import evaluate, spread
from lmtool.config import EngineConfig
from lmtool.quant.pipeline import quantize
from lmtool.tokenizer import load_tokenizer
from tests.quant.models import Silent, job, text_file, tiny_folder
from tests.tokenizer_files import SENTENCES

GPU = EngineConfig(device="cuda", dtype="float32")


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["rtn", "smooth", "awq", "gptq", "best"])
def test_a_card_quantizes_as_well_as_a_cpu(method: str, tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model", max_position_embeddings=256)
    text = text_file(tmp_path / "text.txt", repeats=60)
    ids = load_tokenizer(model).encode(" ".join(SENTENCES * 40))
    windows = spread(torch.tensor(ids), 4, 100)
    losses = []
    for device in ("cpu", "cuda"):
        wanted = job(model, tmp_path / device, text, method=method)
        quantize(replace(wanted, device=torch.device(device)), Silent())
        found = evaluate(tmp_path / device, windows, EngineConfig(device="cpu", dtype="float32"), against=model)
        assert found.kl is not None
        losses.append(found.kl.value)
    assert losses[1] < 1.05 * losses[0]
    assert losses[0] < 1.05 * losses[1]


@pytest.mark.gpu
def test_a_card_evaluates_as_a_cpu_does(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model", max_position_embeddings=256, intermediate_size=128)
    quantize(job(model, tmp_path / "awq", None, method="rtn", samples=0), Silent())
    windows = spread(torch.tensor(load_tokenizer(model).encode(" ".join(SENTENCES * 40))), 4, 100)
    cpu = EngineConfig(device="cpu", dtype="float32")
    expected, actual = (evaluate(tmp_path / "awq", windows, config, against=model) for config in (cpu, GPU))
    for name in ("perplexity", "kl", "delta_nll"):
        assert getattr(actual, name).value == pytest.approx(getattr(expected, name).value, rel=2e-2, abs=1e-4)
    in_codes = evaluate(tmp_path / "awq", windows, EngineConfig(device="cuda", dtype="float16"), against=model)
    assert in_codes.weights == "w4a16 g32"
    assert in_codes.perplexity.value == pytest.approx(expected.perplexity.value, rel=2e-2)


@pytest.mark.gpu
def test_the_commands_on_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a text of the model's own, which an engine on the card writes."""
    monkeypatch.chdir(tmp_path)
    tiny_folder(Path("model"), max_position_embeddings=1024)
    text_file(Path("text.txt"), repeats=1200)
    words = "lite auto_awq ./model --work-dir out --w-group-size 32 --device cuda --calib-samples 8 --calib-seqlen 64"
    assert cli.main([*words.split(), "--eval-windows", "2"]) == 0
    words = "lite eval ./out --against ./model --device cuda --windows 3 --window-len 64 --text text.txt"
    assert cli.main(words.split()) == 0
