"""A JSON object out of a file that may not be there. Knows nothing of what it says."""

import json
from pathlib import Path
from typing import Any

from lmtool.errors import LmtoolError


def json_object(path: Path, refusal: type[LmtoolError]) -> dict[str, Any]:
    """{} where there is no such file. Raises ``refusal`` for one that holds something else, or cannot be read."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise refusal(f"{path} cannot be read as JSON: {error}", "download that file again") from error
    if not isinstance(value, dict):
        raise refusal(f"{path} is not a JSON object", "download that file again")
    return value
