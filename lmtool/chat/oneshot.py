"""One question, one answer, for scripts and pipes: stdout is the answer and nothing else.

Knows no keys and no Markdown.
"""

import json
import re
import sys
from dataclasses import dataclass
from typing import Any, TextIO

from lmtool.chat.backend import Backend, Delta, Message
from lmtool.chat.escape import neutralise
from lmtool.chat.stats import TurnStats
from lmtool.config import GenerationConfig
from lmtool.errors import InputError
from lmtool.tokenizer.thinking import ThinkSplitter


def read_question(prompt: str | None, stdin: TextIO) -> str | None:
    """The question: ``--prompt``, what is piped in, or both; None when a terminal is to be asked.

    Raises InputError when there is nothing in it, or when what is piped in is not UTF-8.
    """
    if stdin.isatty():
        parts = [prompt]
    else:
        try:
            parts = [prompt, stdin.buffer.read().decode("utf-8").strip("\r\n")]
        except UnicodeDecodeError as error:
            raise InputError(
                f"stdin is not UTF-8 text (byte {error.start})", "pipe text, such as `iconv` makes"
            ) from error
    if parts == [None]:
        return None
    if prompt is not None and not prompt.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise InputError("--prompt is not UTF-8 text", "give text, or pipe it in")
    question = "\n\n".join(part for part in parts if part and part.strip())
    if not question:
        raise InputError("the prompt is empty", "give --prompt TEXT, or pipe a text that is not empty")
    return question


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer, its thought apart."""

    text: str
    thought: str
    last: Delta
    logprobs: list[Any]


def answer(backend: Backend, messages: list[Message], config: GenerationConfig, out: TextIO | None) -> Answer:
    """Generate one answer; with ``out`` its text is written there as it comes."""
    splitter = ThinkSplitter(inside=backend.opens_thought(messages))
    pieces: list[tuple[bool, str]] = []
    logprobs: list[Any] = []
    last = Delta(text="")

    def take(piece: tuple[bool, str]) -> None:
        pieces.append(piece)
        if out is not None and not piece[0]:
            out.write(neutralise(piece[1]))
            out.flush()

    for delta in backend.stream(messages, config):
        last = delta
        logprobs.extend(delta.logprobs)
        for piece in splitter.push(delta.text):
            take(piece)
    for piece in splitter.finish():
        take(piece)
    thought = "".join(text for is_thought, text in pieces if is_thought)
    return Answer("".join(text for is_thought, text in pieces if not is_thought), thought, last, logprobs)


def print_answer(backend: Backend, messages: list[Message], config: GenerationConfig) -> None:
    """Stream the text to stdout, a newline behind it; what the user should know goes to stderr."""
    done = answer(backend, messages, config, sys.stdout)
    if not done.text.endswith("\n"):
        sys.stdout.write("\n")
    sys.stdout.flush()
    if done.thought:
        _notice(f"the model thought first ({len(done.thought):,} characters, not shown; --json has it)")
    if done.last.finish_reason == "length":
        _notice(f"stopped at {done.last.num_generated_tokens:,} new tokens; a larger --max-new-tokens allows more")
    elif done.last.finish_reason == "context":
        _notice(f"stopped because the context of {backend.session_len:,} tokens is full")


def print_json(
    backend: Backend, messages: list[Message], config: GenerationConfig, *, model: str, load_s: float
) -> None:
    """One JSON object on stdout: the answer, token counts and times (seconds)."""
    done = answer(backend, messages, config, None)
    stats = TurnStats.of(done.last)
    data: dict[str, Any] = {
        "model": model,
        "text": done.text,
        "thought": done.thought or None,
        "finish_reason": done.last.finish_reason,
        "num_prompt_tokens": stats.num_prompt_tokens,
        "num_cached_tokens": stats.num_cached_tokens,
        "num_generated_tokens": stats.num_generated_tokens,
        "time_to_first_token_s": _rounded(stats.time_to_first_token_s),
        "duration_s": _rounded(stats.duration_s),
        "tokens_per_s": _rounded(stats.tokens_per_s),
        "load_s": _rounded(load_s),
    }
    if config.logprobs is not None:
        data["logprobs"] = done.logprobs
    sys.stdout.write(to_json(data) + "\n")
    sys.stdout.flush()


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def to_json(data: Any) -> str:
    """JSON in UTF-8 in which DEL, C1 controls and lone surrogates are escaped as well: terminals obey them."""
    text = json.dumps(data, ensure_ascii=False)
    return re.sub("[\x7f-\x9f\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)


def _notice(text: str) -> None:
    print(f"lmtool: {text}", file=sys.stderr)  # noqa: T201
