"""The engine on a thread of its own: one inbox, and a callback for whoever asks. Knows neither text nor HTTP.

A callback is called from the engine's thread and must not block: once after each step, with the outputs of all requests
that were submitted with it. A step of hundreds of sequences so costs a call, not hundreds.
"""

import threading
from collections import deque
from collections.abc import Callable

from lmtool.engine.core import EngineCore, TokenOutput
from lmtool.engine.sequence import Request
from lmtool.errors import EngineError, LmtoolError, RanksLost

Callback = Callable[[list[TokenOutput]], None]
Errand = Callable[[EngineCore], None]


class AsyncEngine:
    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._wake = threading.Condition()
        self._inbox: deque[tuple[Request, Callback] | Errand | int] = deque()
        self._callbacks: dict[int, Callback] = {}
        self._closing = False
        self.broken: LmtoolError | None = None  # why nothing is answered any more
        self.over = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="lmtool-engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ any thread
    def submit(self, request: Request, callback: Callback) -> None:
        """Queue a request. Raises EngineError where the engine is closed or broken."""
        self._post((request, callback))

    def abort(self, request_id: int) -> None:
        """End a request; its callback gets a last output with finish_reason 'abort'. Harmless when it is over."""
        self._post_if_open(request_id)

    def call(self, errand: Errand) -> None:
        """Have this done by the engine's thread, between two steps; it must neither block nor raise. Never done where
        the engine is closed or broken."""
        self._post_if_open(errand)

    def close(self) -> None:
        """End all requests with an error and let go of the model."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _post_if_open(self, item: Errand | int) -> None:
        with self._wake:
            if self.broken is None and not self._closing:
                self._inbox.append(item)
                self._wake.notify()

    def _post(self, item: tuple[Request, Callback]) -> None:
        with self._wake:
            if self.broken is not None:
                raise EngineError(self.broken.cause, self.broken.fix)  # an exception of its own for each caller
            if self._closing:
                raise EngineError("the engine is closed")
            self._inbox.append(item)
            self._wake.notify()

    # ------------------------------------------------------------------ the engine's thread
    def _loop(self) -> None:
        reason: LmtoolError = EngineError("the engine is closed")
        try:
            while self._receive():
                self._deliver(self._core.step())
        except RanksLost as error:
            reason = error
        except Exception as error:  # a bug of ours: nobody may be left waiting
            reason = EngineError(f"the engine stopped: {type(error).__name__}: {error}")
            raise
        finally:
            self._finish(reason)

    def _receive(self) -> bool:
        """Wait for work, take the inbox in. False when it is time to stop."""
        while True:
            with self._wake:
                while not (self._inbox or self._core.has_work or self._closing):
                    self._wake.wait()
                if self._closing:
                    return False
                items, self._inbox = self._inbox, deque()
            for item in items:
                self._take(item)
            if self._core.has_work:
                return True
            self._core.check()  # a server's heartbeat wakes an engine that nobody asks for anything

    def _take(self, item: tuple[Request, Callback] | Errand | int) -> None:
        if isinstance(item, int):
            output = self._core.abort(item)
            if output is not None:
                self._deliver([output])
        elif callable(item):
            item(self._core)
        else:
            self._callbacks[item[0].request_id] = item[1]
            self._core.add(item[0])

    def _deliver(self, outputs: list[TokenOutput]) -> None:
        sorted_out: dict[Callback, list[TokenOutput]] = {}
        callback, own = None, []
        for output in outputs:
            found = self._callbacks[output.request_id]
            if found is not callback:  # neighbours often have the same
                callback, own = found, sorted_out.setdefault(found, [])
            own.append(output)
            if output.finish_reason is not None:
                del self._callbacks[output.request_id]
        for callback, own in sorted_out.items():
            callback(own)

    def _finish(self, reason: LmtoolError) -> None:
        with self._wake:
            self.broken = reason
            for item in self._inbox:
                if isinstance(item, tuple):
                    self._callbacks[item[0].request_id] = item[1]
            self._inbox.clear()
        for request_id, callback in list(self._callbacks.items()):
            callback([TokenOutput(request_id, None, "error", error=EngineError(reason.cause, reason.fix))])
        self._callbacks.clear()
        self._core.close()
        self.over.set()
