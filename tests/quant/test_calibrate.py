"""What `lite calibrate` writes, against the values of a forward pass that transformers makes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lmtool.checkpoint.reader import read_json
from lmtool.checkpoint.writer import write_json
from lmtool.errors import CheckpointError
from lmtool.quant.calibrate import calibrate, calibrated_with
from lmtool.quant.options import CalibrationOptions
from tests.models.test_against_hf import hf_model

IDS = torch.arange(3 * 20).view(3, 20) * 5 % 131
OPTIONS = CalibrationOptions(dataset="c4", samples=3, seqlen=20, batch_size=2)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    hf_model("Llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_extremes_are_those_of_transformers(model: Path, tmp_path: Path) -> None:
    calibrate(model, tmp_path / "out", IDS, OPTIONS, device=torch.device("cpu"))
    inputs = load_file(tmp_path / "out" / "calibration" / "inputs.safetensors")
    key_value = load_file(tmp_path / "out" / "calibration" / "key_value.safetensors")
    theirs = AutoModelForCausalLM.from_pretrained(model).eval()
    seen: dict[str, torch.Tensor] = {}
    for name, module in theirs.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].flatten(0, -2)}))
    with torch.inference_mode():
        cache = theirs(IDS, use_cache=True).past_key_values
    assert set(inputs) == {f"{name}.{kind}" for name in seen for kind in ("min", "max", "absmax")}
    for name, x in seen.items():
        torch.testing.assert_close(inputs[f"{name}.min"], x.amin(0))
        torch.testing.assert_close(inputs[f"{name}.max"], x.amax(0))
        torch.testing.assert_close(inputs[f"{name}.absmax"], x.abs().amax(0))
    for i in range(2):
        for kind, values in (("k", cache.layers[i].keys), ("v", cache.layers[i].values)):  # [S, Hkv, L, D]
            torch.testing.assert_close(key_value[f"layers.{i}.{kind}.min"], values.amin((0, 2)))
            torch.testing.assert_close(key_value[f"layers.{i}.{kind}.absmax"], values.abs().amax((0, 2)))
    assert key_value["layers.0.k.max"].shape == (2, 16)


def test_it_says_of_what(model: Path, tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    calibrate(
        model,
        tmp_path / "out",
        IDS,
        OPTIONS,
        device=torch.device("cpu"),
        progress=lambda i, n: done.append((i, n)),
    )
    assert done == [(1, 2), (2, 2)]
    about = read_json(tmp_path / "out" / "calibration" / "about.json")
    assert (about["model"], about["layers"]) == (str(model), 2)
    assert about["text"] == {"dataset": "c4", "samples": 3, "seqlen": 20, "batch_size": 2, "seed": 0}
    assert calibrated_with(tmp_path / "out", model) == OPTIONS
    assert calibrated_with(tmp_path, model) is None
    hf_model("Qwen2").save_pretrained(tmp_path / "other")
    assert calibrated_with(tmp_path / "out", tmp_path / "other") is None


def test_an_about_that_says_nothing_is_refused(model: Path, tmp_path: Path) -> None:
    about = calibrate(model, tmp_path / "out", IDS, OPTIONS, device=torch.device("cpu"))
    write_json(tmp_path / "out" / "calibration" / "about.json", about | {"text": {"samples": -1}})
    with pytest.raises(CheckpointError, match=r"about\.json does not say on which text; calibrate again"):
        calibrated_with(tmp_path / "out", model)
