"""How long a call takes: on a card in CUDA graphs of many launches, elsewhere by the host's clock.

Inputs are the caller's: one that wants the card's memory measured hands over so many that they pass its caches.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

_REPEATS = 7
_WARM_UP = 3  # times as many replays before those that count: the first dozen after other work are 9 % slower
_CPU_LEAST_S = 0.02  # of one repeat: many calls where one is short


def graphed(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """`work` as a graph; it runs once before, so that nothing is compiled or created inside the capture."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def replay_us(graph: torch.cuda.CUDAGraph, repeats: int = _REPEATS) -> float:
    """Median time of one replay in microseconds."""
    for _ in range(_WARM_UP * repeats):
        graph.replay()
    return statistics.median(_replay_us(graph) for _ in range(repeats))


def _replay_us(graph: torch.cuda.CUDAGraph) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1000


def call_us(call: Callable[[int], object], calls: int, repeats: int = _REPEATS) -> float:
    """Mean time of `call(i)` for i in range(calls) as one chain in one graph, in microseconds; median of repeats."""
    graph = graphed(lambda: [call(i) for i in range(calls)])
    time_us = replay_us(graph, repeats) / calls
    graph.reset()
    return time_us


def in_turn_us(graphs: Sequence[torch.cuda.CUDAGraph], repeats: int = _REPEATS) -> list[float]:
    """Median time of a replay of each, taken in turn, so that a card that slows down slows all of them alike."""
    for _ in range(2 * repeats):
        for graph in graphs:
            graph.replay()
    times = [[_replay_us(graph) for graph in graphs] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def durations_s(
    call: Callable[[int], object], calls: int, device: torch.device, repeats: int = _REPEATS
) -> list[float]:
    """Seconds of one `call(i)`, i going round in range(calls): the mean of each of several repeats."""
    if device.type == "cuda":
        graph = graphed(lambda: [call(i) for i in range(calls)])
        for _ in range(_WARM_UP * repeats):
            graph.replay()
        found = [_replay_us(graph) / calls / 1e6 for _ in range(repeats)]
        graph.reset()
        return found
    rounds = max(1, round(_CPU_LEAST_S / max(_round_s(call, calls, 1), 1e-9)))  # the first round warms up too
    return [_round_s(call, calls, rounds) / rounds / calls for _ in range(repeats)]


def _round_s(call: Callable[[int], object], calls: int, rounds: int) -> float:
    started = time.perf_counter()
    for _ in range(rounds):
        for i in range(calls):
            call(i)
    return time.perf_counter() - started
