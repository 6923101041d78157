"""Pictures from files, bytes and texts: what is read, upright and in RGB, and what is refused in one line."""

import base64
import io
import os
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from lmtool.errors import InputError, RequestError
from lmtool.images.load import data_url_bytes, decode_image, load_image
from lmtool.vl import encode_image_base64

# a user of Pillow gets warnings of what is odd in a file; here they are no errors, as elsewhere
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{name}") for name in ("UserWarning", "PIL.Image.DecompressionBombWarning")
]
WHITE, RED, BLUE = (255, 255, 255), (255, 0, 0), (0, 0, 255)


def colours(width: int = 24, height: int = 16) -> Image.Image:
    """Smooth, so that what loses a little when it is written is still near."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=2).astype(np.uint8))


def written(image: Image.Image, form: str, **more: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **more)
    return file.getvalue()


def near(found: Image.Image, expected: Image.Image, within: int = 0) -> bool:
    assert found.mode == "RGB"
    if found.size != expected.size:
        return False
    difference = np.asarray(found, dtype=int) - np.asarray(expected, dtype=int)
    return bool(abs(difference).max() <= within)


def refusal(source: Any) -> str:
    with pytest.raises(RequestError) as caught:
        load_image(source)
    said = str(caught.value)
    assert "\n" not in said
    assert " at 0x" not in said
    assert "BytesIO" not in said
    return said


# ------------------------------------------------------------------ where it may be


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "GIF", "WEBP", "JPEG"])
def test_every_way_to_give_a_picture(tmp_path: Path, form: str) -> None:
    image = colours()
    data = written(image, form, **({"lossless": True} if form == "WEBP" else {}))
    within = {"JPEG": 40, "GIF": 60}.get(form, 0)  # chroma at half the size; 256 colours
    path = tmp_path / "picture.of-some-kind"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    sources = [path, str(path), data, text, f"data:image/{form.lower()};base64,{text}", Image.open(io.BytesIO(data))]
    found = [load_image(source) for source in sources]
    assert near(found[0], image, within)
    assert all(one.tobytes() == found[0].tobytes() for one in found)


def test_a_name_may_look_like_base64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cats").write_bytes(written(colours(), "PNG"))
    assert load_image("cats").size == (24, 16)
    assert "dogs cannot be read: No such file or directory" in refusal("dogs")


def test_a_home_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.png").write_bytes(written(colours(), "PNG"))
    assert load_image("~/a.png").size == (24, 16)


def test_base64_of_any_source() -> None:
    image = colours()
    text = encode_image_base64(image)
    assert near(load_image(text), image)
    assert encode_image_base64(text) == text


def test_base64_may_be_wrapped_and_unpadded() -> None:
    data = written(colours(), "PNG")
    text = base64.encodebytes(data).decode()
    assert data_url_bytes("data:image/png;base64," + text) == data
    assert data_url_bytes("DATA:image/png;charset=x;BASE64," + text.rstrip("\n=").replace("+", "%2B")) == data


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("data:text/html;base64,QUJD", "of another kind"),
        ("data:image/png", "of another kind"),
        ("data:image/png,abc", "not in base64"),
        ("data:image/png;base64,A", "base64 is broken"),
        ("data:image/png;base64,????", "base64 is broken"),
        ("data:image/png;base64,ÄÄÄÄ", "base64 is broken"),
        ("data:image/png;base64,", "the picture is empty"),
        ("data:image/png;base64,AAAA", "the picture is no picture"),
    ],
)
def test_data_urls_that_are_none(url: str, said: str) -> None:
    assert said in refusal(url)


@pytest.mark.parametrize("source", [1, None, ["a.png"], {"url": "x"}, np.zeros((2, 2, 3))])
def test_things_that_are_no_source(source: Any) -> None:
    assert f"a picture is a {type(source).__name__}" in refusal(source)


def test_without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.delitem(sys.modules, "PIL.Image")
    with pytest.raises(
        InputError, match=r"pictures need Pillow, which is not installed; pip install 'lmtool\[vision\]'"
    ):
        load_image("a.png")


# ------------------------------------------------------------------ files that are none


def test_paths_that_lead_to_no_file(tmp_path: Path) -> None:
    assert "is no file" in refusal(tmp_path)
    assert "cannot be read: No such file or directory; check its name" in refusal(tmp_path / "missing.png")
    os.mkfifo(tmp_path / "pipe")
    assert "is no file" in refusal(tmp_path / "pipe")
    assert "is no file" in refusal("/dev/zero")
    assert "cannot be read" in refusal("a\0b.png")
    assert "cannot be read: File name too long" in refusal("x!" * 5000)
    assert len(refusal("x!" * 5000)) < 300
    assert "not read from file: URLs" in refusal("file:///etc/passwd")
    assert "not read from ftp: URLs" in refusal("FTP://example.org/a.png")
    assert "cannot be read" in refusal("a:b//c.png")
    assert "name is empty" in refusal(" ")


def test_bytes_that_are_no_picture(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not a picture at all")
    assert refusal(tmp_path / "text.png").endswith("text.png is no picture; give a JPEG, PNG, WebP, GIF, BMP or TIFF")
    (tmp_path / "empty.png").write_bytes(b"")
    assert "empty.png is empty" in refusal(tmp_path / "empty.png")
    assert "the picture is empty" in refusal(b"")


@pytest.mark.parametrize("form", ["EPS", "PPM", "ICO", "PDF", "TGA", "PCX", "DDS", "JPEG2000"])
def test_formats_that_are_not_read(form: str) -> None:
    assert "is no picture" in refusal(written(colours(), form))


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "GIF", "WEBP", "JPEG"])
def test_files_that_are_cut_off(form: str) -> None:
    data = written(colours(200, 300), form)
    for length in (len(data) // 2, len(data) * 9 // 10):
        assert "is damaged" in refusal(data[:length])
    for length in (1, 3, 9, 20, 30):
        refusal(data[:length])


@settings(max_examples=300)
@given(data=st.data(), form=st.sampled_from(["PNG", "BMP", "TIFF", "GIF", "WEBP", "JPEG"]))
def test_damage_is_seen_or_harmless(data: st.DataObject, form: str) -> None:
    """Nothing but a picture or a refusal ever comes of it."""
    good = bytearray(written(colours(), form))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        mode, said = decode_image(bytes(good)).mode, ""
    except RequestError as error:
        mode, said = "RGB", str(error)
    assert mode == "RGB"
    assert " at 0x" not in said


# ------------------------------------------------------------------ limits


def png_of(width: int, height: int) -> bytes:
    """A PNG that says so, and holds nothing of it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    packed = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def test_what_would_fill_the_memory() -> None:
    assert "has more than 50 megapixels" in refusal(png_of(60_000, 60_000))  # 10.8 GB
    assert "has 7072 x 7072 pixels; give at most 50 megapixels" in refusal(png_of(7072, 7072))
    assert "has 10000 x 10000 pixels" in refusal(png_of(10_000, 10_000))  # of which Pillow only warns
    assert "has 65536 x 2 pixels" in refusal(png_of(65_536, 2))


def test_files_that_are_too_long(tmp_path: Path) -> None:
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(10**12)
    assert "sparse.png has 1,000,000.0 MB; give one of at most 20 MB" in refusal(tmp_path / "sparse.png")
    assert "the picture has 20.0 MB" in refusal(bytes(20_000_001))
    assert "at most 20 MB" in refusal("data:image/png;base64," + "A" * 60_000_000)


def test_small_and_long_ones() -> None:
    assert load_image(written(Image.new("RGB", (1, 1), RED), "PNG")).getpixel((0, 0)) == RED
    assert load_image(written(Image.new("L", (1, 3000), 7), "PNG")).size == (1, 3000)
    assert "has no pixels" in refusal(Image.new("RGB", (0, 5)))


# ------------------------------------------------------------------ frames


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_several_frames(form: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    data = written(frames[0], form, save_all=True, append_images=frames[1:])
    assert refusal(data) == "the picture has several frames or pages; give one of them"


def test_a_camera_s_preview_is_no_frame() -> None:
    image, preview = colours(), Image.new("RGB", (8, 8))
    data = written(image, "MPO", save_all=True, append_images=[preview])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert near(load_image(data), image, within=40)


# ------------------------------------------------------------------ colours and how it was held


def test_grey_and_black() -> None:
    grey = colours().convert("L")
    assert near(load_image(written(grey, "PNG")), grey.convert("RGB"))
    bits = grey.convert("1")
    assert near(load_image(written(bits, "PNG")), bits.convert("RGB"))


def test_ink() -> None:
    ink = colours().convert("CMYK")
    assert near(load_image(written(ink, "JPEG", quality=95)), ink.convert("RGB"), within=30)
    assert near(load_image(written(ink, "TIFF")), ink.convert("RGB"))


def test_sixteen_bits() -> None:
    values = np.array([[0, 256, 257 * 100, 65_535]], dtype=np.uint16)
    found = load_image(written(Image.fromarray(values), "PNG"))
    assert [found.getpixel((x, 0)) for x in range(4)] == [(0,) * 3, (1,) * 3, (100,) * 3, WHITE]
    assert near(load_image(written(Image.fromarray(values), "TIFF")), found)


def test_numbers_are_no_colours() -> None:
    assert "has pixels of 32 bits" in refusal(written(Image.new("F", (2, 2)), "TIFF"))
    assert "has pixels of 32 bits" in refusal(Image.new("I", (2, 2)))


def test_transparent_parts_are_white() -> None:
    clear = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
    clear.putpixel((1, 0), (*RED, 255))
    clear.putpixel((2, 0), (0, 0, 0, 128))
    for image in (clear, clear.convert("LA")):
        found = load_image(written(image, "PNG"))
        assert found.getpixel((0, 0)) == WHITE
        assert found.getpixel((1, 0)) == image.convert("RGB").getpixel((1, 0))
        assert found.getpixel((2, 0)) == (127,) * 3
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((1, 0), 1)
    for transparency in (0, b"\x00\xff"):
        found = load_image(written(palette, "PNG", transparency=transparency))
        assert [found.getpixel((x, 0)) for x in (0, 1)] == [WHITE, RED]
    keyed = written(Image.new("RGB", (2, 2), RED), "PNG", transparency=RED)
    assert load_image(keyed).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_it_is_upright(form: str, orientation: int) -> None:
    image = Image.new("RGB", (32, 16), BLUE)
    image.paste(RED, (0, 0, 16, 8))
    notes = Image.Exif()
    notes[0x0112] = orientation
    data = written(image, form, exif=notes, **({"lossless": True} if form == "WEBP" else {}))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert near(load_image(data), expected)
    assert near(load_image(Image.open(io.BytesIO(data))), expected)
    assert expected.size == ((16, 32) if 5 <= orientation <= 8 else (32, 16))


def test_broken_notes_are_no_reason() -> None:
    data = written(colours(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff rubbish")
    assert load_image(data).size == (24, 16)


def test_a_picture_that_was_given_stays_as_it_is() -> None:
    image = Image.new("RGBA", (2, 2), (1, 2, 3, 4))
    load_image(image)
    assert image.mode == "RGBA"
    assert image.getpixel((0, 0)) == (1, 2, 3, 4)
