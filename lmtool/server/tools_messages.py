"""What a conversation with calls in it becomes before a chat template sees it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lmtool.server.errors import Refusal
from lmtool.server.tools_format import HERMES, knows_tools
from lmtool.tokenizer import Tokenizer

Message = dict[str, Any]


def conversation(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> list[Message]:
    """The messages with calls and results as the template takes them; those of a conversation without any as they are.

    Templates that know tools get the arguments of calls as objects. For others a call becomes text of the assistant
    and a result text of the user, between <tool_response> tags, both as Hermes writes them. Raises Refusal for a call
    whose arguments are not a JSON object.
    """
    plain = [_with_objects(i, message) for i, message in enumerate(messages)]
    has_calls = any("tool_calls" in message or message.get("role") == "tool" for message in plain)
    return _as_text(plain) if has_calls and not knows_tools(tokenizer) else plain


def with_tools(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], wish: str) -> list[Message]:
    """The conversation with a description of the tools in its system message, for a template that knows none."""
    lines = [
        "You may call functions. These there are, one JSON description a line:",
        *(json.dumps(tool["function"], ensure_ascii=False) for tool in tools),
        "A call is written exactly so, its arguments as the function's JSON schema wants them:",
        HERMES.begin_text,
        '{"name": "the function", "arguments": {"an argument": "its value"}}',
        HERMES.end_text,
        "The result is given to you between <tool_response> and </tool_response>.",
        wish,
    ]
    text = "\n".join(line for line in lines if line)
    found = [dict(message) for message in messages]
    if found and found[0].get("role") == "system":
        found[0]["content"] = f"{found[0]['content']}\n\n{text}"
        return found
    return [{"role": "system", "content": text}, *found]


def _with_objects(index: int, message: Mapping[str, Any]) -> Message:
    found = dict(message)
    if not found.get("tool_calls"):
        found.pop("tool_calls", None)  # templates ask whether there is such a field
        return found
    calls = []
    for i, call in enumerate(found["tool_calls"]):
        where = f"messages[{index}].tool_calls[{i}].function.arguments"
        function = call["function"]
        calls.append({**call, "function": {**function, "arguments": _object(function["arguments"], where)}})
    return {**found, "content": found.get("content") or "", "tool_calls": calls}


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Refusal(400, f"{where} is not a JSON object", "give the arguments as the call had them", param=where)
    return found


def _as_text(messages: Sequence[Message]) -> list[Message]:
    found: list[Message] = []
    joinable = False  # the last message is the user's because of a result: the next one of the user joins it
    for message in messages:
        if message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if joinable:
                found[-1]["content"] += f"\n{text}"
            else:
                found.append({"role": "user", "content": text})
            joinable = True
        elif joinable and message["role"] == "user":
            found[-1]["content"] = _joined(found[-1]["content"], message["content"])
        else:
            found.append(_assistant_text(message) if "tool_calls" in message else message)
            joinable = False
    return found


def _joined(text: str, content: Any) -> Any:
    """content: a text, or parts where there are pictures among them."""
    return f"{text}\n\n{content}" if isinstance(content, str) else [{"type": "text", "text": text}, *content]


def _assistant_text(message: Message) -> Message:
    calls = [
        "\n".join([HERMES.begin_text, json.dumps(_called(call), ensure_ascii=False), HERMES.end_text])
        for call in message["tool_calls"]
    ]
    return {"role": message["role"], "content": "\n".join([*filter(None, [message["content"]]), *calls])}


def _called(call: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}
