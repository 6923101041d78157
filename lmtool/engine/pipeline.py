"""`pipeline(model)` → `Pipeline`: text in, text out, from Python; offline, blocking, batched. Knows no HTTP.

>>> from lmtool import pipeline, GenerationConfig
>>> with pipeline("smollm2-135m") as pipe:
...     print(pipe("What is the capital of France?", GenerationConfig(temperature=0)).text)
"""

import itertools
import queue
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

from lmtool.checkpoint.hub import resolve_model
from lmtool.config import EngineConfig, GenerationConfig
from lmtool.engine.async_engine import AsyncEngine
from lmtool.engine.core import TokenOutput
from lmtool.engine.detokenizer import Detokenizer
from lmtool.engine.scheduler import Counters
from lmtool.engine.sequence import Request, TokenLogprob
from lmtool.engine.setup import LoadedEngine, load_engine
from lmtool.errors import RequestError
from lmtool.models.loader import Progress
from lmtool.tokenizer import Tokenizer, load_tokenizer

Message = dict[str, Any]
Prompt = str | list[Message]


@dataclass(slots=True, kw_only=True)
class Response:
    """An answer, or from `Pipeline.stream_infer` the next piece of it (``text`` and ``token_ids`` are then new only).

    finish_reason          'stop', 'length' (max_new_tokens), 'context' (the context is full), 'abort'; None: not yet
    num_cached_tokens      of the prompt, found in the prefix cache and not computed again
    time_to_first_token_s, duration_s   from the call, in seconds
    """

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    finish_reason: str | None = None
    time_to_first_token_s: float | None = None
    duration_s: float | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """Generation speed after the first token; None before the second."""
        if self.num_generated_tokens < 2 or self.duration_s is None or self.time_to_first_token_s is None:
            return None
        return (self.num_generated_tokens - 1) / max(self.duration_s - self.time_to_first_token_s, 1e-9)


@dataclass(slots=True)
class Session:
    """A conversation of `Pipeline.chat`. Its K/V stay in the cache: a new turn computes only what is new."""

    messages: list[Message] = field(default_factory=list)
    response: Response | None = None


class _Answer:
    """One request on its way: engine outputs in, `Response` pieces out."""

    def __init__(self, index: int, request: Request, detokenizer: Detokenizer, started: float) -> None:
        self.index = index
        self.request = request
        self._detokenizer = detokenizer
        self._started = started
        self._num_generated = 0
        self._first_token_s: float | None = None

    def take(self, output: TokenOutput) -> Response:
        """Raises the error that ended the request."""
        if output.error is not None:
            raise output.error
        now = time.perf_counter() - self._started
        finish_reason = output.finish_reason
        text, token_ids = "", []
        if output.token_id is not None:
            self._first_token_s = self._first_token_s or now
            self._num_generated += 1
            token_ids.append(output.token_id)
            if not (finish_reason == "stop" and output.token_id in self.request.stop_ids):
                text = self._detokenizer.push(token_ids)
        if finish_reason is not None:
            text += self._detokenizer.flush()
        if self._detokenizer.stopped:
            finish_reason = "stop"
        return Response(
            index=self.index,
            text=text,
            token_ids=token_ids,
            logprobs=[output.logprob] if output.logprob is not None else None,
            num_prompt_tokens=len(self.request.prompt_ids),
            num_cached_tokens=output.num_cached_tokens,
            num_generated_tokens=self._num_generated,
            finish_reason=finish_reason,
            time_to_first_token_s=self._first_token_s,
            duration_s=now,
        )


class Pipeline:
    """A model and its engine. Thread-safe; close it, or use it in a ``with`` block."""

    def __init__(self, name: str, loaded: LoadedEngine, tokenizer: Tokenizer) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.loaded = loaded
        self._engine = AsyncEngine(loaded.core)
        self._request_ids = itertools.count()

    # ------------------------------------------------------------------ what it is
    @property
    def session_len(self) -> int:
        """The longest prompt + answer, tokens."""
        return self.loaded.plan.session_len

    @property
    def description(self) -> str:
        """One line: model, device, how its weights are stored, context, load time."""
        loaded = self.loaded
        return (
            f"{self.name} · {loaded.weights} on {loaded.device} · "
            f"context {self.session_len} tokens · loaded in {loaded.load_s:.1f} s"
        )

    @property
    def default_generation(self) -> dict[str, Any]:
        """Sampling defaults of the checkpoint's generation_config.json, under `GenerationConfig`'s names."""
        stored = self.loaded.generation_defaults
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        found = {name: stored[name] for name in names if isinstance(stored.get(name), int | float)}
        if stored.get("do_sample") is False:
            found["temperature"] = 0.0
        return found

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
            _extend(whole[part.index], part)
        return whole if _is_several(prompts) else whole[0]

    def stream_infer(self, prompts: Any, gen_config: GenerationConfig | None = None) -> Iterator[Response]:
        """Yield pieces of the answers as they come (``index`` says whose). Closing the iterator ends the requests."""
        config = gen_config or self._default_config()
        return self.stream([self._request(prompt, config) for prompt in _as_prompts(prompts)])

    def stream(self, requests: Sequence[Request]) -> Iterator[Response]:
        """As `stream_infer`, for requests that `request` made of token ids."""
        outputs: queue.SimpleQueue[TokenOutput] = queue.SimpleQueue()
        started = time.perf_counter()
        answers = {
            request.request_id: _Answer(index, request, self._detokenizer(request.params), started)
            for index, request in enumerate(requests)
        }
        try:
            for answer in answers.values():
                self._engine.submit(answer.request, outputs.put)
            while answers:
                output = outputs.get()
                answer_or_none = answers.get(output.request_id)
                if answer_or_none is None:  # a token that was on its way when a stop text ended the answer
                    continue
                part = answer_or_none.take(output)
                if part.finish_reason is not None:
                    del answers[output.request_id]
                    if output.finish_reason is None:
                        self._engine.abort(output.request_id)
                yield part
        finally:
            for request_id in answers:
                self._engine.abort(request_id)

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

    def _detokenizer(self, config: GenerationConfig) -> Detokenizer:
        return Detokenizer(self.tokenizer, config.stop, config.skip_special_tokens)

    def _request(self, prompt: Prompt, config: GenerationConfig) -> Request:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self.request(self.tokenizer.chat_ids(messages), config)

    def request(self, prompt_ids: Sequence[int], config: GenerationConfig) -> Request:
        """A request of this engine, checked. Raises RequestError."""
        if not prompt_ids:
            raise RequestError("the prompt is empty", "give at least one token")
        if len(prompt_ids) >= self.session_len:
            raise RequestError(
                f"the prompt has {len(prompt_ids)} tokens, the context holds {self.session_len} with the answer",
                "shorten it or raise --session-len",
            )
        vocab_size = self.loaded.model.vocab_size
        for what, ids in (
            ("prompt", prompt_ids),
            ("--logit-bias", config.logit_bias),
            ("--stop-token-ids", config.stop_token_ids),
        ):
            outside = [i for i in ids if not 0 <= i < vocab_size]
            if outside:
                raise RequestError(f"{what}: token id {outside[0]} is outside the vocabulary of {vocab_size}")
        stop_ids = frozenset(config.stop_token_ids) | (frozenset() if config.ignore_eos else self.tokenizer.eos_ids)
        return Request(
            request_id=next(self._request_ids),
            prompt_ids=tuple(prompt_ids),
            params=config,
            stop_ids=stop_ids,
            seed=config.seed if config.seed is not None else secrets.randbits(63),
            bad_ids=self._bad_ids(config.bad_words),
        )

    def _bad_ids(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Each word as it stands at a beginning and after a space: a tokenizer writes the two differently."""
        spellings = [spelling for word in words for spelling in (word, " " + word.lstrip())]
        encoded = (tuple(self.tokenizer.encode(text, add_special=False)) for text in spellings)
        return tuple(dict.fromkeys(ids for ids in encoded if ids))

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
    progress: Progress | None = None,
) -> Pipeline:
    """Load a model: a folder, a .gguf file, a hub id or a short name (`lmtool list`).

    chat_template: a built-in name or a file, where the checkpoint has none. backend_config: LMDeploy's name for
    engine_config. progress: called with (layers loaded, layers in all).
    """
    if engine_config is not None and backend_config is not None:
        raise RequestError("engine_config and backend_config are one thing", "give one of them")
    config = engine_config or backend_config or EngineConfig()
    path = resolve_model(str(model), revision=revision, download_dir=download_dir)
    tokenizer = load_tokenizer(path, chat_template=chat_template)
    loaded = load_engine(path, config, progress)
    return Pipeline(str(model), loaded, tokenizer)


def _is_several(prompts: Any) -> bool:
    """A list of texts or of conversations; a list of messages is one conversation."""
    return isinstance(prompts, list) and not (prompts and isinstance(prompts[0], Mapping))


def _as_prompts(prompts: Any) -> list[Prompt]:
    several = prompts if _is_several(prompts) else [prompts]
    for prompt in several:
        if not isinstance(prompt, str) and not (
            isinstance(prompt, list) and all(isinstance(m, Mapping) for m in prompt)
        ):
            raise RequestError(
                f"a prompt is a {type(prompt).__name__}", "give a text, a list of messages, or a list of these"
            )
    return several


def _extend(whole: Response, part: Response) -> None:
    whole.text += part.text
    whole.token_ids += part.token_ids
    if part.logprobs:
        whole.logprobs = (whole.logprobs or []) + part.logprobs
    for name in (
        "num_prompt_tokens",
        "num_cached_tokens",
        "num_generated_tokens",
        "finish_reason",
        "time_to_first_token_s",
        "duration_s",
    ):
        setattr(whole, name, getattr(part, name))
