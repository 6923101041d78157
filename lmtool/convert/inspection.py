"""What a checkpoint or a workspace is, what running it takes, and whether it is whole. Nothing is loaded."""

from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from lmtool.checkpoint.formats import Checkpoint, open_checkpoint
from lmtool.checkpoint.manifest import workspace_of
from lmtool.checkpoint.vision import VisionPart
from lmtool.checkpoint.workspace import Workspace
from lmtool.checkpoint.workspace_manifest import CONVERT_AGAIN
from lmtool.convert.progress import Progress, silent
from lmtool.convert.whole import check_weights
from lmtool.engine.kv_cache import BLOCK_SIZE, block_bytes
from lmtool.errors import CheckpointError, ConfigError, TokenizerError
from lmtool.images.form import read_image_form
from lmtool.images.llava import LlavaForm
from lmtool.layers.weights import W4, Dense, Matrix
from lmtool.models.config import ModelConfig
from lmtool.models.decoder import Decoder, DecoderLayer
from lmtool.models.loader import outline_decoder, read_model_config
from lmtool.tokenizer import load_tokenizer


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on a GPU: of the weights, of the K/V cache for ``concurrency`` conversations of ``context`` tokens."""

    dtype: str
    context: int
    concurrency: int
    weights: int
    cache: int
    cache_per_token: int


@dataclass(frozen=True, slots=True)
class Sight:
    """What a LLaVA sees with. architecture: of the whole model; tower: its shape in words; tower_path: its folder,
    where it is not the model's; the largest picture is most_tiles through the tower and most_rows of the context."""

    architecture: str
    tower: str
    tower_path: str | None
    num_parameters: int
    num_bytes: int
    most_tiles: int
    most_rows: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """stored: how many weights of each dtype or code; chat_template: its text; no_tokenizer: why there is none;
    verified: every byte was read and compared with its checksum, which only a workspace has. Of a LLaVA all but
    ``vision``, ``file_bytes`` and ``memory`` is the language model's."""

    path: str
    format: str
    model: ModelConfig
    num_parameters: int
    file_bytes: int
    stored: dict[str, int]
    group_sizes: list[int]
    source: str | None
    lmtool_version: str | None
    chat_template: str | None
    no_tokenizer: str | None
    memory: Memory
    verified: bool
    vision: Sight | None = None


def inspect(
    path: Path,
    *,
    context: int | None = None,
    concurrency: int = 1,
    verify: bool = True,
    progress: Progress | None = None,
) -> Inspection:
    """context: tokens of a conversation; None: the model's own. Raises CheckpointError for what is damaged."""
    path = workspace_of(path)
    with closing(open_checkpoint(path)) as checkpoint:
        model = read_model_config(checkpoint.config)
        context = model.max_positions if context is None else context
        if context < 1 or concurrency < 1:
            raise ConfigError(f"--context {context} --concurrency {concurrency}", "give numbers above 0")
        check_weights(checkpoint, model)
        is_workspace = isinstance(checkpoint, Workspace)
        if is_workspace and verify:
            _verify(checkpoint, progress or silent)
        manifest = checkpoint.manifest if isinstance(checkpoint, Workspace) else None
        template, no_tokenizer = _template(path)
        if is_workspace and no_tokenizer is not None:  # weights alone are a checkpoint; a workspace is all that runs it
            raise CheckpointError(no_tokenizer, CONVERT_AGAIN)
        return Inspection(
            path=str(path),
            format=checkpoint.format,
            model=model,
            num_parameters=model.num_parameters,
            file_bytes=_file_bytes(path),
            stored=dict(Counter(checkpoint.dtype(name) for name in checkpoint.names())),
            group_sizes=_group_sizes(checkpoint),
            source=manifest.source.name if manifest else None,
            lmtool_version=manifest.lmtool_version if manifest else None,
            chat_template=template,
            no_tokenizer=no_tokenizer,
            memory=memory_on_gpu(checkpoint, model, context, concurrency),
            verified=is_workspace and verify,
            vision=None if checkpoint.vision is None else _sight(checkpoint.vision, checkpoint.path),
        )


def _sight(vision: VisionPart, path: Path) -> Sight:
    form = read_image_form(path)
    assert isinstance(form, LlavaForm), "what has a vision part has a form of pictures"
    tower = vision.tower_config
    # of pictures that fill a grid: any other has less, for its padding is left out
    grids = form.pinpoints or ((form.tile_size, form.tile_size),)
    return Sight(
        architecture=vision.config["architectures"][0],
        tower=(
            f"CLIP, {tower['num_hidden_layers']} layers, hidden {tower['hidden_size']}, tiles of {tower['image_size']} "
            f"pixels in patches of {tower['patch_size']}"
        ),
        tower_path=str(vision.tower_path) if vision.tower_path else None,
        num_parameters=vision.num_parameters,
        num_bytes=vision.num_bytes,
        most_tiles=max((1 + h // form.tile_size * (w // form.tile_size) for h, w in form.pinpoints), default=1),
        most_rows=max(form.num_tokens(size) for size in grids),
    )


def memory_on_gpu(checkpoint: Checkpoint, model: ModelConfig, context: int, concurrency: int) -> Memory:
    """What the engine would hold there; beside it a CUDA context, graphs and workspaces take about 1 GB."""
    numbers = torch.bfloat16 if model.dtype == "bfloat16" else torch.float16  # as `choose_dtype` on a card since 8.0
    keep_int4 = any(checkpoint.dtype(name) == "int4" for name in checkpoint.names())
    outline = outline_decoder(checkpoint, model, numbers, keep_int4=keep_int4, num_layers=model.num_layers)
    seen_with = numbers.itemsize * checkpoint.vision.num_parameters if checkpoint.vision is not None else 0
    block = block_bytes(model, numbers)
    blocks = -(-context // BLOCK_SIZE) * concurrency + 1
    return Memory(
        dtype=str(numbers).removeprefix("torch."),
        context=context,
        concurrency=concurrency,
        weights=_decoder_bytes(outline) + seen_with,
        cache=blocks * block,
        cache_per_token=block // BLOCK_SIZE,
    )


def _decoder_bytes(outline: Decoder) -> int:
    head = outline.head
    shares = isinstance(head, Dense) and head.weight is outline.embed  # a tied head may have 8-bit codes of its own
    layers = sum(_layer_bytes(layer) for layer in outline.layers)  # checkpoints leave some of them unquantized
    return layers + outline.embed.nbytes + outline.final_norm.nbytes + (0 if shares else _matrix_bytes(head))


def _layer_bytes(layer: DecoderLayer) -> int:
    matrices = (layer.qkv, layer.o, layer.gate_up, layer.down)
    norms = (layer.attention_norm, layer.mlp_norm, layer.q_norm, layer.k_norm)
    return sum(_matrix_bytes(matrix) for matrix in matrices) + sum(norm.nbytes for norm in norms if norm is not None)


def _matrix_bytes(matrix: Matrix) -> int:
    if isinstance(matrix, W4):
        held = [matrix.tiles.tiles, matrix.bias]
    else:
        assert isinstance(matrix, Dense)
        held = [matrix.weight, matrix.bias]
    return sum(tensor.nbytes for tensor in held if tensor is not None)


def _verify(workspace: Checkpoint, progress: Progress) -> None:
    assert isinstance(workspace, Workspace)
    names = workspace.all_names()
    for done, name in enumerate(names):
        progress("reading every byte", done, len(names))
        workspace.verify(name)


def _file_bytes(path: Path) -> int:
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def _group_sizes(checkpoint: Checkpoint) -> list[int]:
    if isinstance(checkpoint, Workspace):
        return sorted({weight.group_size for weight in checkpoint.manifest.weights.values() if weight.group_size})
    quantization = checkpoint.config.get("quantization_config")
    return [int(quantization["group_size"])] if isinstance(quantization, dict) else []


def _template(path: Path) -> tuple[str | None, str | None]:
    """The chat template, and why there is no tokenizer."""
    try:
        return load_tokenizer(path).chat_template, None
    except TokenizerError as error:
        return None, error.cause
