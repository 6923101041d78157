"""A picture from wherever it is to RGB, under limits: what comes in is hostile until it is decoded.

Every refusal is a RequestError of one line; what the decoder itself says never gets out of here: it tells addresses in
this process's memory. A server calls `decode_image` and `data_url_bytes`, which touch no files.
"""

import base64
import binascii
import os
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import numpy as np

from lmtool.errors import InputError, RequestError

if TYPE_CHECKING:
    from PIL.Image import Image, Transpose

    ImageSource = str | Path | bytes | Image

MOST_BYTES = 20_000_000  # of a file
MOST_PIXELS = 50_000_000
_BASE64_PIECE = 1 << 18  # letters, whole groups of four
LONGEST_SIDE = 65_535  # pixels, as in a JPEG
# readers that are small and read only; some of Pillow's others start programs
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_GIVE = "give a path, a URL with http or https, a data URL, the bytes of a file or a Pillow image"
_KNOWN = "give a JPEG, PNG, WebP, GIF, BMP or TIFF"
_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II", b"MM")
_DEEP = ("I;16", "I;16L", "I;16B", "I;16N")
_ORIENTATION = 0x0112  # EXIF


def load_image(source: "ImageSource") -> "Image":
    """A path, an http(s) URL, a data URL, base64 text, the bytes of a file or a Pillow image, as RGB and upright.

    Raises RequestError for what is missing, broken, too large, animated or no picture, and for a URL that
    `fetch_image` refuses; InputError where Pillow is not installed.
    """
    pillow = _pillow()
    if isinstance(source, pillow.Image):
        return _as_rgb(source, "the picture")
    if isinstance(source, bytes | bytearray | memoryview):
        return decode_image(bytes(source))
    if isinstance(source, Path):
        return decode_image(file_bytes(source), str(source))
    if not isinstance(source, str):
        raise RequestError(f"a picture is a {type(source).__name__}", _GIVE)
    scheme = _scheme(source)
    if scheme == "data":
        return decode_image(data_url_bytes(source))
    if scheme in ("http", "https"):
        from lmtool.images.fetch import fetch_image

        return decode_image(fetch_image(source), _short(source))
    if not os.path.exists(source) and (data := _hidden_picture(source)) is not None:
        return decode_image(data)
    return decode_image(file_bytes(Path(source)), _short(source))


def decode_image(data: bytes, name: str = "the picture") -> "Image":
    """The bytes of a file as RGB and upright. name: what it is called in errors. Raises what `load_image` raises."""
    pillow = _pillow()
    _check_bytes(len(data), name)
    try:
        image = pillow.open(BytesIO(data), formats=FORMATS)
    except pillow.UnidentifiedImageError:
        raise RequestError(f"{name} is no picture" if data else f"{name} is empty", _KNOWN) from None
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning):
        raise RequestError(f"{name} has more than {MOST_PIXELS // 10**6} megapixels", "make it smaller") from None
    except Exception:  # whatever a hostile header makes a decoder raise
        raise RequestError(f"{name} is damaged", _KNOWN) from None
    with image:
        return _as_rgb(image, name)


def data_url_bytes(url: str) -> bytes:
    """What ``data:image/png;base64,…`` holds. Raises RequestError for another kind of URL and for broken base64."""
    head, comma, text = url.partition(",")
    kind, *settings = head[len("data:") :].split(";")
    if head[:5].lower() != "data:" or not comma or not kind.lower().startswith("image/"):
        raise RequestError("a picture's data URL is of another kind", "give data:image/png;base64,…")
    if "base64" not in [setting.strip().lower() for setting in settings]:
        raise RequestError("a picture's data URL is not in base64", "give data:image/png;base64,…")
    return base64_bytes(text)


def base64_bytes(text: str) -> bytes:
    """Raises RequestError for what is not base64, or too long."""
    if len(text) > 2 * MOST_BYTES:
        _check_bytes(len(text) * 3 // 4, "the picture")
    try:
        letters = unquote(text).encode("ascii").translate(None, b" \t\n\r\f\v").rstrip(b"=")
        if b"=" in letters:
            raise binascii.Error("more behind its end")
        letters += b"=" * (-len(letters) % 4)
        # in pieces: others of this process, such as a server's loop, wait for as long as one takes
        pieces = range(0, len(letters), _BASE64_PIECE)
        return b"".join(binascii.a2b_base64(letters[i : i + _BASE64_PIECE], strict_mode=True) for i in pieces)
    except (binascii.Error, UnicodeEncodeError):
        raise RequestError("a picture's base64 is broken", "encode the file again") from None


def encode_image_base64(source: "ImageSource") -> str:
    """A picture, from wherever `load_image` takes it, as the base64 text of an RGB PNG."""
    file = BytesIO()
    load_image(source).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


def _pillow() -> Any:
    try:
        import PIL.Image
    except ImportError as error:
        raise InputError("pictures need Pillow, which is not installed", "pip install 'lmtool[vision]'") from error
    return PIL.Image


def _check_bytes(num_bytes: int, name: str) -> None:
    if num_bytes > MOST_BYTES:
        raise RequestError(f"{name} has {num_bytes / 10**6:,.1f} MB", f"give one of at most {MOST_BYTES // 10**6} MB")


def _hidden_picture(text: str) -> bytes | None:
    """What base64 text holds, where that begins as a picture does: any word of four letters is base64, too."""
    try:
        data = base64_bytes(text)
    except RequestError:
        return None
    return data if data.startswith(_BEGINNINGS) and len(data) > 16 else None


def file_bytes(path: Path) -> bytes:
    """Of a picture's file, unread. Raises RequestError for what is missing, no file, or larger than pictures may be."""
    name = _short(str(path))
    try:
        path = path.expanduser()
        if path.exists() and not path.is_file():  # nor a pipe, which may never end
            raise RequestError(f"{name} is no file", "give the file of one picture")
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
            _check_bytes(max(len(data), os.fstat(file.fileno()).st_size), name)
            return data
    except (OSError, ValueError, RuntimeError) as error:
        said = error.strerror if isinstance(error, OSError) else "no such file"
        raise RequestError(f"the picture {name} cannot be read: {said}", "check its name") from error


def _scheme(source: str) -> str:
    """Of a URL; '' for anything else. Raises RequestError for a URL of another kind than pictures have, and for ''."""
    if not source or source.isspace():
        raise RequestError("a picture's name is empty", _GIVE)
    scheme, colon, rest = source[:32].partition(":")
    if scheme.lower() in ("data", "http", "https") and colon:
        return scheme.lower()
    if rest.startswith("//") and scheme.isascii() and scheme.isalnum() and len(scheme) > 1:
        raise RequestError(f"pictures are not read from {scheme.lower()}: URLs", _GIVE)
    return ""


def _short(name: str) -> str:
    return name if len(name) <= 100 else name[:99] + "…"


# ------------------------------------------------------------------ from a decoder's image to upright RGB


def _as_rgb(image: "Image", name: str) -> "Image":
    width, height = image.size
    if not (width and height):
        raise RequestError(f"{name} has no pixels", "give another")
    if width * height > MOST_PIXELS or max(width, height) > LONGEST_SIDE:
        raise RequestError(
            f"{name} has {width} x {height} pixels",
            f"give at most {MOST_PIXELS // 10**6} megapixels and {LONGEST_SIDE} a side",
        )
    try:
        # what cameras write beside a JPEG (MPO) are previews and depths, no frames
        is_animated = getattr(image, "is_animated", False) and image.format != "MPO"
    except Exception:  # it looks for the second frame
        raise RequestError(f"{name} is damaged or cut off", "copy it again") from None
    if is_animated:
        raise RequestError(f"{name} has several frames or pages", "give one of them")
    if image.mode in ("I", "F"):
        raise RequestError(f"{name} has pixels of 32 bits", "save it with 8 bits a channel")
    try:
        image.load()
        turn = _turn(image)
        upright = _rgb(image)
        return upright if turn is None else upright.transpose(turn)
    except Exception:  # whatever hostile data makes a decoder raise
        raise RequestError(f"{name} is damaged or cut off", "copy it again") from None


def _turn(image: "Image") -> "Transpose | None":
    """What makes it upright: cameras write pixels as the sensor has them, and beside them how it was held."""
    from PIL.Image import Transpose

    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # notes that are broken are no reason to refuse a picture that is not
        return None
    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return turns.get(orientation) if isinstance(orientation, int) else None


def _rgb(image: "Image") -> "Image":
    """Transparent parts become white, as a page shows them."""
    from PIL import Image

    if image.mode in _DEEP:  # Pillow's own conversion would cut values off at 255
        values = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white
