"""Blocks between the device's cache and host memory. Knows no hash and no sequence: numbers of blocks come in.

A block is one piece on the host and thousands on the device (each layer, K and V, each head). So there is a staging
buffer on the device whose rows are like the host's: blocks are gathered into it or scattered from it by the device,
and cross the bus in large pieces.

Saves: the main stream gathers (at the memory's speed, so a step waits microseconds for a block that it overwrites), a
side lane copies to the host. Loads: another lane does both, after the steps that were launched before.
"""

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lmtool import kernels
from lmtool.engine.batch import CopiesDone, Load
from lmtool.engine.graphs import StartProgress
from lmtool.engine.host_memory import HostBlocks, HostPlan
from lmtool.engine.lanes import Lane, Span, hold_main, main_mark
from lmtool.engine.transfer import upload
from lmtool.layers.kv_store import KvStore

_log = logging.getLogger(__name__)
_NUM_REGIONS = 4
_NUM_WITHIN = 2  # rows through which blocks are copied on the device
_LOAD_SHARE = 4  # of the staging buffer: one in so many rows


class Staging:
    """rows [num_rows, block_bytes] uint8 on the device: each as a block is on the host."""

    def __init__(self, num_rows: int, tensors: Sequence[Tensor]) -> None:
        """tensors: everything that blocks hold, each [Hkv, NB, …]."""
        self.device = tensors[0].device
        self._pieces = kernels.block_pieces(tensors)
        self._words = torch.empty(num_rows, self._pieces.row_words, dtype=torch.int64, device=self.device)
        self.rows = self._words.view(torch.uint8)

    def gather(self, blocks: Sequence[int], first: int) -> None:
        """Blocks → rows from ``first`` on, in the current stream."""
        kernels.gather_blocks(self._pieces, self._numbers(blocks), self._words[first : first + len(blocks)])

    def scatter(self, blocks: Sequence[int], first: int) -> None:
        kernels.scatter_blocks(self._pieces, self._numbers(blocks), self._words[first : first + len(blocks)])

    def _numbers(self, blocks: Sequence[int]) -> Tensor:
        return upload([np.asarray(blocks, dtype=np.int64)], self.device)[0]


@dataclass(slots=True)
class _Region:
    """Rows of the staging buffer, and the last copy out of them."""

    first: int
    copied: Span | None = None


class BlockCopies:
    """Copies that were begun, and which of them are over. For one thread."""

    def __init__(self, tensors: Sequence[Tensor], plan: HostPlan, progress: StartProgress | None = None) -> None:
        """Raises MemoryShortError."""
        self.plan = plan
        self._host = HostBlocks(plan, tensors[0].device, progress)
        self._staging = Staging(plan.num_staging, tensors)
        assert self._staging.rows.shape[1] == plan.block_bytes, "the plan's bytes are those of the tensors"
        self._device = self._staging.device
        self._index = self._device.index or 0 if self._device.type == "cuda" else -1  # -1: nothing to choose
        self._num_load_rows = plan.num_staging // _LOAD_SHARE
        self._region_rows = (plan.num_staging - self._num_load_rows) // _NUM_REGIONS
        self._regions = deque(_Region(self._num_load_rows + i * self._region_rows) for i in range(_NUM_REGIONS))
        self._save_lane, self._load_lane = Lane(self._device), Lane(self._device)
        self._saving: deque[tuple[Span, frozenset[int]]] = deque()  # with the host blocks it writes to
        self._crossing: deque[Span] = deque()  # a load's way over the bus
        self._loading: deque[tuple[Span, int]] = deque()

    def begin(self, saves: Sequence[tuple[int, int]], loads: Sequence[Load]) -> None:
        """What is launched after this may overwrite the saves' blocks. Where it raises, none of it goes on."""
        known = len(self._loading)
        try:
            with torch.inference_mode(), torch.cuda.device(self._index):
                for first in range(0, len(saves), self._region_rows):
                    self._save(saves[first : first + self._region_rows])
                mark = main_mark(self._device) if loads else None
                for load in loads:
                    self._load(load, mark)
        except Exception:
            self._save_lane.synchronize()
            self._load_lane.synchronize()
            while len(self._loading) > known:
                self._loading.pop()
            raise

    def _save(self, saves: Sequence[tuple[int, int]]) -> None:
        region = self._regions[0]
        self._regions.rotate(-1)
        if region.copied is not None:
            hold_main(self._device, region.copied)
        self._staging.gather([block for block, _ in saves], region.first)
        self._save_lane.after_main(main_mark(self._device))
        host_blocks = [host_block for _, host_block in saves]
        with self._save_lane.timed() as span:
            for start, rows in self._host.runs(host_blocks):
                first = region.first + start
                rows.copy_(self._staging.rows[first : first + len(rows)], non_blocking=True)
        region.copied = span
        self._saving.append((span, frozenset(host_blocks)))

    def _load(self, load: Load, mark: torch.cuda.Event | None) -> None:
        wanted = {host_block for host_block, _ in load.blocks}
        for span, written in self._saving:
            if wanted & written:
                self._load_lane.after(span)
        with self._load_lane.timed() as whole:
            for first in range(0, len(load.blocks), self._num_load_rows):
                part = load.blocks[first : first + self._num_load_rows]
                with self._load_lane.timed() as crossing:
                    for start, rows in self._host.runs([host_block for host_block, _ in part]):
                        self._staging.rows[start : start + len(rows)].copy_(rows, non_blocking=True)
                self._crossing.append(crossing)
                if first == 0:  # the bus need not wait for the steps that still use these blocks
                    self._load_lane.after_main(mark)
                self._staging.scatter([block for _, block in part], 0)
        self._loading.append((whole, load.number))

    def over(self, *, wait: bool) -> CopiesDone:
        """What came to an end since the last call. wait: the host waits for the oldest load, where there is one."""
        done = CopiesDone()
        if wait and self._loading:
            self._loading[0][0].wait()
        while self._loading and self._loading[0][0].is_over:
            done.loads.append(self._loading.popleft()[1])
        while self._crossing and self._crossing[0].is_over:
            done.seconds += self._crossing.popleft().seconds
        while self._saving and self._saving[0][0].is_over:
            done.seconds += self._saving.popleft()[0].seconds
        return done

    def await_elsewhere(self, numbers: Sequence[int]) -> None:
        """These loads are over on the rank that decides: what is launched from now on, and may rely on their blocks or
        save over what they read, waits for them here."""
        for span, number in self._loading:
            if number in numbers:
                hold_main(self._device, span)
                self._save_lane.after(span)
        self.over(wait=False)

    def measure(self) -> float:
        """Bytes a second from the host into blocks: block 0, which belongs to nobody, goes there and back."""
        num_blocks = min(self.plan.num_blocks, self._num_load_rows)
        self.begin([(0, host_block) for host_block in range(num_blocks)], [])
        seconds = []
        for _ in range(3):
            self.begin([], [Load(-1, [(host_block, 0) for host_block in range(num_blocks)])])
            whole = self._loading[0][0]
            self.over(wait=True)
            seconds.append(whole.seconds)
        return num_blocks * self.plan.block_bytes / min(seconds)


class RunnerCopies:
    """What runners of both kinds do with whole blocks: a base of theirs."""

    def __init__(
        self,
        caches: Sequence[KvStore],
        host: HostPlan | None,
        progress: StartProgress | None = None,
    ) -> None:
        """host None: there is no tier. Raises MemoryShortError."""
        self._copies = None
        self.load_bytes_per_s = 0.0
        tensors = [tensor for cache in caches for tensor in cache.tensors()]
        self._within = Staging(_NUM_WITHIN, tensors)
        if host is not None:
            self._copies = BlockCopies(tensors, host, progress)
            self.load_bytes_per_s = self._copies.measure()
            _log.info("blocks come back from the host at %.1f GB/s", self.load_bytes_per_s / 1e9)

    def close(self) -> None:
        """Let go of what others wait for."""

    def copy(self, saves: Sequence[tuple[int, int]], loads: Sequence[Load]) -> None:
        assert self._copies is not None, "no host tier"
        self._copies.begin(saves, loads)

    def copy_within(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Blocks' contents into other blocks, in the current stream. A block that was written to is read by none of
        the pairs after it, so they may go few by few."""
        for first in range(0, len(pairs), _NUM_WITHIN):
            part = pairs[first : first + _NUM_WITHIN]
            self._within.gather([block for block, _ in part], 0)
            self._within.scatter([copy for _, copy in part], 0)

    def await_loads(self, numbers: Sequence[int]) -> None:
        """Of a rank that is told what is over: see `BlockCopies.await_elsewhere`."""
        assert self._copies is not None, "no host tier"
        self._copies.await_elsewhere(numbers)

    def copied(self, *, wait: bool) -> CopiesDone:
        return self._copies.over(wait=wait) if self._copies is not None else CopiesDone()
