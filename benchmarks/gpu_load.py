"""From a workspace in the page cache into a card: an 8B model as float16 numbers and in 4 bits (issue 5).

python -m benchmarks.gpu_load [--shape llama3-8b] [--repeats 3]
The workspace is noise of the right shapes, written as `lmtool convert` writes it, in /dev/shm or the temporary folder.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import torch

from lmtool import kernels
from lmtool.bench.shapes import find_shape
from lmtool.checkpoint.engine_file import ENGINE_FILE, engine_file_text
from lmtool.checkpoint.manifest import MANIFEST
from lmtool.checkpoint.tensor_file import TensorFile
from lmtool.checkpoint.workspace_manifest import TEXT_VERSION, Manifest, SourceEntry
from lmtool.config import EngineConfig
from lmtool.convert.stored import StoredForm
from lmtool.convert.to_workspace import weight_places, write_form
from lmtool.engine.load_weights import open_decoder
from lmtool.models.config import ModelConfig
from lmtool.models.own_names import NAMES

GOAL_GB_S = 3.0
NOISE = 64 << 20


def config_json(model: ModelConfig) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "rms_norm_eps": model.rms_norm_eps,
        "max_position_embeddings": model.max_positions,
        "rope_theta": model.rope.theta,
        "torch_dtype": "float16",
    }


def shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden = model.hidden_size
    return {
        "embed": (model.vocab_size, hidden),
        "final_norm": (hidden,),
        "head.weight": (model.vocab_size, hidden),
        "layers.{i}.attention_norm": (hidden,),
        "layers.{i}.mlp_norm": (hidden,),
        "layers.{i}.qkv.weight": (model.qkv_size, hidden),
        "layers.{i}.o.weight": (hidden, model.num_heads * model.head_dim),
        "layers.{i}.gate_up.weight": (2 * model.intermediate_size, hidden),
        "layers.{i}.down.weight": (hidden, model.intermediate_size),
    }


def forms(model: ModelConfig, group_size: int | None) -> Iterator[tuple[str, StoredForm]]:
    noise = torch.empty(NOISE // 2).normal_(0, 0.02, generator=torch.Generator().manual_seed(0)).half()
    words = noise.view(torch.int32)
    wanted = [name for name in NAMES if name in shapes(model)]
    for ours, i in weight_places(wanted, model):
        shape = shapes(model)[ours]
        if group_size is None or len(shape) == 1 or not ours.startswith("layers."):
            count = torch.Size(shape).numel()
            values = noise.repeat(-(-count // len(noise)))[:count].view(shape)
            yield ours.format(i=i), StoredForm("dense", shape, {"values": values})
            continue
        paired = "gate_up" in ours
        tiles = kernels.empty_w4(*shape, group_size, torch.device("cpu"), paired=paired).tiles
        tiles.view(-1).copy_(words.repeat(-(-tiles.numel() // len(words)))[: tiles.numel()])
        yield ours.format(i=i), StoredForm("w4", shape, {"tiles": tiles}, group_size, paired)


def write_workspace(folder: Path, model: ModelConfig, group_size: int | None) -> int:
    entries = {}
    with TensorFile(folder / "weights-00001.safetensors", 1000) as file:
        for name, form in forms(model, group_size):
            entries[name] = write_form(file, name, form)
        num_bytes = file.num_bytes
    source = SourceEntry("noise", "hf", {})
    manifest = Manifest(TEXT_VERSION, "0", source, config_json(model), {}, "float16", None, None, entries)
    (folder / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    (folder / ENGINE_FILE).write_text(engine_file_text(model.max_positions))
    return num_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llama3-8b")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    model = find_shape(args.shape)
    shm = Path("/dev/shm")
    place = shm if shm.exists() and shutil.disk_usage(shm).free > 3 * model.num_parameters else None
    for group_size in (None, 128):
        with tempfile.TemporaryDirectory(dir=place) as folder:
            begun = time.perf_counter()
            num_bytes = write_workspace(Path(folder), model, group_size)
            written_s = time.perf_counter() - begun
            seconds = []
            for _ in range(args.repeats + 1):
                begun = time.perf_counter()
                decoder, stored = open_decoder(Path(folder), EngineConfig(device=args.device))
                if args.device == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - begun)
                del decoder
            median = statistics.median(seconds[1:])
            print(
                f"{args.shape} {stored}: {num_bytes / 1e9:.2f} GB written at {num_bytes / 1e9 / written_s:.1f} GB/s in "
                f"{place or 'tmp'}; loaded in {median:.2f} s ({', '.join(f'{s:.2f}' for s in seconds)}) = "
                f"{num_bytes / 1e9 / median:.1f} GB/s (goal {GOAL_GB_S})",
                flush=True,
            )


if __name__ == "__main__":
    main()
