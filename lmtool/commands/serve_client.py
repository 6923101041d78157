"""`lmtool serve api_client URL`: the chat terminal, with a server at the other end."""

import sys
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmtool.commands import chat, options, serve_options
from lmtool.errors import InputError

if TYPE_CHECKING:
    from lmtool.chat.http_backend import HttpBackend

Url = Annotated[
    str, typer.Argument(metavar="URL", help="Of an OpenAI-compatible server, as in http://localhost:23333.")
]
SessionId = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="The server remembers the conversation under this number (/v1/chat/interactive).",
    ),
]


def api_client(
    url: Url,
    *,
    config: serve_options.Config = None,
    api_key: serve_options.ApiKey = None,
    model_name: serve_options.ServedModel = None,
    session_id: SessionId = None,
    system: chat.System = None,
    prompt: chat.Prompt = None,
    image: chat.Image = None,
    json: chat.Json = False,
    show_prompt: chat.ShowPrompt = False,
    markdown: chat.Markdown = True,
    double_enter: chat.DoubleEnter = False,
    history: chat.History = True,
    history_file: chat.HistoryFile = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    seed: options.Seed = None,
    max_new_tokens: options.MaxNewTokens = None,
    stop: options.Stop = None,
    logprobs: options.Logprobs = None,
) -> None:
    """Chat with a server on the terminal.

    Without a terminal on stdin, what is piped in is the prompt and stdout is only the answer. Flags may also come from
    --config or from LMTOOL_API_KEY and the like.
    """
    from lmtool.chat.oneshot import read_question
    from lmtool.chat.session import Session

    sampling = options.given(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        max_new_tokens=max_new_tokens,
        stop=stop,
        logprobs=logprobs,
    )
    options.generation_config(sampling)
    question = read_question(prompt, sys.stdin)
    chat.check_combination(question, json=json, show_prompt=show_prompt, logprobs=logprobs)
    pictures = chat.read_pictures(image)
    begun_s = time.perf_counter()
    backend = _connect(url, api_key, model_name, session_id)
    connect_s = time.perf_counter() - begun_s
    try:
        if question is None:
            kept = chat.history_path(history, history_file)
            looks = chat.Looks(markdown=markdown, double_enter=double_enter, history=kept, pictures=pictures)
            raise typer.Exit(_talk(backend, sampling, system, looks))
        chat.check_takes_pictures(backend, pictures)
        messages = Session(system).messages(question, pictures)
        _answer(backend, sampling, messages, json=json, show_prompt=show_prompt, connect_s=connect_s)
    finally:
        backend.close()


def _connect(url: str, api_key: str | None, model: str | None, session_id: int | None) -> "HttpBackend":
    if find_spec("httpx") is None:
        raise InputError("httpx is not installed", "pip install '.[chat]' in lmtool's folder")
    from lmtool.chat.http_backend import HttpBackend, InteractiveBackend

    if session_id is None:
        return HttpBackend(url, api_key=api_key, model=model)
    return InteractiveBackend(url, session_id, api_key=api_key, model=model)


def _talk(backend: "HttpBackend", sampling: dict[str, Any], system: str | None, looks: chat.Looks) -> int:
    chat.need_terminal()
    return chat.converse(backend, options.generation_config(sampling, backend.default_generation), system, looks)


def _answer(
    backend: "HttpBackend",
    sampling: dict[str, Any],
    messages: list[dict[str, Any]],
    *,
    json: bool,
    show_prompt: bool,
    connect_s: float,
) -> None:
    from lmtool.chat import oneshot
    from lmtool.chat.escape import neutralise

    config = options.generation_config(sampling, backend.default_generation)
    if show_prompt:
        print(neutralise(backend.render(messages)))
        print(f"lmtool: {backend.count_tokens(messages):,} tokens", file=sys.stderr)
    elif json:
        oneshot.print_json(backend, messages, config, model=backend.model, load_s=connect_s)
    else:
        oneshot.print_answer(backend, messages, config)
