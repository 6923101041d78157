"""Figures against ones taken from all logits by hand; chunks and windows; what is refused; the command."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmtool import cli
from lmtool.bench.evaluate import Figure, evaluate, spread
from lmtool.config import EngineConfig
from lmtool.errors import CheckpointError, ConfigError, EngineError
from lmtool.tokenizer import load_tokenizer
from tests.models.test_against_hf import load
from tests.quant.models import run, text_file, tiny_folder
from tests.support import all_logits
from tests.tokenizer_files import SENTENCES

CPU = EngineConfig(device="cpu", dtype="float32")


def windows_of(model: Path, num_windows: int = 3, window_len: int = 70) -> torch.Tensor:
    ids = load_tokenizer(model).encode(" ".join(SENTENCES * 20))
    return spread(torch.tensor(ids), num_windows, window_len)


def changed(model: Path, folder: Path) -> Path:
    """The same model with noise on its weights."""
    tiny_folder(folder)
    generator = torch.Generator().manual_seed(1)
    tensors = load_file(model / "model.safetensors")
    noisy = {n: t + 0.01 * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}
    save_file(noisy, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("chunk_tokens", [None, 64, 7])
def test_figures_are_those_of_all_logits(tmp_path: Path, chunk_tokens: int | None) -> None:
    model = tiny_folder(tmp_path / "model")
    other = changed(model, tmp_path / "other")
    windows = windows_of(model)
    found = evaluate(other, windows, CPU, against=model, chunk_tokens=chunk_tokens)

    def logprobs(folder: Path) -> torch.Tensor:
        rows = [all_logits(load(folder, len(ids)), ids.tolist())[:-1] for ids in windows]
        return torch.log_softmax(torch.stack(rows).double(), dim=-1)

    p, q = logprobs(model), logprobs(other)
    targets = windows[:, 1:, None]
    loss, original_loss = (-x.gather(2, targets).mean(dim=(1, 2)) for x in (q, p))
    kl = (p.exp() * (p - q)).sum(dim=-1).mean(dim=1)
    same = (p.argmax(-1) == q.argmax(-1)).double().mean(dim=1)
    for figure, values in ((found.kl, kl), (found.delta_nll, loss - original_loss), (found.top1_agreement, same)):
        assert figure is not None
        assert figure.value == pytest.approx(float(values.mean()), rel=1e-3, abs=1e-6)
        assert figure.stderr == pytest.approx(float(values.std() / len(values) ** 0.5), rel=1e-2, abs=1e-6)
    assert found.perplexity.value == pytest.approx(float(loss.mean().exp()), rel=1e-4)
    assert found.perplexity.stderr == pytest.approx(float(loss.mean().exp() * loss.std() / 3**0.5), rel=1e-2)
    assert found.original_perplexity is not None
    assert found.original_perplexity.value == pytest.approx(float(original_loss.mean().exp()), rel=1e-4)
    assert found.kl is not None
    assert found.kl.value > 1e-3  # the noise was seen


def test_a_model_beside_itself_has_lost_nothing(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model")
    found = evaluate(model, windows_of(model), CPU, against=model)
    assert found.kl == Figure(0.0, 0.0)
    assert found.delta_nll == Figure(0.0, 0.0)
    assert found.top1_agreement == Figure(1.0, 0.0)
    assert found.perplexity == found.original_perplexity


def test_without_an_original_there_is_perplexity_alone(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model")
    found = evaluate(model, windows_of(model, num_windows=1), CPU)
    assert found.kl is None
    assert found.as_json()["perplexity"]["stderr"] is None  # of one window


def test_windows_are_spread_and_do_not_overlap() -> None:
    windows = spread(torch.arange(107), 3, 10)
    assert windows[:, 0].tolist() == [0, 30, 60]
    assert windows.shape == (3, 10)
    with pytest.raises(ConfigError, match="the text has 19 tokens, 2 windows of 10 are 20; give more text, or --w.* 1"):
        spread(torch.arange(19), 2, 10)


def test_what_is_refused(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model")
    with pytest.raises(ConfigError, match="--window-len is 129, the model's context is 128; give a smaller one"):
        evaluate(model, windows_of(model, 1, 129), CPU)
    with pytest.raises(ConfigError, match="--chunk-tokens is 0"):
        evaluate(model, windows_of(model), CPU, chunk_tokens=0)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(EngineError, match="logits are not numbers"):
        evaluate(model, windows_of(model), CPU)


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model")
    larger = tiny_folder(tmp_path / "larger", vocab_size=load_tokenizer(model).vocab_size + 64)
    with pytest.raises(CheckpointError, match=r"vocabularies differ: .*larger has \d+ tokens.*; give the model that"):
        evaluate(larger, windows_of(model), CPU, against=model)


# ------------------------------------------------------------------ the command


def test_another_tokenizer_of_the_same_size_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, other = tiny_folder(tmp_path / "model"), tiny_folder(tmp_path / "other")
    library = json.loads((other / "tokenizer.json").read_text())
    library["model"]["merges"] = library["model"]["merges"][:20]
    (other / "tokenizer.json").write_text(json.dumps(library))
    assert cli.main(["lite", "eval", str(model), "--against", str(other), "--windows", "1", "--window-len", "64"]) == 2
    assert "make other tokens of the same text; give the model that it was made from" in capsys.readouterr().err


def test_the_command_on_a_quantized_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, text = tiny_folder(tmp_path / "model"), text_file(tmp_path / "text.txt")
    run(model, tmp_path / "awq", text, method="rtn")
    words = ["lite", "eval", str(tmp_path / "awq"), "--against", str(model), "--text", str(text), "--device", "cpu"]
    sizes = ["--windows", "3", "--window-len", "64"]
    assert cli.main([*words, *sizes, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_windows"] == 3
    assert found["weights"] == "int4"
    assert 0 < found["kl"]["value"] < 1
    assert found["kl"]["stderr"] > 0
    assert cli.main([*words, *sizes]) == 0
    table = capsys.readouterr().out
    assert f"{found['kl']['value']:.4f}" in table
    assert "same likeliest token" in table


def test_the_text_that_comes_with_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_folder(tmp_path / "model")
    assert cli.main(["lite", "eval", str(model), "--windows", "2", "--window-len", "64", "--json", "-"]) == 0
    assert "pydoc_data" in json.loads(capsys.readouterr().out)["text"]["name"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "nowhere.txt"], "--text nowhere.txt does not exist; give a file or a folder of text"),
        (["--windows", "0"], "--windows is 0 and --window-len 1024; give 1 window or more"),
        (["--json", "no/such/folder/x.json"], "cannot be written: there is no folder"),
    ],
)
def test_wrong_words(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["lite", "eval", str(tiny_folder(tmp_path / "model")), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
