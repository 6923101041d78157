"""Tiny checkpoints of every family, with a tokenizer, and quantized ones turned back into dense ones."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmtool.checkpoint.packing import unpack_awq
from lmtool.models.loader import read_model_config
from lmtool.models.registry import family
from lmtool.quant.grid import Codes
from lmtool.quant.job import Job
from lmtool.quant.options import CalibrationOptions, QuantOptions
from lmtool.quant.pipeline import quantize
from tests.tokenizer_files import SENTENCES, byte_level_json

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
DIFFERENCES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"tie_word_embeddings": True},
    "MistralForCausalLM": {"sliding_window": 20},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {"head_dim": 32},
    "InternLMForCausalLM": {"num_key_value_heads": 4, "bias": True},
    "InternLM2ForCausalLM": {"bias": False},
    "QWenLMHeadModel": {"num_key_value_heads": 4, "intermediate_size": 192, "kv_channels": 16, "seq_length": 128},
}


def tiny_folder(path: Path, architecture: str = "LlamaForCausalLM", **difference: Any) -> Path:
    """A checkpoint whose matrices have columns of very different sizes, as trained ones do."""
    torch.manual_seed(3)
    library = byte_level_json()
    config = SIZES | {"architectures": [architecture], "vocab_size": library.get_vocab_size()}
    config |= DIFFERENCES[architecture] | difference
    path.mkdir(parents=True, exist_ok=True)
    save_file(_tensors(config), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    library.save(str(path / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def _tensors(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    names, c = family(config).NAMES, read_model_config(config)
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    sizes: dict[str, tuple[list[int], int]] = {
        "qkv": ([q, kv, kv], c.hidden_size),
        "o": ([c.hidden_size], q),
        "gate_up": ([c.intermediate_size] * 2, c.hidden_size),
        "down": ([c.hidden_size], c.intermediate_size),
    }
    tensors = {}

    def add(found: tuple[str, ...], rows: list[int], columns: int | None) -> None:
        parts = rows if len(found) == len(rows) else [sum(rows)]
        for name, size in zip(found, parts, strict=True):
            tensor = torch.randn(size) * 0.1 if columns is None else torch.randn(size, columns) * 0.03
            tensors[name] = tensor * torch.exp(0.7 * torch.randn(columns)) if columns else tensor

    add(names["embed"], [c.vocab_size], c.hidden_size)
    tensors[names["final_norm"][0]] = torch.rand(c.hidden_size) + 0.5
    if not c.tie_word_embeddings:
        add(names["head.weight"], [c.vocab_size], c.hidden_size)
    for i in range(c.num_layers):
        numbered = {ours: tuple(name.format(i=i) for name in found) for ours, found in names.items()}
        for norm in ("attention_norm", "mlp_norm"):
            tensors[numbered[f"layers.{{i}}.{norm}"][0]] = torch.rand(c.hidden_size) + 0.5
        for norm in ("q_norm", "k_norm") if c.qk_norm else ():
            tensors[numbered[f"layers.{{i}}.{norm}"][0]] = torch.rand(c.head_dim) + 0.5
        for ours, (rows, columns) in sizes.items():
            add(numbered[f"layers.{{i}}.{ours}.weight"], rows, columns)
        if c.qkv_bias:
            add(numbered["layers.{i}.qkv.bias"], sizes["qkv"][0], None)
        if c.o_bias:
            add(numbered["layers.{i}.o.bias"], sizes["o"][0], None)
    return tensors


def text_file(path: Path, repeats: int = 20) -> Path:
    path.write_text("\n".join(SENTENCES * repeats))
    return path


class Silent:
    """Watches nothing."""

    def planned(self, plan: Any) -> None: ...
    def block_done(self, block: int, report: Any, seconds: float) -> None: ...
    def writing(self) -> None: ...


def job(model: Path, work_dir: Path, dataset: Path | None, *, fresh: bool = False, **options: Any) -> Job:
    calibration = {key: options.pop(key) for key in ("samples", "seqlen", "seed") if key in options}
    return Job(
        model=model,
        work_dir=work_dir,
        options=QuantOptions(**({"group_size": 32} | options)),
        calibration=CalibrationOptions(dataset=str(dataset), **({"samples": 6, "seqlen": 40} | calibration)),
        device=torch.device("cpu"),
        fresh=fresh,
    )


def run(*args: Any, **options: Any) -> dict[str, Any]:
    return quantize(job(*args, **options), Silent())


def as_gptq_readers_do(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor) -> Tensor:
    """[N, K] float32 in the format's own words, which know no wrap-around: scales[g_idx] · (code - (stored + 1))."""
    bits = 32 * qweight.shape[0] // g_idx.shape[0]
    shifts, mask = torch.arange(0, 32, bits), (1 << bits) - 1
    codes = ((qweight[:, None] >> shifts[:, None]) & mask).reshape(len(g_idx), -1)
    zeros = ((qzeros[..., None] >> shifts) & mask).reshape(len(scales), -1) + 1
    return (scales[g_idx].float() * (codes - zeros[g_idx])).t()


def dense_again(quantized: Path, folder: Path) -> Path:
    """The same weights as numbers, for a reader that knows no AWQ."""
    tensors: dict[str, torch.Tensor] = {}
    for file in quantized.glob("*.safetensors"):
        tensors |= load_file(file)
    parts = ("qweight", "qzeros", "scales", "g_idx")
    dense = {name: tensor for name, tensor in tensors.items() if not name.endswith(parts)}
    for name, qweight in tensors.items():
        if name.endswith(".qweight"):
            stem = name.removesuffix(".qweight")
            qzeros, scales = tensors[f"{stem}.qzeros"], tensors[f"{stem}.scales"]
            if f"{stem}.g_idx" in tensors:
                dense[f"{stem}.weight"] = as_gptq_readers_do(qweight, qzeros, scales, tensors[f"{stem}.g_idx"])
            else:
                dense[f"{stem}.weight"] = Codes(*unpack_awq(qweight, qzeros, scales)).dequantize()
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in dense.items()}, folder / "model.safetensors")
    config = json.loads((quantized / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder
