"""Pictures become the very pixels that transformers' processors make, and as many rows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import unpad_image
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from lmtool.errors import CheckpointError, RequestError
from lmtool.images.form import ImageForm, read_image_form
from lmtool.images.llava import LlavaForm, grid_rows
from lmtool.images.prepared import PreparedImage
from tests.tiny_llava import MEAN, PATCH, PINPOINTS, STD, TILE, tiny_llava
from tests.tokenizer_files import folder_with

SIZES = [(1, 1), (1, 500), (500, 1), (28, 28), (30, 200), (640, 480), (333, 777), (5000, 40), (40, 5000), (56, 84)]
sides = st.integers(1, 400)
# the same examples on every machine, however slow it is
# as they lie in llava-hf/llava-v1.6-vicuna-7b-hf
REAL_GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
REAL = {
    "crop_size": {"height": 336, "width": 336},
    "size": {"shortest_edge": 336},
    "image_mean": MEAN,
    "image_std": STD,
    "resample": 3,
    "do_resize": True,
    "do_center_crop": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "rescale_factor": 0.00392156862745098,
}
TINY = REAL | {"crop_size": {"height": TILE, "width": TILE}, "size": {"shortest_edge": TILE}}


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * 7919 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def normalized(prepared: PreparedImage, form: ImageForm) -> torch.Tensor:
    """[num_tiles, 3, tile_size, tile_size], as a tower takes it."""
    shape = (prepared.num_tiles, prepared.tile_size, prepared.tile_size, 3)
    pixels = np.frombuffer(prepared.pixels, dtype=np.uint8).reshape(shape)
    values = (pixels / 255 - np.array(form.mean)) / np.array(form.std)
    return torch.tensor(values.transpose(0, 3, 1, 2), dtype=torch.float32)


def form_of(folder: Path, config: dict[str, Any], processor: dict[str, Any] | None = None) -> LlavaForm:
    files = {"config.json": config} | ({} if processor is None else {"preprocessor_config.json": processor})
    form = read_image_form(folder_with(folder, files))
    assert isinstance(form, LlavaForm)
    return form


def hf_config(*, anyres: bool, tile: int = TILE, patch: int = PATCH, **more: Any) -> dict[str, Any]:
    name = "LlavaNextForConditionalGeneration" if anyres else "LlavaForConditionalGeneration"
    vision = {"model_type": "clip_vision_model", "image_size": tile, "patch_size": patch}
    return {"architectures": [name], "vision_config": vision, **more}


def original_config(**more: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": REAL_GRIDS,
        "mm_patch_merge_type": "spatial_unpad",
        "mm_vision_select_feature": "patch",
    } | more


def check_pixels(form: LlavaForm, processor: Any, width: int, height: int) -> PreparedImage:
    image = picture(width, height)
    prepared = form.prepare(image)
    expected = processor(image, return_tensors="pt")["pixel_values"].reshape(-1, 3, form.tile_size, form.tile_size)
    torch.testing.assert_close(normalized(prepared, form), expected.float())
    assert prepared.size == (height, width)
    assert prepared.num_tokens == form.num_tokens((height, width))
    return prepared


def hf_rows(processor: Any, patch: int, height: int, width: int, tile: int) -> int:
    counter = object.__new__(LlavaNextProcessor)  # its arithmetic needs neither a tokenizer nor files
    counter.image_processor, counter.patch_size, counter.num_additional_image_tokens = processor, patch, 1
    return counter._get_number_of_features(height, width, tile, tile) - 1


KINDS = {
    "clip": (CLIPImageProcessorPil, {"image_processor_type": "CLIPImageProcessor"}),
    "stretch": (
        CLIPImageProcessorPil,
        {"image_processor_type": "CLIPImageProcessor", "size": {"height": TILE, "width": TILE}},
    ),
    "llava": (LlavaImageProcessorPil, {"image_processor_type": "LlavaImageProcessorFast", "do_pad": False}),
    "pad": (LlavaImageProcessorPil, {"image_processor_type": "LlavaImageProcessor", "do_pad": True}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_one_tile(tmp_path: Path, kind: str, width: int, height: int) -> None:
    library, more = KINDS[kind]
    form = form_of(tmp_path, hf_config(anyres=False), TINY | more)
    prepared = check_pixels(form, library(**TINY | more), width, height)
    assert prepared.num_tiles == 1
    assert prepared.num_tokens == (TILE // PATCH) ** 2


@settings(max_examples=60)
@given(width=sides, height=sides, pad=st.booleans())
def test_one_tile_of_any_size(width: int, height: int, pad: bool) -> None:
    form = LlavaForm(fit="pad" if pad else "crop", tile_size=TILE, patch_size=PATCH, mean=tuple(MEAN), std=tuple(STD))
    check_pixels(form, LlavaImageProcessorPil(**TINY | {"do_pad": pad}), width, height)


def check_any_resolution(form: LlavaForm, processor: Any, width: int, height: int) -> None:
    prepared = check_pixels(form, processor, width, height)
    assert prepared.num_tokens == hf_rows(processor, form.patch_size, height, width, form.tile_size)
    rows = form.grid_rows((height, width))
    per_tile = form.tile_size // form.patch_size
    shape = (rows.tile_rows * per_tile, rows.tile_columns * per_tile)
    patches = torch.arange(shape[0] * shape[1]).reshape(1, *shape)
    kept = patches[
        :,
        rows.first_row : rows.first_row + rows.num_rows,
        rows.first_column : rows.first_column + rows.num_columns,
    ]
    torch.testing.assert_close(kept, unpad_image(patches, (height, width)))
    assert prepared.num_tiles == 1 + rows.tile_rows * rows.tile_columns


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_any_resolution(tmp_path: Path, width: int, height: int) -> None:
    more = {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": PINPOINTS}
    form = form_of(tmp_path, hf_config(anyres=True), TINY | more)
    check_any_resolution(form, LlavaNextImageProcessorPil(**TINY | more), width, height)


@settings(max_examples=100)
@given(width=sides, height=sides)
def test_any_resolution_of_any_size(width: int, height: int) -> None:
    form = LlavaForm(
        fit="anyres",
        tile_size=TILE,
        patch_size=PATCH,
        mean=tuple(MEAN),
        std=tuple(STD),
        pinpoints=tuple(map(tuple, PINPOINTS)),
    )
    check_any_resolution(form, LlavaNextImageProcessorPil(**TINY, image_grid_pinpoints=PINPOINTS), width, height)


@settings(max_examples=500)
@given(width=st.integers(1, 9000), height=st.integers(1, 9000))
def test_rows_of_the_real_model(width: int, height: int) -> None:
    processor = LlavaNextImageProcessorPil(**REAL, image_grid_pinpoints=REAL_GRIDS)
    rows = grid_rows((height, width), [(h, w) for h, w in REAL_GRIDS], 336, 14)
    assert 24 * 24 + rows.num_tokens == hf_rows(processor, 14, height, width, 336)


def test_the_real_model(tmp_path: Path) -> None:
    more = {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": REAL_GRIDS}
    form = form_of(tmp_path, hf_config(anyres=True, tile=336, patch=14), REAL | more)
    processor = LlavaNextImageProcessorPil(**REAL | more)
    prepared = check_pixels(form, processor, 672, 672)
    assert (prepared.num_tiles, prepared.num_tokens, len(prepared.pixels)) == (5, 2928, 5 * 336 * 336 * 3)
    check_any_resolution(form, processor, 1000, 300)
    original = form_of(tmp_path / "original", original_config())
    assert original == form


def test_any_resolution_without_stated_grids(tmp_path: Path) -> None:
    more = {"image_processor_type": "LlavaNextImageProcessor"}
    form = form_of(tmp_path, hf_config(anyres=True, tile=336, patch=14), REAL | more)
    assert [list(pair) for pair in form.pinpoints] == LlavaNextImageProcessorPil().image_grid_pinpoints


# ------------------------------------------------------------------ names


def test_a_digest_names_picture_and_place() -> None:
    form = LlavaForm(fit="pad", tile_size=TILE, patch_size=PATCH, mean=tuple(MEAN), std=tuple(STD))
    image = picture(30, 40)
    assert form.prepare(image).digest == form.prepare(image.copy()).digest
    other = image.copy()
    other.putpixel((3, 3), tuple(255 - value for value in image.getpixel((3, 3))))
    black, larger = Image.new("RGB", (30, 30)), Image.new("RGB", (60, 60))
    digests = {form.prepare(one).digest for one in (image, other, image.rotate(90, expand=True), black, larger)}
    assert len(digests) == 5  # black squares have equal pixels and are pictures of different sizes
    assert {len(digest) for digest in digests} == {16}


# ------------------------------------------------------------------ where it is read from


@pytest.mark.parametrize("anyres", [False, True])
@pytest.mark.parametrize("original", [False, True])
def test_tiny_checkpoints(tmp_path: Path, anyres: bool, original: bool) -> None:
    tiny_llava(tmp_path, anyres=anyres, original=original)
    form = read_image_form(tmp_path)
    assert isinstance(form, LlavaForm)
    assert (form.tile_size, form.patch_size) == (TILE, PATCH)
    assert form.fit == ("anyres" if anyres else "pad" if original else "crop")
    assert [list(pair) for pair in form.pinpoints] == (PINPOINTS if anyres else [])


def test_a_model_without_pictures(tmp_path: Path) -> None:
    assert read_image_form(folder_with(tmp_path, {"config.json": {"architectures": ["LlamaForCausalLM"]}})) is None
    assert read_image_form(tmp_path / "model.gguf") is None
    assert read_image_form(folder_with(tmp_path / "empty", {})) is None


def test_a_processor_file_goes_first(tmp_path: Path) -> None:
    processor = {"image_processor": TINY | {"image_processor_type": "LlavaImageProcessor", "do_pad": True}}
    folder_with(tmp_path, {"processor_config.json": processor})
    assert form_of(tmp_path, hf_config(anyres=False), TINY | KINDS["clip"][1]).fit == "pad"


@pytest.mark.parametrize("said", [{}, {"feature_extractor_type": "CLIPFeatureExtractor"}])
def test_an_older_processor_file_is_the_model_s_own(tmp_path: Path, said: dict[str, str]) -> None:
    """As OpenAI's CLIP and whoever copied from it have it; transformers takes it, too."""
    older = {key: value for key, value in TINY.items() if key != "image_processor_type"} | said
    crop = {"crop_size": TILE, "size": TILE}
    assert form_of(tmp_path, hf_config(anyres=False), older | crop).fit == "crop"
    if not said:
        assert form_of(tmp_path / "next", hf_config(anyres=True), older | crop).fit == "anyres"


def test_every_row_of_a_tile_is_kept(tmp_path: Path) -> None:
    config = hf_config(anyres=False, vision_feature_select_strategy="full")
    assert form_of(tmp_path, config, TINY | KINDS["clip"][1]).num_tokens((9, 9)) == (TILE // PATCH) ** 2 + 1
    config = original_config(image_aspect_ratio="pad", mm_vision_select_feature="cls_patch")
    assert form_of(tmp_path / "original", config).num_tokens((9, 9)) == 577


@pytest.mark.parametrize(
    ("more", "fit"), [({"image_aspect_ratio": "pad"}, "pad"), ({"image_aspect_ratio": "square"}, "crop")]
)
def test_originals(tmp_path: Path, more: dict[str, Any], fit: str) -> None:
    assert form_of(tmp_path, original_config(**more)).fit == fit
    silent = original_config()
    del silent["image_aspect_ratio"]
    assert form_of(tmp_path, silent).fit == "crop"


@pytest.mark.parametrize("place", ["model/my-clip", "my-clip", "far/away/my-clip"])
def test_an_original_whose_tower_lies_elsewhere(tmp_path: Path, place: str) -> None:
    name = str(tmp_path / "far/away/my-clip/")
    vision = {"model_type": "clip_vision_model", "image_size": TILE, "patch_size": PATCH}
    config = original_config(image_aspect_ratio="pad", mm_vision_tower=name)
    folder_with(tmp_path / place, {"config.json": {"model_type": "clip", "vision_config": vision}})
    form = form_of(tmp_path / "model", config)
    assert (form.tile_size, form.patch_size, form.mean) == (TILE, PATCH, tuple(MEAN))
    folder_with(
        tmp_path / place, {"config.json": vision, "preprocessor_config.json": TINY | {"image_mean": [0, 0.5, 1]}}
    )
    assert form_of(tmp_path / "model", config).mean == (0.0, 0.5, 1.0)
    folder_with(tmp_path / place, {"preprocessor_config.json": TINY | {"do_resize": False}})
    with pytest.raises(CheckpointError, match="do_resize is False"):
        form_of(tmp_path / "model", config)


@pytest.mark.parametrize("name", ["openai/clip-vit-large-patch14", "/models/clip-vit-large-patch14/"])
def test_towers_that_everybody_knows(tmp_path: Path, name: str) -> None:
    form = form_of(tmp_path, original_config(image_aspect_ratio="pad", mm_vision_tower=name))
    assert (form.tile_size, form.patch_size) == (224, 14)


def test_a_workspace_keeps_how_pictures_are_cut(tmp_path: Path) -> None:
    more = {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": PINPOINTS}
    form = form_of(tmp_path / "model", hf_config(anyres=True), TINY | more)
    files = {"lmtool.json": {"config": hf_config(anyres=True)}, "preprocessor_config.json": TINY | more}
    workspace = folder_with(tmp_path / "workspace", files)
    assert read_image_form(workspace) == form
    assert read_image_form(workspace / "triton_models" / "weights") == form


def test_grids_may_be_a_text(tmp_path: Path) -> None:
    text = str([tuple(pair) for pair in REAL_GRIDS])
    assert form_of(tmp_path, original_config(image_grid_pinpoints=text)) == form_of(tmp_path, original_config())


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"image_processor_type": "SiglipImageProcessor"}, "image_processor_type is 'SiglipImageProcessor'"),
        ({"resample": 2}, "resample is 2"),
        ({"do_center_crop": False}, "do_center_crop is False"),
        ({"rescale_factor": 1.0}, "rescale_factor is 255.0"),
        ({"rescale_factor": "1/255"}, "rescale_factor is '1/255'"),
        ({"crop_size": {"height": 20, "width": 28}}, "crop_size is {'height': 20"),
        ({"size": {"shortest_edge": 40}}, "size is 40"),
        ({"image_mean": [0.5]}, "image_mean is [0.5]"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std is [0.5, 0, 0.5]"),
    ],
)
def test_a_processor_that_is_not_ours(tmp_path: Path, more: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        form_of(tmp_path, hf_config(anyres=False), TINY | KINDS["clip"][1] | more)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "vision_config.model_type is 'siglip_vision_model'"),
        ({"vision_config": {"image_size": "big"}}, "tiles of 'big' pixels"),
        ({"vision_config": [28]}, "vision_config is [28]"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy is 'full'"),
        ({"image_grid_pinpoints": [[28, 30]]}, "image_grid_pinpoints is [[28, 30]]"),
        ({"image_grid_pinpoints": [[28, 56], 3]}, "image_grid_pinpoints"),
        ({"image_grid_pinpoints": [["a", "b"]]}, "image_grid_pinpoints"),
        ({"image_grid_pinpoints": [[56, 56]]}, "other image_grid_pinpoints"),
    ],
)
def test_a_config_that_is_not_ours(tmp_path: Path, more: dict[str, Any], said: str) -> None:
    processor = TINY | {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": PINPOINTS}
    with pytest.raises(CheckpointError) as caught:
        form_of(tmp_path, hf_config(anyres=True) | more, processor)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"mm_vision_tower": "google/siglip-so400m"}, "mm_vision_tower is 'siglip-so400m'"),
        ({"image_aspect_ratio": "anyres_max_9"}, "image_aspect_ratio is 'anyres_max_9'"),
        ({"mm_patch_merge_type": "flat"}, "mm_patch_merge_type is 'flat'"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is 'cls_patch'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
        ({"image_grid_pinpoints": "(1x1),...,(6x6)"}, "image_grid_pinpoints is '(1x1),...,(6x6)'"),
        ({"image_grid_pinpoints": None}, "image_grid_pinpoints is None"),
    ],
)
def test_an_original_that_is_not_ours(tmp_path: Path, more: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        form_of(tmp_path, original_config(**more))
    assert said in str(caught.value)


def test_a_processor_that_is_missing_or_broken(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no preprocessor_config.json"):
        form_of(tmp_path, hf_config(anyres=False))
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        read_image_form(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps([1]))
    with pytest.raises(CheckpointError, match="not a JSON object"):
        read_image_form(tmp_path)


def test_pictures_that_are_too_long() -> None:
    thin = Image.new("RGB", (65_000, 1))
    for fit in ("crop", "pad"):
        form = LlavaForm(fit=fit, tile_size=336, patch_size=14, mean=tuple(MEAN), std=tuple(STD))
        with pytest.raises(RequestError, match="65000 x 1 pixels is too l"):
            form.prepare(thin)
