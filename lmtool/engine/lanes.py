"""Streams beside the main one, and how long what was put into them takes. On a CPU everything is done at once.

Knows neither blocks nor batches.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Span:
    """A stretch of work in a lane, from its `Lane.timed` on."""

    def __init__(self, on_gpu: bool) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_gpu else []
        self._seconds = 0.0

    @property
    def is_over(self) -> bool:
        return not self._events or self._events[1].query()

    @property
    def seconds(self) -> float:
        """Of one that is over."""
        return self._events[0].elapsed_time(self._events[1]) / 1000 if self._events else self._seconds

    def hold(self, stream: torch.cuda.Stream) -> None:
        """What is put into ``stream`` from now on runs after this."""
        if self._events:
            stream.wait_event(self._events[1])

    def wait(self) -> None:
        """The host waits until it is over."""
        if self._events:
            self._events[1].synchronize()

    def _run(self) -> Iterator["Span"]:
        if self._events:
            self._events[0].record()
            yield self
            self._events[1].record()
        else:
            started = time.perf_counter()
            yield self
            self._seconds = time.perf_counter() - started


class Lane:
    """One stream of ``device``. Nothing in it waits for the main stream unless it is told to."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def timed(self) -> Iterator[Span]:
        """What is launched inside goes into the lane."""
        if self._stream is None:
            yield from Span(on_gpu=False)._run()
        else:
            with torch.cuda.stream(self._stream):
                yield from Span(on_gpu=True)._run()

    def after(self, span: Span) -> None:
        """What is put into the lane from now on runs after ``span``."""
        if self._stream is not None:
            span.hold(self._stream)

    def after_main(self, mark: torch.cuda.Event | None) -> None:
        """The same for a mark of the main stream."""
        if self._stream is not None and mark is not None:
            self._stream.wait_event(mark)

    def synchronize(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


def main_mark(device: torch.device) -> torch.cuda.Event | None:
    """Where the current stream is now."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def hold_main(device: torch.device, span: Span) -> None:
    """What is put into the current stream from now on runs after ``span``."""
    if device.type == "cuda":
        span.hold(torch.cuda.current_stream(device))
