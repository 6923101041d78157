"""A LLaVA's checkpoint in its two parts: every form of names, every setting, and one clear line for damage."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmtool.checkpoint.formats import open_checkpoint
from lmtool.checkpoint.llava_config import KNOWN_TOWERS, LANGUAGE_DEFAULTS, TOWER_DEFAULTS, language_config
from lmtool.checkpoint.vision import VisionPart
from lmtool.errors import CheckpointError
from lmtool.models.config import ModelConfig, Reader
from lmtool.models.loader import load_decoder, read_model_config
from lmtool.models.registry import family
from tests.checkpoint.llava_forms import FORMS, llava_in_form, move_tower_out
from tests.support import all_logits
from tests.tiny_llava import tiny_llava


def vision_of(folder: Path) -> VisionPart:
    vision = open_checkpoint(folder).vision
    assert vision is not None
    return vision


def our_name(name: str) -> str:
    """transformers' name of a parameter → ours."""
    name = name.removeprefix("model.").replace("vision_tower.", "tower.").replace("vision_model.", "")
    name = name.replace("multi_modal_projector.", "projector.").replace("image_newline", "newline")
    return name.replace("language_model.", "model.")


@pytest.mark.parametrize("anyres", [True, False], ids=["1.6", "1.5"])
@pytest.mark.parametrize("form", FORMS)
def test_both_parts_are_transformers_s_bit_by_bit(form: str, anyres: bool, tmp_path: Path) -> None:
    model = llava_in_form(tmp_path, form, anyres=anyres, dtype=torch.float16)
    checkpoint, vision = open_checkpoint(tmp_path), vision_of(tmp_path)
    expected = {our_name(name): tensor for name, tensor in model.state_dict().items()}
    assert {*checkpoint.names(), *vision.names()} == expected.keys()
    for name in checkpoint.names():
        assert name.startswith(("model.", "lm_head."))
        assert torch.equal(checkpoint.tensor(name).float(), expected[name]), name
    for name in vision.names():
        stored = vision.stored(name)
        assert stored is not None
        assert vision.dtype(name) == "float16"
        assert vision.shape(name) == tuple(expected[name].shape)
        assert torch.equal(vision.tensor(name).float(), expected[name]), name
        assert torch.equal(stored.read().float(), expected[name]), name
    assert ("newline" in vision.names()) == anyres
    named = {vision.form.stored(name) for name in (*checkpoint.names(), *vision.names())}
    assert named == load_file(tmp_path / "model.safetensors").keys()


@pytest.mark.parametrize("backbone", ["llama", "mistral"])
@pytest.mark.parametrize("original", [False, True], ids=["hub", "original"])
def test_the_language_model_runs_alone(original: bool, backbone: Any, tmp_path: Path) -> None:
    model = tiny_llava(tmp_path, original=original, backbone=backbone)
    checkpoint = open_checkpoint(tmp_path)
    config = read_model_config(checkpoint.config)
    assert config.architecture == {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}[backbone]
    assert config.dtype == "float32"
    ids = [5, 9, 200, 31, 7]
    decoder = load_decoder(checkpoint, config, dtype=torch.float32, device=torch.device("cpu"), num_positions=len(ids))
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([ids])).logits[0]
    torch.testing.assert_close(all_logits(decoder, ids), expected)


def test_what_lies_between_tower_and_language_model(tmp_path: Path) -> None:
    for original in (False, True):
        tiny_llava(tmp_path / f"next{original}", original=original)
        tiny_llava(tmp_path / f"plain{original}", original=original, anyres=False)
        found = vision_of(tmp_path / f"next{original}")
        assert (found.settings.has_newline, found.feature_layer) == (True, -2)
        assert (found.tower_config["image_size"], found.tower_config["patch_size"]) == (28, 7)
        plain = vision_of(tmp_path / f"plain{original}")
        assert not plain.settings.has_newline
        assert plain.config == json.loads((tmp_path / f"plain{original}" / "config.json").read_text())
        assert plain.num_parameters == sum(plain.tensor(name).numel() for name in plain.names())


# ------------------------------------------------------------------ what config.json leaves out


@pytest.mark.parametrize("kind", LANGUAGE_DEFAULTS)
def test_keys_that_are_left_out_are_transformers_s(kind: str) -> None:
    from transformers import CONFIG_MAPPING, CLIPVisionConfig, LlavaConfig

    def read(config: dict[str, Any]) -> ModelConfig:
        found: ModelConfig = family(config).read_config(Reader(config))
        return found

    whole = {"architectures": ["LlavaForConditionalGeneration"], "text_config": {"model_type": kind}}
    ours, theirs = language_config(whole), CONFIG_MAPPING[kind]().to_dict()
    assert read(ours) == read(theirs | {"architectures": ours["architectures"], "dtype": None})
    assert {key: theirs[key] for key in LANGUAGE_DEFAULTS[kind]} == LANGUAGE_DEFAULTS[kind]
    assert LlavaConfig(text_config={"model_type": kind}).tie_word_embeddings == ours["tie_word_embeddings"]
    tower = CLIPVisionConfig().to_dict()
    assert {key: tower[key] for key in TOWER_DEFAULTS} == TOWER_DEFAULTS
    known = LlavaConfig().vision_config.to_dict()
    assert {key: known[key] for key in TOWER_DEFAULTS} == KNOWN_TOWERS["clip-vit-large-patch14-336"]


def test_the_config_of_llava_hf_s_1_5() -> None:
    """Its text_config says hardly anything; of dtype the outer table says it."""
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "torch_dtype": "float16",
        "text_config": {
            "_name_or_path": "lmsys/vicuna-7b-v1.5",
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "rms_norm_eps": 1e-05,
            "torch_dtype": "bfloat16",
            "vocab_size": 32064,
        },
    }
    model = read_model_config(language_config(config))
    assert (model.num_layers, model.hidden_size, model.intermediate_size, model.head_dim) == (32, 4096, 11008, 128)
    assert (model.num_kv_heads, model.vocab_size, model.max_positions) == (32, 32064, 4096)
    assert (model.rms_norm_eps, model.dtype, model.tie_word_embeddings) == (1e-5, "float16", False)


@pytest.mark.parametrize(("text", "window"), [({}, 4096), ({"sliding_window": None}, 0), ({"sliding_window": 7}, 7)])
def test_mistral_s_window_is_there_unless_null_is_said(text: dict[str, Any], window: int) -> None:
    whole = {"architectures": ["LlavaNextForConditionalGeneration"], "text_config": {"model_type": "mistral"} | text}
    model = read_model_config(language_config(whole))
    assert (model.sliding_window, model.num_kv_heads, model.intermediate_size) == (window, 8, 14336)


@pytest.mark.parametrize("place", ["outer", "inner"])
def test_quantization_may_be_said_at_either_level(place: str) -> None:
    said = {"quant_method": "awq"}
    inner = {"model_type": "llama"} | ({"quantization_config": said} if place == "inner" else {})
    whole = {"architectures": ["LlavaForConditionalGeneration"], "text_config": inner}
    whole |= {"quantization_config": said if place == "outer" else None}
    assert language_config(whole)["quantization_config"] == said
    assert "quantization_config" not in language_config({**whole, "quantization_config": None, "text_config": {}})


# ------------------------------------------------------------------ a tower that lies elsewhere


@pytest.mark.parametrize("place", ["inside", "beside", "folder", "cache"])
def test_an_original_1_5_finds_its_tower(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "models/llava"
    llava_in_form(model, "original", anyres=False)
    expected = {name: vision_of(model).tensor(name) for name in vision_of(model).names()}
    cache = tmp_path / "hub"
    name = "clip-vit-large-patch14-336"
    folders = {
        "inside": model / name,
        "beside": model.parent / name,
        "folder": tmp_path / "elsewhere" / name,
        "cache": cache / "models--openai--clip-vit-large-patch14-336/snapshots/0123456789",
    }
    move_tower_out(model, folders[place])
    if place == "folder":
        set_key(model, "mm_vision_tower", str(folders[place]))
    if place == "cache":
        refs = folders[place].parents[1] / "refs"
        refs.mkdir()
        (refs / "main").write_text("0123456789")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    vision = vision_of(model)
    assert vision.tower_path == folders[place]
    assert set(vision.names()) == set(expected)
    for name in vision.names():
        assert torch.equal(vision.tensor(name), expected[name])
    assert vision.tower_config["hidden_size"] == 32
    assert vision.form.stored("tower.pre_layrnorm.bias").startswith("model.vision_tower.vision_tower.vision_model.pre")


def test_a_tower_that_is_nowhere(tmp_path: Path) -> None:
    model = tmp_path / "model"
    llava_in_form(model, "original", anyres=False)
    move_tower_out(model, tmp_path / "far/away")
    message = refused(model)
    assert "needs the vision tower openai/clip-vit-large-patch14-336, which is not on this machine; download" in message
    assert "`hf download openai/clip-vit-large-patch14-336`" in message
    assert open_checkpoint(model, tower=tmp_path / "far/away").vision is not None
    set_key(model, "mm_vision_tower", "./checkpoints/my-clip")
    assert "put that folder beside the model as my-clip or give the model's llava-hf form" in refused(model)
    set_key(model, "mm_vision_tower", "/")
    assert "needs the vision tower /, which is not on this machine" in refused(model)
    set_key(model, "mm_vision_tower", "./checkpoints/my-clip")
    pickled = model / "my-clip"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").touch()
    assert "has no *.safetensors, only pickled weights; lmtool convert --allow-bin the model or give" in refused(model)


# ------------------------------------------------------------------ damage


def set_key(folder: Path, key: str, value: Any, table: str | None = None) -> None:
    config = json.loads((folder / "config.json").read_text())
    (config[table] if table else config)[key] = value
    (folder / "config.json").write_text(json.dumps(config))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("key", "value", "table", "message"),
    [
        ("vision_feature_layer", [-2, -5], None, "vision_feature_layer is [-2, -5]; lmtool takes the features of one"),
        ("vision_feature_layer", -9, None, "features of layer -9, the vision tower has 3"),
        ("projector_hidden_act", "relu", None, "projector_hidden_act is 'relu'"),
        (
            "model_type",
            "siglip_vision_model",
            "vision_config",
            "vision_config is of type 'siglip_vision_model'; lmtool",
        ),
        ("image_size", "big", "vision_config", "vision_config: image_size is 'big'"),
        ("image_size", 35, "vision_config", "position_embedding.weight is [17, 32], not [26, 32]"),
        ("num_hidden_layers", 2, "vision_config", "16 are unexpected (vision_tower.encoder.layers.2"),
        ("model_type", "gemma", "text_config", "the language model is of type 'gemma'; supported: llama, mistral"),
        ("num_hidden_layers", 10**9, "vision_config", "num_hidden_layers is 1000000000; the file is damaged"),
        ("model_type", ["llama"], "text_config", "the language model is of type ['llama']; supported: llama, mistral"),
        ("text_config", 3, None, "text_config is 3; a table is expected"),
    ],
)
def test_settings_that_cannot_run_are_named(
    key: str, value: Any, table: str | None, message: str, tmp_path: Path
) -> None:
    tiny_llava(tmp_path)
    set_key(tmp_path, key, value, table)
    assert message in refused(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("mm_projector_type", "linear", "mm_projector_type is 'linear'; lmtool runs LLaVA 1.5 and 1.6"),
        ("mm_patch_merge_type", "spatial", "mm_patch_merge_type is 'spatial'"),
        ("mm_patch_merge_type", "flat", "1 are unexpected (model.image_newline)"),
        ("mm_vision_tower", None, "mm_vision_tower is None"),
        ("vision_config", None, "are missing (model.vision_tower.vision_tower.vision_model.encoder.layers.10."),
    ],
)
def test_settings_of_the_original_form_are_named(key: str, value: Any, message: str, tmp_path: Path) -> None:
    tiny_llava(tmp_path, original=True)
    set_key(tmp_path, key, value)
    assert message in refused(tmp_path)


def test_a_tower_of_no_known_shape(tmp_path: Path) -> None:
    tiny_llava(tmp_path, original=True)
    set_key(tmp_path, "vision_config", None)
    set_key(tmp_path, "mm_vision_tower", "./my-clip")
    assert "does not say what shape its vision tower has; add vision_config" in refused(tmp_path)


def test_tensors_that_are_missing_or_too_many_are_named_as_the_file_does(tmp_path: Path) -> None:
    tiny_llava(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop("vision_tower.pre_layrnorm.bias"))
    assert "1 tensors are missing (vision_tower.pre_layrnorm.bias)" in refused(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"multi_modal_projector.linear_2.more": torch.ones(1)}))
    assert "missing (vision_tower.pre_layrnorm.bias) and 1 are unexpected (multi_modal_projector.linear_2.more)" in (
        refused(tmp_path)
    )


def test_a_file_without_a_tower(tmp_path: Path) -> None:
    tiny_llava(tmp_path)
    rewrite(tmp_path, lambda t: [t.pop(name) for name in list(t) if name.startswith("vision_tower")])
    assert "holds no vision tower" in refused(tmp_path)


def test_two_forms_of_names_in_one(tmp_path: Path) -> None:
    tiny_llava(tmp_path)
    name = "vision_tower.pre_layrnorm.bias"
    rewrite(tmp_path, lambda t: t.update({f"model.{name}": t.pop(name)}))
    assert "names its tensors in two ways: " in refused(tmp_path)


def test_strays_are_the_language_model_s_to_refuse(tmp_path: Path) -> None:
    tiny_llava(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"something.else": torch.ones(1)}))
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"1 are unexpected \(something\.else\)"):
        load_decoder(
            checkpoint,
            read_model_config(checkpoint.config),
            dtype=torch.float32,
            device=torch.device("cpu"),
            num_positions=4,
        )


def test_position_ids_of_older_files_are_nobody_s(tmp_path: Path) -> None:
    tiny_llava(tmp_path)
    positions = {"vision_tower.embeddings.position_ids": torch.arange(17)[None]}
    rewrite(tmp_path, lambda tensors: tensors.update(positions))
    assert not any("position_ids" in name for name in vision_of(tmp_path).names())


def test_an_unknown_architecture_is_told_of_these() -> None:
    with pytest.raises(CheckpointError, match=r"LlavaLlamaForCausalLM, .*LlavaNextForConditionalGeneration"):
        family({"architectures": ["LlavaQwenForCausalLM"]})
