"""Where the lines that a user types are kept across runs. Knows no keys."""

import os
from pathlib import Path

from lmtool.errors import InputError


def default_history() -> Path:
    """In the user's state folder, as the XDG base directory specification has it."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "lmtool" / "chat_history"


def prepare_history(path: Path) -> Path:
    """Make the file if it is not there, readable by its owner only: what people ask a model is their own business.

    Raises InputError where it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
        with path.open("a"):
            return path
    except OSError as error:
        raise InputError(
            f"cannot keep the history in {path}: {error.strerror}", "give --history-file FILE or --no-history"
        ) from error
