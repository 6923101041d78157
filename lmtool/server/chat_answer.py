"""`/v1/chat/completions`: pieces of answers → OpenAI's chat.completion, or its chunks. Knows no HTTP."""

from collections.abc import Sequence
from typing import Any

from lmtool.engine.response import Response
from lmtool.server.answer_parts import Usage, finish_reason, head, usage_of
from lmtool.server.chat_reader import ChatReader, Delta
from lmtool.server.logprobs import chat_logprobs
from lmtool.server.sse import Chunks
from lmtool.tokenizer import Tokenizer


class ChatAnswer:
    """One request's. readers: one for each choice."""

    def __init__(self, tokenizer: Tokenizer, model: str, readers: Sequence[ChatReader]) -> None:
        self._tokenizer = tokenizer
        self._model = model
        self._readers = readers

    def whole(self, answers: Sequence[Response]) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": _message(reader.finish(answer.text)),
                "logprobs": self._logprobs(answer),
                "finish_reason": _reason(answer, reader),
            }
            for index, (answer, reader) in enumerate(zip(answers, self._readers, strict=True))
        ]
        usage = usage_of(answers, len(self._readers))
        return {**head("chat.completion", "chatcmpl", self._model), "choices": choices, "usage": usage}

    def _logprobs(self, piece: Response) -> dict[str, Any] | None:
        return chat_logprobs(self._tokenizer, piece.logprobs) if piece.logprobs else None

    # ------------------------------------------------------------------ a stream
    def begin(self, *, include_usage: bool) -> "ChatChunks":
        chunks = Chunks(head("chat.completion.chunk", "chatcmpl", self._model), include_usage=include_usage)
        return ChatChunks(self, chunks, len(self._readers))

    def choice(self, piece: Response, *, is_first: bool) -> dict[str, Any] | None:
        """A chunk's; None where the piece says nothing: half a character, or what may become a tag."""
        reader = self._readers[piece.index]
        delta = reader.push(piece.text) if piece.finish_reason is None else reader.finish(piece.text)
        logprobs = self._logprobs(piece)
        if not (delta or logprobs or piece.finish_reason or is_first):
            return None
        if is_first:
            delta = {"role": "assistant", "content": "", **delta}
        return {
            "index": piece.index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": _reason(piece, reader),
        }


class ChatChunks:
    """The events of one stream."""

    def __init__(self, answer: ChatAnswer, chunks: Chunks, num_choices: int) -> None:
        self._answer = answer
        self._chunks = chunks
        self._usage = Usage(num_choices)
        self._begun: set[int] = set()

    def push(self, piece: Response) -> bytes | None:
        self._usage.take(piece)
        is_first = piece.index not in self._begun
        self._begun.add(piece.index)
        choice = self._answer.choice(piece, is_first=is_first)
        return self._chunks.chunk(choice) if choice else None

    def end(self) -> bytes:
        return self._chunks.end(self._usage.report())


def _reason(piece: Response, reader: ChatReader) -> str | None:
    if piece.finish_reason == "stop" and reader.has_called:
        return "tool_calls"
    return finish_reason(piece.finish_reason)


def _message(delta: Delta) -> dict[str, Any]:
    calls = [{key: value for key, value in call.items() if key != "index"} for call in delta.pop("tool_calls", ())]
    content = delta.pop("content", None if calls else "")
    message = {"role": "assistant", "content": content, "refusal": None, **delta}
    return {**message, "tool_calls": calls} if calls else message
