"""`/v1/responses`: what is asked, in the words of chat. Knows neither tokens nor what is remembered."""

from collections.abc import Iterator, Sequence
from typing import Any

from lmtool.server import protocol_chat
from lmtool.server.errors import Refusal
from lmtool.server.pictures import Source, source_of
from lmtool.server.protocol_chat import FunctionCall, Message, ToolCall
from lmtool.server.protocol_responses import (
    CallItem,
    ImagePart,
    Item,
    MessageItem,
    Part,
    ReasoningItem,
    ResponsesRequest,
    ResultItem,
    TextPart,
)


def messages_of(body: ResponsesRequest) -> list[Message]:
    """The input as messages: calls that follow one another are one message's, and reasoning is the next answer's."""
    if isinstance(body.input, str):
        return [Message(role="user", content=body.input)]
    found: list[Message] = []
    thought: str | None = None
    for item in body.input:
        if isinstance(item, ReasoningItem):
            thought = "".join(part.text for part in item.content or ()) or None
            continue
        last = found[-1] if found else None
        if isinstance(item, CallItem) and last is not None and last.role == "assistant" and thought is None:
            found[-1] = last.model_copy(update={"tool_calls": [*(last.tool_calls or ()), _call(item)]})
        else:
            found.append(_message(item, thought))
        thought = None
    if not found:
        raise Refusal(400, "input has no message", "give what is said", param="input")
    return found


def _message(item: Item, thought: str | None) -> Message:
    match item:
        case MessageItem():
            own = thought if item.role == "assistant" else None
            return Message(role=item.role, content=_content(item.content), reasoning_content=own)
        case CallItem():
            return Message(role="assistant", content="", tool_calls=[_call(item)], reasoning_content=thought)
        case ResultItem():
            return Message(role="tool", content=_content(item.output), tool_call_id=item.call_id)
        case ReasoningItem():
            raise AssertionError("reasoning is no message")


def _call(item: CallItem) -> ToolCall:
    return ToolCall(id=item.call_id, function=FunctionCall(name=item.name, arguments=item.arguments))


def _content(content: str | Sequence[TextPart | ImagePart]) -> str | list[protocol_chat.Part]:
    if isinstance(content, str):
        return content
    texts = [part.text for part in content if isinstance(part, TextPart)]
    return "\n".join(texts) if len(texts) == len(content) else [_part(part) for part in content]


def _part(part: TextPart | ImagePart) -> protocol_chat.Part:
    if isinstance(part, TextPart):
        return protocol_chat.TextPart(type="text", text=part.text)
    url = protocol_chat.ImageUrl(url=part.image_url, detail=part.detail)
    return protocol_chat.ImagePart(type="image_url", image_url=url)


def pictures_of(body: ResponsesRequest) -> Iterator[Source]:
    """In their order. Raises Refusal for one that is not in a message of the user."""
    for i, item in enumerate(body.input if isinstance(body.input, list) else ()):
        content, name = (item.output, "output") if isinstance(item, ResultItem) else (_said(item), "content")
        for j, part in enumerate(content if isinstance(content, list) else ()):
            if isinstance(part, ImagePart):
                role = item.role if isinstance(item, MessageItem) else "tool"
                yield source_of(part.image_url, role, f"input[{i}].{name}[{j}].image_url")


def _said(item: Item) -> str | list[Part]:
    return item.content if isinstance(item, MessageItem) else ""


def tools_of(body: ResponsesRequest) -> list[dict[str, Any]]:
    """As chat has them."""
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    return [{"type": tool.pop("type"), "function": tool} for tool in tools]


def tool_choice_of(body: ResponsesRequest) -> str | dict[str, Any] | None:
    """As chat has it; what is malformed stays so, and is refused there."""
    match body.tool_choice:
        case {"type": "function", "name": name}:
            return {"type": "function", "function": {"name": name}}
        case {"type": "allowed_tools", "mode": mode, "tools": [*some]}:
            named = [tool_choice_of(body.model_copy(update={"tool_choice": one})) for one in some]
            return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": named}}
    return body.tool_choice


def response_format_of(body: ResponsesRequest) -> dict[str, Any] | None:
    """As chat has it; None for plain text."""
    wanted = body.text.format if body.text else None
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "json_object"}
    if wanted.name is None or wanted.json_schema is None:
        missing = "name" if wanted.name is None else "schema"
        raise Refusal(400, f"text.format.{missing} is missing", "give it", param=f"text.format.{missing}")
    schema = {"name": wanted.name, "schema": wanted.json_schema, "strict": wanted.strict}
    return {"type": "json_schema", "json_schema": {key: value for key, value in schema.items() if value is not None}}
