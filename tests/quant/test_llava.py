"""A LLaVA quantized: the language model's matrices are codes, all else is as it was, the folder is a LLaVA again."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lmtool.checkpoint.formats import open_checkpoint
from lmtool.checkpoint.vision import copy_picture_files
from lmtool.config import EngineConfig
from lmtool.convert.job import Job
from lmtool.convert.to_workspace import convert
from lmtool.engine.setup import load_engine
from lmtool.errors import CheckpointError
from lmtool.images.prepared import IMAGE_ID
from lmtool.models.loader import load_decoder, read_model_config
from lmtool.quant.calibrate import FOLDER, calibrate
from lmtool.quant.options import CalibrationOptions
from tests.checkpoint.llava_forms import FORMS, in_form, llava_in_form, move_tower_out
from tests.engine.test_pictures import request
from tests.models.test_llava import load, logits_of, picture
from tests.quant.models import Silent, dense_again, job, run, text_file
from tests.support import all_logits, check_greedy, run_all
from tests.tiny_llava import tiny_llava

IDS = [5, 9, 200, 31, 7, 80, 81]
VISION = ("vision_tower", "projector", "newline")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return text_file(tmp_path / "text.txt")


def logits(folder: Path) -> torch.Tensor:
    checkpoint = open_checkpoint(folder)
    config = read_model_config(checkpoint.config)
    decoder = load_decoder(checkpoint, config, dtype=torch.float32, device=torch.device("cpu"), num_positions=len(IDS))
    return all_logits(decoder, IDS)


@pytest.mark.parametrize("method", ["awq", "gptq", "smooth", "rtn"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_that_form_again(form: str, method: str, tmp_path: Path, text: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    llava_in_form(model, form, anyres=form != "original")
    run(model, out, text, method=method)
    source, written = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    parts = {"qweight", "qzeros", "scales"}
    expected: set[str] = set()
    for name, tensor in source.items():
        if any(part in name for part in VISION):
            expected.add(name)
            assert written[name].dtype == tensor.dtype
            assert torch.equal(written[name], tensor), name
        elif "_proj" in name:
            expected |= {f"{name.removesuffix('weight')}{part}" for part in parts}
        else:
            expected.add(name)
            assert written[name].dtype == torch.float16
    assert written.keys() == expected
    config = json.loads((model / "config.json").read_text())
    made = json.loads((out / "config.json").read_text())
    assert made.pop("quantization_config")["quant_method"] == "awq"
    assert made | {key: config.get(key) for key in ("dtype", "torch_dtype")} == config | {
        key: config.get(key) for key in ("dtype", "torch_dtype")
    }
    for name in ("preprocessor_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (out / name).exists() == (model / name).exists()
    assert open_checkpoint(out).format == "awq"
    dense = dense_again(out, tmp_path / "dense")
    torch.testing.assert_close(logits(out), logits(dense))
    # matrices without any structure lose a quarter in 4 bits; one in another's place gives 1.4
    assert (logits(out) - logits(model)).norm() < 0.5 * logits(model).norm()


@pytest.mark.parametrize("form", ["transformers 5", "original"])
def test_the_engine_sees_pictures_with_it(form: str, tmp_path: Path, text: Path) -> None:
    """Its answer on codes is that of the numbers which they stand for, step by step."""
    model, out, dense = tmp_path / "model", tmp_path / "out", tmp_path / "dense"
    llava_in_form(model, form)
    run(model, out, text)
    dense_again(out, dense)
    copy_picture_files(out, dense)
    decoder, shape = load(dense)
    shown = [shape.prepare(picture(size)) for size in ((64, 48), (20, 90))]
    loaded = load_engine(out, EngineConfig(device="cpu", max_batch_size=2, session_len=1024))
    assert loaded.weights == "int4"
    answer = run_all(loaded.core, [request(1, [5, shown[0], 9, shown[1], 11], max_new_tokens=12)])[1]
    with torch.inference_mode():
        expected = logits_of(decoder, [5, IMAGE_ID, 9, IMAGE_ID, 11, *answer], shown)
    assert check_greedy(answer, expected[-len(answer) - 1 : -1]) >= 0.9 * 12


@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_s_format(symmetric: bool, tmp_path: Path, text: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    tiny_llava(model)
    run(model, out, text, bits=8, symmetric=symmetric)
    assert open_checkpoint(out).format == "gptq"
    torch.testing.assert_close(logits(out), logits(dense_again(out, tmp_path / "dense")))
    vision, original = open_checkpoint(out).vision, open_checkpoint(model).vision
    assert vision is not None
    assert original is not None
    assert vision.names() == original.names()
    assert all(torch.equal(vision.tensor(name), original.tensor(name)) for name in vision.names())


def linears(model: Any) -> tuple[set[str], set[str]]:
    """Names of transformers' modules: those of the language model's layers, and all others."""
    found = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    layers = {name for name in found if ".language_model.layers." in name}
    return layers, found - layers


def in_vllm(name: str) -> str:
    """What vLLM calls a module: as llava-hf's files did before transformers 4.52."""
    return in_form(f"{name}.", "hub").removesuffix(".")


def test_awq_s_config_leaves_out_what_is_no_code(tmp_path: Path, text: Path) -> None:
    """By transformers' own rule, and by vLLM's: any name of the list that is part of the module's."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    model = tiny_llava(tmp_path / "model")
    run(tmp_path / "model", tmp_path / "out", text, skip=("layers.1.mlp.down",))
    said = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    layers, others = linears(model)
    skipped = {"model.language_model.layers.1.mlp.down_proj"}
    assert {name for name in layers | others if should_convert_module(name, said)} == layers - skipped
    assert {name for name in layers | others if not any(part in in_vllm(name) for part in said)} == layers - skipped


def test_gptq_s_config_leaves_out_what_is_no_code(tmp_path: Path, text: Path) -> None:
    """By the rule of vLLM and gptqmodel: a pattern after "-:" that fits from the module's beginning."""
    model = tiny_llava(tmp_path / "model")
    run(tmp_path / "model", tmp_path / "out", text, bits=8, skip=("layers.1.mlp.down",))
    said = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["dynamic"]
    patterns = [pattern.removeprefix("-:") for pattern in said]
    layers, others = linears(model)
    for named in (str, in_vllm):
        kept = {name for name in layers | others if not any(re.match(p, named(name)) for p in patterns)}
        assert kept == (layers | {"lm_head"}) - {"model.language_model.layers.1.mlp.down_proj"}


def test_a_tower_that_lay_elsewhere_comes_along(tmp_path: Path, text: Path) -> None:
    model, out = tmp_path / "models/llava", tmp_path / "out"
    llava_in_form(model, "original", anyres=False)
    before = open_checkpoint(model).vision
    assert before is not None
    expected = {name: before.tensor(name) for name in before.names()}
    move_tower_out(model, model.parent / "clip-vit-large-patch14-336")
    run(model, out, text)
    vision = open_checkpoint(out).vision
    assert vision is not None
    assert vision.tower_path is None
    assert vision.tower_config["hidden_size"] == 32
    assert {name: tuple(vision.shape(name)) for name in vision.names()} == {
        name: tuple(tensor.shape) for name, tensor in expected.items()
    }
    assert all(torch.equal(vision.tensor(name), tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("form", ["transformers 5", "original"])
def test_an_int8_head(form: str, tmp_path: Path, text: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    llava_in_form(model, form)
    run(model, out, text, head_bits=8)
    beginning = "language_model." if form == "transformers 5" else ""
    written = load_file(out / "model.safetensors")
    assert {name for name in written if "lm_head" in name} == {
        f"{beginning}lm_head.codes",
        f"{beginning}lm_head.scale",
    }
    assert json.loads((out / "config.json").read_text())["model_type"].startswith("lmtool_llava")
    difference = logits(out) - logits(model)
    assert difference.norm() < 0.5 * logits(model).norm()


def test_a_run_goes_on_where_it_was_killed(tmp_path: Path, text: Path) -> None:
    class Killed(Silent):
        def block_done(self, block: int, report: Any, seconds: float) -> None:
            raise KeyboardInterrupt

    from lmtool.quant.pipeline import quantize

    model = tmp_path / "model"
    tiny_llava(model)
    run(model, tmp_path / "whole", text)
    with pytest.raises(KeyboardInterrupt):
        quantize(job(model, tmp_path / "out", text), Killed())
    assert not (tmp_path / "out/model.safetensors").exists()
    run(model, tmp_path / "out", text)
    for name in ("model.safetensors", "config.json", "preprocessor_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_the_report_says(tmp_path: Path, text: Path) -> None:
    from lmtool.quant.report import markdown

    model = tmp_path / "model"
    tiny_llava(model, dtype=torch.float16)
    quality = run(model, tmp_path / "out", text)
    vision = open_checkpoint(model).vision
    assert vision is not None
    assert quality["vision_bytes"] == 2 * vision.num_parameters
    assert "vision tower and projector" in markdown(quality, picture=False)


def test_a_quantized_one_is_not_quantized_again(tmp_path: Path, text: Path) -> None:
    tiny_llava(tmp_path / "model")
    run(tmp_path / "model", tmp_path / "out", text)
    with pytest.raises(CheckpointError, match=r"is quantized already \(awq\)"):
        run(tmp_path / "out", tmp_path / "twice", text)


def test_calibration_sees_the_language_model(tmp_path: Path) -> None:
    model, ids = tmp_path / "model", torch.tensor([IDS, IDS])
    tiny_llava(model)
    options = CalibrationOptions(dataset="text", samples=2, seqlen=len(IDS))
    about = calibrate(model, tmp_path / "work", ids, options, device=torch.device("cpu"))
    assert about["layers"] == 2
    seen = load_file(tmp_path / "work" / FOLDER / "inputs.safetensors")
    assert "model.layers.1.mlp.down_proj.absmax" in seen
    assert not any("tower" in name for name in seen)


@pytest.mark.parametrize("form", ["hub", "original"])
def test_of_a_workspace_comes_what_comes_of_its_source(form: str, tmp_path: Path, text: Path) -> None:
    model, workspace = tmp_path / "model", tmp_path / "workspace"
    llava_in_form(model, form)
    convert(Job(source=model, name="model", destination=workspace))
    run(model, tmp_path / "a", text)
    run(workspace, tmp_path / "b", text)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in "ab"]
    assert configs[0] == configs[1]
