"""LLaVA's configuration files, of both kinds of checkpoints, as a `LlavaForm`.

What they ask for and `LlavaForm` does not do is refused by name.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmtool.errors import CheckpointError
from lmtool.images.llava import Fit, LlavaForm

OF_TRANSFORMERS = ("LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration")
ORIGINALS = ("LlavaLlamaForCausalLM", "LlavaMistralForCausalLM")
# the towers that originals name, by the last word: (tile_size, patch_size) in pixels
TOWERS = {"clip-vit-large-patch14-336": (336, 14), "clip-vit-large-patch14": (224, 14)}
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
LONGEST_SIDE = 4096  # pixels of a tile or a grid: beyond it a file is damaged, and a picture would take gigabytes
BICUBIC = 3  # Pillow's number
# transformers' defaults
NEXT_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
CLIP_TILE, CLIP_PATCH = 224, 32
_TAKE_ANOTHER = "take another checkpoint of this model"


def of_transformers(folder: Path, config: Mapping[str, Any], processor: Mapping[str, Any]) -> LlavaForm:
    """As llava-hf's. processor: preprocessor_config.json, or the image_processor of processor_config.json."""
    is_next = config["architectures"][0].startswith("LlavaNext")
    known = ("LlavaNextImageProcessor",) if is_next else ("CLIPImageProcessor", "LlavaImageProcessor")
    kind = _processor_kind(processor, known[0])
    _only(folder, "image_processor_type", kind, *known)
    tile, patch = _tower(folder, config.get("vision_config") or {"image_size": 336, "patch_size": 14})
    _check_processor(folder, processor, tile)
    size = processor.get("size")
    strategy = config.get("vision_feature_select_strategy", "default")
    _only(folder, "vision_feature_select_strategy", strategy, "default", *(() if is_next else ("full",)))
    fit: Fit = "crop" if not isinstance(size, dict) or "shortest_edge" in size else "stretch"
    pinpoints: tuple[tuple[int, int], ...] = ()
    if is_next:
        fit, pinpoints = "anyres", _pinpoints_of_both(folder, config, processor, tile)
    elif kind == "LlavaImageProcessor" and processor.get("do_pad"):
        fit = "pad"
    return LlavaForm(
        fit=fit,
        tile_size=tile,
        patch_size=patch,
        mean=_channels(folder, "image_mean", processor.get("image_mean", CLIP_MEAN)),
        std=_channels(folder, "image_std", processor.get("image_std", CLIP_STD)),
        pinpoints=pinpoints,
        keeps_class_token=strategy == "full",
    )


def of_original(folder: Path, config: Mapping[str, Any], processor: Mapping[str, Any]) -> LlavaForm:
    """As liuhaotian's: one flat config.json. processor: the tower's preprocessor_config.json; {}: as all CLIPs have.

    Its grids are read as transformers reads them, height first. LLaVA's own code reads width first, which chooses
    another grid only for a picture that fits into one tile: both forms of a model shall give one answer.
    """
    said = config.get("vision_config")
    name = str(config.get("mm_vision_tower")).rstrip("/").rpartition("/")[2]
    if said is None and name not in TOWERS:
        _only(folder, "mm_vision_tower", name, *TOWERS)
    tile, patch = TOWERS[name] if said is None else _tower(folder, said)
    if processor:
        _check_processor(folder, processor, tile)
    ratio = config.get("image_aspect_ratio") or "square"
    _only(folder, "image_aspect_ratio", ratio, "square", "pad", "anyres")
    feature = config.get("mm_vision_select_feature", "patch")
    _only(folder, "mm_use_im_start_end", config.get("mm_use_im_start_end", False), False)
    _only(folder, "mm_vision_select_feature", feature, "patch", *(() if ratio == "anyres" else ("cls_patch",)))
    pinpoints: tuple[tuple[int, int], ...] = ()
    if ratio == "anyres":
        _only(folder, "mm_patch_merge_type", config.get("mm_patch_merge_type", "flat"), "spatial_unpad")
        pinpoints = _pinpoints(folder, config.get("image_grid_pinpoints"), tile)
    fits: dict[str, Fit] = {"square": "crop", "pad": "pad", "anyres": "anyres"}
    return LlavaForm(
        fit=fits[ratio],
        tile_size=tile,
        patch_size=patch,
        mean=_channels(folder, "image_mean", processor.get("image_mean", CLIP_MEAN)),
        std=_channels(folder, "image_std", processor.get("image_std", CLIP_STD)),
        pinpoints=pinpoints,
        keeps_class_token=feature == "cls_patch",
    )


def _processor_kind(processor: Mapping[str, Any], default: str) -> str:
    """Older files call processors feature extractors, and some say nothing: then it is the model's own, as in
    transformers."""
    named = processor.get("image_processor_type") or processor.get("feature_extractor_type") or default
    return str(named).replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")


def _only(folder: Path, key: str, value: Any, *known: Any) -> None:
    if value not in known:
        raise CheckpointError(
            f"{folder}: {key} is {value!r}, pictures are prepared with {' or '.join(map(repr, known))} only",
            _TAKE_ANOTHER,
        )


def _check_processor(folder: Path, processor: Mapping[str, Any], tile: int) -> None:
    for key in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
        _only(folder, key, processor.get(key, True), True)
    _only(folder, "resample", processor.get("resample", BICUBIC), BICUBIC)
    factor = processor.get("rescale_factor", 1 / 255)
    _only(folder, "rescale_factor", round(255 * factor, 6) if isinstance(factor, int | float) else factor, 1.0)
    _only(folder, "crop_size", _side(processor.get("crop_size", CLIP_TILE)), tile)
    _only(folder, "size", _side(processor.get("size", CLIP_TILE)), tile)


def _tower(folder: Path, vision: Any) -> tuple[int, int]:
    """(tile_size, patch_size) of a vision_config."""
    if not isinstance(vision, dict):
        raise CheckpointError(f"{folder}: vision_config is {vision!r}, no object", "download config.json again")
    _only(folder, "vision_config.model_type", vision.get("model_type", "clip_vision_model"), "clip_vision_model")
    tile, patch = vision.get("image_size", CLIP_TILE), vision.get("patch_size", CLIP_PATCH)
    if not (_is_side(tile) and _is_side(patch) and tile >= patch):
        raise CheckpointError(f"{folder}: tiles of {tile!r} pixels in patches of {patch!r}", _TAKE_ANOTHER)
    return tile, patch


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LONGEST_SIDE


def _side(size: Any) -> Any:
    """336 of 336, {"shortest_edge": 336} or {"height": 336, "width": 336}; anything else as it is."""
    if isinstance(size, dict):
        values = set(size.values())
        if set(size) in ({"shortest_edge"}, {"height", "width"}) and len(values) == 1:
            return next(iter(values))
    return size


def _channels(folder: Path, key: str, value: Any) -> tuple[float, float, float]:
    if isinstance(value, list | tuple) and len(value) == 3 and all(isinstance(one, int | float) for one in value):
        red, green, blue = map(float, value)
        if key != "image_std" or min(red, green, blue) > 0:
            return red, green, blue
    raise CheckpointError(f"{folder}: {key} is {value!r}, no three numbers", "download preprocessor_config.json again")


def _pinpoints_of_both(
    folder: Path, config: Mapping[str, Any], processor: Mapping[str, Any], tile: int
) -> tuple[tuple[int, int], ...]:
    said = [
        _pinpoints(folder, one["image_grid_pinpoints"], tile)
        for one in (config, processor)
        if one.get("image_grid_pinpoints") is not None
    ]
    if len(set(said)) > 1:
        raise CheckpointError(
            f"{folder}: config.json and the processor's file have other image_grid_pinpoints", "download both again"
        )
    return said[0] if said else _pinpoints(folder, NEXT_PINPOINTS, tile)


def _pinpoints(folder: Path, value: Any, tile: int) -> tuple[tuple[int, int], ...]:
    """A list of pairs, or its text in Python's or JSON's spelling."""
    said = value
    if isinstance(value, str):
        try:
            value = json.loads(value.replace("(", "[").replace(")", "]"))
        except ValueError:
            value = None
    pairs = [tuple(pair) for pair in value if isinstance(pair, list | tuple)] if isinstance(value, list | tuple) else []
    whole = [p for p in pairs if len(p) == 2 and all(_is_side(side) and side % tile == 0 for side in p)]
    if not whole or len(whole) != len(value):
        raise CheckpointError(
            f"{folder}: image_grid_pinpoints is {said!r}, no pairs of multiples of {tile}", _TAKE_ANOTHER
        )
    return tuple(whole)
