"""Options that the commands of `lmtool serve` share, each described once."""

from pathlib import Path
from typing import Annotated

import typer

from lmtool.commands.settings_file import read_settings

SERVER = "Server"

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
ServerName = Annotated[
    str, typer.Option("--server-name", "--host", help="Address to listen on.", rich_help_panel=SERVER)
]
ServerPort = Annotated[
    int, typer.Option("--server-port", "--port", help="Port; 0: a free one.", rich_help_panel=SERVER)
]
ApiKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--api-keys", "--api-key", help="Ask clients for one of these; several times.", rich_help_panel=SERVER
    ),
]
AllowOrigins = Annotated[
    list[str] | None,
    typer.Option(help="Pages of these origins may ask (CORS; default: none).", rich_help_panel=SERVER),
]
SslKeyfile = Annotated[str | None, typer.Option(help="Key for https (PEM).", rich_help_panel=SERVER)]
SslCertfile = Annotated[str | None, typer.Option(help="Certificate for https (PEM).", rich_help_panel=SERVER)]
LogRequests = Annotated[bool, typer.Option("--log-requests", help="A line for each request.", rich_help_panel=SERVER)]
