"""`lmtool serve gradio URL|MODEL`: the chat as a page in a browser."""

import contextlib
import os
import signal
import socket
import sys
import tempfile
import threading
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmtool.commands import chat, options, serve_options
from lmtool.config import LOOPBACK
from lmtool.errors import ConfigError, InputError

if TYPE_CHECKING:
    from lmtool.chat.backend import Backend
    from lmtool.config import EngineConfig, GenerationConfig

_OF_URL = ("api_key", "model_name", "restful_api")
_OF_MODEL = (
    "device",
    "dtype",
    "model_format",
    "session_len",
    "max_batch_size",
    "tp",
    "rank_hosts",
    "quant_policy",
    "kv_dtype",
    "cache_gb",
    "cache_host_gb",
    "cache_max_entry_count",
    "chat_template",
    "revision",
    "download_dir",
    "backend",
)
_USERS = 64  # of a URL, at once; a model of this process has its --max-batch-size

UrlOrModel = Annotated[
    str,
    typer.Argument(metavar="URL|MODEL", help="A server, as in http://localhost:23333, or a model to load here."),
]
ServerName = Annotated[str, typer.Option("--server-name", "--host", help="Address that the page is at.")]
ServerPort = Annotated[int, typer.Option("--server-port", "--port", help="Its port; 0: a free one.", min=0, max=65535)]
Share = Annotated[bool, typer.Option("--share", hidden=True)]
RestfulApi = Annotated[bool, typer.Option("--restful-api", hidden=True)]


def gradio(
    ctx: typer.Context,
    url_or_model: UrlOrModel,
    *,
    server_name: ServerName = "127.0.0.1",
    server_port: ServerPort = 6006,
    config: serve_options.Config = None,
    api_key: serve_options.ApiKey = None,
    model_name: serve_options.ServedModel = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    max_new_tokens: options.MaxNewTokens = None,
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
    share: Share = False,
    restful_api: RestfulApi = False,
) -> None:
    """A page to chat with a server, or with a model that is loaded here."""
    is_url = url_or_model.startswith(("http://", "https://"))
    _check(ctx, is_url=is_url, share=share)
    sampling = options.given(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        max_new_tokens=max_new_tokens,
    )
    options.generation_config(sampling)
    engine = options.engine_config(
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
    if backend is not None:
        options.say_one_engine(backend)
    _check_port(server_name, server_port)
    if is_url:
        found, recommended = _connect(url_or_model, api_key, model_name)
    else:
        found, recommended = _load(chat.Source(url_or_model, chat_template, revision, download_dir), engine)
    users = _USERS if is_url else engine.max_batch_size
    try:
        _show(found, options.generation_config(sampling, recommended), users, server_name, server_port)
    finally:
        found.close()


def _check(ctx: typer.Context, *, is_url: bool, share: bool) -> None:
    """Nothing that is given is for nothing."""
    if share:
        raise ConfigError(
            "--share would lead everything through gradio's own servers", "give --server-name 0.0.0.0, or use ssh -L"
        )
    for name in _OF_MODEL if is_url else _OF_URL:
        source = ctx.get_parameter_source(name)
        # the environment is for other commands as well
        if source is not None and source.name not in ("DEFAULT", "ENVIRONMENT"):
            flag = f"--{name.replace('_', '-')}"
            if is_url:
                raise ConfigError(
                    f"{flag} is for a model that is loaded here", "give it to the server, or give a model"
                )
            raise ConfigError(f"{flag} is for a server", "give its address instead of the model")
    if find_spec("gradio") is None:
        raise InputError("gradio is not installed", "pip install '.[web]' in lmtool's folder")


def _check_port(name: str, port: int) -> None:
    """Raises ConfigError where it cannot be had, before anything is loaded."""
    family = socket.AF_INET6 if ":" in name else socket.AF_INET
    with socket.socket(family) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((name, port))
        except OSError as error:
            raise ConfigError(
                f"{name}:{port} cannot be listened at: {error.strerror}", "give another --server-port"
            ) from None


def _connect(url: str, api_key: str | None, model: str | None) -> tuple["Backend", dict[str, Any]]:
    from lmtool.chat.http_backend import HttpBackend

    backend = HttpBackend(url, api_key=api_key, model=model)
    return backend, backend.default_generation


def _load(source: chat.Source, config: "EngineConfig") -> tuple["Backend", dict[str, Any]]:
    from lmtool.chat.backend import LocalBackend

    pipe = chat.load_pipeline(source, config)
    return LocalBackend(pipe), pipe.default_generation


def _show(backend: "Backend", defaults: "GenerationConfig", users: int, name: str, port: int) -> None:
    """Until Ctrl-C or SIGTERM."""
    if name not in LOOPBACK:
        _say(f"warning: whoever reaches {name} may use this page, and what is behind it; 127.0.0.1 is for you alone")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # of uploaded pictures; gradio's own is the same for everybody on the machine, and open to all
    with tempfile.TemporaryDirectory(prefix="lmtool-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        from lmtool.chat.web import Page, launch

        page = Page(backend, defaults, users=users)
        _say(f"the page is at {launch(page, name, port)}")
        over = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: over.set())
        with contextlib.suppress(KeyboardInterrupt):
            over.wait()
        page.blocks.close(verbose=False)


def _say(line: str) -> None:
    print(f"lmtool: {line}", file=sys.stderr, flush=True)
