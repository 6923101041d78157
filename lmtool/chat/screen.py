"""The rows at the bottom of a terminal that may still change, redrawn without flicker.

Only rows that differ are written, in one piece. Everything that reaches the terminal is neutralised here, after
Markdown has been understood, because Markdown itself can produce control characters (``<http://x/%1b[2J>``).
Does not know what the rows mean.
"""

from rich.console import Console, RenderableType
from rich.segment import Segment, Segments

from lmtool.chat.escape import neutralise

_BEGIN, _END = "\x1b[?2026h", "\x1b[?2026l"  # synchronized update; terminals without it ignore it
_ERASE_LINE, _ERASE_BELOW = "\x1b[K", "\x1b[J"


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
    safe = [Segment(neutralise(text), style) for text, style, control in line if not control]
    while safe and not safe[-1].text.strip(" ") and not _has_background(safe[-1]):
        safe.pop()  # padding is nothing to copy
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
        self._rows: list[str] = []
        self._width = console.width

    def draw(self, rows: list[str]) -> None:
        """Show these rows instead of the last ones; of more than fit, the last ones."""
        self._write(rows[-max(self._console.height - 1, 1) :])

    def commit(self, rows: list[str]) -> None:
        """Show these rows, all of them, for good."""
        self._write(rows)
        if rows:
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
        self._emit(prefix + _move(len(old), same) + _change(rows[same:], shrunk=len(rows) < len(old)))
        self._rows = rows

    def _emit(self, text: str) -> None:
        self._console.file.write(f"{_BEGIN}{text}{_END}")
        self._console.file.flush()


def _move(num_rows: int, to: int) -> str:
    """From the end of the last row to the beginning of row ``to``."""
    if to == num_rows:
        return "\n" if num_rows else "\r"
    up = num_rows - 1 - to
    return (f"\x1b[{up}A" if up else "") + "\r"


def _change(rows: list[str], *, shrunk: bool) -> str:
    text = "\n".join(_ERASE_LINE + row for row in rows)
    return text + _ERASE_BELOW if shrunk else text
