"""The conversations of one browser page, and one turn of one of them. Knows neither the page nor what makes tokens."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from lmtool.chat.backend import Backend, Delta
from lmtool.chat.pictures import Picture
from lmtool.chat.session import Session, Turn
from lmtool.chat.stats import TurnStats
from lmtool.config import GenerationConfig
from lmtool.errors import InputError
from lmtool.tokenizer.thinking import ThinkSplitter

_TITLE_CHARS = 40
_NOT_IN_NAMES = r"[^\w .-]"  # of pictures, where Markdown would make something of it
Shown = list[dict[str, Any]]  # as gradio's Chatbot takes messages


class Book:
    """Conversations by number, newest first in `titles`; there is always a current one."""

    def __init__(self) -> None:  # no dataclass: gradio would make a dict of it
        self.sessions = {1: Session()}
        self.current = 1

    @property
    def session(self) -> Session:
        return self.sessions[self.current]

    def titles(self) -> list[tuple[str, int]]:
        """(title, number) of each: what was asked first."""
        return [(_title(number, session), number) for number, session in reversed(self.sessions.items())]

    def begin(self) -> None:
        """A new conversation, with the system prompt of this one."""
        number = max(self.sessions) + 1
        self.sessions[number] = Session(self.session.system)
        self.current = number

    def choose(self, number: int) -> None:
        """Raises InputError for a number that there is not."""
        if number not in self.sessions:
            raise InputError("this conversation is gone", "choose another")
        self.current = number

    def delete(self) -> None:
        system = self.sessions.pop(self.current).system
        if not self.sessions:
            self.sessions[self.current + 1] = Session(system)
        self.current = max(self.sessions)


def shown(session: Session, question: str | None = None, pictures: tuple[Picture, ...] = ()) -> Shown:
    """Messages of a conversation as the page shows them; the system prompt has a field of its own."""
    found: Shown = []
    for turn in session.turns:
        found.append(_question_shown(turn.user, turn.pictures))
        found += answer_shown(turn.assistant)
    if question is not None:
        found.append(_question_shown(question, pictures))
    return found


def _question_shown(text: str, pictures: tuple[Picture, ...]) -> dict[str, Any]:
    small = [f"![{re.sub(_NOT_IN_NAMES, '_', picture.name)}]({picture.thumbnail})" for picture in pictures]
    return {"role": "user", "content": "\n\n".join([" ".join(small), text] if small else [text])}


def answer_shown(text: str, *, inside: bool = False) -> Shown:
    """An answer, and before it its thought, folded. inside: the prompt has opened the thought."""
    splitter = ThinkSplitter(inside=inside)
    pieces = [*splitter.push(text), *splitter.finish()]
    thought = "".join(piece for is_thought, piece in pieces if is_thought)
    answer = "".join(piece for is_thought, piece in pieces if not is_thought)
    found: Shown = []
    if thought:
        found.append({"role": "assistant", "content": thought, "metadata": {"title": "Thought"}})
    if answer or not thought:
        found.append({"role": "assistant", "content": answer})
    return found


@dataclass(slots=True)
class Answering:
    """One turn: iterate it for the answer's text so far, then `keep` it. ``abort`` ends it from any thread."""

    backend: Backend
    session: Session
    question: str
    config: GenerationConfig
    pictures: tuple[Picture, ...] = ()
    text: str = ""
    last: Delta = field(default_factory=lambda: Delta(text=""))
    inside: bool = False
    _stream: Any = None
    _aborted: bool = False
    _dropped: bool = False

    def __iter__(self) -> Iterator[str]:
        """Raises LmtoolError."""
        messages = self.session.messages(self.question, self.pictures)
        self.inside = self.backend.opens_thought(messages)
        self._stream = self.backend.stream(messages, self.config)
        if self._aborted:
            self.abort()
        try:
            for delta in self._stream:
                self.text, self.last = self.text + delta.text, delta
                yield self.text
                if self._aborted and not hasattr(self._stream, "abort"):
                    break
        finally:
            close = getattr(self._stream, "close", None)
            if close is not None:
                close()

    def abort(self) -> None:
        self._aborted = True
        abort = getattr(self._stream, "abort", None)
        if abort is not None:
            abort()

    def drop(self) -> None:
        """`abort`, and nothing is kept."""
        self._dropped = True
        self.abort()

    def keep(self) -> bool:
        """The turn is part of the conversation, also as far as it came; False: there is nothing of it."""
        if self._dropped or (self._aborted and not self.text):
            return False
        self.session.turns.append(Turn(self.question, self.text, self._aborted, self.pictures))
        return True

    def summary(self) -> str:
        """One line: tokens, speed, and what ended it, where that was not its own end."""
        stats = TurnStats.of(self.last)
        words = [f"{stats.num_prompt_tokens:,} prompt tokens, {stats.num_cached_tokens:,} of them cached"]
        words.append(f"{stats.num_generated_tokens:,} generated")
        if stats.tokens_per_s is not None:
            words.append(f"{stats.tokens_per_s:.3g} tokens/s")
        ends = {"length": "stopped at the most new tokens", "context": "the context is full"}
        if self._aborted:
            words.append("stopped; what there is is kept")
        elif self.last.finish_reason in ends:
            words.append(ends[self.last.finish_reason])
        return " · ".join(words)


def sampling(
    defaults: GenerationConfig, temperature: float, top_p: float, max_new_tokens: float | None
) -> GenerationConfig:
    """What the page's fields say. Raises RequestError."""
    most = int(max_new_tokens) if max_new_tokens else None
    return replace(defaults, temperature=float(temperature), top_p=float(top_p), max_new_tokens=most)


def _title(number: int, session: Session) -> str:
    if not session.turns:
        return f"{number}: new conversation"
    line = " ".join(session.turns[0].user.split())
    return f"{number}: " + (line if len(line) <= _TITLE_CHARS else line[: _TITLE_CHARS - 1] + "…")
