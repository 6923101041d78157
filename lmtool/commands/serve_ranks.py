"""`lmtool serve ranks`: a machine's GPUs for models that are shared with other machines."""

import sys
from typing import Annotated

import typer

Host = Annotated[str, typer.Option("--host", help="Address to listen on: this machine's, as the first one reaches it.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="0: a free one.")]


def ranks(*, host: Host = "127.0.0.1", port: Port = 23334) -> None:
    """Have this machine take part in a model that `--tp N --rank-hosts` of another machine spreads over both.

    Whoever has the key in LMTOOL_RANKS_KEY may start ranks here, and nobody else. Each machine reads its own copy of
    the model at the same path. The machines' network is to be trusted.
    """
    from lmtool.engine.rank_host import RankHost, serve
    from lmtool.engine.rank_key import key_here

    listening = RankHost(host, port, key_here())
    print(f"lmtool: for --rank-hosts {listening.address}", file=sys.stderr, flush=True)
    serve(listening)
