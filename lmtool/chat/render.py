"""Show an answer while it arrives: as Markdown on a terminal, as plain text everywhere else.

Finished blocks are printed once and scroll away; only the open last block is drawn again, a few times a second.
Notices and statistics go to stderr. Knows no engine.
"""

import time
from collections.abc import Callable
from typing import Protocol

from rich.console import Console
from rich.text import Text

from lmtool.chat.blocks import BlockSplitter
from lmtool.chat.escape import neutralise
from lmtool.chat.markdown import ChatMarkdown
from lmtool.chat.screen import LiveRegion, rows
from lmtool.tokenizer.thinking import ThinkSplitter

REFRESH_S = 0.06
_WAIT_S = 0.3  # an answer that begins sooner needs no "reading …"


class View(Protocol):
    """Where the text of an answer goes. ``status`` is one line that the next text replaces."""

    def push(self, text: str) -> None: ...
    def tick(self) -> None: ...
    def status(self, text: str) -> None: ...
    def finish(self) -> None: ...


class PlainView:
    """Text as it comes, for pipes, dumb terminals and `--no-markdown`."""

    def __init__(self, out: Console) -> None:
        self._file = out.file
        self._last = "\n"

    def push(self, text: str) -> None:
        if text:
            self._file.write(neutralise(text))
            self._file.flush()
            self._last = text[-1]

    def tick(self) -> None: ...

    def status(self, text: str) -> None: ...

    def finish(self) -> None:
        if self._last != "\n":
            self.push("\n")


class MarkdownView:
    """Blocks for good, the open one live, at most one drawing each REFRESH_S."""

    def __init__(self, out: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._out = out
        self._region = LiveRegion(out)
        self._blocks = BlockSplitter()
        self._pending = ""
        self._clock = clock
        self._next_s = 0.0

    def push(self, text: str) -> None:
        self._pending += text
        self.tick()

    def tick(self) -> None:
        begun_s = self._clock()
        if self._pending and begun_s >= self._next_s:
            self._refresh()
            ended_s = self._clock()
            # a long table takes longer to lay out: never spend more than a third of the time on drawing
            self._next_s = ended_s + max(REFRESH_S, 2 * (ended_s - begun_s))

    def status(self, text: str) -> None:
        self._region.draw(rows(self._out, Text(text, style="dim", no_wrap=True, overflow="ellipsis")))

    def finish(self) -> None:
        self._refresh()
        self._commit(self._blocks.open_block)

    def _refresh(self) -> None:
        pending, self._pending = self._pending, ""
        for block in self._blocks.push(pending):
            self._commit(block)
        self._region.draw(rows(self._out, ChatMarkdown(self._blocks.open_block)))

    def _commit(self, block: str) -> None:
        drawn = rows(self._out, ChatMarkdown(block))
        self._region.commit([*drawn, ""] if drawn else [])


class AnswerPrinter:
    """One answer from its first delta to its last: waiting, thinking, text."""

    def __init__(self, view: View, notice: Callable[[str], None], *, inside_thought: bool, show_thought: bool) -> None:
        self._view = view
        self._notice = notice
        self._splitter = ThinkSplitter(inside=inside_thought)
        self._show_thought = show_thought
        self._thought_tokens = 0
        self._folded = False
        self._begun_s = time.monotonic()

    def push(self, text: str, num_generated_tokens: int) -> None:
        for is_thought, piece in self._splitter.push(text):
            self._show(is_thought, piece)
        if self._splitter.inside:
            self._thought_tokens = num_generated_tokens
            if not self._show_thought:
                self._view.status(f"thinking … {num_generated_tokens:,} tokens")

    def tick(self, waiting_for: str | None) -> None:
        """Called when nothing came for a while. ``waiting_for`` is said as long as there is no text at all."""
        if waiting_for and time.monotonic() - self._begun_s >= _WAIT_S:
            self._view.status(waiting_for)
        self._view.tick()

    def finish(self) -> None:
        for is_thought, piece in self._splitter.finish():
            self._show(is_thought, piece)
        self._fold()
        self._view.finish()

    def _show(self, is_thought: bool, piece: str) -> None:
        if not is_thought:
            self._fold()
        if not is_thought or self._show_thought:
            self._view.push(piece)

    def _fold(self) -> None:
        """The thought is over: say so once, in one line."""
        if self._folded or not self._splitter.num_chars:
            return
        self._folded = True
        if self._show_thought:
            self._view.push("\n\n---\n\n")
            return
        self._view.status("")
        self._notice(f"thought for {self._thought_tokens:,} tokens (/set think on shows it)")


def answer_view(out: Console, *, markdown: bool) -> View:
    """Markdown where the terminal can draw it, else plain text."""
    return MarkdownView(out) if markdown and out.is_terminal and not out.is_dumb_terminal else PlainView(out)
