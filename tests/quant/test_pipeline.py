"""The whole pipeline on tiny models: names and shapes as the source's, the function kept, refusals before any work."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmtool.checkpoint.formats import open_checkpoint
from lmtool.errors import CheckpointError, ConfigError, MemoryShortError, TokenizerError
from lmtool.tokenizer import load_tokenizer
from tests.models.test_against_hf import load
from tests.quant.models import DIFFERENCES, dense_again, run, text_file, tiny_folder
from tests.support import all_logits
from tests.tokenizer_files import SENTENCES


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return text_file(tmp_path / "text.txt")


def relative_error(folder: Path, reference: Path) -> float:
    """Of the logits, on a text of the kind that was calibrated on."""
    ids = load_tokenizer(reference).encode(" ".join(SENTENCES[:3]))
    logits, expected = (all_logits(load(model, len(ids)), ids) for model in (folder, reference))
    return float((logits - expected).norm() / expected.norm())


@pytest.mark.parametrize("architecture", DIFFERENCES)
def test_every_family_keeps_its_names_its_shapes_and_its_function(
    architecture: str, tmp_path: Path, text: Path
) -> None:
    model, out = tiny_folder(tmp_path / "model", architecture), tmp_path / "out"
    run(model, out, text)
    source, tensors = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    linears = {name.removesuffix(".weight") for name in source if source[name].ndim == 2 and ".weight" in name}
    linears -= {name for name in linears if "layers." not in name and ".h." not in name}
    assert len(linears) >= 12
    expected: dict[str, tuple[int, ...]] = {}
    for name, tensor in source.items():
        stem = name.removesuffix(".weight")
        if stem not in linears:
            expected[name] = tuple(tensor.shape)
            continue
        num_out, num_in = tensor.shape
        expected[f"{stem}.qweight"] = (num_in, num_out // 8)
        expected[f"{stem}.qzeros"] = (num_in // 32, num_out // 8)
        expected[f"{stem}.scales"] = (num_in // 32, num_out)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    assert {tensor.dtype for tensor in tensors.values()} == {torch.int32, torch.float16}
    dense = dense_again(out, tmp_path / "dense")
    assert relative_error(dense, model) < 0.2
    ids = load_tokenizer(model).encode(SENTENCES[0])
    torch.testing.assert_close(*(all_logits(load(folder, len(ids)), ids) for folder in (out, dense)))
    assert load_tokenizer(out).encode("the quick") == load_tokenizer(model).encode("the quick")


def test_what_the_config_says(tmp_path: Path, text: Path) -> None:
    model, out = tiny_folder(tmp_path / "model"), tmp_path / "out"
    quality = run(model, out, text, skip=("layers.1.mlp.down",))
    config = json.loads((out / "config.json").read_text())
    skipped = "model.layers.1.mlp.down_proj"
    assert config["quantization_config"] == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head", skipped],
    }
    assert config["dtype"] == "float16"
    assert config["hidden_size"] == 64
    tensors = load_file(out / "model.safetensors")
    # its columns carry the scales that gate and up's rows gave away: the function is kept, not the bytes
    assert tensors[f"{skipped}.weight"].dtype == torch.float16
    assert f"{skipped}.qweight" not in tensors
    assert quality["skipped"] == [skipped]
    assert relative_error(dense_again(out, tmp_path / "dense"), model) < 0.2
    assert quality == json.loads((out / "lmtool-quality.json").read_text())


def test_each_method_is_better_than_the_one_before(tmp_path: Path, text: Path) -> None:
    model = tiny_folder(tmp_path / "model")
    errors = {}
    for method in ("smooth", "awq", "gptq", "best"):
        quality = run(model, tmp_path / method, text, method=method)
        entries = [entry for layer in quality["layers"] for entry in layer["linears"]]
        assert len(entries) == 12
        plain = sum(entry["error_plain"] for entry in entries)
        errors[method] = sum(entry["error"] for entry in entries) / plain
    assert errors["smooth"] < 1
    assert errors["awq"] < errors["smooth"]
    assert errors["best"] < errors["gptq"] < 1
    assert errors["best"] < errors["awq"]


def test_no_samples_is_plain_rounding_and_needs_no_text(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model")
    quality = run(model, tmp_path / "none", None, samples=0)
    run(model, tmp_path / "rtn", None, method="rtn")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "none" / name).read_bytes() == (tmp_path / "rtn" / name).read_bytes()
    assert quality["method"] == "rtn"
    assert quality["calibration"] is None


def test_inputs_that_are_not_finite_fall_back_to_plain_rounding(tmp_path: Path, text: Path) -> None:
    model, out = tiny_folder(tmp_path / "model"), tmp_path / "out"
    tensors = load_file(model / "model.safetensors")
    up = "model.layers.1.mlp.up_proj.weight"
    tensors[up] *= 1e30  # finite itself; silu(gate) · up squared is not
    save_file(tensors, model / "model.safetensors")
    quality = run(model, out, text)
    reasons = {entry["linear"]: entry["reason"] for entry in quality["fallbacks"]}
    assert reasons["model.layers.1.mlp.down_proj"] == "its inputs are not finite"
    assert not any("layers.0" in name for name in reasons)
    written = load_file(out / "model.safetensors")
    assert all(torch.isfinite(t).all() for n, t in written.items() if t.is_floating_point() and "layers.0" in n)


def test_shards_are_written_and_read(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmtool.checkpoint import writer

    monkeypatch.setattr(writer.write_shards, "__defaults__", (40_000,))
    model, out = tiny_folder(tmp_path / "model"), tmp_path / "out"
    run(model, out, text)
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(weight_map) == len(open_checkpoint(model).names()) + 2 * 7 * 3
    for name, file in weight_map.items():
        assert name in load_file(out / file)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"group_size": 64},
            "does not divide the 96 inputs of model.layers.0.mlp.down_proj; give --w-group-size 32$",
        ),
        ({"skip": ("q_proj",)}, "--skip leaves out model.layers.0.self_attn.q_proj and not model.layers.0"),
        ({"skip": ("nothing",)}, "--skip nothing names no linear; names are like model.layers.0"),
        ({"skip": (".",)}, "leaves nothing to quantize"),
        ({"samples": 600}, r"of 40 are 24,000; give more text, or --calib-samples \d+"),
    ],
)
def test_refused_before_anything_is_written(options: dict[str, Any], message: str, tmp_path: Path, text: Path) -> None:
    model = tiny_folder(tmp_path / "model")
    with pytest.raises(ConfigError, match=message) as caught:
        run(model, tmp_path / "out", text, **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_quantized_model_is_not_quantized_again(tmp_path: Path, text: Path) -> None:
    model, out = tiny_folder(tmp_path / "model"), tmp_path / "out"
    run(model, out, text)
    with pytest.raises(CheckpointError, match=r"is quantized already \(awq\)"):
        run(out, tmp_path / "twice", text)


def test_weights_that_are_not_numbers_are_named(tmp_path: Path, text: Path) -> None:
    model = tiny_folder(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.self_attn.o_proj.weight"][3, 4] = torch.nan
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.2\.self_attn\.o_proj\.weight are not numbers"):
        run(model, tmp_path / "out", text)


def test_work_dirs_that_are_something_else(tmp_path: Path, text: Path) -> None:
    model = tiny_folder(tmp_path / "model")
    with pytest.raises(ConfigError, match="is the model itself"):
        run(model, model, text)
    with pytest.raises(ConfigError, match="is a file"):
        run(model, text, text)
    other = tiny_folder(tmp_path / "other")
    with pytest.raises(ConfigError, match="holds another model"):
        run(model, other, text)
    assert (other / "model.safetensors").exists()


def test_a_disk_that_is_too_small(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100_000))
    with pytest.raises(MemoryShortError, match=r"out has 0\.0 GB free and the run needs 0\.\d; give another"):
        run(tiny_folder(tmp_path / "model"), tmp_path / "out", text)


def test_a_model_without_a_tokenizer(tmp_path: Path, text: Path) -> None:
    model = tiny_folder(tmp_path / "model")
    (model / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"holds no tokenizer\.json"):
        run(model, tmp_path / "out", text)
