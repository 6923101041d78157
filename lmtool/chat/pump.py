"""An answer is made on one thread and shown on another, so that the terminal obeys Ctrl-C at any moment.

Knows neither what makes the deltas nor what shows them.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any

from lmtool.chat.backend import Delta

_END = object()


class Pump:
    """Open and iterate a backend's stream on a thread, from `start` on: whoever stops it can be there before.

    `deltas` hands the pieces to the caller's thread.
    """

    def __init__(self, open_stream: Callable[[], Iterator[Delta]]) -> None:
        self._open_stream = open_stream
        self._stream: Iterator[Delta] | None = None
        # SimpleQueue.put may be called from a signal handler, Queue.put may not
        self._queue: SimpleQueue[Any] = SimpleQueue()
        self._stopping = threading.Event()
        self.stopped_s = float("-inf")  # when, on the monotonic clock
        self._thread = threading.Thread(target=self._run, name="lmtool-answer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def stopped(self) -> bool:
        return self._stopping.is_set()

    def stop(self) -> None:
        """End `deltas` now, and the stream: at once if it can be aborted, else when it next yields.

        Safe in a signal handler.
        """
        self.stopped_s = time.monotonic()
        self._stopping.set()
        self._queue.put(_END)
        self._abort()

    def wait(self, timeout_s: float | None = None) -> None:
        """Until the stream is closed, so that nothing that follows meets it in the engine."""
        if self._thread.ident is not None:  # else it was never started
            self._thread.join(timeout_s)

    def deltas(self, tick_s: float) -> Iterator[Delta | None]:
        """The pieces as they come, and None whenever ``tick_s`` pass without one. Raises what the stream raised."""
        while True:
            try:
                item = self._queue.get(timeout=tick_s)
            except Empty:
                yield None
                continue
            if item is _END or self.stopped:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def _abort(self) -> None:
        abort = getattr(self._stream, "abort", None)
        if abort is not None:
            abort()

    def _run(self) -> None:
        try:
            self._stream = stream = self._open_stream()
            if self.stopped:  # when there was none to abort yet
                self._abort()
            for delta in stream:
                self._queue.put(delta)
                if self.stopped:
                    break
            self._queue.put(_END)
        except BaseException as error:  # handed to the caller's thread, which raises it
            self._queue.put(error)
        finally:
            close = getattr(self._stream, "close", None)
            if close is not None:
                close()


class StopOnInterrupt:
    """While entered, the first Ctrl-C stops the pump; a second one is a KeyboardInterrupt as everywhere else."""

    def __init__(self, pump: Pump) -> None:
        self._pump = pump

    def __enter__(self) -> None:
        self._previous = signal.signal(signal.SIGINT, self._interrupted)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _interrupted(self, signum: int, frame: FrameType | None) -> None:
        if self._pump.stopped:
            raise KeyboardInterrupt
        self._pump.stop()
