"""`python -m lmtool.engine.grammar_worker FD`: makes a process for each grammar that is handed to it.

It loads xgrammar and the vocabulary once; a process for a grammar is a fork, and costs milliseconds. Each compiles its
grammar and follows the answers in it: C++ over what strangers wrote. One that crashes, hangs or has no memory left
takes with it the answers of that grammar, and nothing else. Every process ends when the engine closes its connection.
"""

import contextlib
import os
import queue
import re
import resource
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmtool.engine.frames import Frames
from lmtool.engine.grammar_frames import (
    Allowed,
    Begun,
    Close,
    Compiled,
    GrammarVocabulary,
    Open,
    Order,
    Refused,
    Reply,
    Source,
    Step,
)

_LOG_PREFIX = re.compile(r"^\[[\d:]+\] \S+:\d+: ")
_MOST_LETTERS = 300
_MOST_WHITESPACE = 20  # between two parts of JSON: a model that is not sure would go on with it
_NOT_WHOLE = "check it with a JSON schema validator, or a regular expression's or GBNF's rules"


def main(control_fd: int) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes
    control = socket.socket(fileno=control_fd)
    try:
        vocabulary = Frames(control, GrammarVocabulary).receive()
    except EOFError:
        return
    compiler = _compiler(vocabulary)
    while True:
        data, fds, _, _ = socket.recv_fds(control, 1, 1)
        if not data:
            return
        if os.fork() == 0:
            try:
                _serve(socket.socket(fileno=fds[0]), compiler, vocabulary)
            finally:
                os._exit(0)  # whatever it was: the engine sees that the connection ended
        os.close(fds[0])


def _compiler(vocabulary: GrammarVocabulary) -> Any | None:
    """None where xgrammar is not installed."""
    try:
        import xgrammar
    except ImportError:
        return None
    info = xgrammar.TokenizerInfo(
        vocabulary.tokens,
        xgrammar.VocabType.RAW,
        vocab_size=len(vocabulary.tokens),
        stop_token_ids=vocabulary.stop_ids,
        add_prefix_space=False,
    )
    return xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)


def _serve(connection: socket.socket, compiler: Any | None, vocabulary: GrammarVocabulary) -> None:
    """One grammar's process. Another thread reads, so that the engine's leaving is noticed in the middle of C++."""
    orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
    frames = Frames(connection, Order)
    threading.Thread(target=_listen, args=(frames, orders), daemon=True).start()
    frames.send(Begun())
    source = orders.get()
    assert isinstance(source, Source), "the first order"
    _limit_memory(source.memory_bytes)
    try:
        answers = _Answers(_compiled(compiler, source), vocabulary)
    except _RefusedError as error:
        frames.send(error.reply)
        return
    frames.send(Compiled())
    while True:
        reply = answers.take(orders.get())
        if reply is not None:
            frames.send(reply)


def _listen(frames: Frames, orders: "queue.SimpleQueue[Order]") -> None:
    with contextlib.suppress(EOFError, OSError):
        while True:
            orders.put(frames.receive())
    os._exit(0)


def _limit_memory(more_bytes: int) -> None:
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more_bytes, now + more_bytes))


class _RefusedError(Exception):
    def __init__(self, cause: str, fix: str | None) -> None:
        self.reply = Refused(None, cause, fix)


def _compiled(compiler: Any | None, source: Source) -> Any:
    if compiler is None:
        raise _RefusedError("response_format needs xgrammar", "pip install 'lmtool[server]'")
    try:
        if source.kind == "schema":
            return compiler.compile_json_schema(
                source.text, strict_mode=source.closed, max_whitespace_cnt=_MOST_WHITESPACE
            )
        if source.kind == "regex":
            return compiler.compile_regex(source.text)
        if source.kind == "tag":
            return compiler.compile_structural_tag(source.text)
        return compiler.compile_grammar(source.text)
    except Exception as error:  # whatever the library says of it
        if isinstance(error, MemoryError) or "bad_alloc" in str(error):
            raise _RefusedError("response_format: its grammar needs too much memory", "make it smaller") from None
        raise _RefusedError(f"response_format: {_one_line(error)}", _NOT_WHOLE) from None


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return _LOG_PREFIX.sub("", lines[0])[:_MOST_LETTERS]


class _Answers:
    """How far each answer of one grammar is in it."""

    def __init__(self, grammar: Any, vocabulary: GrammarVocabulary) -> None:
        self._grammar = grammar
        self._matchers: dict[int, Any] = {}
        vocab_size = len(vocabulary.tokens)
        self._ends = _words(vocabulary.stop_ids, vocab_size)
        self._ids = _words(range(vocab_size), vocab_size)  # the library leaves the bits beyond as they are

    def take(self, order: Order) -> Reply | None:
        if isinstance(order, Close):
            del self._matchers[order.number]
            return None
        assert isinstance(order, Open | Step)
        if isinstance(order, Open):
            from xgrammar import GrammarMatcher

            self._matchers[order.number] = GrammarMatcher(self._grammar)
        elif not self._matchers[order.number].accept_token(order.token_id):
            return Refused(order.number, f"response_format: token {order.token_id} is not in its grammar", None)
        return self._allowed(order.number)

    def _allowed(self, number: int) -> Reply:
        filled = np.full((1, len(self._ids)), -1, dtype=np.int32)
        self._matchers[number].fill_next_token_bitmask(filled)
        words = filled[0] & self._ids
        if not words.any():
            return Refused(
                number, "response_format: no text fits its grammar", "is it a cycle, or does it contradict itself?"
            )
        return Allowed(number, words.tobytes(), not (words & ~self._ends).any())


def _words(ids: Sequence[int], vocab_size: int) -> "np.ndarray[tuple[int], np.dtype[np.int32]]":
    """A bit for each id, set for these."""
    bits = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
    bits[ids] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


if __name__ == "__main__":
    main(int(sys.argv[1]))
