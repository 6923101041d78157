"""What tests see of the processes that an engine starts."""

from pathlib import Path


def is_gone(pid: int) -> bool:
    """Also while nobody has waited for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
