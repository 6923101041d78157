"""Timing on a CUDA card: inside graphs, over inputs rotated past the second-level cache, medians of replays."""

import statistics
from collections.abc import Callable

import torch


def graphed(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """`work` as a graph; it runs once before, so that nothing is compiled or created inside the capture."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def replay_us(graph: torch.cuda.CUDAGraph, repeats: int = 7) -> float:
    """Median time of one replay in microseconds."""
    for _ in range(3 * repeats):
        graph.replay()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1000)
    return statistics.median(times)


def call_us(call: Callable[[int], object], calls: int) -> float:
    """Mean time of `call(i)` for i in range(calls) as one chain in one graph, in microseconds."""
    graph = graphed(lambda: [call(i) for i in range(calls)])
    time_us = replay_us(graph) / calls
    graph.reset()
    return time_us


def ceilings() -> dict[str, float]:
    """What this card does at best today: TB/s read and copied, TFLOP/s of a float16 product of random matrices."""
    big = torch.randn(1 << 30, device="cuda")
    other = torch.empty_like(big)
    read = call_us(lambda i: big.sum(), 3)
    copy = call_us(lambda i: other.copy_(big), 3)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.float16) for _ in range(2))
    product = call_us(lambda i: torch.mm(a, b), 10)
    return {"read": (4 << 30) / read / 1e6, "copy": (8 << 30) / copy / 1e6, "matmul": 2 * 8192**3 / product / 1e6}
