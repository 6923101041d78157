"""Whether a checkpoint holds the weights that its config asks for. Reads no tensor."""

import torch

from lmtool.checkpoint.formats import Checkpoint
from lmtool.models.config import ModelConfig
from lmtool.models.source import Source, names_of


def check_weights(checkpoint: Checkpoint, model: ModelConfig) -> None:
    """Raises CheckpointError for weights that are missing, too many, of other shapes, no numbers and no known codes."""
    source = Source(checkpoint, model, names_of(checkpoint), torch.float32, torch.device("meta"))
    source.check_names()
    for ours in source.wanted():
        for i in range(model.num_layers if "{i}" in ours else 1):
            source.check_shape(ours, i)
            for name in source.sources(ours, i):
                if (stored := checkpoint.stored(name)) is not None:
                    source.check_floating(name, stored.dtype)
