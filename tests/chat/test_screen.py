"""Rows drawn in place, seen through a terminal emulator."""

import io

import pyte
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from lmtool.chat.markdown import ChatMarkdown
from lmtool.chat.render import MarkdownView
from lmtool.chat.screen import LiveRegion, rows

# the same examples on every machine, however slow it is
COLUMNS, LINES = 20, 6
ROWS = st.lists(st.sampled_from(["", "a", "bb", "a row of nineteen!!"]), max_size=LINES - 1)  # what can be redrawn


def _console(width: int = COLUMNS, height: int = LINES) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=True, color_system=None, width=width, height=height, legacy_windows=False
    )


def _seen(console: Console) -> list[str]:
    """Everything the terminal shows, scrolled-away rows included, without the blank rows at the end."""
    screen = pyte.HistoryScreen(console.width, console.height, history=1000, ratio=0.5)
    output = console.file.getvalue()  # type: ignore[attr-defined]
    pyte.Stream(screen).feed(output.replace("\n", "\r\n"))
    gone = ["".join(line[x].data for x in range(console.width)).rstrip() for line in screen.history.top]
    shown = [*gone, *(line.rstrip() for line in screen.display)]
    while shown and not shown[-1]:
        shown.pop()
    return shown


def _stripped(rows: list[str]) -> list[str]:
    while rows and not rows[-1]:
        rows = rows[:-1]
    return rows


@settings(max_examples=200)
@given(st.lists(ROWS, max_size=6), ROWS, ROWS.map(lambda rows: rows * 3))
def test_whatever_was_drawn_only_what_was_committed_stays(
    drafts: list[list[str]], first: list[str], second: list[str]
) -> None:
    console = _console()
    region = LiveRegion(console)
    for committed in (first, second):
        for draft in drafts:
            region.draw(draft)
        region.commit(committed)
    assert _seen(console) == _stripped([*first, *second])


def test_a_tall_block_scrolls_away_as_it_grows_and_is_there_once() -> None:
    console = _console()
    region = LiveRegion(console)
    block = [str(i) for i in range(20)]
    for size in range(1, 21):
        region.draw(block[:size])
        assert _seen(console) == block[:size]
    region.commit(block)
    assert _seen(console) == block


def test_a_tall_block_that_changed_after_scrolling_is_there_whole_at_the_end() -> None:
    console = _console()
    region = LiveRegion(console)
    region.draw([str(i) for i in range(20)])
    changed = [f"{i}!" for i in range(21)]
    region.draw(changed)
    region.commit(changed)
    assert _seen(console)[-21:] == changed


def test_rows_that_did_not_change_are_not_written_again() -> None:
    console = _console()
    region = LiveRegion(console)
    region.draw(["same", "old"])
    before = len(console.file.getvalue())  # type: ignore[attr-defined]
    region.draw(["same", "new"])
    written = console.file.getvalue()[before:]  # type: ignore[attr-defined]
    assert "same" not in written
    assert "new" in written
    region.draw(["same", "new"])
    assert console.file.getvalue()[before:] == written  # type: ignore[attr-defined]


def test_rows_carry_no_control_characters_and_no_padding() -> None:
    assert rows(_console(), Text("a\x1b[2Jb\x9b   ")) == ["a[2Jb"]


def test_a_row_never_reaches_the_last_column() -> None:
    assert max(len(row) for row in rows(_console(), ChatMarkdown("word " * 40))) < COLUMNS


def test_drawing_is_rate_limited_and_the_end_is_always_drawn() -> None:
    console = _console()
    now = 0.0
    view = MarkdownView(console, clock=lambda: now)
    for index in range(1000):  # no time passes: one drawing
        view.push(f"w{index} ")
    written = len(console.file.getvalue())  # type: ignore[attr-defined]
    assert written < 100
    view.finish()
    assert _seen(console)[-1].endswith("w999")


def test_an_answer_in_single_characters_comes_out_as_the_whole_does() -> None:
    text = "# T\n\npara *x*\nnext\n\n- a\n- b\n\n```py\nx = 1\n```\n| a | b |\n|--|--|\n| 1 | 2 |\n"
    pieces, whole = _console(60, 40), _console(60, 40)
    ticking = iter(range(10_000))
    view = MarkdownView(pieces, clock=lambda: float(next(ticking)))
    for character in text:
        view.push(character)
    view.finish()
    once = MarkdownView(whole)
    once.push(text)
    once.finish()
    assert _seen(pieces) == _seen(whole)
    assert "x = 1" in _seen(whole)
