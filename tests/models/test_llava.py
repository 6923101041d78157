"""LLaVA 1.5 and 1.6 against transformers: rows of pictures, and logits of what follows them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lmtool.checkpoint.formats import open_checkpoint
from lmtool.config import EngineConfig
from lmtool.engine.kv_cache import allocate_cache, outline_plan
from lmtool.engine.requests import place_images
from lmtool.images.form import ImageForm, read_image_form
from lmtool.images.prepared import IMAGE_ID, PreparedImage
from lmtool.layers.context import AttentionContext
from lmtool.models.decoder import Decoder, Inserted
from lmtool.models.loader import load_decoder, read_model_config
from lmtool.models.vision import load_tower
from tests.tiny_llava import MEAN, STD, tiny_llava

SIZES = [(56, 56), (28, 28), (1, 1), (20, 90), (131, 17), (64, 48)]  # width, height


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def load(folder: Path) -> tuple[Decoder, ImageForm]:
    checkpoint = open_checkpoint(folder)
    config = read_model_config(checkpoint.config)
    cpu = torch.device("cpu")
    decoder = load_decoder(checkpoint, config, dtype=torch.float32, device=cpu, num_positions=1024)
    form = read_image_form(folder)
    assert form is not None
    assert checkpoint.vision is not None
    decoder.vision = load_tower(checkpoint.vision, form, torch.float32, cpu)
    return decoder, form


def pixel_values(images: Sequence[PreparedImage]) -> torch.Tensor:
    """As transformers takes them: [pictures, tiles, 3, S, S], or [pictures, 3, S, S] where a picture is one tile."""
    side = images[0].tile_size
    most = max(image.num_tiles for image in images)
    made = torch.zeros(len(images), most, side, side, 3)
    for values, image in zip(made, images, strict=True):
        tiles = torch.frombuffer(bytearray(image.pixels), dtype=torch.uint8).view(-1, side, side, 3)
        values[: len(tiles)] = (tiles / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    made = made.permute(0, 1, 4, 2, 3)
    return made if most > 1 else made[:, 0]


def logits_of(decoder: Decoder, ids: Sequence[int], images: Sequence[PreparedImage]) -> torch.Tensor:
    """Logits [T, V] of a whole prompt in one step."""
    found, placed = place_images(ids, images)
    assert decoder.vision is not None
    rows = torch.cat([torch.arange(one.start, one.end) for one in placed])
    inserted = Inserted(rows, torch.cat(decoder.vision.encode(images)))
    length = len(found)
    num_blocks = -(-length // 64)
    plan = outline_plan(EngineConfig(), length, num_blocks=num_blocks + 1, num_slots=1)
    caches = allocate_cache(plan, decoder.config, decoder.dtype, decoder.device)
    context = AttentionContext(
        num_decode=0,
        positions=torch.arange(length),
        slots=64 + torch.arange(length),
        seq_lens=torch.tensor([length], dtype=torch.int32),
        block_tables=torch.arange(1, num_blocks + 1, dtype=torch.int32)[None],
        seq_slots=torch.zeros(1, dtype=torch.int32),
        cu_seqlens_q=torch.tensor([0, length], dtype=torch.int32),
        max_seqlen_q=length,
    )
    hidden = decoder.forward(torch.tensor(found).clamp_min(0), context, caches, inserted=inserted)
    return decoder.logits(hidden)


def expected_logits(model: Any, ids: Sequence[int], images: Sequence[PreparedImage]) -> torch.Tensor:
    repeated: list[int] = []
    left = list(images)
    for i in ids:
        repeated += [model.config.image_token_id] * left.pop(0).num_tokens if i == IMAGE_ID else [i]
    anyres = hasattr(model.config, "image_grid_pinpoints")
    sizes = {"image_sizes": torch.tensor([image.size for image in images])} if anyres else {}
    logits: torch.Tensor = model(input_ids=torch.tensor([repeated]), pixel_values=pixel_values(images), **sizes).logits
    return logits[0]


@pytest.mark.parametrize("backbone", ["llama", "mistral"])
@pytest.mark.parametrize("original", [False, True], ids=["llava-hf", "liuhaotian"])
@pytest.mark.parametrize("anyres", [False, True], ids=["1.5", "1.6"])
@torch.inference_mode()
def test_logits_are_transformers(tmp_path: Path, anyres: bool, original: bool, backbone: Any) -> None:
    """1, 2 and 5 pictures of odd shapes, between texts."""
    model = tiny_llava(tmp_path, anyres=anyres, original=original, backbone=backbone)
    decoder, form = load(tmp_path)
    for count in (1, 2, 5):
        images = [form.prepare(picture(SIZES[(i + count) % len(SIZES)], seed=i)) for i in range(count)]
        ids = [7, 8, 9]
        for i in range(count):
            ids += [IMAGE_ID, 10 + i, 40 + i]
        torch.testing.assert_close(logits_of(decoder, ids, images), expected_logits(model, ids, images))


@pytest.mark.parametrize("size", SIZES)
@torch.inference_mode()
def test_rows_are_transformers(tmp_path: Path, size: tuple[int, int]) -> None:
    model = tiny_llava(tmp_path)
    decoder, form = load(tmp_path)
    image = form.prepare(picture(size))
    expected = model.model.get_image_features(
        pixel_values=pixel_values([image]), image_sizes=torch.tensor([image.size])
    ).pooler_output
    assert decoder.vision is not None
    found = decoder.vision.encode([image])[0]
    assert len(found) == image.num_tokens
    torch.testing.assert_close(found, expected[0])


@torch.inference_mode()
def test_pictures_of_a_batch_do_not_see_each_other(tmp_path: Path) -> None:
    tiny_llava(tmp_path)
    decoder, form = load(tmp_path)
    images = [form.prepare(picture(size, seed)) for seed, size in enumerate(SIZES)]
    assert decoder.vision is not None
    together = decoder.vision.encode(images)
    for rows, image in zip(together, images, strict=True):
        torch.testing.assert_close(rows, decoder.vision.encode([image])[0])
    assert decoder.vision.num_bytes > 0
