"""`Picture`: one that a user has put into the conversation, as a data URL of the file's own bytes, so that it is still
there when the file is not, and any server can be sent it. Knows neither terminal nor engine.
"""

import base64
import io
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

_THUMBNAIL_SIDE = 200
_IS_URL = re.compile(r"https?://", re.IGNORECASE)
_KINDS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif"}  # that servers of all kinds read


@dataclass(frozen=True)
class Picture:
    """name: for the user. url: a data URL. width, height: pixels."""

    name: str
    url: str
    width: int
    height: int

    def __str__(self) -> str:
        num_bytes = len(self.url.partition(",")[2]) * 3 // 4
        size = f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.0f} kB"
        return f"{self.name}, {self.width} × {self.height}, {size}"

    @cached_property
    def thumbnail(self) -> str:
        """A small one for a page, as a data URL of some kilobytes."""
        from lmtool.images.load import load_image

        small, out = load_image(self.url), io.BytesIO()
        small.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
        small.save(out, "JPEG")
        return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"

    @classmethod
    def read(cls, source: str) -> "Picture":
        """Of a file, or of an http(s) URL. Raises InputError for what is no picture, or is larger than pictures may
        be."""
        if _IS_URL.match(source):
            from lmtool.images.fetch import fetch_image

            return cls.of(source.partition("?")[0].rpartition("/")[2], fetch_image(source))
        from lmtool.images.load import file_bytes

        path = Path(source)
        return cls.of(path.name, file_bytes(path))

    @classmethod
    def of(cls, name: str, data: bytes) -> "Picture":
        """Of a file's bytes."""
        from lmtool.images.load import decode_image

        image = decode_image(data, name)
        kind, sent = _as_sent(data, image)
        url = f"data:image/{kind};base64,{base64.b64encode(sent).decode()}"
        return cls(name, url, image.width, image.height)


def content(text: str, pictures: tuple[Picture, ...]) -> str | list[dict[str, Any]]:
    """Of a message, as OpenAI writes it: pictures, and then the text about them."""
    if not pictures:
        return text
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": picture.url}} for picture in pictures]
    return [*parts, {"type": "text", "text": text}]


def _as_sent(data: bytes, image: "Image") -> tuple[str, bytes]:
    """The file's own bytes, or, where not every server reads its format, a PNG."""
    for begin, kind in _KINDS.items():
        if data.startswith(begin):
            return kind, data
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp", data
    out = io.BytesIO()
    image.save(out, "PNG")
    return "png", out.getvalue()
