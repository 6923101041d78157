"""The line that a person sees while a model loads. Knows no engine."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lmtool.chat.escape import neutralise


@contextmanager
def loading(model: str) -> Iterator[Callable[[str, int, int], None] | None]:
    """What to tell (what is being done, parts done, parts in all); drawn on stderr and gone afterwards.

    None, and nothing is drawn, where stderr is no terminal.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    text, parts = TextColumn("{task.description}", markup=False), MofNCompleteColumn()
    with Progress(text, BarColumn(), parts, console=Console(stderr=True), transient=True) as line:
        task = line.add_task(f"loading {neutralise(model)} …", total=None)

        def tell(what: str, done: int, total: int) -> None:
            line.update(task, description=f"{neutralise(model)}: {what}", completed=done, total=total)

        yield tell
