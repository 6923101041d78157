"""Options that several of `lmtool bench`'s commands share."""

from pathlib import Path
from typing import Annotated

import typer

from lmtool.errors import ConfigError

JsonFile = Annotated[str | None, typer.Option("--json", metavar="FILE|-", help="Write everything measured as JSON.")]
Png = Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the roofline and each share of the limit.")]
Seed = Annotated[int, typer.Option(help="Of the mixes and the token ids.")]


def numbers(flag: str, text: str) -> tuple[int, ...]:
    """'1,8,64' → (1, 8, 64). Raises ConfigError."""
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise ConfigError(f"{flag} is {text!r}", "give numbers with commas between them, as in 1,8,64") from None
