"""Where a GPU's time goes in the engine: how much of it is idle, and which kernels take the rest.

python -m benchmarks.gpu_profile [--shapes internlm2-1_8b llama3-8b] [--top 8] [--tp 2]
Random weights. 'idle' is the share of the time between the first kernel's start and the last one's end in which no
kernel and no copy runs; a kernel that waits for the one before it (dependent launch) counts as running.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_engine import SESSION_LEN
from lmtool.bench import workloads
from lmtool.bench.offline import free, greedy_requests
from lmtool.bench.shapes import find_shape
from lmtool.bench.workloads import Workload
from lmtool.config import EngineConfig
from lmtool.engine.core import EngineCore
from lmtool.engine.setup import load_random


@dataclass(slots=True)
class Busy:
    """Nanoseconds: of the whole, of some kernel or copy running, of each kernel by name with its number of calls."""

    span: int
    busy: int
    kernels: dict[str, tuple[int, int]]


def on_gpu(work: Callable[[], object]) -> Busy:
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        work()
        torch.cuda.synchronize()
    intervals, kernels = [], defaultdict(lambda: (0, 0))
    for event in recorded.profiler.kineto_results.events():
        if event.device_type() == DeviceType.CUDA and event.duration_ns() > 0:
            start, duration = event.start_ns(), event.duration_ns()
            intervals.append((start, start + duration))
            total, calls = kernels[event.name()]
            kernels[event.name()] = (total + duration, calls + 1)
    intervals.sort()
    busy, reached = 0, intervals[0][0]
    for start, stop in intervals:
        busy += max(0, stop - max(start, reached))
        reached = max(reached, stop)
    return Busy(reached - intervals[0][0], busy, dict(kernels))


def show(label: str, found: Busy, num_steps: int, top: int) -> None:
    print(
        f"\n{label}: {found.span / num_steps / 1000:.0f} us a step on the GPU's clock,"
        f" idle {1 - found.busy / found.span:.1%}"
    )
    for name, (total, calls) in sorted(found.kernels.items(), key=lambda item: -item[1][0])[:top]:
        print(f"  {total / found.span:6.1%} {total / num_steps / 1000:8.1f} us {calls / num_steps:6.1f} x  {name[:90]}")


def submit(core: EngineCore, workload: Workload, vocab_size: int) -> None:
    counts = [size.num_new_tokens for size in workload.sizes]
    for request in greedy_requests(workload.prompts(vocab_size, 0), counts):
        core.add(request)


def end(core: EngineCore) -> None:
    for i in list(core._sequences):
        core.abort(i)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["internlm2-1_8b", "llama3-8b"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 256])
    parser.add_argument("--top", type=int, default=8)
    parser.add_argument("--tp", type=int, default=1, help="what the first of so many cards does")
    arguments = parser.parse_args()
    for shape in arguments.shapes:
        config = EngineConfig(
            device="cuda", dtype="float16", session_len=SESSION_LEN[shape], prefix_caching=False, tp=arguments.tp
        )
        loaded = load_random(find_shape(shape), config)
        core, vocab_size = loaded.core, loaded.model.vocab_size

        def steps(count: int, core: EngineCore = core) -> float:
            started = time.perf_counter()
            for _ in range(count):
                core.step()
            return time.perf_counter() - started

        for name, workload in {
            "64 prompts of 128": workloads.static(64, 128, 400),
            "one prompt of 2000": workloads.static(1, 2000, 20),
        }.items():
            for _ in range(2):  # the first warms up
                submit(core, workload, vocab_size)
                found = on_gpu(lambda: steps(1))
                end(core)
            show(f"{shape}, {name}", found, 1, arguments.top)
        for batch in arguments.batches:
            submit(core, workloads.static(batch, 128, 400), vocab_size)
            steps(20)
            show(f"{shape}, decode b{batch}", on_gpu(lambda: steps(50)), 50, arguments.top)
            end(core)
        submit(core, workloads.chat(1000), vocab_size)
        steps(100)
        wall = steps(100)
        before = core.scheduler.counters.num_generated_tokens
        found = on_gpu(lambda: steps(100))
        tokens = core.scheduler.counters.num_generated_tokens - before
        print(f"\nchat1000: {wall * 1e4:.0f} us a step unprofiled, {tokens / 100:.0f} tokens a step")
        show(f"{shape}, chat1000", found, 100, arguments.top + 8)
        end(core)
        free(loaded)


if __name__ == "__main__":
    main()
