"""`lmtool serve`: an OpenAI-compatible server, and two faces for it."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from lmtool.commands import options, serve_options
from lmtool.commands.serve_client import api_client
from lmtool.commands.serve_gradio import gradio
from lmtool.commands.serve_proxy import proxy
from lmtool.commands.serve_ranks import ranks
from lmtool.errors import InputError

app = typer.Typer(no_args_is_help=True, help="Serve a model over HTTP, and talk to a server.")
app.command("api-client")(api_client)
app.command("gradio")(gradio)
app.command("proxy")(proxy)
app.command("ranks")(ranks)

_SERVER = serve_options.SERVER
_LIMITS = "Limits"

ModelName = Annotated[
    list[str] | None,
    typer.Option(help="What clients call the model; may be given several times.", rich_help_panel=_SERVER),
]
HttpProcesses = Annotated[
    int | None,
    typer.Option(help="That take requests and write answers (default: 1, on a GPU 4).", rich_help_panel=_SERVER),
]
DisableDocs = Annotated[
    bool,
    typer.Option("--disable-docs", "--disable-fastapi-docs", help="No OpenAPI page.", rich_help_panel=_SERVER),
]
MaxQueue = Annotated[
    int,
    typer.Option(help="Requests that may wait; more are refused with 429.", rich_help_panel=_LIMITS),
]
RequestTimeout = Annotated[
    float, typer.Option(help="Seconds for a whole answer; 0: no limit.", rich_help_panel=_LIMITS)
]
DrainTimeout = Annotated[float, typer.Option(help="Seconds for answers under way at SIGTERM.", rich_help_panel=_LIMITS)]
MaxBodyMb = Annotated[
    float | None,
    typer.Option(help="Of one request (default: 8; 64 where the model takes pictures).", rich_help_panel=_LIMITS),
]
MaxImages = Annotated[int, typer.Option(help="Pictures in one request; 0: none.", rich_help_panel=_LIMITS)]
AllowedImageHosts = Annotated[
    list[str] | None,
    typer.Option(
        metavar="HOST[:PORT]",
        help="Fetch pictures from there (default: from nowhere); several times, or with commas.",
        rich_help_panel=_LIMITS,
    ),
]


@app.command("api-server")
def api_server(
    model: options.Model,
    *,
    config: serve_options.Config = None,
    server_name: serve_options.ServerName = "127.0.0.1",
    server_port: serve_options.ServerPort = 23333,
    model_name: ModelName = None,
    api_keys: serve_options.ApiKeys = None,
    allow_origins: serve_options.AllowOrigins = None,
    ssl_keyfile: serve_options.SslKeyfile = None,
    ssl_certfile: serve_options.SslCertfile = None,
    http_processes: HttpProcesses = None,
    log_requests: serve_options.LogRequests = False,
    disable_docs: DisableDocs = False,
    max_queue: MaxQueue = 1024,
    request_timeout: RequestTimeout = 600.0,
    drain_timeout: DrainTimeout = 30.0,
    max_body_mb: MaxBodyMb = None,
    max_images: MaxImages = 16,
    allowed_image_hosts: AllowedImageHosts = None,
    device: options.Device = options.ENGINE_DEFAULTS.device,
    dtype: options.Dtype = options.ENGINE_DEFAULTS.dtype,
    model_format: options.ModelFormat = None,
    session_len: options.SessionLen = None,
    max_batch_size: serve_options.MaxBatchSize = None,
    tp: options.Tp = None,
    rank_hosts: options.RankHosts = None,
    quant_policy: options.QuantPolicy = None,
    kv_dtype: options.KvDtype = None,
    cache_gb: options.CacheGb = None,
    cache_host_gb: options.CacheHostGb = None,
    cache_max_entry_count: options.CacheMaxEntryCount = None,
    chat_template: options.ServedChatTemplate = None,
    revision: options.Revision = None,
    download_dir: options.DownloadDir = None,
    backend: options.Backend = None,
) -> None:
    """An OpenAI-compatible server of one model.

    The model and the key may also come from --config or from LMTOOL_MODEL, LMTOOL_API_KEYS and the like.
    """
    _need_server()
    if backend is not None:
        options.say_one_engine(backend)
    from lmtool.server.config import ServerConfig

    engine = options.given(
        device=device,
        dtype=dtype,
        model_format=model_format,
        session_len=session_len,
        max_batch_size=max_batch_size,
        quant_policy=quant_policy,
        kv_dtype=kv_dtype,
        cache_gb=cache_gb,
        cache_host_gb=cache_host_gb,
        tp=tp,
        rank_hosts=options.separate(rank_hosts),
        cache_max_entry_count=cache_max_entry_count,
    )
    options.engine_config(**engine)  # what is wrong with the flags is said before a model is looked for
    served = ServerConfig(
        host=server_name,
        port=server_port,
        model_names=tuple(model_name or (_short(model),)),
        api_keys=tuple(api_keys or ()),
        allow_origins=tuple(allow_origins or ()),
        ssl_keyfile=ssl_keyfile,
        ssl_certfile=ssl_certfile,
        num_http_processes=http_processes if http_processes is not None else _http_processes(device),
        max_queue=max_queue,
        request_timeout_s=request_timeout,
        drain_timeout_s=drain_timeout,
        max_body_bytes=None if max_body_mb is None else int(max_body_mb * (1 << 20)),
        max_images=max_images,
        allowed_image_hosts=options.separate(allowed_image_hosts) or (),
        disable_docs=disable_docs,
        log_requests=log_requests,
    )
    if served.is_public and not served.api_keys:
        _say(f"warning: whoever reaches {served.host} may use this server; give --api-keys, or --host 127.0.0.1")
    from lmtool.checkpoint.hub import resolve_model
    from lmtool.server.supervisor import Launch, serve

    path = resolve_model(model, revision=revision, download_dir=download_dir)
    serve(Launch(name=model, path=path, chat_template=chat_template, engine=engine, config=served), _say)


def _say(line: str) -> None:
    print(f"lmtool: {line}", file=sys.stderr, flush=True)


def _short(model: str) -> str:
    """What a model is called where nobody named it: of a path its last part."""
    return Path(model).name if Path(model).exists() else model


def _http_processes(device: str) -> int:
    """Where a GPU makes thousands of tokens a second, one Python process cannot write them all."""
    return 1 if device == "cpu" or not Path("/dev/nvidiactl").exists() else 4


def _need_server() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("fastapi", "uvicorn", "uvloop", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise InputError(f"{missing[0]} is not installed", "pip install '.[server]' in lmtool's folder")
