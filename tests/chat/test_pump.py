"""An answer on a thread: order, errors, stopping, and that the stream is closed."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from lmtool.chat.backend import Delta
from lmtool.chat.pump import Pump, StopOnInterrupt
from lmtool.errors import EngineError

TICK_S = 0.01


class Stream:
    """Three pieces; before the second one it may have to wait for ``go``."""

    def __init__(self, *, error: Exception | None = None, held: bool = False) -> None:
        self.closed = threading.Event()
        self.go = threading.Event()
        self._error = error
        self._held = held

    def __iter__(self) -> Iterator[Delta]:
        try:
            yield Delta(text="a")
            if self._held:
                self.go.wait()
            if self._error is not None:
                raise self._error
            yield Delta(text="b")
            yield Delta(text="c")
        finally:
            self.closed.set()


def _started(stream: Stream) -> Pump:
    pump = Pump(lambda: iter(stream))
    pump.start()
    return pump


def _texts(pump: Pump) -> list[str]:
    return [delta.text for delta in pump.deltas(TICK_S) if delta is not None]


def test_everything_comes_in_order_and_the_stream_is_closed() -> None:
    stream = Stream()
    pump = _started(stream)
    assert _texts(pump) == ["a", "b", "c"]
    pump.wait()
    assert stream.closed.is_set()


def test_an_error_of_the_stream_is_raised_here() -> None:
    pump = _started(Stream(error=EngineError("boom")))
    with pytest.raises(EngineError, match="boom"):
        _texts(pump)


def test_ticks_come_while_nothing_else_does() -> None:
    stream = Stream(held=True)
    seen = []
    for delta in _started(stream).deltas(TICK_S):
        seen.append(delta.text if delta else None)
        if delta is None:
            stream.go.set()
    assert [text for text in seen if text] == ["a", "b", "c"]
    assert None in seen


def test_ctrl_c_ends_the_deltas_at_once_even_while_the_engine_is_busy() -> None:
    stream = Stream(held=True)
    pump = _started(stream)
    texts = []
    with StopOnInterrupt(pump):
        for delta in pump.deltas(TICK_S):
            if delta is not None:
                texts.append(delta.text)
                os.kill(os.getpid(), signal.SIGINT)
    assert texts == ["a"]
    assert pump.stopped
    assert not stream.closed.is_set()
    stream.go.set()
    pump.wait()
    assert stream.closed.is_set()


def test_a_second_ctrl_c_is_an_interrupt_and_the_handler_is_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    pump = _started(Stream())
    with StopOnInterrupt(pump):
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


class Abortable:
    """As a server's or an engine's: ended from outside, also before it has begun."""

    def __init__(self) -> None:
        self.aborted = threading.Event()

    def __next__(self) -> Delta:
        self.aborted.wait()
        raise StopIteration

    def __iter__(self) -> Iterator[Delta]:
        return self

    def abort(self) -> None:
        self.aborted.set()


@pytest.mark.parametrize("when", ["before the thread", "while it is opened"])
def test_a_stream_that_is_stopped_before_there_is_one_is_aborted(when: str) -> None:
    stream, opening, go = Abortable(), threading.Event(), threading.Event()

    def open_stream() -> Iterator[Delta]:
        opening.set()
        go.wait()
        return stream

    pump = Pump(open_stream)
    pump.wait()  # there is nothing to wait for yet
    if when == "before the thread":
        pump.stop()
    pump.start()
    opening.wait()
    if not pump.stopped:
        pump.stop()
    assert _texts(pump) == []
    go.set()
    pump.wait()
    assert stream.aborted.is_set()
