"""Pictures in a conversation's messages: taken out, and their places kept."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmtool.errors import RequestError
from lmtool.images.load import base64_bytes

if TYPE_CHECKING:
    from lmtool.images.load import ImageSource

_SOURCES = ("image", "url", "path", "base64", "data")
_KNOWN = 'give {"type": "text", "text": "…"}, {"type": "image", "image": …} or {"type": "image_url", "image_url": …}'


def take_images(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], "list[ImageSource]"]:
    """The messages with {"type": "image"} for each picture, and what `load_image` takes of each, in order.

    A picture is a part {"type": "image_url", "image_url": {"url": …} or "…"}, or {"type": "image"} with one of
    image (anything that `load_image` takes), url, path, base64 or data. Raises RequestError for other parts.
    """
    taken: list[ImageSource] = []
    plain = []
    for i, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, list | tuple):
            content = [_part(f"message {i}: part {j}", part, taken) for j, part in enumerate(content)]
            plain.append({**message, "content": content})
        else:
            plain.append(dict(message))
    return plain, taken


def _part(where: str, part: Any, taken: "list[ImageSource]") -> dict[str, Any]:
    if not isinstance(part, Mapping):
        raise RequestError(f"{where} is a {type(part).__name__}", _KNOWN)
    kind, keys = part.get("type"), set(part) - {"type"}
    if kind == "text" and keys == {"text"} and isinstance(part["text"], str):
        return dict(part)
    if kind == "image_url" and keys == {"image_url"}:
        taken.append(_url(where, part["image_url"]))
    elif kind == "image" and len(keys) == 1 and keys < {*_SOURCES}:
        taken.append(_source(where, next(iter(keys)), part))
    elif kind in ("text", "image", "image_url"):
        raise RequestError(f"{where} is of type {kind!r} with {sorted(map(str, keys)) or 'nothing'}", _KNOWN)
    else:
        raise RequestError(f"{where} is of type {kind!r}", _KNOWN)
    return {"type": "image"}


def _url(where: str, said: Any) -> str:
    if isinstance(said, Mapping):
        if said.get("detail", "auto") not in ("auto", "high") or set(said) - {"url", "detail"}:
            raise RequestError(f"{where}: a picture is seen as sharply as the model can", "leave out all but its url")
        said = said.get("url")
    schemes = ("http://", "https://", "data:")
    if not isinstance(said, str) or not said[:8].lower().startswith(schemes):
        raise RequestError(f"{where}: its URL is none", "give http://…, https://… or data:image/png;base64,…")
    return said


def _source(where: str, key: str, part: Mapping[str, Any]) -> "ImageSource":
    value = part[key]
    if key == "url":
        return _url(where, value)
    if key == "path" and isinstance(value, str | Path):
        return Path(value)
    if key in ("base64", "data"):
        if isinstance(value, bytes) and key == "data":
            return value
        if isinstance(value, str):
            return value if value[:5].lower() == "data:" else base64_bytes(value)
    if key == "image":
        source: ImageSource = value
        return source
    raise RequestError(f"{where}: {key} is a {type(value).__name__}", _KNOWN)
