"""`lmtool chat`: a conversation on a terminal, or one answer on stdout when there is none to talk to."""

import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmtool.commands import options
from lmtool.config import EngineConfig, GenerationConfig
from lmtool.errors import ConfigError, InputError

if TYPE_CHECKING:
    from lmtool.chat.backend import Backend
    from lmtool.chat.pictures import Picture

System = Annotated[str | None, typer.Option(help="System prompt.")]
Prompt = Annotated[str | None, typer.Option(help="Answer this once and leave; piped text is put behind it.")]
Image = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE|URL", help="A picture for the (first) message; may be given several times."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object: text, finish reason, tokens, times.")]
ShowPrompt = Annotated[
    bool, typer.Option("--show-prompt", help="Print what the model is really given, and generate nothing.")
]
Markdown = Annotated[
    bool, typer.Option("--markdown/--no-markdown", help="Draw Markdown on the terminal, or plain text.")
]
DoubleEnter = Annotated[bool, typer.Option("--double-enter", help="An empty line sends, Enter makes a new line.")]
HistoryFile = Annotated[
    Path | None, typer.Option(help="Where typed lines are kept (default: in XDG_STATE_HOME).", dir_okay=False)
]
History = Annotated[bool, typer.Option("--history/--no-history", help="Keep typed lines across runs.")]


def chat(
    model: options.Model = options.DEFAULT_MODEL,
    *,
    system: System = None,
    prompt: Prompt = None,
    image: Image = None,
    json: Json = False,
    show_prompt: ShowPrompt = False,
    markdown: Markdown = True,
    double_enter: DoubleEnter = False,
    history: History = True,
    history_file: HistoryFile = None,
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
    device: options.Device = options.ENGINE_DEFAULTS.device,
    dtype: options.Dtype = options.ENGINE_DEFAULTS.dtype,
    model_format: options.ModelFormat = None,
    session_len: options.SessionLen = None,
    quant_policy: options.QuantPolicy = None,
    kv_dtype: options.KvDtype = None,
    cache_gb: options.CacheGb = None,
    cache_host_gb: options.CacheHostGb = None,
    cache_max_entry_count: options.CacheMaxEntryCount = None,
    tp: options.Tp = None,
    rank_hosts: options.RankHosts = None,
    chat_template: options.ChatTemplate = None,
    revision: options.Revision = None,
    download_dir: options.DownloadDir = None,
    backend: options.Backend = None,
) -> None:
    """Chat with a model on the terminal.

    Without a terminal on stdin, what is piped in is the prompt and stdout is only the answer.
    """
    from lmtool.chat.oneshot import read_question

    if backend is not None:
        options.say_one_engine(backend)
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
    # what is wrong with the flags or the prompt is said before a model is loaded
    options.generation_config(sampling)
    engine = options.engine_config(
        device=device,
        dtype=dtype,
        model_format=model_format,
        session_len=session_len,
        quant_policy=quant_policy,
        kv_dtype=kv_dtype,
        cache_gb=cache_gb,
        cache_host_gb=cache_host_gb,
        cache_max_entry_count=cache_max_entry_count,
        tp=tp,
        rank_hosts=options.separate(rank_hosts),
        max_batch_size=1,  # one conversation: fewer kernels to compile and one graph to capture
    )
    question = read_question(prompt, sys.stdin)
    check_combination(question, json=json, show_prompt=show_prompt, logprobs=logprobs)
    source = Source(model, chat_template, revision, download_dir)
    pictures = read_pictures(image)
    if question is None:
        kept = history_path(history, history_file)
        looks = Looks(markdown=markdown, double_enter=double_enter, history=kept, pictures=pictures)
        raise typer.Exit(_talk(source, engine, sampling, system, looks))
    if show_prompt:
        _show_prompt(source, system, question, pictures)
    else:
        _answer(source, engine, sampling, system, question, pictures, json=json)


@dataclass(frozen=True, slots=True)
class Source:
    """Where the model comes from."""

    model: str
    chat_template: str | None
    revision: str | None
    download_dir: Path | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Looks:
    """How a conversation on a terminal begins, and what it looks like. history: None where none is kept; pictures: for
    the first message."""

    markdown: bool
    double_enter: bool
    history: Path | None
    pictures: "tuple[Picture, ...]" = ()


def read_pictures(sources: list[str] | None) -> "tuple[Picture, ...]":
    """Of ``--image``. Raises InputError for what is no picture."""
    if not sources:
        return ()
    from lmtool.chat.pictures import Picture

    return tuple(Picture.read(source) for source in sources)


def check_takes_pictures(backend: "Backend", pictures: "tuple[Picture, ...]") -> None:
    """Raises InputError where the model is known to take none."""
    if pictures and backend.takes_pictures is False:
        raise InputError(
            "--image: this model takes no pictures", "leave it out, or give one that does, such as a LLaVA"
        )


def check_combination(question: str | None, *, json: bool, show_prompt: bool, logprobs: int | None) -> None:
    """Raises ConfigError for flags that do not go together."""
    if question is None:
        for flag, used in (("--json", json), ("--show-prompt", show_prompt)):
            if used:
                raise ConfigError(f"{flag} has no prompt", "give --prompt TEXT or pipe one in")
    if json and show_prompt:
        raise ConfigError("--json and --show-prompt are two outputs", "give one of them")
    if logprobs is not None and not json:
        raise ConfigError("--logprobs has nowhere to go", "give --json as well")


def load_pipeline(source: Source, engine: EngineConfig) -> Any:
    """A Pipeline; a person at a terminal sees how far it is."""
    from lmtool.chat.loading import loading
    from lmtool.checkpoint.hub import check_name

    check_name(source.model)  # torch, and so the engine, takes seconds to import
    with loading(source.model) as progress:
        from lmtool.engine.pipeline import pipeline

        return pipeline(
            source.model,
            engine,
            chat_template=source.chat_template,
            revision=source.revision,
            download_dir=source.download_dir,
            progress=progress,
        )


def _talk(source: Source, engine: EngineConfig, sampling: dict[str, Any], system: str | None, looks: Looks) -> int:
    need_terminal()
    from lmtool.chat.backend import LocalBackend

    pipe = load_pipeline(source, engine)
    backend = LocalBackend(pipe)
    try:
        return converse(backend, options.generation_config(sampling, pipe.default_generation), system, looks)
    finally:
        backend.close()


def need_terminal() -> None:
    """Raises InputError where the library for one is not there."""
    if find_spec("prompt_toolkit") is None:
        raise InputError(
            "prompt_toolkit is not installed", "pip install '.[chat]' in lmtool's folder, or pipe the prompt in"
        )


def converse(backend: "Backend", config: GenerationConfig, system: str | None, looks: Looks) -> int:
    """The terminal, until the user leaves it → exit code."""
    check_takes_pictures(backend, looks.pictures)
    from lmtool.chat import repl
    from lmtool.chat.session import Session
    from lmtool.chat.settings import Settings

    begun = repl.ReplOptions(history=looks.history, double_enter=looks.double_enter, pictures=looks.pictures)
    return repl.run(backend, Session(system), Settings(config, markdown=looks.markdown), begun)


def history_path(history: bool, path: Path | None) -> Path | None:
    """Where typed lines are kept, made ready; None: nowhere."""
    from lmtool.chat.history import default_history, prepare_history

    return prepare_history(path or default_history()) if history else None


def _answer(
    source: Source,
    engine: EngineConfig,
    sampling: dict[str, Any],
    system: str | None,
    question: str,
    pictures: "tuple[Picture, ...]",
    *,
    json: bool,
) -> None:
    from lmtool.chat import oneshot
    from lmtool.chat.backend import LocalBackend
    from lmtool.chat.session import Session

    begun_s = time.perf_counter()
    pipe = load_pipeline(source, engine)
    load_s = time.perf_counter() - begun_s
    backend = LocalBackend(pipe)
    try:
        check_takes_pictures(backend, pictures)
        config = options.generation_config(sampling, pipe.default_generation)
        messages = Session(system).messages(question, pictures)
        if json:
            oneshot.print_json(backend, messages, config, model=source.model, load_s=load_s)
        else:
            oneshot.print_answer(backend, messages, config)
    finally:
        backend.close()


def _show_prompt(source: Source, system: str | None, question: str, pictures: "tuple[Picture, ...]") -> None:
    """The text behind the chat template, special tokens and all; needs no weights."""
    from lmtool.chat.backend import without_pictures
    from lmtool.chat.escape import neutralise
    from lmtool.chat.session import Session
    from lmtool.checkpoint.hub import resolve_model
    from lmtool.tokenizer import load_tokenizer

    path = resolve_model(source.model, revision=source.revision, download_dir=source.download_dir)
    tokenizer = load_tokenizer(path, chat_template=source.chat_template)
    messages = without_pictures(Session(system).messages(question, pictures))
    print(neutralise(tokenizer.render_chat(messages)))
    num_tokens = len(tokenizer.chat_ids(messages)) + _more_tokens(path, pictures)
    print(f"lmtool: {num_tokens:,} tokens", file=sys.stderr)


def _more_tokens(path: Path, pictures: "tuple[Picture, ...]") -> int:
    """That pictures take, besides the one that stands for each."""
    from lmtool.images.form import read_image_form

    form = read_image_form(path) if pictures else None
    if form is None:
        return 0
    from lmtool.images.load import load_image

    return sum(form.prepare(load_image(picture.url)).num_tokens - 1 for picture in pictures)
