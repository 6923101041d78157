"""The four ways in which files name the tensors of one LLaVA, and a tower that lies elsewhere."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny_llava import tiny_llava

# as transformers' model of today names it in memory → as each form does; the longest beginning counts
FORMS: dict[str, dict[str, str]] = {
    "hub": {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.image_newline": "image_newline",
    },
    "transformers 5": {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.image_newline": "image_newline",
    },
    "transformers 4.52": {"model.vision_tower.": "model.vision_tower.vision_model."},
    "original": {
        "model.language_model.": "model.",
        "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
        "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
        "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
    },
}


def in_form(name: str, form: str) -> str:
    """transformers' name of today → the form's."""
    for ours, theirs in FORMS[form].items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def llava_in_form(folder: Path, form: str, **settings: Any) -> Any:
    """`tiny_llava` whose file has the form's names; transformers' model of it."""
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_llava(folder, original=form == "original", **settings)
    dtype = settings.get("dtype", torch.float32)
    named = {in_form(name, form): tensor.to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    save_file(named, folder / "model.safetensors")
    return model


def move_tower_out(model: Path, tower: Path) -> dict[str, Tensor]:
    """As an original LLaVA 1.5 lies on the hub: the tower is a CLIP model's folder; what was moved, by CLIP's names."""
    config = json.loads((model / "config.json").read_text())
    tensors = load_file(model / "model.safetensors")
    beginning = "model.vision_tower.vision_tower."
    moved = {name.removeprefix(beginning): tensors.pop(name) for name in list(tensors) if name.startswith(beginning)}
    save_file(tensors, model / "model.safetensors")
    clip = {"model_type": "clip", "vision_config": config.pop("vision_config"), "text_config": {"vocab_size": 9}}
    (model / "config.json").write_text(json.dumps(config))
    tower.mkdir(parents=True)
    (tower / "config.json").write_text(json.dumps(clip))
    others = {"text_model.final_layer_norm.weight": torch.ones(4), "logit_scale": torch.ones(())}
    positions = {"vision_model.embeddings.position_ids": torch.arange(17)[None]}
    save_file(moved | others | positions, tower / "model.safetensors")
    return moved
