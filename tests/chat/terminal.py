"""A real pseudo-terminal with a screen that can be read: pexpect runs the program, pyte understands what it draws."""

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pexpect
import pyte

REPO = Path(__file__).parents[2]
ENTER, ALT_ENTER, TAB, UP = "\r", "\x1b\r", "\t", "\x1b[A"
SHIFT_ENTER = "\x1b[13;2u"
CTRL_C, CTRL_D = "\x03", "\x04"
TIMEOUT_S = 180.0  # generous: the machine is shared


class _Screen(pyte.HistoryScreen):
    """Answers the terminal's questions (where is the cursor?) as a terminal would."""

    reply: Any = None

    def write_process_input(self, data: str) -> None:
        self.reply(data)


class Terminal:
    def __init__(self, *command: str, columns: int = 80, rows: int = 30, **environment: str) -> None:
        self.raw = ""
        self._screen = _Screen(columns, rows, history=10_000, ratio=0.5)
        self._stream = pyte.Stream(self._screen)
        unset = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")
        inherited = {name: value for name, value in os.environ.items() if name not in unset}
        self.child = pexpect.spawn(
            sys.executable,
            list(command),
            dimensions=(rows, columns),
            cwd=str(REPO),
            env={**inherited, "TERM": "xterm-256color", "COLORTERM": "", **environment},
            encoding="utf-8",
            timeout=TIMEOUT_S,
        )
        self.child.delaybeforesend = None
        self._screen.reply = self.child.send

    def send(self, *keys: str) -> None:
        for key in keys:
            self.child.send(key)

    def paste(self, text: str) -> None:
        self.send(f"\x1b[200~{text}\x1b[201~")

    @property
    def text(self) -> str:
        """Everything that was on the screen, what has scrolled away first."""
        gone = ["".join(line[x].data for x in range(self._screen.columns)) for line in self._screen.history.top]
        return "\n".join(line.rstrip() for line in [*gone, *self._screen.display])

    @property
    def _row(self) -> int:
        """Where the cursor is, counted from the first row that there was."""
        return len(self._screen.history.top) + self._screen.cursor.y

    def _text_below(self, row: int) -> str:
        return "\n".join(self.text.split("\n")[row + 1 :])

    @property
    def display(self) -> str:
        """What is on the screen now."""
        return "\n".join(line.rstrip() for line in self._screen.display)

    def wait(self, pattern: str, *, on_screen: bool = True) -> str:
        """Until the regular expression is found in the text (or in the raw bytes); fails showing the screen."""
        return self._until(
            lambda: re.search(pattern, self.text if on_screen else self.raw, re.MULTILINE) is not None, repr(pattern)
        )

    def ask(self, question: str, pattern: str) -> str:
        """Type a line at the prompt, wait for what it brings, and for the prompt behind it: both are further down than
        the line, since what stood there before may look the same."""
        self.prompt()
        row = self._row
        self.send(question, ENTER)
        self._until(
            lambda: self._row > row and re.search(pattern, self._text_below(row), re.MULTILINE) is not None,
            repr(pattern),
        )
        return self.prompt()

    def prompt(self) -> str:
        """Until the cursor stands in an empty prompt: one further up is an old one, and takes no keys any more."""

        def is_there() -> bool:
            cursor = self._screen.cursor
            return cursor.x == len("> ") and self._screen.display[cursor.y].rstrip() == ">"

        return self._until(is_there, "an empty prompt")

    def end(self) -> int:
        """Until the program has ended; its exit code."""
        deadline = time.monotonic() + TIMEOUT_S
        while self._read(deadline):
            pass
        assert time.monotonic() < deadline, f"it has not ended; the screen was:\n{self.text.strip()}"
        self.child.wait()
        self.child.close()
        return self.child.exitstatus if self.child.exitstatus is not None else -self.child.signalstatus

    def close(self) -> None:
        """Whatever it is doing."""
        if self.child.isalive():
            self.child.kill(signal.SIGKILL)
            self.child.wait()
        self.child.close()

    def _until(self, condition: Callable[[], bool], what: str) -> str:
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            if not self._read(deadline):
                raise AssertionError(f"never saw {what}; the screen was:\n{self.text.strip()}")
        return self.text

    def _read(self, deadline: float) -> bool:
        try:
            data = self.child.read_nonblocking(65536, timeout=max(deadline - time.monotonic(), 0.01))
        except (pexpect.EOF, pexpect.TIMEOUT):
            return False
        self.raw += data
        self._stream.feed(data)
        return True


def fake_chat(*flags: str, **settings: Any) -> Terminal:
    terminal = Terminal(str(Path(__file__).parent / "fake_chat.py"), *flags, PYTHONPATH=str(REPO), **settings)
    terminal.prompt()
    return terminal
