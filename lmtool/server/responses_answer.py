"""`/v1/responses`: the response object, and the events of a stream of one."""

import time
import uuid
from collections.abc import Iterator
from typing import Any, NotRequired

import msgspec
from typing_extensions import TypedDict

from lmtool.config import GenerationConfig
from lmtool.engine.response import Response as Piece
from lmtool.errors import LmtoolError
from lmtool.server.chat_reader import ChatReader
from lmtool.server.errors import body_of
from lmtool.server.protocol_responses import ResponsesRequest
from lmtool.server.responses_output import Event, Output

_ECHOED = ("instructions", "max_output_tokens", "previous_response_id", "user")
_DEFAULTS = {"metadata": {}, "parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "store": True}


class ResponseObject(TypedDict):
    """For the OpenAPI page."""

    id: str
    object: str
    created_at: int
    model: str
    status: str
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None
    error: dict[str, str] | None
    incomplete_details: dict[str, str] | None
    previous_response_id: NotRequired[str | None]


class ResponseAnswer:
    """One response on its way. text: as far as it was generated, thought and all. replica: of `ServerConfig`."""

    def __init__(
        self, body: ResponsesRequest, model: str, config: GenerationConfig, reader: ChatReader, replica: str = ""
    ) -> None:
        self.id = f"resp_{replica and f'{replica}_'}{uuid.uuid4().hex}"
        self.output = Output()
        self.made = Piece()
        self._reader = reader
        self._status = "in_progress"
        self._error: dict[str, str] | None = None
        self._num_reasoning = 0
        self._sequence_number = -1
        said = body.model_dump(exclude_none=True, by_alias=True, exclude={"input"})
        self._head = {
            "id": self.id,
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            **{name: said.get(name) for name in _ECHOED},
            **{name: said.get(name, default) for name, default in _DEFAULTS.items()},
            "temperature": config.temperature,
            "top_p": config.top_p,
            "text": {"format": said.get("text", {}).get("format", {"type": "text"})},
            "reasoning": {"effort": said.get("reasoning", {}).get("effort"), "summary": None},
            "background": False,
            "service_tier": "default",
            "truncation": "disabled",
        }

    # ------------------------------------------------------------------ what happens to it
    def begin(self) -> Iterator[Event]:
        yield self._whole_event("response.created")
        yield self._whole_event("response.in_progress")

    def push(self, piece: Piece) -> Iterator[Event]:
        self.made.extend(piece)
        over = piece.finish_reason is not None
        delta = self._reader.finish(piece.text) if over else self._reader.push(piece.text)
        if delta.keys() == {"reasoning_content"}:
            self._num_reasoning += len(piece.token_ids)
        yield from self.output.push(delta)

    def end(self) -> Iterator[Event]:
        self._status = "completed" if self.made.finish_reason == "stop" else "incomplete"
        yield from self.output.close(self._status)

    def last_event(self) -> Event:
        """After it was remembered."""
        return self._whole_event(f"response.{self._status}")

    def fail(self, error: LmtoolError) -> Iterator[Event]:
        self._status = "failed"
        self._error = {"code": "server_error", "message": body_of(error)["error"]["message"]}
        yield from self.output.close("incomplete")
        yield self._whole_event("response.failed")

    # ------------------------------------------------------------------ what it looks like
    def whole(self) -> dict[str, Any]:
        cut = {"reason": "max_output_tokens"} if self._status == "incomplete" else None
        return {
            **self._head,
            "status": self._status,
            "output": self.output.items,
            "usage": self._usage() if self._status != "in_progress" else None,
            "error": self._error,
            "incomplete_details": cut,
        }

    def encoded(self, event: Event) -> bytes:
        """As it is sent, with its number."""
        self._sequence_number += 1
        data = msgspec.json.encode({**event, "sequence_number": self._sequence_number})
        return b"event: " + event["type"].encode() + b"\ndata: " + data + b"\n\n"

    def _whole_event(self, kind: str) -> Event:
        return {"type": kind, "response": self.whole()}

    def _usage(self) -> dict[str, Any]:
        made = self.made
        return {
            "input_tokens": made.num_prompt_tokens,
            "input_tokens_details": {"cached_tokens": made.num_cached_tokens},
            "output_tokens": made.num_generated_tokens,
            "output_tokens_details": {"reasoning_tokens": self._num_reasoning},
            "total_tokens": made.num_prompt_tokens + made.num_generated_tokens,
        }
