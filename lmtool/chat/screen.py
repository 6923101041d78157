"""The rows at the bottom of a terminal that may still change, redrawn without flicker.

Only rows that differ are written, in one piece. Control characters that are left in a renderable do not get through.
Does not know what the rows mean.
"""

import re
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.segment import Segment, Segments

from lmtool.chat.escape import without_controls

_BEGIN, _END = "\x1b[?2026h", "\x1b[?2026l"  # synchronized update; terminals without it ignore it
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_ERASE_LINE, _ERASE_BELOW = "\x1b[K", "\x1b[J"


@contextmanager
def without_echo() -> Iterator[None]:
    """What is typed meanwhile is not shown in the middle of what is drawn (``^C``); the next prompt gets it."""
    if not sys.stdin.isatty():
        yield
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    quiet = termios.tcgetattr(descriptor)
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(descriptor, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def rows(console: Console, renderable: RenderableType) -> list[str]:
    """What a renderable looks like, one string with its colours for each row; no blank rows at either end."""
    # one column stays free: a full row would put the cursor where terminals disagree on what comes next
    options = console.options.update(width=max(console.width - 1, 1), height=None)
    rendered = [_row(console, line) for line in console.render_lines(renderable, options, pad=False)]
    while rendered and not rendered[0].strip():
        del rendered[0]
    while rendered and not rendered[-1].strip():
        del rendered[-1]
    return rendered


def _row(console: Console, line: list[Segment]) -> str:
    safe = [Segment(without_controls(text), style) for text, style, control in line if not control]
    while safe and not _has_background(safe[-1]):  # padding is nothing to copy
        text, style, _ = safe.pop()
        if text.rstrip(" "):
            safe.append(Segment(text.rstrip(" "), style))
            break
    with console.capture() as capture:
        console.print(Segments(safe), end="", soft_wrap=True)
    return capture.get()


def _has_background(segment: Segment) -> bool:
    colour = segment.style.bgcolor if segment.style else None
    return colour is not None and not colour.is_default


class LiveRegion:
    """Rows drawn and drawn again in place; `commit` leaves them behind and begins below them."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rows: list[str] = []  # what stands on the screen and can be reached
        self._gone: list[str] = []  # what has left it at the top
        self._width = console.width

    def draw(self, rows: list[str]) -> None:
        """Show these rows instead of the last ones. Of more than fit, the first scroll away, as text does."""
        height = max(self._console.height - 1, 1)
        if not _same_text(rows[: len(self._gone)], self._gone):  # such as a table that got wider: only its end
            self._write(rows[-height:])
            return
        self._write(rows[len(self._gone) :])
        self._gone += self._rows[:-height]
        self._rows = self._rows[-height:]

    def commit(self, rows: list[str]) -> None:
        """Show these rows for good: all of them, once, unless the first ones changed after they scrolled away."""
        gone, self._gone = self._gone, []
        begun = _same_text(rows[: len(gone)], gone)
        self._write(rows[len(gone) :] if begun else rows)
        if self._rows:
            self._emit("\n")
        self._rows = []

    def _write(self, rows: list[str]) -> None:
        prefix = ""
        if self._rows and self._console.width != self._width:
            prefix, self._rows = "\n", []  # the terminal has re-wrapped what was there: leave it
        self._width = self._console.width
        old, same = self._rows, 0
        while same < min(len(old), len(rows)) and old[same] == rows[same]:
            same += 1
        if same == len(old) == len(rows):
            return
        if len(rows) < len(old):  # the cursor must come to the end of the last row: write that again
            same = min(same, max(len(rows) - 1, 0))
        self._emit(prefix + _move(len(old), same) + _change(rows[same:], shrunk=len(rows) < len(old)))
        self._rows = rows

    def _emit(self, text: str) -> None:
        self._console.file.write(f"{_BEGIN}{text}{_END}")
        self._console.file.flush()


def _same_text(some: list[str], others: list[str]) -> bool:
    """Colours aside: those of code may change while a string is still open."""
    return len(some) == len(others) and all(
        _COLOUR.sub("", a) == _COLOUR.sub("", b) for a, b in zip(some, others, strict=True)
    )


def _move(num_rows: int, to: int) -> str:
    """From the end of the last row to the beginning of row ``to``."""
    if to == num_rows:
        return "\n" if num_rows else "\r"
    up = num_rows - 1 - to
    return (f"\x1b[{up}A" if up else "") + "\r"


def _change(rows: list[str], *, shrunk: bool) -> str:
    text = "\n".join(_ERASE_LINE + row for row in rows)
    return text + _ERASE_BELOW if shrunk else text
