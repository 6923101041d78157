"""Two ranks and more on as many cards: all-reduces inside a graph, then batch 1 and chat1000 beside one card.

python -m benchmarks.gpu_ranks [--tp 2] [--shape llama3-8b] [--w-group-size 128] [--mix chat1000] [--only reduce]
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from lmtool.bench import workloads
from lmtool.bench.offline import drive, free, greedy_requests
from lmtool.bench.shapes import find_shape
from lmtool.config import EngineConfig
from lmtool.engine.rank_group import join_group
from lmtool.engine.setup import load_random

SIZES = (8 << 10, 64 << 10, 512 << 10, 2 << 20, 4 << 20, 16 << 20, 64 << 20)
LAPS = 50


# ---------------------------------------------------------------------- all-reduces
def reduce_times(rank: int, size: int, store: Path) -> None:
    """Each rank calls this; the first one prints."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    group = join_group(store, rank, size, device)
    for num_bytes in SIZES:
        hidden = torch.zeros(num_bytes // 2, dtype=torch.float16, device=device)
        part = torch.ones_like(hidden)
        found = {
            "nccl": captured_us(lambda part=part: group.all_reduce_(part)),
            "hidden += by the group": captured_us(lambda hidden=hidden, part=part: group.add_all_reduce_(hidden, part)),
        }
        if rank == 0:
            print(f"  all-reduce of {num_bytes >> 10} KiB among {size}, us:", found, flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def captured_us(work: Any) -> float:
    """Microseconds of one of many that follow each other in a graph."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    torch.distributed.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(LAPS):
            work()
    laps = []
    for _ in range(7):
        torch.distributed.barrier()
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        laps.append(begin.elapsed_time(end) / LAPS * 1e3)
    return round(statistics.median(laps), 2)


def all_reduces(size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "benchmarks.gpu_ranks", "--store", f"{folder}/store", "--tp", str(size)]
        others = [subprocess.Popen([*words, "--rank", str(rank)]) for rank in range(size)]
        codes = [other.wait(120) for other in others]
        print("  ended with", codes, flush=True)


# ---------------------------------------------------------------------- engines
def engine_runs(given: argparse.Namespace, tp: int) -> dict[str, float]:
    shape = find_shape(given.shape)
    on_gpu = torch.cuda.is_available()
    settings: dict[str, Any] = {"session_len": 4096, "cache_gb": given.cache_gb, "dtype": "float16"}
    if not on_gpu:
        settings |= {"device": "cpu", "dtype": "float32"}
    began = time.perf_counter()
    loaded = load_random(shape, EngineConfig(tp=tp, **settings), None, given.w_group_size)
    print(f"  tp {tp}: {loaded.described(given.shape)}, in all {time.perf_counter() - began:.1f} s", flush=True)
    found = {}
    for batch in given.batches:
        prompts = [tuple(range(1 + i, 129 + i)) for i in range(batch)]
        for _ in range(2):
            seen = drive(loaded.core, greedy_requests(prompts, [given.output_len] * batch)).metrics()
        found[f"b{batch} tok/s"] = seen["decode_tokens_per_s"]
    if given.mix:
        mix = workloads.mix(given.mix, 0)
        sizes = [size.num_new_tokens for size in mix.sizes]
        for seed in range(2):
            requests = greedy_requests(mix.prompts(shape.vocab_size - 1, seed), sizes)
            began = time.perf_counter()
            drive(loaded.core, requests)
            found[f"{given.mix} req/s"] = len(sizes) / (time.perf_counter() - began)
    free(loaded)
    print(f"  tp {tp}:", {name: round(value, 2) for name, value in found.items()}, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--shape", default="llama3-8b")
    parser.add_argument("--w-group-size", type=int)
    parser.add_argument("--mix", default="chat1000")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--cache-gb", type=float, default=60.0)
    parser.add_argument("--only", choices=["reduce", "engines"])
    parser.add_argument("--no-one", action="store_true", help="not on one card: where it does not fit")
    parser.add_argument("--store", type=Path)
    parser.add_argument("--rank", type=int, default=-1)
    given = parser.parse_args()
    if given.rank >= 0:
        reduce_times(given.rank, given.tp, given.store)
        return
    if given.only != "engines":
        os.system("nvidia-smi topo -m | head -4")  # noqa: S605, S607
        all_reduces(given.tp)
    if given.only != "reduce":
        print(given.shape, f"w4 g{given.w_group_size}" if given.w_group_size else "float16")
        many = engine_runs(given, given.tp)
        if not given.no_one:
            one = engine_runs(given, 1)
            print("  ratio:", {name: round(many[name] / one[name], 2) for name in one}, flush=True)


if __name__ == "__main__":
    main()
