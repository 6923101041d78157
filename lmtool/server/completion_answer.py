"""`/v1/completions`: pieces of answers → OpenAI's text_completion, whole or in chunks. Knows no HTTP."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lmtool.engine.response import Response
from lmtool.server.answer_parts import Usage, finish_reason, head, usage_of
from lmtool.server.logprobs import CompletionLogprobs
from lmtool.server.sse import Chunks
from lmtool.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Prompt:
    """text: what echo repeats."""

    ids: Sequence[int]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is told of each answer. generates: False where nothing was asked for, though the engine makes one token."""

    num_choices: int
    echo: bool
    logprobs: bool
    generates: bool
    skip_special: bool


class CompletionAnswer:
    """One request's: of each of ``prompts`` as many choices as are wanted, one prompt after the other."""

    def __init__(self, tokenizer: Tokenizer, model: str, prompts: Sequence[Prompt], wanted: Wanted) -> None:
        self._model = model
        self._wanted = wanted
        self._choices = [_Choice(tokenizer, prompt, wanted) for prompt in prompts for _ in range(wanted.num_choices)]

    def whole(self, answers: Sequence[Response]) -> dict[str, Any]:
        told = [self._as_wanted(answer) for answer in answers]
        choices = [choice.take(answer) for choice, answer in zip(self._choices, told, strict=True)]
        usage = usage_of(told, self._wanted.num_choices)
        return {**head("text_completion", "cmpl", self._model), "choices": choices, "usage": usage}

    def begin(self, *, include_usage: bool) -> "CompletionChunks":
        chunks = Chunks(head("text_completion", "cmpl", self._model), include_usage=include_usage)
        return CompletionChunks(self, chunks, self._wanted.num_choices)

    def told(self, piece: Response) -> tuple[Response, dict[str, Any] | None]:
        """What of a piece is told, and its chunk's choice: None where that says nothing."""
        piece = self._as_wanted(piece)
        choice = self._choices[piece.index].take(piece)
        says = choice["text"] or choice["logprobs"] or choice["finish_reason"]
        return piece, choice if says else None

    def _as_wanted(self, piece: Response) -> Response:
        if self._wanted.generates:
            return piece
        reason = piece.finish_reason and "length"
        return replace(piece, text="", token_ids=[], logprobs=None, num_generated_tokens=0, finish_reason=reason)


class CompletionChunks:
    """The events of one stream."""

    def __init__(self, answer: CompletionAnswer, chunks: Chunks, num_choices: int) -> None:
        self._answer = answer
        self._chunks = chunks
        self._usage = Usage(num_choices)

    def push(self, piece: Response) -> bytes | None:
        told, choice = self._answer.told(piece)
        self._usage.take(told)
        return self._chunks.chunk(choice) if choice else None

    def end(self) -> bytes:
        return self._chunks.end(self._usage.report())


class _Choice:
    def __init__(self, tokenizer: Tokenizer, prompt: Prompt, wanted: Wanted) -> None:
        self._prompt = prompt
        self._wanted = wanted
        self._begun = False
        self._logprobs = CompletionLogprobs(tokenizer, skip_special=wanted.skip_special) if wanted.logprobs else None

    def take(self, piece: Response) -> dict[str, Any]:
        text, logprobs = piece.text, None
        parts = []
        if not self._begun and self._wanted.echo:
            text = self._prompt.text + text
            if self._logprobs:
                parts.append(self._logprobs.prompt(self._prompt.ids, piece.prompt_logprobs))
        self._begun = True
        if self._logprobs:
            if piece.logprobs:
                parts.append(self._logprobs.push(piece.logprobs))
            logprobs = _joined(parts)
        return {
            "index": piece.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason(piece.finish_reason),
        }


def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    return {name: [one for part in parts for one in part[name]] for name in parts[0]} if parts else None
