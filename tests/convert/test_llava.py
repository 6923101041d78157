"""A LLaVA → a workspace → the files that it came from: the same numbers and codes under the same names."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lmtool import cli
from lmtool.checkpoint.formats import open_checkpoint
from lmtool.checkpoint.vision import VisionPart
from lmtool.checkpoint.workspace import Workspace
from lmtool.checkpoint.workspace_manifest import VISION
from lmtool.config import EngineConfig
from lmtool.convert.inspection import inspect
from lmtool.convert.job import Job
from lmtool.convert.to_gguf import export_gguf
from lmtool.convert.to_hf import export
from lmtool.convert.to_workspace import Converted, convert
from lmtool.engine.load_weights import open_decoder
from lmtool.errors import CheckpointError, ConfigError
from lmtool.images.form import read_image_form
from lmtool.images.prepared import IMAGE_ID
from lmtool.tokenizer import load_tokenizer
from tests.checkpoint.llava_forms import FORMS, llava_in_form, move_tower_out
from tests.quant.models import run as quantize
from tests.quant.models import text_file, tiny_folder
from tests.support import all_logits
from tests.tiny_llava import TILE, tiny_llava

IDS = [5, 9, 200, 31, 7, 80, 81]


def to_workspace(model: Path, **settings: Any) -> tuple[Path, Converted]:
    destination = model.parent / "workspace"
    return destination, convert(Job(source=model, name=str(model), destination=destination, **settings))


def vision_of(folder: Path) -> VisionPart:
    vision = open_checkpoint(folder).vision
    assert vision is not None
    return vision


def logits(folder: Path) -> torch.Tensor:
    decoder, _ = open_decoder(folder, EngineConfig(dtype="float32", device="cpu"))
    return all_logits(decoder, IDS)


def check_same_sight(folder: Path, original: Path) -> None:
    found, expected = vision_of(folder), vision_of(original)
    assert set(found.names()) == set(expected.names())
    for name in expected.names():
        assert found.dtype(name) == expected.dtype(name)
        assert torch.equal(found.tensor(name), expected.tensor(name)), name
    assert found.tower_config == expected.tower_config
    assert found.settings == expected.settings
    assert read_image_form(folder) == read_image_form(original)


def json_of(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.mark.parametrize("anyres", [True, False], ids=["1.6", "1.5"])
@pytest.mark.parametrize("form", FORMS)
def test_numbers_come_back_bit_by_bit_under_their_names(form: str, anyres: bool, tmp_path: Path) -> None:
    model, back = tmp_path / "model", tmp_path / "hf"
    llava_in_form(model, form, anyres=anyres, dtype=torch.bfloat16)
    workspace, made = to_workspace(model)
    assert made.exact
    assert made.difference is not None
    assert made.difference.equal
    assert made.manifest.format_version == 2
    assert made.manifest.dtype == "bfloat16"
    check_same_sight(workspace, model)
    names = Workspace(workspace).names()
    assert "layers.1.qkv.weight" in names
    assert not any(name.startswith(VISION) for name in names)
    torch.testing.assert_close(logits(workspace), logits(model), rtol=0, atol=0)
    exported = export(workspace, back)
    assert exported.difference is not None
    assert exported.difference.equal
    check_same_sight(back, model)
    first, last = load_file(model / "model.safetensors"), load_file(back / "model.safetensors")
    assert first.keys() == last.keys()
    for name, tensor in first.items():
        assert last[name].dtype == tensor.dtype
        assert torch.equal(last[name], tensor), name
    said = {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    assert json_of(back / "config.json") == json_of(model / "config.json") | said
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (back / name).exists() == (model / name).exists()
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
    ids = load_tokenizer(model).chat_ids(message)
    assert ids.count(IMAGE_ID) == 1
    assert ids == load_tokenizer(workspace).chat_ids(message) == load_tokenizer(back).chat_ids(message)


@pytest.mark.parametrize("form", FORMS)
def test_codes_stay_codes(form: str, tmp_path: Path) -> None:
    """What `lmtool lite` made of it, through a workspace and back."""
    model, quantized, back = tmp_path / "model", tmp_path / "quantized", tmp_path / "hf"
    llava_in_form(model, form, dtype=torch.float16)
    quantize(model, quantized, text_file(tmp_path / "text.txt"), method="rtn")
    workspace, made = to_workspace(quantized)
    assert made.exact
    assert made.manifest.dtype == "float16"
    check_same_sight(workspace, model)
    checkpoint = open_checkpoint(workspace)
    assert sum(checkpoint.dtype(name) == "int4" for name in checkpoint.names()) == 4 * 2
    torch.testing.assert_close(logits(workspace), logits(quantized), rtol=0, atol=0)
    assert export(workspace, back).quantized
    check_same_sight(back, model)
    first, last = load_file(quantized / "model.safetensors"), load_file(back / "model.safetensors")
    assert first.keys() == last.keys()
    assert all(torch.equal(last[name], tensor) for name, tensor in first.items())
    config, expected = json_of(back / "config.json"), json_of(quantized / "config.json")
    left = [one.pop("quantization_config") for one in (config, expected)]
    assert set(left[0]["modules_to_not_convert"]) == set(left[1]["modules_to_not_convert"])
    assert config == expected


def test_another_dtype(tmp_path: Path) -> None:
    tiny_llava(tmp_path / "model", dtype=torch.float32)
    workspace, made = to_workspace(tmp_path / "model", dtype="float16")
    assert not made.exact
    vision = vision_of(workspace)
    assert {vision.dtype(name) for name in vision.names()} == {"float16"}
    export(workspace, tmp_path / "hf", dtype="float32")
    assert {tensor.dtype for tensor in load_file(tmp_path / "hf/model.safetensors").values()} == {torch.float32}


def test_transformers_reads_what_goes_back(tmp_path: Path) -> None:
    from transformers import LlavaNextForConditionalGeneration

    model = tiny_llava(tmp_path / "model")
    workspace, _ = to_workspace(tmp_path / "model")
    export(workspace, tmp_path / "hf")
    read = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    expected = model.state_dict()
    assert read.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read.state_dict().items())


# ------------------------------------------------------------------ pickles, and a tower that lies elsewhere


def pickled(folder: Path, *, with_index: bool = False) -> None:
    """Its safetensors as pickle files; with an index as liuhaotian/llava-v1.5-7b lies on the hub."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    if not with_index:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    half = len(tensors) // 2
    parts = [dict(list(tensors.items())[:half]), dict(list(tensors.items())[half:])]
    weight_map = {}
    for number, part in enumerate(parts, start=1):
        shard = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save(part, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    projector = {name: tensor for name, tensor in tensors.items() if "mm_projector" in name}
    torch.save(projector, folder / "mm_projector.bin")


@pytest.mark.parametrize("tower_too", [True, False], ids=["pickled tower", "safe tower"])
def test_liuhaotian_s_1_5_as_it_lies_on_the_hub(tower_too: bool, tmp_path: Path) -> None:
    model, tower = tmp_path / "llava-v1.5-7b", tmp_path / "clip-vit-large-patch14-336"
    llava_in_form(model, "original", anyres=False)
    expected = {name: vision_of(model).tensor(name) for name in vision_of(model).names()}
    files = load_file(model / "model.safetensors")
    moved = move_tower_out(model, tower)
    pickled(model, with_index=True)
    if tower_too:
        pickled(tower)
    workspace, made = to_workspace(model, allow_bin=True)
    assert made.exact
    assert sorted(made.manifest.source.files) == [f"pytorch_model-{i:05d}-of-00002.bin" for i in (1, 2)]
    vision = vision_of(workspace)
    assert vision.tower_path is None
    assert all(torch.equal(vision.tensor(name), tensor) for name, tensor in expected.items())
    export(workspace, tmp_path / "hf")
    back = load_file(tmp_path / "hf/model.safetensors")
    assert len(moved) > 40
    assert back.keys() == files.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in files.items())
    check_same_sight(tmp_path / "hf", workspace)
    assert {path.name for path in tmp_path.iterdir()} == {model.name, tower.name, "workspace", "hf"}


def test_a_safe_model_with_a_pickled_tower(tmp_path: Path) -> None:
    model, tower = tmp_path / "llava", tmp_path / "clip-vit-large-patch14-336"
    llava_in_form(model, "original", anyres=False)
    move_tower_out(model, tower)
    pickled(tower)
    with pytest.raises(CheckpointError, match="only pickled weights; lmtool convert --allow-bin the model or give"):
        to_workspace(model)
    workspace, _ = to_workspace(model, allow_bin=True)
    assert len(vision_of(workspace).names()) > 40


@pytest.mark.parametrize("way", ["workspace", "quantized", "pickled"])
def test_the_colours_of_a_tower_that_lies_elsewhere_go_with_it(way: str, tmp_path: Path) -> None:
    """Only its own folder says what it was normalized with."""
    model, tower = tmp_path / "llava", tmp_path / "clip-vit-large-patch14-336"
    llava_in_form(model, "original", anyres=False)
    move_tower_out(model, tower)
    colours = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "crop_size": TILE, "size": TILE}
    (tower / "preprocessor_config.json").write_text(json.dumps(colours))
    expected = read_image_form(model)
    assert expected is not None
    assert expected.mean == (0.5, 0.4, 0.3)
    if way == "quantized":
        quantize(model, tmp_path / "made", text_file(tmp_path / "text.txt"))
        made = tmp_path / "made"
    else:
        if way == "pickled":
            pickled(model, with_index=True)
        made, _ = to_workspace(model, allow_bin=way == "pickled")
    (tower / "config.json").unlink()
    assert read_image_form(made) == expected
    if way != "quantized":
        export(made, tmp_path / "hf")
        assert read_image_form(tmp_path / "hf") == expected


def test_allow_bin_without_pickles_is_said(tmp_path: Path) -> None:
    tiny_llava(tmp_path / "model", original=True)
    with pytest.raises(ConfigError, match="has no pickle weights, or has safetensors too"):
        to_workspace(tmp_path / "model", allow_bin=True)


def test_an_index_of_pickles_must_be_true(tmp_path: Path) -> None:
    model = tmp_path / "model"
    llava_in_form(model, "original")
    pickled(model, with_index=True)
    (model / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match="lacks 1 of 2 weight files: pytorch_model-00002-of-00002.bin"):
        to_workspace(model, allow_bin=True)
    (model / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "../other.bin"}}')
    with pytest.raises(CheckpointError, match="names no files of its folder"):
        to_workspace(model, allow_bin=True)


# ------------------------------------------------------------------ what is said, what is refused


@pytest.mark.parametrize(("anyres", "tiles", "rows"), [(True, 5, 16 + 8 * 9), (False, 1, 16)])
def test_inspect_says_what_it_sees_with(
    anyres: bool, tiles: int, rows: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_llava(tmp_path / "model", anyres=anyres, dtype=torch.float16)
    workspace, _ = to_workspace(tmp_path / "model")
    expected = vision_of(tmp_path / "model")
    for path in (tmp_path / "model", workspace):
        assert cli.main(["inspect", str(path), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["vision"]
        assert (found["most_tiles"], found["most_rows"]) == (tiles, rows)
        assert (found["num_parameters"], found["num_bytes"]) == (expected.num_parameters, 2 * expected.num_parameters)
        assert cli.main(["inspect", str(path)]) == 0
        said = capsys.readouterr().out
        assert "CLIP, 3 layers, hidden 32, tiles of 28 pixels in patches of 7" in said
        assert f"{rows} tokens of the context" in said
        assert "LlamaForCausalLM" in said
    whole = inspect(tmp_path / "model")
    assert whole.memory.weights == 2 * (whole.num_parameters + expected.num_parameters)


def test_what_pictures_need_is_missed_before_anything_is_written(tmp_path: Path) -> None:
    tiny_llava(tmp_path / "model")
    (tmp_path / "model/preprocessor_config.json").rename(tmp_path / "kept.json")
    with pytest.raises(CheckpointError, match=r"has no preprocessor_config\.json; download it"):
        to_workspace(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"has no preprocessor_config\.json; download it"):
        quantize(tmp_path / "model", tmp_path / "out", None, method="rtn")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "kept.json"}


def test_the_weights_alone_with_the_files_of_another_folder(tmp_path: Path) -> None:
    """--quant-path: its tokenizer and what it says of pictures are the model's own."""
    model, weights = tmp_path / "model", tmp_path / "weights"
    tiny_llava(model)
    weights.mkdir()
    for name in ("config.json", "model.safetensors"):
        (weights / name).write_bytes((model / name).read_bytes())
    convert(Job(source=weights, name="weights", destination=tmp_path / "w", tokenizer_path=model))
    check_same_sight(tmp_path / "w", model)


def test_gguf_is_refused(tmp_path: Path) -> None:
    tiny_llava(tmp_path / "model")
    workspace, _ = to_workspace(tmp_path / "model")
    with pytest.raises(ConfigError, match="takes pictures, and a GGUF file holds a language model alone; `--to hf`"):
        export_gguf(workspace, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_damage_of_what_it_sees_with_is_found(tmp_path: Path) -> None:
    tiny_llava(tmp_path / "model")
    workspace, _ = to_workspace(tmp_path / "model")
    file = workspace / "weights-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1  # the newline is written last
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"the bytes of vision\.\w+.* are not those that were written"):
        inspect(workspace)


@pytest.mark.parametrize("damage", ["weight", "names", "tower"])
def test_a_manifest_that_says_too_little(damage: str, tmp_path: Path) -> None:
    tiny_llava(tmp_path / "model", original=True)
    workspace, _ = to_workspace(tmp_path / "model")
    manifest = json_of(workspace / "lmtool.json")
    if damage == "weight":
        del manifest["weights"]["vision.tower.pre_layrnorm.bias"]
    elif damage == "names":
        del manifest["names"]["tower."]
    else:
        del manifest["config"]["vision_config"]
        manifest["config"]["mm_vision_tower"] = "./other"
    (workspace / "lmtool.json").write_text(json.dumps(manifest))
    said = {"weight": "1 tensors are missing", "names": "does not say what it sees with", "tower": "does not say what"}
    with pytest.raises(CheckpointError, match=said[damage]):
        open_checkpoint(workspace)


def test_a_text_model_s_manifest_is_as_it_was(tmp_path: Path) -> None:
    """Version 1: any older lmtool reads it."""
    workspace, made = to_workspace(tiny_folder(tmp_path / "model"))
    assert made.manifest.format_version == 1
    assert made.manifest.names == {}
    assert Workspace(workspace).vision is None


# ------------------------------------------------------------------ commands that read text alone


def test_kv_qparams_and_eval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def lmtool(*words: object) -> None:
        assert cli.main([str(word) for word in words]) == 0, capsys.readouterr().err

    model, work, text = tmp_path / "model", tmp_path / "work", text_file(tmp_path / "text.txt")
    tiny_llava(model)
    workspace, _ = to_workspace(model)
    flags = ("--calib-dataset", text, "--calib-samples", 2, "--calib-seqlen", 32, "--device", "cpu")
    lmtool("lite", "calibrate", model, "--work-dir", work, *flags)
    lmtool("lite", "kv_qparams", "--work-dir", work, "--turbomind-dir", workspace)
    assert (workspace / "kv_cache.safetensors").exists()
    evaluation = ("--text", text, "--windows", "1", "--window-len", "32", "--device", "cpu", "--json", "-")
    capsys.readouterr()
    lmtool("lite", "eval", model, "--against", workspace, *evaluation)
    assert abs(json.loads(capsys.readouterr().out)["kl"]["value"]) < 1e-6
