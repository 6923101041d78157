"""Options that the commands of `lmtool serve` share, each described once."""

from pathlib import Path
from typing import Annotated

import typer

from lmtool.commands.settings_file import read_settings

Config = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", callback=read_settings, is_eager=True, help="A TOML file of these flags; LMTOOL_* also works."
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(help="The server's key; LMTOOL_API_KEY keeps it out of the command line."),
]
ServedModel = Annotated[
    str | None, typer.Option("--model-name", help="Which of the server's models (default: its first).")
]
MaxBatchSize = Annotated[
    int | None,
    typer.Option(
        "--max-batch-size",
        "--instance-num",
        help="Most requests computed in one step (default: 256).",
        rich_help_panel="Engine",
    ),
]
