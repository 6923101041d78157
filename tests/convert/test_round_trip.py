"""A checkpoint → a workspace → Hugging Face's files: the same numbers, the same codes, the same logits."""

import json
import re
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file

from lmtool.checkpoint.formats import open_checkpoint
from lmtool.checkpoint.workspace import Workspace, join_nibbles, split_nibbles
from lmtool.config import EngineConfig
from lmtool.convert.job import Job
from lmtool.convert.to_hf import export
from lmtool.convert.to_workspace import Converted, convert
from lmtool.engine.load_weights import open_decoder
from lmtool.engine.setup import load_engine
from lmtool.errors import CheckpointError, ConfigError
from lmtool.layers.weights import W4, Int4Cpu
from lmtool.models.loader import outline_decoder, read_model_config
from lmtool.tokenizer import load_tokenizer
from tests.checkpoint.gguf_files import interleave, llama_tensors, write_gguf
from tests.models.test_quantized import IDS, KINDS, quantize
from tests.quant.models import DIFFERENCES, tiny_folder
from tests.quant.models import run as quantize_model
from tests.support import all_logits, check_greedy, request, run_all

WITHOUT_ORDER = [kind for kind in KINDS if kind != "gptq act-order"]


def to_workspace(model: Path, **settings: object) -> tuple[Path, Converted]:
    destination = model.parent / "workspace"
    return destination, convert(Job(source=model, name=str(model), destination=destination, **settings))  # type: ignore[arg-type]


def logits(path: Path) -> torch.Tensor:
    decoder, _ = open_decoder(path, EngineConfig(dtype="float32", device="cpu"))
    return all_logits(decoder, [i % decoder.config.vocab_size for i in IDS])


def odd_sizes(architecture: str) -> dict[str, int]:
    return {"intermediate_size": 128} if architecture != "QWenLMHeadModel" else {}


@pytest.mark.parametrize("architecture", DIFFERENCES)
def test_dense_weights_come_back_bit_by_bit(architecture: str, tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model", architecture)
    workspace, made = to_workspace(model)
    assert made.exact
    assert made.difference is not None
    assert made.difference.equal
    torch.testing.assert_close(logits(workspace), logits(model), rtol=0, atol=0)
    exported = export(workspace, tmp_path / "hf")
    assert exported.difference is not None
    assert exported.difference.equal
    original, back = load_file(model / "model.safetensors"), load_file(tmp_path / "hf/model.safetensors")
    assert original.keys() == back.keys()
    for name, tensor in original.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", DIFFERENCES)
def test_codes_stay_codes(architecture: str, kind: str, tmp_path: Path) -> None:
    model = quantize(tiny_folder(tmp_path / "model", architecture, **odd_sizes(architecture)), **KINDS[kind])
    workspace, made = to_workspace(model)
    assert made.exact
    read, written = open_checkpoint(model), open_checkpoint(workspace)
    assert sum(written.dtype(name) == "int4" for name in written.names()) == 4 * 3
    torch.testing.assert_close(logits(workspace), logits(model), rtol=0, atol=0)
    exported = export(workspace, tmp_path / "hf")
    if kind not in WITHOUT_ORDER:
        assert exported.why_numbers is not None
        assert "act-order" in exported.why_numbers
        return
    back = open_checkpoint(tmp_path / "hf")
    assert back.format == "awq"
    for name in read.names():
        expected, actual = read.packed_int4(name), back.packed_int4(name)
        assert (expected is None) == (actual is None)
        if expected is not None and actual is not None:
            for part in ("codes", "scale", "zero"):
                assert torch.equal(getattr(expected, part), getattr(actual, part)), (name, part)


def test_act_order_comes_back_as_the_numbers_it_stands_for(tmp_path: Path) -> None:
    model = quantize(tiny_folder(tmp_path / "model", intermediate_size=128), **KINDS["gptq act-order"])
    workspace, _ = to_workspace(model)
    made = export(workspace, tmp_path / "hf", dtype="float32")
    assert made.difference is not None
    assert made.difference.equal
    expected = load_file(model / "dense/model.safetensors")
    back = load_file(tmp_path / "hf/model.safetensors")
    assert all(torch.equal(back[name], tensor.float()) for name, tensor in expected.items())


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "F16", "Q5_1"])
def test_gguf_to_the_engine_to_hugging_face(kind: str, tmp_path: Path) -> None:
    chosen = GGMLQuantizationType[kind]
    tensors = {
        name: (
            interleave(array, {"q": 4, "k": 2}[name[-8]]) if name[-8:-7] in ("q", "k") else array,
            chosen if array.ndim == 2 else GGMLQuantizationType.F32,
        )
        for name, array in llama_tensors().items()
    }
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "default"}
    path = write_gguf(tmp_path / "model.gguf", tensors, metadata | {"vocab_size": 40})
    folder = tmp_path / "tokenizer"
    tiny_folder(folder)
    workspace, made = to_workspace(path, tokenizer_path=folder)
    assert made.exact == (kind != "Q5_1")  # which is unpacked to float16
    if kind != "Q5_1":
        torch.testing.assert_close(logits(workspace), logits(path), rtol=0, atol=0)
    export(workspace, tmp_path / "hf", dtype="float32")
    torch.testing.assert_close(logits(tmp_path / "hf"), logits(workspace), rtol=0, atol=0)
    stored = {open_checkpoint(workspace).dtype(f"layers.0.{matrix}.weight") for matrix in ("qkv", "gate_up", "down")}
    assert stored == {{"Q4_0": "int4", "Q4_1": "q4_1", "Q8_0": "q8_0", "F16": "float16", "Q5_1": "float16"}[kind]}


@pytest.mark.parametrize("kind", ["awq", "gptq act-order"])
def test_the_engine_runs_a_workspace_s_codes_on_a_cpu(kind: str, tmp_path: Path) -> None:
    model = quantize(tiny_folder(tmp_path / "model", intermediate_size=128), **KINDS[kind])
    workspace, _ = to_workspace(model)
    answers = []
    for path in (model, workspace):
        loaded = load_engine(path, EngineConfig(device="cpu", max_batch_size=2))
        assert loaded.weights == "int4"
        answers.append(run_all(loaded.core, [request(1, IDS, max_new_tokens=20)]))
    assert answers[0] == answers[1]
    assert isinstance(open_decoder(workspace, EngineConfig(device="cpu"))[0].layers[0].qkv, Int4Cpu)


@pytest.mark.parametrize("tied", [True, False])
def test_an_int8_head_goes_along(tied: bool, tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "float", tie_word_embeddings=tied)
    quantize_model(model, tmp_path / "model", None, method="rtn", head_bits=8)
    workspace, made = to_workspace(tmp_path / "model")
    assert made.exact
    torch.testing.assert_close(logits(workspace), logits(tmp_path / "model"), rtol=0, atol=0)
    made_back = export(workspace, tmp_path / "hf")
    assert made_back.difference is not None
    assert made_back.difference.equal
    first, back = load_file(tmp_path / "model/model.safetensors"), load_file(tmp_path / "hf/model.safetensors")
    assert torch.equal(first["lm_head.codes"], back["lm_head.codes"])
    assert torch.equal(first["lm_head.scale"], back["lm_head.scale"])


def test_a_card_s_kernels_get_the_tiles_as_they_lie(tmp_path: Path) -> None:
    model = quantize(tiny_folder(tmp_path / "model", intermediate_size=128), **KINDS["awq"])
    workspace, _ = to_workspace(model)
    checkpoint = open_checkpoint(workspace)
    outline = outline_decoder(checkpoint, read_model_config(checkpoint.config), torch.float16, keep_int4=True)
    for ours in ("qkv", "o", "gate_up", "down"):
        matrix, stored = getattr(outline.layers[0], ours), checkpoint.stored_w4(f"layers.0.{ours}.weight")
        assert isinstance(matrix, W4)
        assert stored is not None
        assert matrix.tiles.tiles.shape == stored.tiles.shape
        assert matrix.tiles.paired == (ours == "gate_up")


def test_a_workspace_of_a_workspace_s_export_is_the_same(tmp_path: Path) -> None:
    model = quantize(tiny_folder(tmp_path / "a/model", "InternLM2ForCausalLM", intermediate_size=128), method="awq")
    first, _ = to_workspace(model)
    export(first, tmp_path / "b/hf")
    second, _ = to_workspace(tmp_path / "b/hf")
    sums = [
        {part.name: part.xxh3 for weight in Workspace(path).manifest.weights.values() for part in weight.parts.values()}
        for path in (first, second)
    ]
    assert sums[0] == sums[1]


def test_transformers_reads_what_goes_back(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    workspace, _ = to_workspace(tiny_folder(tmp_path / "model", "Qwen3ForCausalLM", model_type="qwen3"))
    export(workspace, tmp_path / "hf")
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)(
            torch.tensor([IDS])
        ).logits
    torch.testing.assert_close(logits(workspace), expected[0])


def test_the_tokenizer_and_its_template_go_along(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model")
    workspace, made = to_workspace(model, chat_template="chatml")
    messages = [{"role": "user", "content": "hi"}]
    chosen = load_tokenizer(model, chat_template="chatml").render_chat(messages)
    assert load_tokenizer(workspace).render_chat(messages) == chosen
    assert made.manifest.chat_template is not None
    export(workspace, tmp_path / "hf")
    assert load_tokenizer(tmp_path / "hf").render_chat(messages) == chosen


def test_a_tensor_s_slice_is_read_alone(tmp_path: Path) -> None:
    """What a share of a matrix costs to read is its own bytes, along either dimension."""
    model = quantize(tiny_folder(tmp_path / "model", intermediate_size=256, hidden_size=256), method="awq")
    workspace, _ = to_workspace(model)
    checkpoint = open_checkpoint(workspace)
    tiles, dense = checkpoint.stored_w4("layers.1.down.weight"), checkpoint.stored("embed")
    assert tiles is not None
    assert dense is not None
    for stored, dim, start, stop in (
        (tiles.tiles, 1, 1, 2),
        (tiles.tiles, 0, 2, 5),
        (dense, 0, 3, 9),
        (dense, 1, 64, 128),
    ):
        whole = stored.read()
        before = _bytes_read()
        part = stored.read_slice(dim, start, stop)
        assert _bytes_read() - before < part.nbytes + 1000
        assert torch.equal(part, whole.narrow(dim, start, stop - start))


def _bytes_read() -> int:
    """By this thread, by any call (the reading of this file is in it): others of the process may read as well."""
    return int(Path("/proc/thread-self/io").read_text().split()[1])


def test_nibbles_are_joined_and_split() -> None:
    codes = torch.randint(16, (5, 64), dtype=torch.uint8)
    assert torch.equal(split_nibbles(join_nibbles(codes)), codes)


def test_settings_of_the_workspace_hold_where_nothing_is_said(tmp_path: Path) -> None:
    workspace, _ = to_workspace(tiny_folder(tmp_path / "model"))
    (workspace / "engine.toml").write_text("session_len = 64\nmax_batch_size = 3\nquant_policy = 0\n")
    assert load_engine(workspace, EngineConfig(device="cpu")).plan.session_len == 64
    assert load_engine(workspace, EngineConfig(device="cpu", session_len=100)).plan.session_len == 100
    for line, said in (
        ("session_len = 'long'", "--session-len is 'long'"),
        ("sesion_len = 5", "sesion_len is no setting"),
        ("quant_policy = 3", "--quant-policy is 3"),
        ("session_len", "engine.toml"),
    ):
        (workspace / "engine.toml").write_text(line)
        with pytest.raises(ConfigError, match=said):
            load_engine(workspace, EngineConfig(device="cpu"))


def test_as_written_every_setting_of_engine_toml_can_be_turned_on(tmp_path: Path) -> None:
    workspace, _ = to_workspace(tiny_folder(tmp_path / "model"))
    file = workspace / "engine.toml"
    settings = [line.removeprefix("# ") for line in file.read_text().splitlines() if " = " in line]
    assert len(settings) == 9
    small = re.sub(r"(cache\w*_gb) = [0-9.]+", r"\1 = 0.01", "\n".join(settings))  # whatever memory is free
    file.write_text(small)
    assert load_engine(workspace, EngineConfig(device="cpu")).plan.session_len == 128


def test_smollm2_from_a_workspace_says_what_the_file_says(tmp_path: Path) -> None:
    from lmtool.checkpoint.hub import resolve_model

    path = resolve_model("smollm2-135m")
    workspace = tmp_path / "workspace"
    made = convert(Job(source=path, name="smollm2-135m", destination=workspace))
    assert made.exact
    assert json.loads((workspace / "lmtool.json").read_text())["source"]["format"] == "gguf"
    ids = load_tokenizer(workspace).chat_ids([{"role": "user", "content": "What is the capital of France?"}])
    assert ids == load_tokenizer(path).chat_ids([{"role": "user", "content": "What is the capital of France?"}])
    expected = open_decoder(path, EngineConfig(device="cpu"))[0]
    answer = run_all(load_engine(workspace, EngineConfig(device="cpu")).core, [request(1, ids, max_new_tokens=8)])[1]
    rows = all_logits(expected, [*ids, *answer], len(ids))[len(ids) - 1 : -1]
    assert check_greedy(answer, rows, torch.bfloat16) >= 1


def test_scales_that_no_tile_can_hold_become_numbers_when_asked(tmp_path: Path) -> None:
    model = quantize(tiny_folder(tmp_path / "model", intermediate_size=128), "awq")
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.scales"
    tensors[name] = tensors[name].float() * (1 + 2**-20)
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers.1.down.weight has scales .* give --dtype float32"):
        to_workspace(model)
    _, made = to_workspace(model, dtype="float32")
    kinds = {name: weight.kind for name, weight in made.manifest.weights.items()}
    assert made.exact
    assert (kinds["layers.0.down.weight"], kinds["layers.1.down.weight"]) == ("w4", "dense")


def test_float64_is_not_exact_as_float32(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    save_file({name: tensor.double() for name, tensor in tensors.items()}, model / "model.safetensors")
    assert not to_workspace(model, dtype="float32")[1].exact
