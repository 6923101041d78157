"""What AWQ's format cannot say: 8 bits and fixed zero points in GPTQ's, and an int8 head of lmtool's own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmtool.checkpoint.formats import open_checkpoint
from lmtool.errors import CheckpointError
from lmtool.layers.weights import Int4Cpu, Int8Cpu, round_int8
from lmtool.models.decoder import Decoder
from lmtool.models.loader import load_decoder, read_model_config
from tests.quant.models import dense_again, run, text_file, tiny_folder
from tests.support import all_logits
from tests.tokenizer_files import SENTENCES, byte_level_json

KINDS: dict[str, dict[str, Any]] = {
    "8 bits": {"bits": 8},
    "symmetric": {"symmetric": True},
    "8 bits, symmetric": {"bits": 8, "symmetric": True},
}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return text_file(tmp_path / "text.txt")


def load(folder: Path, *, keep_int4: bool = False) -> Decoder:
    checkpoint = open_checkpoint(folder)
    return load_decoder(
        checkpoint,
        read_model_config(checkpoint.config),
        dtype=torch.float32,
        device=torch.device("cpu"),
        num_positions=128,
        keep_int4=keep_int4,
    )


def logits(folder: Path, *, keep_int4: bool = False) -> torch.Tensor:
    ids = byte_level_json().encode(" ".join(SENTENCES[:3])).ids
    return all_logits(load(folder, keep_int4=keep_int4), ids)


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "InternLM2ForCausalLM"])
def test_gptqs_files_hold_what_was_rounded(architecture: str, kind: str, tmp_path: Path, text: Path) -> None:
    model, out = tiny_folder(tmp_path / "model", architecture), tmp_path / "out"
    options = KINDS[kind]
    bits, symmetric = options.get("bits", 4), options.get("symmetric", False)
    run(model, out, text, **options)
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    assert said == {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": 32,
        "sym": symmetric,
        "desc_act": False,
        "checkpoint_format": "gptq",
        "lm_head": False,
    }
    tensors = load_file(out / "model.safetensors")
    if architecture != "InternLM2ForCausalLM":
        down = "model.layers.1.mlp.down_proj"
        shapes = {part: tuple(tensors[f"{down}.{part}"].shape) for part in ("qweight", "qzeros", "scales", "g_idx")}
        assert shapes == {
            "qweight": (96 * bits // 32, 64),
            "qzeros": (3, 64 * bits // 32),
            "scales": (3, 64),
            "g_idx": (96,),
        }
        if symmetric:
            assert set(tensors[f"{down}.qzeros"].flatten().tolist()) == {0x77777777 if bits == 4 else 0x7F7F7F7F}
    # another reader's arithmetic on the file's own tensors, and ours: the same numbers
    torch.testing.assert_close(logits(out), logits(dense_again(out, tmp_path / "dense")), rtol=0, atol=0)
    assert distance(logits(out), logits(model)) < (0.01 if bits == 8 else 0.25)


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_rounds_to_these_levels(kind: str, tmp_path: Path, text: Path) -> None:
    model, errors = tiny_folder(tmp_path / "model"), {}
    for method in ("smooth", "awq", "gptq", "best"):
        quality = run(model, tmp_path / method, text, method=method, **KINDS[kind])
        entries = [entry for layer in quality["layers"] for entry in layer["linears"]]
        errors[method] = sum(e["error"] for e in entries) / sum(e["error_plain"] for e in entries)
        assert quality["fallbacks"] == []
    assert errors["best"] < errors["gptq"] < 1
    assert errors["best"] < errors["awq"] < errors["smooth"] < 1


def test_4_bit_codes_with_a_fixed_zero_run_as_codes(tmp_path: Path, text: Path) -> None:
    model, out = tiny_folder(tmp_path / "model"), tmp_path / "out"
    run(model, out, text, symmetric=True)
    assert isinstance(load(out, keep_int4=True).layers[0].qkv, Int4Cpu)
    assert distance(logits(out, keep_int4=True), logits(out)) < 0.03


def test_what_is_skipped_is_said_in_gptqs_words(tmp_path: Path, text: Path) -> None:
    model, out = tiny_folder(tmp_path / "model"), tmp_path / "out"
    run(model, out, text, bits=8, skip=(r"layers\.1\.mlp\.(gate|up)",))
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    stem = r"-:model\.layers\.1\.mlp\."
    assert set(said["dynamic"]) == {f"{stem}gate_proj$", f"{stem}up_proj$", f"{stem}gate_up_proj$"}
    assert distance(logits(out), logits(model)) < 0.01


# ------------------------------------------------------------------ the int8 head


@pytest.mark.parametrize("tied", [True, False])
def test_an_int8_head_is_stored_and_multiplied_as_it_is(tied: bool, tmp_path: Path, text: Path) -> None:
    model = tiny_folder(tmp_path / "model", tie_word_embeddings=tied, model_type="llama")
    quality = run(model, tmp_path / "out", text, head_bits=8)
    run(model, tmp_path / "plain", text)
    assert quality["head_bits"] == 8
    tensors, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    added = {"lm_head.codes": torch.int8, "lm_head.scale": torch.bfloat16}
    assert {name: tensor.dtype for name, tensor in tensors.items() if name not in plain} == added
    assert set(plain) - set(tensors) == (set() if tied else {"lm_head.weight"})
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["quantization_config"]["quant_method"] == "awq"
    assert said["quantization_config"]["head_bits"] == 8
    assert said["model_type"] == ("llama" if tied else "lmtool_llama")
    source = load_file(model / "model.safetensors")["model.embed_tokens.weight" if tied else "lm_head.weight"]
    numbers = tensors["lm_head.codes"].float() * tensors["lm_head.scale"].float()[:, None]
    assert ((numbers - source).abs() <= 0.51 * tensors["lm_head.scale"].float()[:, None]).all()
    decoder = load(tmp_path / "out")
    assert torch.equal(decoder.head.weight, numbers)  # type: ignore[attr-defined]
    on_cpu = load(tmp_path / "out", keep_int4=True).head
    assert isinstance(on_cpu, Int8Cpu)
    assert torch.equal(on_cpu._codes, tensors["lm_head.codes"])
    assert torch.equal(on_cpu._scale, tensors["lm_head.scale"])
    assert open_checkpoint(tmp_path / "out").dtype("lm_head.weight") == "int8"
    assert 0 < distance(logits(tmp_path / "out"), logits(tmp_path / "plain")) < 0.02


def test_rounding_a_head_again_changes_nothing() -> None:
    codes, scale = round_int8(torch.randn(300, 64) * torch.rand(300, 1))
    again = round_int8(codes.float() * scale.float()[:, None])
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], scale)
    assert int(codes.abs().max()) == 127


def test_many_rows_and_few_rows_of_an_int8_head_agree() -> None:
    weight = torch.randn(200, 64)
    head, x = Int8Cpu(*round_int8(weight)), torch.randn(40, 64)
    few = torch.cat([head.linear(rows) for rows in x.split(5)])
    assert head._dense is None
    many = head.linear(x)
    assert distance(few, many) < 5e-3  # rows are bfloat16 in torch's kernel
    assert distance(many, x @ weight.t()) < 1e-2


def test_other_readers_pass_over_the_codes_or_refuse_the_model(tmp_path: Path, text: Path) -> None:
    from transformers import AutoModelForCausalLM

    run(tiny_folder(tmp_path / "own", "Qwen2ForCausalLM", model_type="qwen2"), tmp_path / "a", text, head_bits=8)
    with pytest.raises(ValueError, match="model type `lmtool_qwen2`"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    run(tiny_folder(tmp_path / "tied", model_type="llama"), tmp_path / "b", text, head_bits=8)
    folder = dense_again(
        tmp_path / "b", tmp_path / "dense"
    )  # what AWQ's codes stand for: transformers alone has no AWQ
    assert "lm_head.codes" in load_file(folder / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = byte_level_json().encode(SENTENCES[0]).ids
    with torch.inference_mode():
        theirs = model(torch.tensor([ids])).logits[0]
    run(tmp_path / "tied", tmp_path / "plain", text)
    torch.testing.assert_close(theirs, all_logits(load(tmp_path / "plain"), ids), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("lm_head.scale", None, r"lm_head\.scale is missing"),
        ("lm_head.codes", None, r"lm_head\.codes is missing"),
        ("lm_head.scale", torch.ones(3).bfloat16(), r"lm_head\.scale \(bfloat16 \[3\]\) are no int8 head"),
    ],
)
def test_a_damaged_head_is_named(
    name: str, tensor: torch.Tensor | None, message: str, tmp_path: Path, text: Path
) -> None:
    run(tiny_folder(tmp_path / "model"), tmp_path / "out", text, head_bits=8)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors.pop(name)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "out")
