"""Cut streaming Markdown into blocks that are finished and one that is still open.

CommonMark is parsed line by line, and of the top-level blocks only the last can still change. So everything before
the last block of the *complete* lines is final: it is handed out once and never parsed again.
Knows no terminal.
"""

from markdown_it import MarkdownIt


def parser() -> MarkdownIt:
    """CommonMark with tables, as chat models write it.

    No HTML and no link reference definitions: both would make text of the answer vanish.
    """
    return MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"]).disable("reference")


class BlockSplitter:
    def __init__(self) -> None:
        self._text = ""  # from the beginning of the open block
        self._parser = parser().disable("inline")  # only the block structure matters here

    @property
    def open_block(self) -> str:
        return self._text

    def push(self, text: str) -> list[str]:
        """Add text and return the blocks that it finished."""
        self._text += text
        if "\n" not in text:
            return []
        complete = self._text[: self._text.rfind("\n") + 1]
        starts = [token.map[0] for token in self._parser.parse(complete) if token.level == 0 and token.map]
        if len(starts) < 2:
            return []
        return self._cut(sorted(set(starts)))

    def _cut(self, starts: list[int]) -> list[str]:
        lines = self._text.split("\n")  # not splitlines: the parser counts "\n" only
        bounds = [0, *starts[1:]]
        blocks = ["\n".join(lines[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
        self._text = "\n".join(lines[bounds[-1] :])
        return blocks
