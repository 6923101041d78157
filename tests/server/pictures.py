"""Pictures for the tests of a server: made here, as a client would send them."""

import base64
import io

from PIL import Image


def picture(width: int = 60, height: int = 40, seed: int = 0, form: str = "PNG") -> bytes:
    """Stripes and a slope, others for each seed."""
    pixels = bytes(
        value
        for y in range(height)
        for x in range(width)
        for value in ((x * (5 + seed)) % 256, (y * 7 + 31 * seed) % 256, (x * y + 91 * seed) % 256)
    )
    out = io.BytesIO()
    Image.frombytes("RGB", (width, height), pixels).save(out, form)
    return out.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def part(url: str, **more: str) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def says(text: str, *urls: str) -> dict[str, object]:
    """A message of the user with these pictures before its text."""
    return {"role": "user", "content": [*map(part, urls), {"type": "text", "text": text}]}
