"""AWQ and GPTQ checkpoints of others: read, refused, run as numbers and as 4-bit codes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmtool import kernels
from lmtool.checkpoint.formats import open_checkpoint
from lmtool.checkpoint.packing import pack_awq, pack_gptq
from lmtool.config import EngineConfig
from lmtool.engine.setup import load_engine
from lmtool.errors import CheckpointError, ConfigError
from lmtool.layers.weights import W4, Int4Cpu
from lmtool.models.decoder import Decoder
from lmtool.models.loader import load_decoder, outline_decoder, read_model_config
from lmtool.models.registry import family
from lmtool.models.source import Source, tiles_of
from tests.quant.models import DIFFERENCES, tiny_folder
from tests.support import all_logits, request, run_all

GROUP = 32
IDS = [5, 17, 3, 44, 8, 21, 60, 2, 9, 11, 30, 7]
CPU = torch.device("cpu")


def rounded(weight: Tensor, order: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """codes, scale, zero of the columns in ``order``, and what they stand for with columns as they were."""
    columns = torch.arange(weight.shape[1]) if order is None else order
    grouped = weight[:, columns].float().view(len(weight), -1, GROUP)
    low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
    scale = ((high - low) / 15).half()
    zero = (-low / scale.float()).round().clamp(0, 15)
    codes = (grouped / scale.float()[..., None] + zero[..., None]).round().clamp(0, 15)
    dense = torch.empty_like(weight, dtype=torch.float32)
    dense[:, columns] = ((codes - zero[..., None]) * scale.float()[..., None]).flatten(1)
    return codes.flatten(1).to(torch.uint8), scale, zero.to(torch.uint8), dense


def quantize(folder: Path, method: str, *, act_order: bool = False, version: str = "") -> Path:
    """Rewrite a tiny checkpoint as ``method`` would; beside it in ``dense`` what its codes stand for."""
    config = json.loads((folder / "config.json").read_text())
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(1)
    orders: dict[int, Tensor] = {}
    names = family(config).NAMES
    ends = {*names["embed"], *names["head.weight"]}
    for name, tensor in load_file(folder / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        if tensor.ndim < 2 or name in ends:
            tensors[name] = plain[name] = tensor
            continue
        order = None
        if act_order:
            order = orders.setdefault(tensor.shape[1], torch.randperm(tensor.shape[1], generator=generator))
        codes, scale, zero, plain[name] = rounded(tensor, order)
        if method == "awq":
            packed = pack_awq(codes, scale, zero)
        else:
            group_of = torch.arange(tensor.shape[1], dtype=torch.int32) // GROUP
            in_file = codes
            if order is not None:
                group_of, in_file = torch.empty_like(group_of), torch.empty_like(codes)
                group_of[order] = torch.arange(tensor.shape[1], dtype=torch.int32) // GROUP
                in_file[:, order] = codes
            packed = pack_gptq(in_file, scale, zero, offset=0 if version == "gptq_v2" else 1)
            tensors[f"{stem}.g_idx"] = group_of
        tensors |= zip((f"{stem}.qweight", f"{stem}.qzeros", f"{stem}.scales"), packed, strict=True)
    (folder / "dense").mkdir()
    save_file({name: tensor.contiguous() for name, tensor in plain.items()}, folder / "dense/model.safetensors")
    (folder / "dense/config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    said: dict[str, Any] = {"quant_method": method, "bits": 4, "group_size": GROUP}
    said |= {"version": "gemm", "zero_point": True} if method == "awq" else {"desc_act": act_order, "sym": False}
    if version:
        said["checkpoint_format"] = version
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    return folder


def load(folder: Path, *, keep_int4: bool = False) -> Decoder:
    checkpoint = open_checkpoint(folder)
    config = read_model_config(checkpoint.config)
    return load_decoder(checkpoint, config, dtype=torch.float32, device=CPU, num_positions=512, keep_int4=keep_int4)


KINDS = {
    "awq": {"method": "awq"},
    "gptq": {"method": "gptq"},
    "gptq v2": {"method": "gptq", "version": "gptq_v2"},
    "gptq act-order": {"method": "gptq", "act_order": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", DIFFERENCES)
def test_every_family_runs_as_numbers_and_as_codes(architecture: str, kind: str, tmp_path: Path) -> None:
    difference = {"intermediate_size": 128} if architecture != "QWenLMHeadModel" else {}
    folder = quantize(tiny_folder(tmp_path / "m", architecture, **difference), **KINDS[kind])
    expected = all_logits(load(folder / "dense"), IDS)
    as_numbers = all_logits(load(folder), IDS)
    torch.testing.assert_close(as_numbers, expected, rtol=0, atol=0)
    as_codes = load(folder, keep_int4=True)
    assert all(isinstance(layer.qkv, Int4Cpu) and isinstance(layer.gate_up, Int4Cpu) for layer in as_codes.layers)
    # products of bfloat16 rows, one row at a time and many at once; the head is rounded to 8 bits
    for num_prefill in (len(IDS), 1):
        actual = all_logits(as_codes, IDS, num_prefill)
        assert (actual - expected).norm() / expected.norm() < 0.03


@pytest.mark.parametrize("kind", KINDS)
def test_the_tiles_for_a_gpu_hold_the_same_integers(kind: str, tmp_path: Path) -> None:
    """Through the loader's own door, the reference kernels standing in for the card."""
    folder = quantize(tiny_folder(tmp_path / "m", intermediate_size=128), **KINDS[kind])
    dense, checkpoint = load(folder / "dense"), open_checkpoint(folder)
    source = Source(checkpoint, read_model_config(checkpoint.config), family(checkpoint.config), torch.float32, CPU)
    for ours in ("qkv", "o", "gate_up", "down"):
        packed = source.packed(f"layers.{{i}}.{ours}.weight", 1)
        assert packed is not None
        matrix = W4(tiles_of(packed, paired=ours == "gate_up"), None, packed.order)
        whole = getattr(dense.layers[1], ours).weight
        columns = slice(None) if packed.order is None else packed.order
        torch.testing.assert_close(kernels.w4_expand(matrix.tiles, torch.float32), whole[:, columns], rtol=0, atol=0)
        x, norm_weight = torch.randn(3, whole.shape[1]), torch.rand(whole.shape[1])
        expected = getattr(dense.layers[1], ours).norm_linear(x, norm_weight, 1e-5)
        torch.testing.assert_close(matrix.norm_linear(x, norm_weight, 1e-5), expected)
        torch.testing.assert_close(matrix.linear(x), getattr(dense.layers[1], ours).linear(x))


def test_an_outline_has_the_shapes_of_what_is_loaded(tmp_path: Path) -> None:
    folder = quantize(tiny_folder(tmp_path / "m", intermediate_size=128), "awq")
    checkpoint = open_checkpoint(folder)
    outline = outline_decoder(checkpoint, read_model_config(checkpoint.config), torch.float16, keep_int4=True)
    matrix = outline.layers[0].gate_up
    assert isinstance(matrix, W4)
    assert matrix.tiles.tiles.is_meta
    assert matrix.tiles.tiles.shape == (8, 2, 512 + 32 * 4)
    assert matrix.tiles.paired


def test_act_order_that_differs_between_q_and_k_is_run_as_numbers(tmp_path: Path) -> None:
    folder = quantize(tiny_folder(tmp_path / "m", intermediate_size=128), "gptq", act_order=True)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj."
    reverse = torch.arange(64).flip(0)
    tensors[name + "g_idx"] = tensors[name + "g_idx"][reverse].contiguous()
    save_file(tensors, folder / "model.safetensors")
    assert not isinstance(load(folder, keep_int4=True).layers[0].qkv, Int4Cpu)


def test_the_engine_finds_out_by_itself_and_the_flag_is_checked(tmp_path: Path) -> None:
    folder = quantize(tiny_folder(tmp_path / "m", intermediate_size=128), "awq")
    assert load_engine(folder, EngineConfig(device="cpu", cache_gb=0.01, model_format="awq")).weights == "int4"
    assert load_engine(folder, EngineConfig(device="cpu", cache_gb=0.01, dtype="float32")).weights == "float32"
    with pytest.raises(ConfigError, match="is 'gptq', .* is 'awq'"):
        load_engine(folder, EngineConfig(device="cpu", model_format="gptq"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, r"awq, gemm, bits 3, group_size 32"),
        ({"version": "gemv"}, "gemv"),
        ({"group_size": 48}, "group_size 48"),
        ({"zero_point": False}, "zero_point False"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"group_size": "32"}, "group_size 32"),
    ],
)
def test_schemes_that_cannot_run_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = quantize(tiny_folder(tmp_path / "m", intermediate_size=128), "awq")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder)
    assert "4-bit AWQ" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        ("scales", None, "scales is missing"),
        ("scales", torch.ones(3, 64).half(), r"scales \[3, 64\] are not those of 64 × 64"),
        ("qzeros", torch.ones(2, 8), "are not those of"),
    ],
)
def test_parts_that_do_not_fit_are_named(part: str, tensor: Tensor | None, message: str, tmp_path: Path) -> None:
    folder = quantize(tiny_folder(tmp_path / "m", intermediate_size=128), "awq")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(f"model.layers.0.self_attn.q_proj.{part}")
    if tensor is not None:
        tensors[f"model.layers.0.self_attn.q_proj.{part}"] = tensor
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_a_config_that_speaks_of_codes_where_there_are_numbers(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="says awq, but no matrix is quantized"):
        open_checkpoint(folder)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_card_the_answers_are_those_of_the_numbers(kind: str, tmp_path: Path) -> None:
    """Alone, a few together and a prompt of hundreds: each kernel of these weights, in the engine's own graphs."""
    folder = quantize(tiny_folder(tmp_path / "m", intermediate_size=128, max_position_embeddings=512), **KINDS[kind])
    loaded = load_engine(folder, EngineConfig(device="cuda", dtype="float16", cache_gb=0.1, max_batch_size=8))
    assert loaded.weights == "w4a16 g32"
    generator = torch.Generator().manual_seed(4)
    lengths = (3, 30, 300)
    prompts = {i: torch.randint(0, 100, (n,), generator=generator).tolist() for i, n in enumerate(lengths)}
    requests = [request(i, prompt, max_new_tokens=30) for i, prompt in prompts.items()]
    together = run_all(loaded.core, requests)
    answers = together | {i + 10: run_all(loaded.core, [one])[i] for i, one in enumerate(requests)}
    dense, compared = load(folder / "dense"), 0
    for number, answer in answers.items():
        prompt = prompts[number % 10]
        top = torch.topk(all_logits(dense, [*prompt, *answer])[len(prompt) - 1 : -1], 2)
        for step, token_id in enumerate(answer):
            if top.values[step, 0] - top.values[step, 1] > 2e-2:
                assert token_id == int(top.indices[step, 0]), (number, step)
                compared += 1
    assert compared > 0.8 * 30 * len(answers)
