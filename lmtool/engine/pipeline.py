"""`pipeline(model)` → `Pipeline`: text in, text out, from Python; offline, blocking, batched. Knows no HTTP.

>>> from lmtool import pipeline, GenerationConfig
>>> with pipeline("smollm2-135m") as pipe:
...     print(pipe("What is the capital of France?", GenerationConfig(temperature=0)).text)
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, overload

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
from lmtool.images.prepared import PreparedImage
from lmtool.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from lmtool.images.form import ImageForm

_PREPARING = 8  # threads that prepare pictures
Message = dict[str, Any]
Prompt = str | tuple[str, Any] | list[Message]  # a text, a text with a picture or several, a conversation


@dataclass(slots=True)
class Session:
    """A conversation of `Pipeline.chat`. Its K/V stay in the cache: a new turn computes only what is new."""

    messages: list[Message] = field(default_factory=list)
    response: Response | None = None


class Pipeline:
    """A model and its engine. Thread-safe; close it, or use it in a ``with`` block."""

    def __init__(
        self, name: str, loaded: LoadedEngine, tokenizer: Tokenizer, image_form: "ImageForm | None" = None
    ) -> None:
        """image_form: how the model takes pictures, where it does."""
        self.name = name
        self.tokenizer = tokenizer
        self.image_form = image_form
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
        """Answer a prompt, or several in one batch. A prompt is a text, a list of chat messages, or a text and its
        picture or pictures: `("describe this", image)`, where a picture is whatever `lmtool.vl.load_image` takes.

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
        several = _as_prompts(prompts)
        if len(several) == 1:
            return self.stream([self._request(several[0], config)])
        prepare = partial(self._request_of_several, config)
        if all(isinstance(prompt, str) for prompt in several):
            return self.stream(list(map(prepare, range(len(several)), several)))
        with ThreadPoolExecutor(_PREPARING, "prepare") as pool:  # Pillow lets go of Python's lock
            return self.stream(list(pool.map(prepare, range(len(several)), several)))

    def stream(self, requests: Sequence[Request]) -> Answers:
        """As `stream_infer`, for requests that `request` made of token ids."""
        return Answers(self._engine, requests, self._maker.detokenizer)

    def session(self, system: str | None = None) -> Session:
        """A conversation that has not begun. It needs no closing: in the cache it makes room for others."""
        return Session([{"role": "system", "content": system}] if system is not None else [])

    def chat(
        self, prompt: str | tuple[str, Any], session: Session | None = None, gen_config: GenerationConfig | None = None
    ) -> Session:
        """One turn of a conversation; without ``session`` a new one. ``session.response`` is the answer.

        The session keeps the pictures themselves, so a file or a URL is read once. Raises as `__call__` does, and then
        leaves the session as it was.
        """
        if _is_several(prompt):
            raise RequestError("a turn is a list of prompts", "give one: a text, or a tuple of a text and a picture")
        session = session if session is not None else Session()
        messages = [*session.messages, *self._with_pictures(_messages_of(_as_prompts(prompt)[0]))]
        response = self(messages, gen_config)
        session.messages = [*messages, {"role": "assistant", "content": response.text}]
        session.response = response
        return session

    def _default_config(self) -> GenerationConfig:
        return GenerationConfig(**self.default_generation)

    def _request(self, prompt: Prompt, config: GenerationConfig) -> Request:
        prompt_ids, images = self.prepare(_messages_of(prompt))
        return self.request(prompt_ids, config, images)

    def _request_of_several(self, config: GenerationConfig, index: int, prompt: Prompt) -> Request:
        try:
            return self._request(prompt, config)
        except RequestError as error:
            raise RequestError(f"prompt {index}: {error.cause}", error.fix) from error

    def _with_pictures(self, messages: list[Message]) -> list[Message]:
        """The same with each picture in place of its name, where the model takes pictures."""
        if self.image_form is None or not any(isinstance(message["content"], list) for message in messages):
            return messages
        from lmtool.images.load import load_image
        from lmtool.images.messages import take_images

        plain, sources = take_images(messages)
        pictures = map(load_image, sources)
        for message in plain:
            if isinstance(message["content"], list):
                message["content"] = [
                    {"type": "image", "image": next(pictures)} if part["type"] == "image" else part
                    for part in message["content"]
                ]
        return plain

    def prepare(self, messages: Sequence[Message]) -> tuple[list[int], list[PreparedImage]]:
        """A conversation as `request` takes it: token ids, with an `IMAGE_ID` for each picture, and the pictures.

        Raises InputError where the template, or a picture, is refused.
        """
        if all(isinstance(message.get("content"), str) for message in messages):
            return self.tokenizer.chat_ids(messages), []
        from lmtool.images.load import load_image
        from lmtool.images.messages import take_images

        plain, sources = take_images(messages)
        if sources and self.image_form is None:
            raise RequestError(f"{self.name} takes no pictures", "load a model that does, such as LLaVA")
        images = [self.image_form.prepare(load_image(source)) for source in sources if self.image_form is not None]
        return self.tokenizer.chat_ids(plain), images

    def request(
        self, prompt_ids: Sequence[int], config: GenerationConfig, images: Sequence[PreparedImage] = ()
    ) -> Request:
        """A request of this engine, checked. Raises RequestError."""
        return self._maker.request(prompt_ids, config, images)

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
    return Pipeline(str(model), loaded, tokenizer, _image_form(path) if loaded.takes_images else None)


def _image_form(path: Path) -> "ImageForm | None":
    from lmtool.images.form import read_image_form

    return read_image_form(path)


def _is_several(prompts: Any) -> bool:
    """A list of texts or of conversations; a list of messages is one conversation."""
    return isinstance(prompts, list) and not (prompts and isinstance(prompts[0], Mapping))


def _as_prompts(prompts: Any) -> list[Prompt]:
    several = prompts if _is_several(prompts) else [prompts]
    for prompt in several:
        if isinstance(prompt, list):
            for i, message in enumerate(prompt):
                _check_message(i, message)
        elif isinstance(prompt, tuple):
            if len(prompt) != 2 or not isinstance(prompt[0], str):
                raise RequestError("a prompt is a tuple of other things", "give (text, picture) or (text, [pictures])")
        elif not isinstance(prompt, str):
            raise RequestError(
                f"a prompt is a {type(prompt).__name__}",
                "give a text, a list of messages, a tuple of a text and a picture, or a list of these",
            )
    return several


def _messages_of(prompt: Prompt) -> list[Message]:
    """A text, with or without pictures before it, is a conversation's first message."""
    if isinstance(prompt, list):
        return prompt
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    text, images = prompt
    parts = [{"type": "image", "image": image} for image in (images if isinstance(images, list | tuple) else [images])]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def _check_message(index: int, message: Any) -> None:
    if not isinstance(message, Mapping):
        raise RequestError(f"message {index} is a {type(message).__name__}", "give a dict with role and content")
    if not isinstance(message.get("role"), str):
        raise RequestError(f"message {index}: role is {message.get('role')!r}", "give a text")
    if not isinstance(message.get("content"), str | list):
        raise RequestError(f"message {index}: content is {message.get('content')!r}", "give a text or a list of parts")
