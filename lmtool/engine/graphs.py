"""A step as CUDA graphs, one for each size that it is padded to. Knows no model, no scheduling."""

import gc
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

from lmtool.engine.garbage import no_collection

StartProgress = Callable[[str, int, int], None]  # what is done, parts done, parts in all


def bucket_sizes(max_rows: int) -> list[int]:
    """1, 2, 4, 8, then steps of 8 to 64, of 16 to 256, of 32 to 512, of 256 beyond; the last is ``max_rows``.

    Padding is a few percent everywhere; powers of two would waste half of a step at 130 rows.
    """
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 512, 32), *range(512, max_rows, 256)]
    return [size for size in sizes if size < max_rows] + [max_rows]


class Graphs:
    """``work(*size)`` launches a step's kernels over fixed buffers and returns its ids.

    sizes: for each number of rows that a step has, those that there is a graph for. Until `capture` is called, and on a
    CPU, the work is simply done.
    """

    def __init__(self, work: Callable[..., Tensor], *sizes: Sequence[int]) -> None:
        self._work = work
        self._sizes = [list(one) for one in sizes]
        self._captured: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def _largest_first(self) -> list[tuple[int, ...]]:
        return list(product(*(reversed(one) for one in self._sizes)))

    def run_each(self) -> None:
        """Every step once, so that nothing is compiled, loaded or created inside a capture or while serving."""
        for size in self._largest_first():
            self._work(*size)

    @property
    def captured(self) -> bool:
        return bool(self._captured)

    def capture(self, what: str, progress: StartProgress | None = None) -> None:
        """Largest first: the smaller ones then fit into the memory of the larger, which they share.

        `run_each` comes before. Raises torch's OutOfMemoryError.
        """
        pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()
        gc.collect()  # destroying an old engine's graph breaks a capture
        sizes = self._largest_first()
        with no_collection():
            for i, size in enumerate(sizes):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    ids = self._work(*size)
                self._captured[size] = (graph, ids)
                if progress is not None:
                    progress(f"capturing {what}", i + 1, len(sizes))

    def release(self) -> None:
        """Let go of the graphs: a communicator waits for those that hold it."""
        for graph, _ in self._captured.values():
            graph.reset()
        self._captured.clear()

    def size_of(self, *counts: int) -> tuple[int, ...]:
        """What a step of so many rows is padded to."""
        return tuple(one[bisect_left(one, count)] for one, count in zip(self._sizes, counts, strict=True))

    def run(self, *counts: int) -> Tensor:
        """The ids of all rows that there may be, valid until the next run."""
        size = self.size_of(*counts)
        if size not in self._captured:
            return self._work(*size)
        graph, ids = self._captured[size]
        graph.replay()
        return ids
