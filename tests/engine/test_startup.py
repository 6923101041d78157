"""Starting: kernels compiled ahead are the ones that are used, and memory that is short is said in one line.

On a GPU the shortage is real: the card is filled first, and the process goes on afterwards.
"""

import gc
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_startup import write_checkpoint
from lmtool.config import EngineConfig
from lmtool.engine import load_weights, setup
from lmtool.engine.device import memory_short
from lmtool.engine.setup import LoadedEngine, load_engine
from lmtool.errors import MemoryShortError
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
    with pytest.raises(MemoryShortError, match="^no room; use --flag$"), memory_short("no room", "use --flag"):
        raise RuntimeError(words)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"), memory_short("no room", "use --flag"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


# ---------------------------------------------------------------------- on a GPU
ON_GPU: dict[str, Any] = {"device": "cuda", "dtype": "float16", "max_batch_size": 16}


@contextmanager
def all_taken_but(num_bytes: int) -> Iterator[None]:
    """Of the card's memory; afterwards the process goes on, and a small model finds room and answers."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    taken = torch.empty(torch.cuda.mem_get_info()[0] - num_bytes, dtype=torch.uint8, device="cuda")
    try:
        yield
    finally:
        del taken


def refusal(folder: Path, **settings: Any) -> str:
    """What is said when it is loaded: one line."""
    with pytest.raises(MemoryShortError) as caught:
        load_engine(folder, EngineConfig(**(ON_GPU | settings)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def check_goes_on(small: Path) -> None:
    assert len(answers(load_engine(small, EngineConfig(**ON_GPU, cache_gb=0.05)))) == 8


@pytest.mark.gpu
def test_weights_that_cannot_fit_are_refused_before_they_are_read(wide: Path, small: Path) -> None:
    with all_taken_but(200 * MIB):
        said = refusal(wide)
    assert re.fullmatch(r"the weights need 0\.3 GiB on cuda:0, 0\.[12] GiB are free; use a smaller.*", said)
    check_goes_on(small)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("left", "message"),
    [
        (200 * MIB, r"the weights .* did not fit on cuda:0 .*; close what else uses the card, or .*"),
        (700 * MIB, r"no memory for a step on cuda:0 beside a K/V cache of .*; lower --cache-max-entry-count or .*"),
    ],
)
def test_memory_that_is_gone_when_it_is_used(
    wide: Path, small: Path, monkeypatch: pytest.MonkeyPatch, left: int, message: str
) -> None:
    """Another process took it between the question and the use: weights, then the cache, are not allocated."""
    with all_taken_but(left), monkeypatch.context() as patch:
        for module in (load_weights, setup):
            patch.setattr(module, "free_bytes", lambda device: 8 << 30)
        assert re.fullmatch(message, refusal(wide))
    check_goes_on(small)


@pytest.mark.gpu
def test_a_step_that_does_not_fit_beside_the_cache(wide: Path, small: Path) -> None:
    with all_taken_but(900 * MIB):
        said = refusal(wide, cache_max_entry_count=0.9)
        assert re.fullmatch("no memory for a step on cuda:0 beside a K/V cache of .*max_batched_tokens", said)
        gc.collect()
        check_goes_on(small)  # in what is left: nothing of the other engine stays behind


@pytest.mark.gpu
def test_a_card_that_others_have_filled(small: Path) -> None:
    """Not even a process's own context fits: the first call that needs it says so."""
    script = (
        "import pathlib, sys; from lmtool.config import EngineConfig; from lmtool.engine.setup import load_engine;"
        "load_engine(pathlib.Path(sys.argv[1]), EngineConfig(device='cuda'))"
    )
    with all_taken_but(60 * MIB):
        run = subprocess.run([sys.executable, "-c", script, str(small)], capture_output=True, text=True, check=False)
    said = run.stderr.splitlines()[-1]
    assert re.search(r"(MemoryShortError|DeviceError): .*; .*(close what else uses the card|--device cpu)", said), (
        run.stderr
    )


@pytest.mark.gpu
@pytest.mark.parametrize(("max_batch_size", "num_heads", "num_kv_heads"), [(16, 12, 4), (16, 14, 2), (1, 10, 10)])
def test_nothing_is_compiled_after_the_rehearsal(
    tmp_path: Path, max_batch_size: int, num_heads: int, num_kv_heads: int
) -> None:
    """Neither for the first steps and graphs nor for prompts of any length beside decodes, sampled in any way.

    Shapes that no other test has: what this process has compiled before would not be told.
    """
    from triton import knobs

    shape = {"hidden_size": 64 * num_heads, "num_heads": num_heads, "num_kv_heads": num_kv_heads, "vocab_size": 223}
    write_checkpoint(tmp_path, replace(WIDE, **shape))  # type: ignore[arg-type]
    compiled: list[str] = []

    def progress(what: str, done: int, total: int) -> None:
        if what == "compiling kernels" and done == total:
            knobs.runtime.jit_post_compile_hook = lambda *, fn, key, **_: compiled.append(f"{fn.name} {key}")

    settings = [{}, {"temperature": 1.0, "top_k": 5}, {"temperature": 1.0, "top_p": 0.5}, {"repetition_penalty": 1.2}]
    requests = [
        request(i, range(length), max_new_tokens=3 + 5 * i, **settings[i % 4])  # type: ignore[arg-type]
        for i, length in enumerate([1, 3, 5, 9, 17, 33, 40, 63, 65, 100, 129, 200, 2, 13])
    ]
    config = EngineConfig(**(ON_GPU | {"max_batch_size": max_batch_size}), cache_gb=1.0, max_batched_tokens=100)
    try:
        loaded = load_engine(tmp_path, config, progress)
        assert len(run_all(loaded.core, requests)) == len(requests)
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
