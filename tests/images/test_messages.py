"""Pictures are taken out of messages in their order; whatever else is among the parts is named."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lmtool.errors import RequestError
from lmtool.images.messages import take_images

TEXT = {"type": "text", "text": "and this?"}
PIXEL = Image.new("RGB", (1, 1))


def taken(*parts: Any) -> tuple[Any, list[Any]]:
    messages, sources = take_images([{"role": "user", "content": list(parts), "name": "me"}])
    assert messages[0].keys() == {"role", "content", "name"}
    return messages[0]["content"], sources


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ({"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}, "https://example.org/a.png"),
        ({"type": "image_url", "image_url": {"url": "HTTP://a/b", "detail": "auto"}}, "HTTP://a/b"),
        ({"type": "image_url", "image_url": "data:image/png;base64,AAAA"}, "data:image/png;base64,AAAA"),
        ({"type": "image", "image": PIXEL}, PIXEL),
        ({"type": "image", "image": "a.png"}, "a.png"),
        ({"type": "image", "url": "https://example.org/a.png"}, "https://example.org/a.png"),
        ({"type": "image", "path": "a.png"}, Path("a.png")),
        ({"type": "image", "path": Path("a.png")}, Path("a.png")),
        ({"type": "image", "base64": "QUJD"}, b"ABC"),
        ({"type": "image", "data": b"ABC"}, b"ABC"),
        ({"type": "image", "data": "QUJD"}, b"ABC"),
        ({"type": "image", "data": "data:image/png;base64,QUJD"}, "data:image/png;base64,QUJD"),
    ],
)
def test_every_way_to_say_a_picture(part: dict[str, Any], source: Any) -> None:
    assert taken(part, TEXT) == ([{"type": "image"}, TEXT], [source])


def test_order_is_kept() -> None:
    conversation = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "image", "image": "1"}, TEXT, {"type": "image", "image": "2"}]},
        {"role": "assistant", "content": None},
        {"role": "user", "content": [{"type": "image", "image": "3"}]},
    ]
    messages, sources = take_images(conversation)
    assert sources == ["1", "2", "3"]
    assert messages[0] == conversation[0]
    assert messages[1]["content"] == [{"type": "image"}, TEXT, {"type": "image"}]
    assert messages[2] == conversation[2]
    assert conversation[1]["content"][0] == {"type": "image", "image": "1"}  # what was given stays as it was


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("text", "message 0: part 1 is a str"),
        ({"type": "video", "video": "x"}, "part 1 is of type 'video'"),
        ({}, "part 1 is of type None"),
        ({"type": ["text"], "text": "x"}, "part 1 is of type ['text']"),
        ({"type": "text"}, "part 1 is of type 'text' with nothing"),
        ({"type": "text", "text": 1}, "part 1 is of type 'text'"),
        ({"type": "text", "text": "a", "more": 1}, "part 1 is of type 'text' with ['more', 'text']"),
        ({"type": "image"}, "part 1 is of type 'image' with nothing"),
        ({"type": "image", "image": "a", "url": "b"}, "part 1 is of type 'image' with ['image', 'url']"),
        ({"type": "image", "picture": "a"}, "part 1 is of type 'image' with ['picture']"),
        ({"type": "image", "path": 3}, "part 1: path is a int"),
        ({"type": "image", "base64": b"x"}, "part 1: base64 is a bytes"),
        ({"type": "image", "base64": "?"}, "base64 is broken"),
        ({"type": "image", "url": "/etc/passwd"}, "part 1: its URL is none"),
        ({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, "part 1: its URL is none"),
        ({"type": "image_url", "image_url": {}}, "part 1: its URL is none"),
        ({"type": "image_url", "image_url": 5}, "part 1: its URL is none"),
        ({"type": "image_url", "image_url": {"url": "http://a/", "detail": "low"}}, "seen as sharply as the model can"),
        ({"type": "image_url", "image_url": {"url": "http://a/", "size": 3}}, "leave out all but its url"),
    ],
)
def test_other_parts_are_named(part: Any, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        taken(TEXT, part)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
