"""A workspace → a GGUF file: what our own reader and llama.cpp make of it."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmtool import cli
from lmtool.checkpoint.formats import open_checkpoint
from lmtool.checkpoint.gguf_file import GgufFile
from lmtool.checkpoint.hub import resolve_model
from lmtool.config import EngineConfig
from lmtool.convert.job import Job
from lmtool.convert.to_gguf import export_gguf
from lmtool.convert.to_workspace import convert
from lmtool.engine.setup import load_engine
from lmtool.models.config import ModelConfig
from lmtool.models.loader import read_model_config
from lmtool.tokenizer import load_tokenizer
from tests.convert.test_refusals import refused
from tests.convert.test_round_trip import logits, to_workspace
from tests.models.test_quantized import KINDS, quantize
from tests.quant.models import DIFFERENCES, tiny_folder
from tests.support import request, run_all
from tests.tokenizer_files import SENTENCES

PROMPTS = (
    "What is the capital of France?",
    "Name three colours.",
    "Write a short story about a cat.",
    "How does a car engine work?",
    "List the planets of the solar system.",
)


def halves(folder: Path) -> Path:
    """Numbers that F16 holds."""
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.half() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("architecture", DIFFERENCES)
def test_every_family_as_f16(architecture: str, tmp_path: Path) -> None:
    workspace, _ = to_workspace(halves(tiny_folder(tmp_path / "model", architecture)))
    made = export_gguf(workspace, tmp_path / "model.gguf", kind="F16")
    assert made.difference is not None
    assert made.difference.equal
    torch.testing.assert_close(logits(tmp_path / "model.gguf"), logits(workspace), rtol=0, atol=0)
    tokenizers = [load_tokenizer(path) for path in (workspace, tmp_path / "model.gguf")]
    for text in SENTENCES:
        assert tokenizers[0].encode(text) == tokenizers[1].encode(text)
    assert tokenizers[0].eos_ids == tokenizers[1].eos_ids
    assert tokenizers[0].chat_template == tokenizers[1].chat_template


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192},
    ],
)  # fmt: skip
def test_rotary_scaling_goes_along(rope: dict[str, object], tmp_path: Path) -> None:
    workspace, _ = to_workspace(halves(tiny_folder(tmp_path / "model", rope_scaling=rope)))
    export_gguf(workspace, tmp_path / "model.gguf")
    assert configs(workspace).rope == configs(tmp_path / "model.gguf").rope


def configs(path: Path) -> ModelConfig:
    return read_model_config(open_checkpoint(path).config)


def test_scaling_without_a_form_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_folder(tmp_path / "model", rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    workspace, _ = to_workspace(model)
    line = refused(capsys, "convert", workspace, "--to", "gguf", "-o", tmp_path / "x.gguf")
    assert "GGUF has no form for rope scaling 'dynamic'" in line
    assert not (tmp_path / "x.gguf").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "workspace"]


@pytest.mark.parametrize("kind", ["awq", "gptq act-order"])
def test_codes_are_written_as_they_are(kind: str, tmp_path: Path) -> None:
    """AWQ's codes with their minimums rounded to float16; act-order's are numbers first."""
    model = quantize(tiny_folder(tmp_path / "model", intermediate_size=128), **KINDS[kind])
    workspace, _ = to_workspace(model)
    made = export_gguf(workspace, tmp_path / "model.gguf")
    assert made.type == "Q4_1"
    read, written = open_checkpoint(model), open_checkpoint(tmp_path / "model.gguf")
    name = "model.layers.1.self_attn.k_proj.weight"  # whose rows are interleaved in the file
    expected, actual = read.packed_int4(name), written.packed_int4(name)
    assert expected is not None
    assert actual is not None
    if kind == "awq":
        assert torch.equal(expected.codes, actual.codes)
        assert torch.equal(expected.scale.float(), actual.scale)
        assert torch.equal(expected.lowest.half().float(), actual.minimum)
    assert made.difference is not None
    assert made.difference.relative < (5e-2 if kind == "awq" else 0.3)


@pytest.mark.parametrize(("kind", "most"), [("Q8_0", 5e-2), ("Q4_0", 0.5), ("Q4_1", 0.5)])
def test_numbers_are_rounded_by_the_package(kind: str, most: float, tmp_path: Path) -> None:
    workspace, _ = to_workspace(tiny_folder(tmp_path / "model"))
    made = export_gguf(workspace, tmp_path / "model.gguf", kind=kind)
    assert made.difference is not None
    assert 0 < made.difference.relative < most
    types = {name: entry.type.name for name, entry in GgufFile(tmp_path / "model.gguf").tensors.items()}
    assert types["blk.0.ffn_down.weight"] == kind.lower()
    assert types["token_embd.weight"] == "q8_0"
    assert types["output_norm.weight"] == "float32"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-o", "x.bin"], "let it end in .gguf"),
        (["-o", "there.gguf"], "is there already"),
        (["-o", "x.gguf", "--gguf-type", "Q2_K"], "give one of F16"),
        (["-o", "x.gguf", "--dense"], "--dense means nothing here"),
        (["-o", "there.gguf/x.gguf"], "lies in a file"),
        (["-o", "there.gguf/a/x.gguf"], "cannot be written: not a directory"),
    ],
)
def test_what_cannot_be_written(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    workspace, _ = to_workspace(tiny_folder(tmp_path / "model"))
    Path("there.gguf").write_text("mine")
    assert said in refused(capsys, "convert", workspace, "--to", "gguf", *words)
    assert Path("there.gguf").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "there.gguf", "workspace"]
    if words[1] == "there.gguf":
        assert cli.main(["convert", str(workspace), "--to", "gguf", *words, "--overwrite"]) == 0


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
@pytest.mark.parametrize("kind", ["F16", "Q4_1"])
def test_llama_cpp_gives_the_same_tokens(kind: str, tmp_path: Path) -> None:
    from llama_cpp import Llama

    source = resolve_model("smollm2-135m")
    workspace = tmp_path / "workspace"
    convert(Job(source=source, name="smollm2-135m", destination=workspace, check=False))
    made = export_gguf(workspace, tmp_path / "model.gguf", kind=kind, check=False)
    assert made.type == kind
    tokenizer = load_tokenizer(workspace)
    engine = load_engine(workspace, EngineConfig(device="cpu", dtype="float32", session_len=256))
    llama = Llama(str(tmp_path / "model.gguf"), n_ctx=256, verbose=False, n_threads=2, logits_all=True)
    compared = 0
    for number, prompt in enumerate(PROMPTS):
        text = tokenizer.render_chat([{"role": "user", "content": prompt}])
        ids = tokenizer.chat_ids([{"role": "user", "content": prompt}])
        assert llama.tokenize(text.encode(), add_bos=False, special=True) == ids
        ours = run_all(engine.core, [request(number, ids, max_new_tokens=24)])[number]
        llama.reset()
        llama.eval([*ids, *ours])
        # its own products are of rounded rows: near ties may fall otherwise
        rows = torch.from_numpy(llama.scores[len(ids) - 1 : len(ids) + len(ours) - 1])
        top = rows.topk(2)
        for step, token_id in enumerate(ours):
            if top.values[step, 0] - top.values[step, 1] > 0.3:
                assert token_id == int(top.indices[step, 0]), (prompt, step)
                compared += 1
    assert compared > 0.7 * 24 * len(PROMPTS)
