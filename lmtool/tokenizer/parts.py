"""What a message says, as its template takes it: a text, or a list of parts, texts and pictures.

Does not know how a template finds out which it takes, nor what a picture looks like.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lmtool.errors import RequestError

Part = Mapping[str, Any]


def check_content(index: int, content: Any) -> None:
    """Of message ``index``. Raises RequestError for parts that are neither texts nor places of pictures."""
    if not isinstance(content, list | tuple):
        return
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "image" and not (kind == "text" and isinstance(part.get("text"), str)):
            raise RequestError(
                f"message {index}: part {i} is neither a text nor a picture",
                'give {"type": "text", "text": "…"} or {"type": "image"}',
            )


def has_pictures(content: Any) -> bool:
    return isinstance(content, list | tuple) and any(part["type"] == "image" for part in content)


def as_parts(content: Any) -> Any:
    """For a template that takes a list of parts; no content at all, as beside tool calls, stays none."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def as_text(content: Any, image_token: str) -> Any:
    """For a template that takes a text: each part on lines of its own, a picture as the token that stands for it."""
    if not isinstance(content, list | tuple):
        return content
    parts: Sequence[Part] = content
    return "\n".join(image_token if part["type"] == "image" else part["text"] for part in parts)
