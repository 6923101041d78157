"""The logits of one prompt by two checkpoints of a model, a weight at a time: neither is ever whole in memory."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lmtool import kernels
from lmtool.convert.progress import Progress
from lmtool.errors import CheckpointError, InputError
from lmtool.layers.rotary import cos_sin_table
from lmtool.models.block import Block
from lmtool.models.source import Source

# float16 in place of bfloat16 or of what GGUF packs moves logits by less than 1e-2 of their size
MOST_DIFFERENCE = 5e-2
_NUM_IDS = 16
_HEAD_ROWS = 8192


@dataclass(frozen=True, slots=True)
class Difference:
    """Of logits [tokens, V]. equal: bit by bit; relative: norm of the difference over the norm."""

    equal: bool
    relative: float
    same_top: float  # share of positions with the same likeliest token


def check(
    source: Source, other: Source, *, exact: bool, most: float = MOST_DIFFERENCE, progress: Progress
) -> Difference:
    """exact: they must be the same; most: that logits may move else. Raises InputError where they are not one model."""
    found = logits(source, other, progress)
    if (exact and not found.equal) or not found.relative <= most:
        raise InputError(
            f"the logits of the converted model differ from the source's by {found.relative:.1e} of their size",
            "this is a fault of lmtool's, or of this machine: please report it; --no-check converts all the same",
        )
    return found


def logits(source: Source, other: Source, progress: Progress) -> Difference:
    """Both with dtype float32 on a CPU. Raises CheckpointError for a source whose logits are no numbers."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(source.config.vocab_size, (1, _NUM_IDS), generator=generator)
    with torch.inference_mode():
        expected, actual = _run(source, ids, progress, 0), _run(other, ids, progress, 1)
    if not torch.isfinite(expected).all():
        raise CheckpointError(
            f"the logits of {source.checkpoint.path} are no numbers: NaN or infinity is among its weights",
            "download the model again; --no-check converts it as it is",
        )
    relative = float((actual - expected).norm() / expected.norm().clamp_min(1e-30))
    same_top = (actual.argmax(-1) == expected.argmax(-1)).float().mean().item()
    return Difference(torch.equal(actual, expected), relative, same_top)


def _run(source: Source, ids: Tensor, progress: Progress, turn: int) -> Tensor:
    """ids int64 [1, L] → float32 [L, V]."""
    config = source.config
    cos_sin = cos_sin_table(config.rope, ids.shape[1], ids.device)
    (embed,) = source.sources("embed", 0)
    hidden = source.checkpoint.tensor(embed)[ids].float()
    for i in range(config.num_layers):
        progress("comparing logits", turn * config.num_layers + i, 2 * config.num_layers)
        hidden = Block(source.layer(i), config, cos_sin).forward(hidden)
    hidden = kernels.rms_norm(hidden[0], source.tensor("final_norm"), config.rms_norm_eps)
    tied = config.tie_word_embeddings and source.int8_head() is None
    (head,) = source.sources("embed" if tied else "head.weight", 0)
    # a piece at a time: as float32 it may be the largest matrix by far
    return torch.cat(
        [kernels.linear(hidden, rows.float()) for rows in source.checkpoint.tensor(head).split(_HEAD_ROWS)], 1
    )
