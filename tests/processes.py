"""What tests see of processes that others have started."""

import contextlib
from pathlib import Path


def children(pid: int) -> list[int]:
    """Those that any thread of a process has started, in the order of its threads. Raises OSError where it is gone."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # the thread has ended meanwhile, as some of Ray's do now and then
            found += map(int, (task / "children").read_text().split())
    return found


def is_gone(pid: int) -> bool:
    """Also while nobody has waited for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
