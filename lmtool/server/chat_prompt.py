"""Messages as they come → the token ids of a prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmtool.errors import InputError
from lmtool.server.errors import Refusal
from lmtool.server.protocol_chat import Message
from lmtool.server.tools import ToolUse
from lmtool.server.tools_messages import conversation
from lmtool.server.translate import off_the_loop
from lmtool.tokenizer import Tokenizer
from lmtool.tokenizer.thinking import OPEN

_TAIL = 8  # tokens in which a template would open a thought
_MESSAGE_CHARS = 10  # what a message costs besides its text


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """opens_thought: the template itself has written the beginning of a thought."""

    ids: list[int]
    opens_thought: bool

    @classmethod
    def of(cls, ids: list[int], tokenizer: Tokenizer) -> "ChatPrompt":
        return cls(ids, tokenizer.decode(ids[-_TAIL:], skip_special=False).rstrip().endswith(OPEN))


async def chat_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    options: Mapping[str, Any],
    *,
    tool_use: ToolUse | None = None,
    add_generation_prompt: bool = True,
) -> ChatPrompt:
    """Raises Refusal for messages that the template does not take."""

    def make() -> ChatPrompt:
        plain = plain_messages(messages, tokenizer)
        known = tool_use.messages(plain) if tool_use else conversation(plain, tokenizer)
        told = {**options, **tool_use.template_options} if tool_use else options
        try:
            ids = tokenizer.chat_ids(known, add_generation_prompt=add_generation_prompt, options=told)
        except InputError as error:
            raise Refusal(400, error.cause, error.fix, param="messages") from error
        return ChatPrompt.of(ids, tokenizer)

    num_chars = sum(_MESSAGE_CHARS + len(text) for message in messages for text in ("", *_texts(message)))
    return await off_the_loop(num_chars, make)


def plain_messages(messages: Sequence[Message], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """As templates take them: parts of text are one text, and what was not given is not there."""
    knows_developers = "developer" in (tokenizer.chat_template or "")
    found = []
    for i, message in enumerate(messages):
        plain = message.model_dump(exclude_none=True, exclude={"refusal", "annotations"})
        if message.content is None and not message.tool_calls:
            raise Refusal(400, f"messages[{i}] has no content", "give a text", param=f"messages[{i}].content")
        plain["content"] = "\n".join(_texts(message))
        if message.role == "developer" and not knows_developers:
            plain["role"] = "system"  # the newer name of the same
        found.append(plain)
    return found


def _texts(message: Message) -> list[str]:
    content = message.content or ""
    return [content] if isinstance(content, str) else [part.text for part in content]
