"""A workspace on a card: the source's answers, and after --warm nothing to compile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lmtool.config import EngineConfig
from lmtool.convert.job import Job
from lmtool.convert.to_workspace import convert
from lmtool.engine.load_weights import open_decoder
from lmtool.engine.setup import load_engine
from lmtool.layers.weights import W4
from tests.models.test_quantized import KINDS, quantize
from tests.quant.models import tiny_folder
from tests.support import request, run_all

START = """
import sys
from pathlib import Path
from lmtool.config import EngineConfig
from lmtool.engine.setup import load_engine
load_engine(Path(sys.argv[1]), EngineConfig(device="cuda", cache_gb=0.1))
"""


def made(tmp_path: Path, kind: str) -> tuple[Path, Path]:
    """A tiny model and its workspace."""
    model = tiny_folder(tmp_path / "model", intermediate_size=128, max_position_embeddings=512)
    if kind != "dense":
        quantize(model, **KINDS[kind])
    convert(Job(source=model, name="tiny", destination=tmp_path / "workspace"))
    return model, tmp_path / "workspace"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["dense", "awq", "gptq act-order"])
def test_the_answers_are_the_source_s(kind: str, tmp_path: Path) -> None:
    answers = []
    for path in made(tmp_path, kind):
        config = EngineConfig(device="cuda", dtype="float16", cache_gb=0.1, max_batch_size=4)
        loaded = load_engine(path, config)
        assert loaded.weights == ("float16" if kind == "dense" else "w4a16 g32")
        prompts = ([5, 17, 3], list(range(40)), [i % 90 for i in range(300)])
        answers.append(run_all(loaded.core, [request(i, ids, max_new_tokens=20) for i, ids in enumerate(prompts)]))
    assert answers[0] == answers[1]


@pytest.mark.gpu
def test_tiles_reach_the_card_as_they_were_written(tmp_path: Path) -> None:
    model, workspace = made(tmp_path, "awq")
    config = EngineConfig(device="cuda", dtype="float16")
    (expected, _), (actual, _) = open_decoder(model, config), open_decoder(workspace, config)
    for ours in ("qkv", "o", "gate_up", "down"):
        one, other = getattr(expected.layers[1], ours), getattr(actual.layers[1], ours)
        assert isinstance(one, W4)
        assert isinstance(other, W4)
        assert torch.equal(one.tiles.tiles, other.tiles.tiles)


@pytest.mark.gpu
def test_after_warm_a_start_compiles_nothing(tmp_path: Path) -> None:
    model = quantize(tiny_folder(tmp_path / "model", intermediate_size=128), **KINDS["awq"])
    cache = tmp_path / "cache"
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0"}
    words = ["-m", "lmtool", "convert", str(model), "--warm", "--dst-path", str(tmp_path / "w")]
    subprocess.run([sys.executable, *words], env=environment, check=True)
    kernels = set(cache.rglob("*.cubin"))
    assert len(kernels) > 10
    subprocess.run([sys.executable, "-c", START, str(tmp_path / "w")], env=environment, check=True)
    assert set(cache.rglob("*.cubin")) == kernels
