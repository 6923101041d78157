"""`pipeline(model)` → `Pipeline`: text in, text out, from Python; offline, blocking, batched. Knows no HTTP.

>>> from lmtool import pipeline, GenerationConfig
>>> with pipeline("smollm2-135m") as pipe:
...     print(pipe("What is the capital of France?", GenerationConfig(temperature=0)).text)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

from lmtool.checkpoint.formats import open_checkpoint
from lmtool.checkpoint.hub import resolve_model
from lmtool.config import EngineConfig, GenerationConfig
from lmtool.engine.async_engine import AsyncEngine
from lmtool.engine.counters import Counters
from lmtool.engine.grammar_frames import GrammarVocabulary
from lmtool.engine.graphs import StartProgress
from lmtool.engine.requests import RequestMaker, default_generation
from lmtool.engine.response import Answers, Response
from lmtool.engine.sequence import Request
from lmtool.engine.setup import LoadedEngine, load_engine
from lmtool.errors import ConfigError, RequestError
from lmtool.tokenizer import Tokenizer, load_tokenizer

Message = dict[str, Any]
Prompt = str | list[Message]


@dataclass(slots=True)
class Session:
    """A conversation of `Pipeline.chat`. Its K/V stay in the cache: a new turn computes only what is new."""

    messages: list[Message] = field(default_factory=list)
    response: Response | None = None


class Pipeline:
    """A model and its engine. Thread-safe; close it, or use it in a ``with`` block."""

    def __init__(self, name: str, loaded: LoadedEngine, tokenizer: Tokenizer) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.loaded = loaded
        loaded.core.give_vocabulary(partial(GrammarVocabulary.of, tokenizer, loaded.model.vocab_size))
        self._engine = AsyncEngine(loaded.core)
        self._maker = RequestMaker(tokenizer, session_len=loaded.plan.session_len, vocab_size=loaded.model.vocab_size)

    # ------------------------------------------------------------------ what it is
    @property
    def session_len(self) -> int:
        """The longest prompt + answer, tokens."""
        return self.loaded.plan.session_len

    @property
    def description(self) -> str:
        """One line: model, device, how its weights are stored, context, load time."""
        return self.loaded.described(self.name)

    @property
    def default_generation(self) -> dict[str, Any]:
        """Sampling defaults of the checkpoint's generation_config.json, under `GenerationConfig`'s names."""
        return default_generation(self.loaded.generation_defaults)

    @property
    def counters(self) -> Counters:
        """Totals since the engine started."""
        return replace(self.loaded.core.scheduler.counters)

    # ------------------------------------------------------------------ generation
    @overload
    def __call__(self, prompts: Prompt, gen_config: GenerationConfig | None = None) -> Response: ...
    @overload
    def __call__(self, prompts: list[Prompt], gen_config: GenerationConfig | None = None) -> list[Response]: ...
    @overload
    def __call__(self, prompts: list[str], gen_config: GenerationConfig | None = None) -> list[Response]: ...

    def __call__(self, prompts: Any, gen_config: GenerationConfig | None = None) -> Response | list[Response]:
        """Answer a prompt, or several in one batch. A prompt is a text or a list of chat messages.

        Raises RequestError where a prompt does not fit the context or a value is impossible.
        """
        several = _as_prompts(prompts)
        whole = [Response(index=i) for i in range(len(several))]
        for part in self.stream_infer(prompts, gen_config):
            whole[part.index].extend(part)
        return whole if _is_several(prompts) else whole[0]

    def stream_infer(self, prompts: Any, gen_config: GenerationConfig | None = None) -> Answers:
        """Pieces of the answers as they come; ``index`` says whose. Raises as `__call__` does."""
        config = self._default_config() if gen_config is None else gen_config
        if not isinstance(config, GenerationConfig):
            raise RequestError(f"gen_config is a {type(config).__name__}", "give an lmtool.GenerationConfig")
        return self.stream([self._request(prompt, config) for prompt in _as_prompts(prompts)])

    def stream(self, requests: Sequence[Request]) -> Answers:
        """As `stream_infer`, for requests that `request` made of token ids."""
        return Answers(self._engine, requests, self._maker.detokenizer)

    def session(self, system: str | None = None) -> Session:
        """A conversation that has not begun. It needs no closing: in the cache it makes room for others."""
        return Session([{"role": "system", "content": system}] if system is not None else [])

    def chat(self, prompt: str, session: Session | None = None, gen_config: GenerationConfig | None = None) -> Session:
        """One turn of a conversation; without ``session`` a new one. ``session.response`` is the answer."""
        session = session if session is not None else Session()
        messages = [*session.messages, {"role": "user", "content": prompt}]
        response = self(messages, gen_config)
        session.messages = [*messages, {"role": "assistant", "content": response.text}]
        session.response = response
        return session

    def _default_config(self) -> GenerationConfig:
        return GenerationConfig(**self.default_generation)

    def _request(self, prompt: Prompt, config: GenerationConfig) -> Request:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self.request(self.tokenizer.chat_ids(messages), config)

    def request(self, prompt_ids: Sequence[int], config: GenerationConfig) -> Request:
        """A request of this engine, checked. Raises RequestError."""
        return self._maker.request(prompt_ids, config)

    # ------------------------------------------------------------------ life
    def close(self) -> None:
        """End what is running and free the model. May be called twice."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def pipeline(
    model: str | Path,
    engine_config: EngineConfig | None = None,
    *,
    backend_config: EngineConfig | None = None,
    chat_template: str | None = None,
    revision: str | None = None,
    download_dir: Path | None = None,
    progress: StartProgress | None = None,
) -> Pipeline:
    """Load a model: a folder, a .gguf file, a hub id or a short name (`lmtool list`).

    chat_template: a built-in name or a file, where the checkpoint has none. backend_config: LMDeploy's name for
    engine_config. progress: called with (what is being done, parts done, parts in all).
    """
    if engine_config is not None and backend_config is not None:
        raise ConfigError("engine_config and backend_config are one thing", "give one of them")
    config = engine_config or backend_config or EngineConfig()
    if not isinstance(config, EngineConfig):
        raise ConfigError(f"engine_config is a {type(config).__name__}", "give an lmtool.EngineConfig")
    if not isinstance(model, str | Path):
        raise ConfigError(f"model is a {type(model).__name__}", "give a path or a name")
    path = resolve_model(str(model), revision=revision, download_dir=download_dir)
    open_checkpoint(path).close()  # what is wrong with the whole is said before what is wrong with its tokenizer
    tokenizer = load_tokenizer(path, chat_template=chat_template)
    loaded = load_engine(path, config, progress)
    return Pipeline(str(model), loaded, tokenizer)


def _is_several(prompts: Any) -> bool:
    """A list of texts or of conversations; a list of messages is one conversation."""
    return isinstance(prompts, list) and not (prompts and isinstance(prompts[0], Mapping))


def _as_prompts(prompts: Any) -> list[Prompt]:
    several = prompts if _is_several(prompts) else [prompts]
    for prompt in several:
        if isinstance(prompt, list):
            for i, message in enumerate(prompt):
                _check_message(i, message)
        elif not isinstance(prompt, str):
            raise RequestError(
                f"a prompt is a {type(prompt).__name__}", "give a text, a list of messages, or a list of these"
            )
    return several


def _check_message(index: int, message: Any) -> None:
    if not isinstance(message, Mapping):
        raise RequestError(f"message {index} is a {type(message).__name__}", "give a dict with role and content")
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise RequestError(f"message {index}: {key} is {message.get(key)!r}", "give a text")
