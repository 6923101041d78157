"""Starting another Python process that runs one of lmtool's modules. Knows none of them."""

import os
import sys
from pathlib import Path


def module_command(name: str) -> list[str]:
    """``python -P -m name``, to be run with `module_environment`.

    Without -P the folder where lmtool was started, which may be a downloaded model, is searched for modules first.
    """
    return [sys.executable, "-P", "-m", name]


def module_environment() -> dict[str, str]:
    """This process's, in which lmtool is found also where it was found in the folder it was started in."""
    here = str(Path(__file__).parents[1])
    known = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([here, known]) if known else here}
