"""`/v1/responses`: an answer as a list of items (a thought, a message, calls), and each change of it as an event."""

import uuid
from collections.abc import Iterator
from typing import Any

from lmtool.server.chat_reader import Delta

Event = dict[str, Any]
_TEXTS = {  # kind of item: its id's beginning, its part's type
    "reasoning": ("rs", "reasoning_text"),
    "message": ("msg", "output_text"),
}


class Output:
    """items: as they are now."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._open = False  # the last item may still grow

    @property
    def content(self) -> str:
        """What the answer says, without thoughts and calls."""
        return "".join(item["content"][0]["text"] for item in self.items if item["type"] == "message")

    @property
    def calls(self) -> list[dict[str, Any]]:
        """As chat has them."""
        return [
            {"id": item["call_id"], "type": "function", "function": {key: item[key] for key in ("name", "arguments")}}
            for item in self.items
            if item["type"] == "function_call"
        ]

    def push(self, delta: Delta) -> Iterator[Event]:
        if text := delta.get("reasoning_content"):
            yield from self._text("reasoning", text)
        if text := delta.get("content"):
            yield from self._text("message", text)
        for call in delta.get("tool_calls", ()):
            yield from self._call(call)

    def close(self, status: str = "completed") -> Iterator[Event]:
        """The last item is over."""
        if not self._open:
            return
        self._open = False
        item = self.items[-1]
        item["status"] = status
        if item["type"] == "function_call":
            yield self._event("response.function_call_arguments.done", arguments=item["arguments"])
        else:
            (part,) = item["content"]
            more: dict[str, Any] = {"logprobs": []} if item["type"] == "message" else {}
            yield self._event(f"response.{part['type']}.done", content_index=0, text=part["text"], **more)
            yield self._event("response.content_part.done", content_index=0, part=dict(part))
        yield self._item_event("response.output_item.done")

    def _text(self, kind: str, text: str) -> Iterator[Event]:
        prefix, part_type = _TEXTS[kind]
        if not (self._open and self.items[-1]["type"] == kind):
            part: dict[str, Any] = {"type": part_type, "text": ""}
            own: dict[str, Any] = {"summary": []}
            if kind == "message":
                part["annotations"], own = [], {"role": "assistant"}
            yield from self._begin({"id": _id(prefix), "type": kind, **own, "content": []})
            yield self._event("response.content_part.added", content_index=0, part=dict(part))
            self.items[-1]["content"].append(part)
        self.items[-1]["content"][0]["text"] += text
        more: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        yield self._event(f"response.{part_type}.delta", content_index=0, delta=text, **more)

    def _call(self, call: dict[str, Any]) -> Iterator[Event]:
        function = call["function"]
        if "id" in call:
            own = {"call_id": call["id"], "name": function["name"], "arguments": ""}
            yield from self._begin({"id": _id("fc"), "type": "function_call", **own})
        self.items[-1]["arguments"] += function["arguments"]
        yield self._event("response.function_call_arguments.delta", delta=function["arguments"])

    def _begin(self, item: dict[str, Any]) -> Iterator[Event]:
        yield from self.close()
        self.items.append({**item, "status": "in_progress"})
        self._open = True
        yield self._item_event("response.output_item.added")

    def _event(self, kind: str, **said: Any) -> Event:
        return {"type": kind, "item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **said}

    def _item_event(self, kind: str) -> Event:
        item = self.items[-1]
        shown = {**item, "content": [dict(part) for part in item["content"]]} if "content" in item else dict(item)
        return {"type": kind, "output_index": len(self.items) - 1, "item": shown}


def _id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
