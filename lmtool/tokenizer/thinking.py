"""Tell a model's `<think>…</think>` from its answer while the text is still arriving.

Only a thought at the very beginning counts: an answer that merely mentions the tag is left alone.
Knows neither terminal nor models.
"""

from collections.abc import Iterator

OPEN, CLOSE = "<think>", "</think>"


class ThinkSplitter:
    """Feed pieces of text; get ``(is_thought, text)`` pieces back.

    ``inside``: the prompt has already opened the thought, as some templates do.
    """

    def __init__(self, *, inside: bool = False) -> None:
        self._pending = ""
        self._state = "thought" if inside else "start"
        self.num_chars = 0  # length of the thought

    @property
    def inside(self) -> bool:
        return self._state == "thought"

    def push(self, text: str) -> Iterator[tuple[bool, str]]:
        self._pending += text
        if self._state == "start":
            self._begin()
        if self._state == "thought":
            yield from self._think()
        if self._state == "gap":
            self._pending = self._pending.lstrip("\n")
            self._state = "answer" if self._pending else "gap"
        if self._state == "answer" and self._pending:
            yield False, self._take(len(self._pending))

    def finish(self) -> Iterator[tuple[bool, str]]:
        """What was held back because it might have become a tag."""
        if self._pending:
            thought = self.inside
            self.num_chars += len(self._pending) if thought else 0
            yield thought, self._take(len(self._pending))

    def _begin(self) -> None:
        text = self._pending.lstrip()
        if text.startswith(OPEN):
            self._pending = text.removeprefix(OPEN)
            self._state = "thought"
        elif text and not OPEN.startswith(text):
            self._state = "answer"

    def _think(self) -> Iterator[tuple[bool, str]]:
        if self.num_chars == 0:
            self._pending = self._pending.lstrip("\n")
        end = self._pending.find(CLOSE)
        closed = end >= 0
        if not closed:
            end = len(self._pending) - _overlap(self._pending, CLOSE)
        self.num_chars += end
        if end:
            yield True, self._take(end)
        if closed:
            self._pending = self._pending.removeprefix(CLOSE)
            self._state = "gap"

    def _take(self, num_chars: int) -> str:
        taken, self._pending = self._pending[:num_chars], self._pending[num_chars:]
        return taken


def _overlap(text: str, tag: str) -> int:
    """How many of the last characters could be the beginning of the tag."""
    return next((size for size in range(len(tag) - 1, 0, -1) if text.endswith(tag[:size])), 0)


def split(text: str, *, inside: bool = False) -> tuple[str, str]:
    """A whole answer as ``(thought, answer)``."""
    splitter = ThinkSplitter(inside=inside)
    pieces = [*splitter.push(text), *splitter.finish()]
    return "".join(t for thought, t in pieces if thought), "".join(t for thought, t in pieces if not thought)
