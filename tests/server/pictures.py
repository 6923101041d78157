"""Pictures for the tests of a server, as a client would send them, and what is asked about them."""

import base64
import io
from pathlib import Path

from PIL import Image

from lmtool import GenerationConfig
from lmtool.engine.pipeline import Pipeline
from lmtool.images.form import read_image_form
from lmtool.images.load import decode_image
from tests.server.serving import Serving


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


RED, BLUE, WIDE = data_url(picture(seed=1)), data_url(picture(seed=2)), data_url(picture(120, 30, seed=3))


def ask(server: Serving, *messages, **settings):
    return server.openai().chat.completions.create(
        model="tiny", messages=messages, **{"max_completion_tokens": 12, "temperature": 0, **settings}
    )


def text_of(answer) -> str:
    return answer.choices[0].message.content


def same(pipe: Pipeline, *messages) -> str:
    """What the engine itself says."""
    return pipe(list(messages), GenerationConfig(temperature=0, max_new_tokens=12)).text


def rows(folder: Path, url: str) -> int:
    data = base64.b64decode(url.partition(",")[2])
    return read_image_form(folder).prepare(decode_image(data)).num_tokens
