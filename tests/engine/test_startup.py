"""Starting: kernels compiled ahead are the ones that are used, and memory that is short is said in one line.

On a GPU the shortage is real: the card is filled first, and the process goes on afterwards.
"""

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_startup import write_checkpoint
from lmtool.config import EngineConfig
from lmtool.engine import setup
from lmtool.engine.setup import LoadedEngine, load_engine
from lmtool.errors import LmtoolError, MemoryShortError
from tests.support import TINY, request, run_all

# 320 MB of weights; a step over 8192 tokens needs 1 GB beside them
WIDE = replace(TINY, hidden_size=512, intermediate_size=32768, num_heads=8, num_kv_heads=8, head_dim=64, num_layers=3)
WIDE = replace(WIDE, max_positions=8192, rope=replace(TINY.rope, dim=64))
MIB = 1 << 20


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    write_checkpoint(folder, TINY)
    return folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    write_checkpoint(folder, WIDE)
    return folder


def answers(loaded: LoadedEngine) -> list[int]:
    return run_all(loaded.core, [request(0, [1, 2, 3], max_new_tokens=8)])[0]


def test_what_is_loading_is_told_as_it_goes(small: Path) -> None:
    told: list[tuple[str, int, int]] = []
    loaded = load_engine(small, EngineConfig(device="cpu"), lambda *step: told.append(step))
    assert told == [("loading weights", i, TINY.num_layers) for i in range(TINY.num_layers + 1)]
    assert len(answers(loaded)) == 8


@pytest.mark.parametrize("words", ["CUDA out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"])
def test_shortage_is_said_whoever_notices_it(words: str) -> None:
    with pytest.raises(MemoryShortError, match="^no room; use --flag$"), setup.memory_short("no room", "use --flag"):
        raise RuntimeError(words)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"), setup.memory_short("no room", "use --flag"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


# ---------------------------------------------------------------------- on a GPU
ON_GPU: dict[str, Any] = {"device": "cuda", "dtype": "float16", "max_batch_size": 16}


@pytest.fixture
def little_memory() -> Iterator[None]:
    """All but 700 MiB of the card is taken."""
    gc.collect()
    torch.cuda.empty_cache()
    taken = torch.empty(torch.cuda.mem_get_info()[0] - 700 * MIB, dtype=torch.uint8, device="cuda")
    yield
    del taken
    torch.cuda.empty_cache()


def check_refused(folder: Path, message: str, small: Path, **settings: Any) -> None:
    """In one line; and then the small model still finds room and answers."""
    with pytest.raises(LmtoolError, match=message) as caught:
        load_engine(folder, EngineConfig(**(ON_GPU | settings)))
    assert isinstance(caught.value, MemoryShortError)
    assert "\n" not in str(caught.value)
    del caught
    gc.collect()
    loaded = load_engine(small, EngineConfig(**ON_GPU, cache_gb=0.05))
    assert len(answers(loaded)) == 8


@pytest.mark.gpu
def test_weights_that_cannot_fit_are_refused_before_they_are_read(
    wide: Path, small: Path, little_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = torch.empty(500 * MIB, dtype=torch.uint8, device="cuda")
    check_refused(wide, r"the weights need 0\.3 GiB on cuda:0, 0\.\d GiB are free; use a smaller", small)
    del more


@pytest.mark.gpu
def test_weights_that_do_not_fit_after_all(
    wide: Path, small: Path, little_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = torch.empty(500 * MIB, dtype=torch.uint8, device="cuda")
    with monkeypatch.context() as patch:  # another process takes the memory between the question and the use
        patch.setattr(setup, "free_bytes", lambda device: 8 << 30)
        with pytest.raises(MemoryShortError, match="did not fit on cuda:0 .*; close what else uses the card"):
            load_engine(wide, EngineConfig(**ON_GPU))
    gc.collect()
    assert len(answers(load_engine(small, EngineConfig(**ON_GPU, cache_gb=0.05)))) == 8
    del more


@pytest.mark.gpu
def test_a_cache_that_does_not_fit_after_all(
    wide: Path, small: Path, little_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(setup, "free_bytes", lambda device: 8 << 30)
        with pytest.raises(MemoryShortError, match="beside a K/V cache of .*; lower --cache-max-entry-count"):
            load_engine(wide, EngineConfig(**ON_GPU))
    gc.collect()
    assert len(answers(load_engine(small, EngineConfig(**ON_GPU, cache_gb=0.05)))) == 8


@pytest.mark.gpu
def test_a_step_that_does_not_fit_beside_the_cache(wide: Path, small: Path, little_memory: None) -> None:
    message = "no memory for a step on cuda:0 beside a K/V cache of .*--max-batched-tokens"
    check_refused(wide, message, small, cache_max_entry_count=0.9)


@pytest.mark.gpu
def test_nothing_is_compiled_after_the_rehearsal(wide: Path) -> None:
    """Specialised alike: the launches on the card use what the launches on the meta device asked for."""
    from triton import knobs

    compiled: list[str] = []

    def progress(what: str, done: int, total: int) -> None:
        if what == "compiling kernels" and done == total:
            knobs.runtime.jit_post_compile_hook = lambda *, fn, **_: compiled.append(fn.name)

    try:
        loaded = load_engine(wide, EngineConfig(**ON_GPU, cache_gb=1.0), progress)
        assert len(answers(loaded)) == 8
        assert knobs.runtime.jit_post_compile_hook is not None
    finally:
        knobs.runtime.jit_post_compile_hook = None
    assert compiled == []


@pytest.mark.gpu
def test_staged_weights_are_the_stored_ones(wide: Path) -> None:
    """Through pinned buffers and streams: bit for bit, as they are and cast on the card."""
    from lmtool.checkpoint.formats import open_checkpoint
    from lmtool.models.loader import load_decoder, read_model_config

    checkpoint = open_checkpoint(wide)
    config = read_model_config(checkpoint.config)
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        decoder, expected = (
            load_decoder(checkpoint, config, dtype=dtype, device=torch.device(device), num_positions=64)
            for device in ("cuda", "cpu")
        )
        assert torch.equal(decoder.embed.cpu(), expected.embed)
        for one, other in zip(decoder.layers, expected.layers, strict=True):
            for name in ("qkv", "o", "gate_up", "down"):
                assert torch.equal(getattr(one, name).weight.cpu(), getattr(other, name).weight), name
