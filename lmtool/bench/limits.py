"""What this machine does at best today: reading, copying, multiplying, starting a kernel.

Every figure of a benchmark stands beside its share of these. Knows no model.
"""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lmtool.engine.device import free_bytes

_GPU_BUFFER_BYTES = 4 << 30
_CPU_BUFFER_BYTES = 512 << 20  # beyond any cache of today
_GPU_MATMUL_SIZE = 8192
_CPU_MATMUL_SIZE = 2048
_NUM_CHAINED_KERNELS = 240
_REPEATS, _LEAST_S = 5, 1.0  # of each figure: so many times, and for so long at least
_GPU_CALLS = 10  # in one time, so that waiting for the card is a small part of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Measured rates per second. A copy counts each byte twice, read and written. launch_gap_s: None on a CPU."""

    device: str
    read_bytes_per_s: float
    copy_bytes_per_s: float
    matmul_flops_per_s: float
    matmul_dtype: str
    launch_gap_s: float | None = None


def measure(device: torch.device) -> Limits:
    """A few seconds; memory for two large buffers is taken and given back, so measure before a model is loaded."""
    read_bytes_per_s, copy_bytes_per_s = _bytes_per_s(device)
    rates = {dtype: _matmul_flops_per_s(device, dtype) for dtype in _matmul_dtypes(device)}
    best = max(rates, key=lambda dtype: rates[dtype])
    gap_s = _launch_gap_s(device) if device.type == "cuda" else None
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Limits(
        device=device_name(device),
        read_bytes_per_s=read_bytes_per_s,
        copy_bytes_per_s=copy_bytes_per_s,
        matmul_flops_per_s=rates[best],
        matmul_dtype=str(best).removeprefix("torch."),
        launch_gap_s=gap_s,
    )


def device_name(device: torch.device) -> str:
    """'NVIDIA H200', or the processor and how many cores are used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} of {len(os.sched_getaffinity(0))} cores"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _bytes_per_s(device: torch.device) -> tuple[float, float]:
    """Read by a float32 sum, and copied (each byte counts twice)."""
    most = _GPU_BUFFER_BYTES if device.type == "cuda" else _CPU_BUFFER_BYTES
    count = min(most, free_bytes(device) // 4) // 4
    source = torch.empty(count, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    read_s = _best_s(device, lambda: source.sum())
    copy_s = _best_s(device, lambda: target.copy_(source))
    return source.nbytes / read_s, 2 * source.nbytes / copy_s


def _matmul_dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    return (torch.float16,) if device.type == "cuda" else (torch.float32, torch.bfloat16)


def _matmul_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """On random numbers: zeros are multiplied faster."""
    size = _GPU_MATMUL_SIZE if device.type == "cuda" else _CPU_MATMUL_SIZE
    a, b = (torch.empty(size, size, dtype=dtype, device=device).normal_() for _ in range(2))
    product = torch.empty_like(a)
    return 2 * size**3 / _best_s(device, lambda: torch.mm(a, b, out=product))


def _best_s(device: torch.device, work: Callable[[], object]) -> float:
    """The shortest of many times: neighbours on the machine can only lengthen one."""
    calls = _GPU_CALLS if device.type == "cuda" else 1
    work()
    times: list[float] = []
    while len(times) < _REPEATS or sum(times) * calls < _LEAST_S:
        _wait(device)
        started = time.perf_counter()
        for _ in range(calls):
            work()
        _wait(device)
        times.append((time.perf_counter() - started) / calls)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _launch_gap_s(device: torch.device) -> float:
    """From one tiny kernel to the next in a CUDA graph."""
    with torch.cuda.device(device):
        value = torch.zeros(1, device=device)
        value.add_(1)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(_NUM_CHAINED_KERNELS):
                value.add_(1)
        gap_s = _best_s(device, graph.replay) / _NUM_CHAINED_KERNELS
        graph.reset()
    return gap_s
