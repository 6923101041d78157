"""A model in parts: every architecture, dense and 4-bit, whole files and workspaces; logits are those of the whole."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from lmtool.checkpoint.formats import open_checkpoint
from lmtool.errors import CheckpointError, ConfigError
from lmtool.layers.group import Group
from lmtool.models.decoder import Decoder
from lmtool.models.loader import load_decoder, read_model_config
from lmtool.models.registry import ARCHITECTURES
from tests.models.test_quantized import quantize
from tests.quant.models import tiny_folder
from tests.support import all_logits

IDS = [5, 17, 3, 44, 8, 21, 60, 2, 9, 11, 30, 7]
CPU = torch.device("cpu")
R = TypeVar("R")


class ThreadGroup:
    """Ranks that are threads of one process."""

    def __init__(self, rank: int, size: int, values: list[Tensor | None], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, size
        self._values, self._barrier = values, barrier

    def _exchange(self, values: Tensor) -> list[Tensor]:
        self._values[self.rank] = values.clone()
        self._barrier.wait()
        found = [one for one in self._values if one is not None]
        self._barrier.wait()
        return found

    def all_reduce_(self, values: Tensor) -> Tensor:
        return values.copy_(torch.stack(self._exchange(values)).sum(0))

    def add_all_reduce_(self, hidden: Tensor, part: Tensor) -> Tensor:
        return hidden.add_(self.all_reduce_(part))

    def all_gather(self, values: Tensor) -> Tensor:
        return torch.cat(self._exchange(values), dim=1)

    def exchange(self, values: Tensor) -> Tensor:
        return torch.cat([one.chunk(self.size)[self.rank] for one in self._exchange(values)], dim=1)

    def all_gather_rows(self, values: Tensor) -> Tensor:
        return torch.cat(self._exchange(values))


def load(folder: Path, group: Group | None = None, *, keep_int4: bool = False) -> Decoder:
    checkpoint = open_checkpoint(folder)
    config = read_model_config(checkpoint.config)
    return load_decoder(
        checkpoint, config, dtype=torch.float32, device=CPU, num_positions=64, group=group, keep_int4=keep_int4
    )


def in_parts(folder: Path, size: int, *, keep_int4: bool = False) -> list[Tensor]:
    """Logits as each rank has them."""
    return on_ranks(folder, size, lambda decoder: all_logits(decoder, IDS, num_prefill=8), keep_int4=keep_int4)


def on_ranks(folder: Path, size: int, work: Callable[[Decoder], R], *, keep_int4: bool = False) -> list[R]:
    """What each rank makes of its part of a model."""
    values: list[Tensor | None] = [None] * size
    barrier = threading.Barrier(size, timeout=150)

    def run(rank: int) -> R:
        try:
            return work(load(folder, ThreadGroup(rank, size, values, barrier), keep_int4=keep_int4))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
        errors = [error for future in futures if (error := future.exception()) is not None]
        told = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
        if told:
            raise told[0]
        return [future.result() for future in futures]


def check(folder: Path, size: int, *, keep_int4: bool = False, close: Sequence[float] = ()) -> None:
    expected = all_logits(load(folder, keep_int4=keep_int4), IDS, num_prefill=8)
    tolerance = {"rtol": close[0], "atol": close[1]} if close else {}
    for found in in_parts(folder, size, keep_int4=keep_int4):
        torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(tmp_path: Path, architecture: str, size: int) -> None:
    check(tiny_folder(tmp_path, architecture), size)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("method", ["awq", "gptq"])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "InternLM2ForCausalLM", "QWenLMHeadModel"])
def test_four_bits(tmp_path: Path, architecture: str, method: str, size: int) -> None:
    inner = {"intermediate_size": 512, "kv_channels": 32} if architecture == "QWenLMHeadModel" else {}
    sizes = {"hidden_size": 128, "intermediate_size": 256, **inner}
    folder = quantize(tiny_folder(tmp_path, architecture, **sizes), method)
    check(folder, size)
    # as codes: products of bfloat16 rows, whose parts are rounded before they are added
    check(folder, size, keep_int4=True, close=(0.02, 0.05))


def test_a_vocabulary_that_the_ranks_do_not_divide(tmp_path: Path) -> None:
    check(tiny_folder(tmp_path, vocab_size=131), 4)
    check(tiny_folder(tmp_path / "tied", vocab_size=131, tie_word_embeddings=True), 2)


@pytest.mark.parametrize(
    ("difference", "said"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 6, "hidden_size": 96}, "6 attention heads.*1, 2, 3 or 6"),
        ({"intermediate_size": 98}, "98 MLP features.*give 1 or 2"),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 3, "hidden_size": 192, "intermediate_size": 96},
            "3 key/value heads do not go into each other.*give 1, 3",
        ),
    ],
)
def test_what_cannot_be_shared_out_is_refused(tmp_path: Path, difference: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=f"--tp 4.*{said}"):
        in_parts(tiny_folder(tmp_path, **difference), 4)


def test_a_group_that_would_be_cut_is_refused(tmp_path: Path) -> None:
    folder = quantize(tiny_folder(tmp_path, hidden_size=64, intermediate_size=96), "awq")
    with pytest.raises(CheckpointError, match="--tp 4 would cut groups.*its groups are 32 wide.*smaller --tp"):
        in_parts(folder, 4, keep_int4=True)
