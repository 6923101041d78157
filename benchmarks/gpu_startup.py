"""From a process's start to the first token of an 8B model in local files, kernel cache cold and warm (issue 3).

python -m benchmarks.gpu_startup [--shape llama3-8b] [--repeats 3]
Makes a checkpoint of float16 noise (four shards; the same 64 MiB of N(0, 0.02²) over and over) in /dev/shm or, where
that is too small, in the temporary folder. The files have just been written: they are in the page cache, and a cold
disk is not measured. Each start is a fresh process: token ids in and out, 128 of them in, no tokenizer. Cold means an
empty TRITON_CACHE_DIR.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmtool.models.config import ModelConfig

NUM_SHARDS = 4
NOISE_BYTES = 64 << 20
GOALS = {"cold": (30.0, 15.0), "warm": (12.0, 6.0)}  # first bar, goal, in seconds


# ---------------------------------------------------------------------- the checkpoint
def write_checkpoint(folder: Path, model: "ModelConfig") -> int:
    """config.json and shards of a Llama of this shape; bytes of weights."""
    import torch

    hidden, inner, head = model.hidden_size, model.intermediate_size, model.head_dim
    kv_size = model.num_kv_heads * head
    q_size = model.num_heads * head
    shapes = {"model.embed_tokens.weight": [model.vocab_size, hidden], "model.norm.weight": [hidden]}
    shapes["lm_head.weight"] = [model.vocab_size, hidden]
    for i in range(model.num_layers):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}{name}_layernorm.weight": [hidden] for name in ("input", "post_attention")}
        shapes |= {f"{layer}self_attn.{name}_proj.weight": [kv_size, hidden] for name in "kv"}
        shapes |= {
            f"{layer}self_attn.q_proj.weight": [q_size, hidden],
            f"{layer}self_attn.o_proj.weight": [hidden, q_size],
        }
        shapes |= {f"{layer}mlp.{name}_proj.weight": [inner, hidden] for name in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = [hidden, inner]
    noise = torch.empty(NOISE_BYTES // 2).normal_(0, 0.02, generator=torch.Generator().manual_seed(0)).half()
    names = list(shapes)
    parts = [names[i * len(names) // NUM_SHARDS : (i + 1) * len(names) // NUM_SHARDS] for i in range(NUM_SHARDS)]
    files = [folder / f"model-{i + 1:05}-of-{NUM_SHARDS:05}.safetensors" for i in range(NUM_SHARDS)]
    with ThreadPoolExecutor(NUM_SHARDS) as pool:
        data = noise.view(torch.uint8).numpy().data
        sizes = pool.map(
            lambda file, part: write_shard(file, {name: shapes[name] for name in part}, data), files, parts
        )
        total = sum(sizes)
    (folder / "config.json").write_text(json.dumps(hf_config(model)))
    return total


def hf_config(model: "ModelConfig") -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "float16",
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
        "tie_word_embeddings": False,
    }


def write_shard(file: Path, shapes: dict[str, list[int]], noise: memoryview) -> int:
    """One safetensors file; bytes of its tensors."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb", buffering=0) as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for left in range(end, 0, -len(noise)):
            piece = noise[: min(left, len(noise))]
            while len(piece):
                piece = piece[out.write(piece) :]
    return end


# ---------------------------------------------------------------------- one start, in a process of its own
def start(folder: Path, began: float) -> None:
    """Prints one JSON object: what was reached how many seconds after ``began`` (time.time), and counts."""
    reached = {"python": time.time() - began}
    import torch

    from lmtool.config import EngineConfig
    from lmtool.engine.sequence import Request
    from lmtool.engine.setup import load_engine

    reached["imports"] = time.time() - began
    torch.cuda.mem_get_info()
    reached["CUDA context"] = time.time() - began
    missed: list[str] = []
    ends = {"loading weights": "weights", "compiling kernels": "kernels", "capturing decode steps": "graphs"}

    def progress(what: str, done: int, total: int) -> None:
        if done == total:
            reached[ends[what]] = time.time() - began
        if what == "compiling kernels" and done == total:
            count_compilations(missed)

    loaded = load_engine(folder, EngineConfig(device="cuda", dtype="float16"), progress)
    reached["engine"] = time.time() - began
    from lmtool.config import GenerationConfig

    params = GenerationConfig(temperature=0.0, max_new_tokens=2, ignore_eos=True)
    request = Request(request_id=0, prompt_ids=tuple(range(1, 129)), params=params, stop_ids=frozenset(), seed=0)
    loaded.core.add(request)
    outputs: list[Any] = []
    while not outputs:
        outputs = [output for output in loaded.core.step() if output.token_id is not None]
    reached["first token"] = time.time() - began
    print(json.dumps({"reached": reached, "missed": missed, "peak_rss": peak_rss()}), flush=True)


def count_compilations(missed: list[str]) -> None:
    """From now on, the name of every kernel that is compiled or fetched from the disk's cache."""
    from triton import knobs

    def note(*, fn: Any, **_: Any) -> None:
        missed.append(fn.name)

    knobs.runtime.jit_post_compile_hook = note


def peak_rss() -> float:
    """GiB of host memory, mapped files not counted."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["RssAnon"].split()[0]) / (1 << 20)


# ---------------------------------------------------------------------- all of it
@contextmanager
def scratch(num_bytes: int) -> Iterator[Path]:
    """A new folder where so much fits: in memory if it can be."""
    shm = Path("/dev/shm")
    roomy = shm.is_dir() and shutil.disk_usage(shm).free > num_bytes
    with tempfile.TemporaryDirectory(prefix="lmtool-startup-", dir=shm if roomy else None) as folder:
        yield Path(folder)


def show(kind: str, found: dict[str, Any], num_bytes: int) -> None:
    reached: dict[str, float] = found["reached"]
    bar, goal = GOALS[kind]
    total = reached["first token"]
    mark = "goal" if total <= goal else "first bar" if total <= bar else "MISSED"
    print(f"{kind}: {total:.2f} s to the first token (bar {bar:g}, goal {goal:g}: {mark})")
    before = 0.0
    for name, at in reached.items():
        print(f"    {name:14} {at:6.2f} s  {at - before:+6.2f}")
        before = at
    rate = num_bytes / (reached["weights"] - reached["CUDA context"]) / 1e9
    print(f"    weights at {rate:.1f} GB/s, {found['peak_rss']:.2f} GiB of host memory at the end")
    print(f"    compiled or fetched after the rehearsal's: {found['missed'] or 'nothing'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llama3-8b")
    parser.add_argument("--repeats", type=int, default=3, help="of the warm start")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.began is not None:
        start(arguments.folder, arguments.began)
        return
    from lmtool.bench.shapes import find_shape

    with scratch(40 << 30) as folder:
        written = time.perf_counter()
        num_bytes = write_checkpoint(folder, find_shape(arguments.shape))
        print(f"{num_bytes / 1e9:.1f} GB written to {folder} in {time.perf_counter() - written:.1f} s", flush=True)
        with tempfile.TemporaryDirectory(prefix="lmtool-kernels-") as kernels:
            for i in range(1 + arguments.repeats):
                command = [sys.executable, "-m", "benchmarks.gpu_startup", "--folder", str(folder), "--began"]
                environment = os.environ | {"TRITON_CACHE_DIR": kernels}
                run = subprocess.run([*command, str(time.time())], env=environment, stdout=subprocess.PIPE, check=True)
                show("warm" if i else "cold", json.loads(run.stdout), num_bytes)


if __name__ == "__main__":
    main()
