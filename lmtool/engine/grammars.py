"""The grammars of an engine's answers, in processes (`grammar_worker`); a few of the same one share it. Knows no
scheduling.

xgrammar is not loaded here: compiling what strangers wrote, and following it, must not slow down or break the engine.
A grammar's process is kept when nobody uses it, as long as there is room: that is the cache of compiled grammars.
"""

import logging
import select
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable

from lmtool.child import module_command, module_environment
from lmtool.engine.constraint import Constraint
from lmtool.engine.frames import Frames
from lmtool.engine.grammar_frames import GrammarVocabulary
from lmtool.engine.grammar_process import GrammarLimits, GrammarProcess
from lmtool.engine.grammar_source import GrammarSource
from lmtool.errors import EngineError, LmtoolError, RequestError

_log = logging.getLogger(__name__)
_GATHER_S = 0.005  # a step of a GPU; a dozen answers of one process
_SEND_S = 0.5  # a process reads on a thread of its own: one that does not is gone


class Grammars:
    """For one thread, the engine's. ``vocabulary`` is called once, on a thread of its own, when it is needed."""

    def __init__(self, vocabulary: Callable[[], GrammarVocabulary], limits: GrammarLimits | None = None) -> None:
        self._limits = limits or GrammarLimits()
        self._worker = _Worker(vocabulary)
        self._processes: list[GrammarProcess] = []  # the one that was used last comes last
        self._waiting: deque[Constraint] = deque()  # for the worker, or for room

    # ------------------------------------------------------------------ answers
    def follow(self, source: GrammarSource) -> Constraint:
        """An answer begins; a later `poll` tells when its first token may be chosen."""
        self._worker.start()
        constraint = Constraint(source)
        self._waiting.append(constraint)
        return constraint

    def leave(self, constraint: Constraint) -> None:
        """The answer is over, in any way."""
        if constraint in self._waiting:
            self._waiting.remove(constraint)
        elif isinstance(constraint.follower, GrammarProcess):
            constraint.follower.close(constraint)

    def gather(self) -> list[Constraint]:
        """As `poll`, but what is told at any moment is waited for: answers that go on together are one step, not many.

        One that takes longer is not waited for again until it has told.
        """
        news, until = self.poll(), time.monotonic() + _GATHER_S
        while (left := until - time.monotonic()) > 0 and any(one.tells_soon(_GATHER_S) for one in self._processes):
            news += self.poll(left)
        return news

    def poll(self, wait_s: float = 0.0) -> list[Constraint]:
        """Those that may go on now, or cannot. wait_s: how long nothing may come before this returns."""
        news = self._begin()
        awaited = {process.connection.fileno(): process for process in self._processes if process.is_awaited}
        if not awaited and wait_s and self._waiting:
            self._worker.wait(wait_s)
            return self._begin()
        poller = select.poll()
        for file in awaited:
            poller.register(file, select.POLLIN)
        ready = {file for file, _ in poller.poll(0 if news else 1000 * wait_s)} if awaited else ()
        for file, process in awaited.items():
            try:
                if file in ready:
                    news += process.receive()
                error = process.overdue()
            except LmtoolError as ended:
                error = ended
            if error is not None:
                self._processes.remove(process)
                news += process.end(error)
        return news

    # ------------------------------------------------------------------ processes
    def _begin(self) -> list[Constraint]:
        """Give those who wait to a process. Returns who cannot have one."""
        failed: list[Constraint] = []
        for _ in range(len(self._waiting) if self._worker.is_ready else 0):
            constraint = self._waiting.popleft()
            assert constraint.source is not None, "follow gave it one"
            try:
                process = self._process(constraint.source)
            except LmtoolError as error:
                constraint.error = error
                failed.append(constraint)
                continue
            if process is None:
                self._waiting.append(constraint)
            else:
                constraint.stop_ids = self._worker.stop_ids
                process.open(constraint)
        return failed

    def _process(self, source: GrammarSource) -> GrammarProcess | None:
        """Of those with this grammar the one with the fewest answers, or a new one; None: there is no room for it."""
        own = [process for process in self._processes if process.source == source]
        process = min(own, key=lambda one: len(one.answers), default=None)
        if process is None or len(process.answers) >= self._limits.num_answers:
            if self._has_room():
                process = GrammarProcess(source, self._worker.connection(), self._limits)
                self._processes.append(process)
        else:
            self._processes.remove(process)
            self._processes.append(process)
        return process

    def _has_room(self) -> bool:
        """For another process; the one that nobody has used for longest makes place."""
        idle = next((process for process in self._processes if not process.answers), None)
        if len(self._processes) >= self._limits.num_processes and idle is not None:
            self._processes.remove(idle)
            idle.connection.close()
        return len(self._processes) < self._limits.num_processes

    def close(self) -> None:
        for process in self._processes:
            process.connection.close()
        self._processes.clear()
        self._worker.close()


class _Worker:
    """The process that all others are forks of. Started once it is needed, again where it has ended."""

    def __init__(self, vocabulary: Callable[[], GrammarVocabulary]) -> None:
        self._make_vocabulary = vocabulary
        self._ready = threading.Event()  # or it is known why not
        self._thread: threading.Thread | None = None
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._error: LmtoolError | None = None
        self.stop_ids: frozenset[int] = frozenset()

    @property
    def is_ready(self) -> bool:
        return self._ready.is_set()

    def wait(self, seconds: float) -> None:
        self._ready.wait(seconds)

    def start(self) -> None:
        ended = self._process is not None and self._process.poll() is not None
        if self._ready.is_set() and (ended or self._error is not None):
            self.close()
        if self._thread is None:
            self._ready.clear()
            self._thread = threading.Thread(target=self._run, name="lmtool-grammars", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        """A tokenizer's bytes and a process: too long for the engine's thread."""
        try:
            vocabulary = self._make_vocabulary()
            if not vocabulary.stop_ids:
                raise RequestError("response_format: this model's vocabulary has no end of answer", "leave it out")
            self.stop_ids = frozenset(vocabulary.stop_ids)
            ours, theirs = socket.socketpair()
            with theirs:
                self._process = subprocess.Popen(
                    [*module_command("lmtool.engine.grammar_worker"), str(theirs.fileno())],
                    env=module_environment(),
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,  # the library writes there what its input says
                    start_new_session=True,  # Ctrl-C is not meant for it
                )
            self._control = ours
            Frames(ours, None).send(vocabulary)
        except LmtoolError as error:
            self._error = error
        except Exception as error:  # nobody may wait for ever
            _log.debug("no process for grammars", exc_info=error)
            self._error = EngineError(f"the process that follows grammars cannot start: {' '.join(str(error).split())}")
        self._ready.set()

    def connection(self) -> socket.socket:
        """To a process of its own. Raises LmtoolError."""
        if self._error is not None:  # an exception of its own for each
            raise type(self._error)(self._error.cause, self._error.fix)
        assert self._control is not None, "it is ready"
        ours, theirs = socket.socketpair()
        ours.settimeout(_SEND_S)
        with theirs:
            try:
                socket.send_fds(self._control, [b"+"], [theirs.fileno()])
            except OSError:
                ours.close()
                self._error = EngineError("the process that follows grammars ended", "send the request again")
                raise self._error from None
        return ours

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
        if self._thread is not None:
            self._thread.join()
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.kill()  # it may have been started only now
            self._process.wait()
        self._thread = self._control = self._process = self._error = None
