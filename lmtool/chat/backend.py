"""One protocol between a chat and whatever makes its tokens: an engine of this process, or a URL (`http_backend`).

Knows neither terminal nor rendering. The only file of this room that may import the engine.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lmtool.config import GenerationConfig
from lmtool.tokenizer.thinking import OPEN

if TYPE_CHECKING:
    from lmtool.engine.pipeline import Pipeline
    from lmtool.engine.response import Answers
    from lmtool.engine.sequence import TokenLogprob
    from lmtool.images.prepared import PreparedImage
    from lmtool.tokenizer import Tokenizer

Message = dict[str, Any]  # {"role": "system" | "user" | "assistant", "content": of `chat.pictures.content`}

Prepared = tuple[list[int], "list[PreparedImage]"]  # ids of a prompt, and its pictures


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """One piece of an answer. Counts are cumulative; times and ``finish_reason`` are set on the last one.

    finish_reason: 'stop' (end of turn or stop text), 'length' (max_new_tokens), 'context' (the context is full),
    'abort' (the user stopped it).
    logprobs: where asked for, one ``{"token_id", "token", "logprob", "top": [...]}`` for each token; ``top`` holds the
    likeliest tokens in the same form.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    time_to_first_token_s: float | None = None
    duration_s: float | None = None
    logprobs: tuple[dict[str, Any], ...] = ()


class Backend(Protocol):
    """What the terminal needs of an engine."""

    @property
    def description(self) -> str:
        """One line for the greeting: model, device, dtype, context."""
        ...

    @property
    def session_len(self) -> int | None:
        """The context, in tokens; None: not known."""
        ...

    @property
    def takes_pictures(self) -> bool | None:
        """Whether messages may have any; None: not known."""
        ...

    def stream(self, messages: Sequence[Message], config: GenerationConfig) -> Iterator[Delta]:
        """The answer; RequestError when the conversation is longer than the context.

        Where the iterator has ``abort()``, that ends the answer at any moment, from any thread or signal handler;
        a generator is ended when it next yields.
        """
        ...

    def count_tokens(self, messages: Sequence[Message]) -> int | None:
        """Tokens of the conversation as the model would be given it; None: not known."""
        ...

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt text after the chat template, special tokens visible (`--show-prompt`)."""
        ...

    def opens_thought(self, messages: Sequence[Message]) -> bool:
        """Whether the answer begins inside a thought, because the prompt has opened it."""
        ...

    def close(self) -> None:
        """Free the engine. May be called twice."""
        ...


class LocalBackend:
    """A `Pipeline` of this process."""

    def __init__(self, pipe: "Pipeline") -> None:
        self._pipe = pipe
        self._last: tuple[list[Message], Prepared] | None = None  # asked of it, and what came of that

    @property
    def description(self) -> str:
        return self._pipe.description

    @property
    def session_len(self) -> int:
        return self._pipe.session_len

    @property
    def takes_pictures(self) -> bool:
        return self._pipe.image_form is not None

    def stream(self, messages: Sequence[Message], config: GenerationConfig) -> "LocalStream":
        prompt_ids, images = self._prepared(messages)
        return LocalStream(self._pipe.stream([self._pipe.request(prompt_ids, config, images)]), self._pipe.tokenizer)

    def count_tokens(self, messages: Sequence[Message]) -> int:
        from lmtool.images.prepared import count_tokens

        return count_tokens(*self._prepared(messages))

    def render(self, messages: Sequence[Message]) -> str:
        return self._pipe.tokenizer.render_chat(without_pictures(messages))

    def opens_thought(self, messages: Sequence[Message]) -> bool:
        return self.render(messages).rstrip().endswith(OPEN)

    def close(self) -> None:
        self._pipe.close()

    def _prepared(self, messages: Sequence[Message]) -> Prepared:
        """What is counted is asked next: its pictures are read once. Safe on any thread: one reads `_last` whole."""
        last = self._last
        if last is None or last[0] != list(messages):
            self._last = last = (list(messages), self._pipe.prepare(messages))
        return last[1]


def without_pictures(messages: Sequence[Message]) -> list[Message]:
    """The same with {"type": "image"} for each, as `Tokenizer` takes them."""
    if all(isinstance(message["content"], str) for message in messages):
        return list(messages)
    from lmtool.images.messages import take_images

    return list(take_images(messages)[0])


class LocalStream(Iterator[Delta]):
    """The engine's pieces as deltas."""

    def __init__(self, answers: "Answers", tokenizer: "Tokenizer") -> None:
        self._answers = answers
        self._tokenizer = tokenizer

    def __next__(self) -> Delta:
        part = next(self._answers)
        return Delta(
            text=part.text,
            token_ids=tuple(part.token_ids),
            finish_reason=part.finish_reason,
            num_prompt_tokens=part.num_prompt_tokens,
            num_cached_tokens=part.num_cached_tokens,
            num_generated_tokens=part.num_generated_tokens,
            time_to_first_token_s=part.time_to_first_token_s,
            duration_s=part.duration_s,
            logprobs=tuple(self._plain(chosen) for chosen in part.logprobs or ()),
        )

    def abort(self) -> None:
        self._answers.abort()

    def _plain(self, chosen: "TokenLogprob") -> dict[str, Any]:
        def entry(token_id: int, logprob: float) -> dict[str, Any]:
            return {"token_id": token_id, "token": self._tokenizer.token_text(token_id), "logprob": logprob}

        top = [entry(token_id, logprob) for token_id, logprob in chosen.top]
        return {**entry(chosen.token_id, chosen.logprob), "top": top}
