"""Tiny random LLaVA checkpoints in both forms that are out there, and transformers' model of the same weights."""

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken

from tests.tokenizer_files import byte_level_json, folder_with

TILE = 28
PATCH = 7
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]
Backbone = Literal["llama", "mistral"]
# pictures of a message first, then its texts: as llava-hf's templates do
TEMPLATE = (
    "{% for message in messages %}{{ message.role.upper() + ': ' }}"
    "{% for part in message.content if part.type == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}{{ part.text + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def tiny_llava(
    folder: Path,
    *,
    anyres: bool = True,
    original: bool = False,
    backbone: Backbone = "llama",
    dtype: torch.dtype = torch.float32,
    hidden_size: int = 64,
) -> Any:
    """Fill ``folder``; returns transformers' model (float32, eval) of the same weights.

    anyres: LLaVA 1.6 (tiles), else 1.5. original: as liuhaotian's checkpoints are, else as llava-hf's.
    """
    model = _model(anyres, backbone, hidden_size).to(dtype)
    library = byte_level_json()
    if not original:
        library.add_special_tokens([AddedToken("<image>", special=True)])
    assert library.get_vocab_size() <= model.config.text_config.vocab_size
    if original:
        _write_original(folder, model, anyres)
    else:
        model.save_pretrained(folder)
        folder_with(folder, {"preprocessor_config.json": _preprocessor(anyres)})
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    settings = {"eos_token": "<|im_end|>", "bos_token": "<|begin|>"}
    folder_with(folder, {"tokenizer.json": library.to_str().encode(), "tokenizer_config.json": settings})
    return model.float().eval()


def _model(anyres: bool, backbone: Backbone, hidden_size: int) -> Any:
    import transformers as hf

    text = {"llama": hf.LlamaConfig, "mistral": hf.MistralConfig}[backbone](
        vocab_size=448,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    if backbone == "mistral":
        text.sliding_window = None
    vision = hf.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=TILE,
        patch_size=PATCH,
        projection_dim=16,
    )
    torch.manual_seed(0)
    image_id = byte_level_json().get_vocab_size()
    if anyres:
        config = hf.LlavaNextConfig(
            vision_config=vision, text_config=text, image_token_index=image_id, image_grid_pinpoints=PINPOINTS
        )
        model: Any = hf.LlavaNextForConditionalGeneration(config)
    else:
        model = hf.LlavaForConditionalGeneration(
            hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_id)
        )
    with torch.no_grad():  # transformers' own are so small that every picture looks alike
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.12)
            elif "norm" not in name:
                weight.normal_(0, 0.05)
    return model


def _preprocessor(anyres: bool) -> dict[str, Any]:
    more = {"image_grid_pinpoints": PINPOINTS, "do_pad": True} if anyres else {}
    return {
        "image_processor_type": "LlavaNextImageProcessor" if anyres else "CLIPImageProcessor",
        "crop_size": {"height": TILE, "width": TILE},
        "size": {"shortest_edge": TILE},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": MEAN,
        "image_std": STD,
        "resample": 3,
        "rescale_factor": 1 / 255,
        **more,
    }


def _write_original(folder: Path, model: Any, anyres: bool) -> None:
    """As liuhaotian/llava-v1.6-vicuna-7b lies on the hub: one flat config, the tower under the model."""
    text, vision = model.config.text_config, model.config.vision_config
    mistral = text.model_type == "mistral"
    config = {
        key: value
        for key, value in text.to_dict().items()
        if key not in ("architectures", "model_type", "dtype", "transformers_version")
    }
    config |= {
        "architectures": ["LlavaMistralForCausalLM" if mistral else "LlavaLlamaForCausalLM"],
        "model_type": "llava_mistral" if mistral else "llava",
        "torch_dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_hidden_size": vision.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "anyres" if anyres else "pad",
        "mm_patch_merge_type": "spatial_unpad" if anyres else "flat",
        # the hub's tower has the shape that its name says; one of another shape says so itself
        "vision_config": vision.to_dict(),
    }
    if anyres:
        config["image_grid_pinpoints"] = PINPOINTS
    folder_with(folder, {"config.json": config})
    save_file({_original_name(k): v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")


def _original_name(name: str) -> str:
    """transformers' name of a parameter → LLaVA's own."""
    name = name.removeprefix("model.")
    if name.startswith("language_model."):
        return "model." + name.removeprefix("language_model.")
    if name.startswith("vision_tower."):
        return "model.vision_tower.vision_tower.vision_model." + name.removeprefix("vision_tower.").removeprefix(
            "vision_model."
        )
    if name.startswith("multi_modal_projector."):
        return name.replace("multi_modal_projector.linear_1", "model.mm_projector.0").replace(
            "multi_modal_projector.linear_2", "model.mm_projector.2"
        )
    return "model.image_newline" if name == "image_newline" else name
