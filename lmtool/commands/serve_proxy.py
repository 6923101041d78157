"""`lmtool serve proxy`: several models, each with several replicas, behind one OpenAI address."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from lmtool.commands import serve_options
from lmtool.commands.settings_file import read_settings
from lmtool.errors import ConfigError, InputError

_SERVER = serve_options.SERVER


def _hear_environment(ctx: typer.Context, path: Path | None) -> Path | None:
    """LMTOOL_* speak here, too; the file is one of models, and not of flags."""
    read_settings(ctx, None)
    return path


ModelsFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        callback=_hear_environment,
        is_eager=True,
        help="A TOML file of models, as in configs/cluster; LMTOOL_* also works for flags.",
    ),
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        metavar="MODEL[,KEY=VALUE]…",
        help="A model, and how: name, replicas, cpus, gpus, cache-gb, … (flags of api_server); several times.",
    ),
]
RayAddress = Annotated[
    str | None, typer.Option(help="A Ray cluster: auto or HOST:PORT (default: one of its own on this machine).")
]
RoutingPolicy = Annotated[
    str, typer.Option(metavar="POLICY", help="Who gets a request: prefix, least-queued or random.")
]
DrainTimeout = Annotated[float, typer.Option(help="Seconds for answers under way at SIGTERM.", rich_help_panel=_SERVER)]
MaxBodyMb = Annotated[float | None, typer.Option(help="Of one request (default: 64).", rich_help_panel=_SERVER)]
DisableDocs = Annotated[bool, typer.Option("--disable-docs", help="No OpenAPI page.", rich_help_panel=_SERVER)]


def proxy(
    *,
    config: ModelsFile = None,
    model: Models = None,
    ray_address: RayAddress = None,
    routing: RoutingPolicy = "prefix",
    server_name: serve_options.ServerName = "127.0.0.1",
    server_port: serve_options.ServerPort = 23333,
    api_keys: serve_options.ApiKeys = None,
    allow_origins: serve_options.AllowOrigins = None,
    ssl_keyfile: serve_options.SslKeyfile = None,
    ssl_certfile: serve_options.SslCertfile = None,
    drain_timeout: DrainTimeout = 30.0,
    max_body_mb: MaxBodyMb = None,
    log_requests: serve_options.LogRequests = False,
    disable_docs: DisableDocs = False,
) -> None:
    """Several models behind one OpenAI address, each with replicas that Ray Serve places and keeps alive.

    A request goes to the replica of its model that has most of its beginning in its cache. SIGHUP reads --config again:
    models come and go, and replicas of those whose settings differ are replaced, one after another.
    """
    _need_cluster()
    if (config is None) == (not model):
        raise ConfigError("models come from --config or from --model", "give one of the two")
    from lmtool.cluster.routing import Policy
    from lmtool.cluster.spec import ClusterSpec
    from lmtool.cluster.spec_reader import parse_models, read_spec
    from lmtool.server.config import ServerConfig

    def read() -> ClusterSpec:
        return read_spec(config) if config is not None else parse_models(model or ())

    if routing not in [*Policy]:
        raise ConfigError(f"--routing is {routing!r}", f"give one of {', '.join(Policy)}")
    spec = read()
    front = ServerConfig(
        host=server_name,
        port=server_port,
        model_names=spec.names,
        api_keys=tuple(api_keys or ()),
        allow_origins=tuple(allow_origins or ()),
        ssl_keyfile=ssl_keyfile,
        ssl_certfile=ssl_certfile,
        drain_timeout_s=drain_timeout,
        max_body_bytes=None if max_body_mb is None else int(max_body_mb * (1 << 20)),
        log_requests=log_requests,
        disable_docs=disable_docs,
    )
    if front.is_public and not front.api_keys:
        _say(f"warning: whoever reaches {front.host} may use this server; give --api-keys, or --host 127.0.0.1")
    from lmtool.cluster.proxy import serve_proxy

    serve_proxy(spec, front, ray_address, Policy(routing), _say, read)


def _say(line: str) -> None:
    print(f"lmtool: {line}", file=sys.stderr, flush=True)


def _need_cluster() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("ray", "aiohttp", "fastapi", "uvicorn", "uvloop") if find_spec(name) is None]
    if missing:
        raise InputError(f"{missing[0]} is not installed", "pip install '.[cluster]' in lmtool's folder")
