"""Messages as they come → the token ids of a prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmtool.errors import InputError
from lmtool.images.prepared import PreparedImage
from lmtool.server.errors import Refusal
from lmtool.server.protocol_chat import ImagePart, Message
from lmtool.server.tools import ToolUse
from lmtool.server.tools_messages import Message as Plain
from lmtool.server.tools_messages import conversation
from lmtool.server.translate import off_the_loop
from lmtool.tokenizer import Tokenizer
from lmtool.tokenizer.thinking import OPEN

_TAIL = 8  # tokens in which a template would open a thought
_MESSAGE_CHARS = 10  # what a message costs besides its text


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """ids: with an `IMAGE_ID` for each of ``images``. opens_thought: the template itself has written the beginning of a
    thought."""

    ids: list[int]
    opens_thought: bool
    images: Sequence[PreparedImage] = ()

    @classmethod
    def of(cls, ids: list[int], tokenizer: Tokenizer, images: Sequence[PreparedImage] = ()) -> "ChatPrompt":
        tail = [token_id for token_id in ids[-_TAIL:] if token_id >= 0]
        return cls(ids, tokenizer.decode(tail, skip_special=False).rstrip().endswith(OPEN), images)


async def chat_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Plain],
    options: Mapping[str, Any],
    *,
    images: Sequence[PreparedImage] = (),
    tool_use: ToolUse | None = None,
    add_generation_prompt: bool = True,
) -> ChatPrompt:
    """messages: of `plain_messages`. Raises Refusal for messages that the template does not take."""

    def make() -> ChatPrompt:
        known = tool_use.messages(messages) if tool_use else conversation(messages, tokenizer)
        told = {**options, **tool_use.template_options} if tool_use else options
        try:
            ids = tokenizer.chat_ids(known, add_generation_prompt=add_generation_prompt, options=told)
        except InputError as error:
            raise Refusal(400, error.cause, error.fix, param="messages") from error
        return ChatPrompt.of(ids, tokenizer, images)

    return await off_the_loop(num_chars(messages), make)


def num_chars(messages: Sequence[Plain]) -> int:
    """As a measure of the time that reading them takes."""
    return sum(_MESSAGE_CHARS + len(_text(message["content"])) for message in messages)


def plain_messages(messages: Sequence[Message], tokenizer: Tokenizer) -> list[Plain]:
    """As templates take them: parts of text are one text, and what was not given is not there. Where there are
    pictures, a list of parts stays one, with {"type": "image"} for each picture."""
    knows_developers = "developer" in (tokenizer.chat_template or "")
    found = []
    for i, message in enumerate(messages):
        plain = message.model_dump(exclude_none=True, exclude={"refusal", "annotations"})
        if message.content is None and not message.tool_calls:
            raise Refusal(400, f"messages[{i}] has no content", "give a text", param=f"messages[{i}].content")
        plain["content"] = _plain_content(message)
        if message.role == "developer" and not knows_developers:
            plain["role"] = "system"  # the newer name of the same
        found.append(plain)
    return found


def _plain_content(message: Message) -> str | list[dict[str, str]]:
    content = message.content or ""
    if isinstance(content, str):
        return content
    if not any(isinstance(part, ImagePart) for part in content):
        return "\n".join(part.text for part in content if not isinstance(part, ImagePart))
    return [
        {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text} for part in content
    ]


def _text(content: str | Sequence[Mapping[str, str]]) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
