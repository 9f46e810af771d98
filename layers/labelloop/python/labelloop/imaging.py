"""Decode and preprocess images: the same function serves and trains, so that a model is asked about what it has learnt from.

Half of a prediction's CPU time is decoding: JPEGs are decoded at the smallest DCT scale that leaves `oversampling` times the
model's input. Pixels are capped by the header, before anything is decoded.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from labelloop.errors import ImageError

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 80_000_000
MAX_PIXELS_PROGRESSIVE = 40_000_000  # a progressive JPEG keeps all its coefficients in memory, however small it is decoded
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height


@dataclass(frozen=True)
class ImageInfo:
    """What an image is: its format and its size in pixels as a person sees it (EXIF rotation applied)."""

    format: str
    width: int
    height: int


def inspect(data: bytes) -> ImageInfo:
    """Say what an image file is, and prove that it decodes. Raises `ImageError` with the reason when it does not."""
    return survey(data)[0]


def survey(data: bytes) -> tuple[ImageInfo, Image.Image]:
    """What an image file is, and the image, upright, of no less than 64 × 64 pixels where it has them. Raises `ImageError`."""
    image = _open(data)
    width, height = _upright_size(image)
    name = "JPEG" if isinstance(image, JpegImageFile) else image.format or ""  # Pillow names some JPEGs of phones "MPO"
    decoded = _load(image, "RGB", (64, 64))
    return ImageInfo(format=name, width=width, height=height), decoded


def upright_size(data: bytes) -> tuple[int, int]:
    """Width and height in pixels as a person sees the image, from its header alone. Raises `ImageError`."""
    return _upright_size(_open(data))


def decode(data: bytes, *, width: int, height: int, mode: Literal["L", "RGB"], oversampling: float = 2.0) -> Image.Image:
    """Decode an image file to exactly `width` × `height` pixels, 8 bits a channel, upright.

    The aspect ratio is not kept: the model sees the whole image. Of an animation the first frame counts; transparency
    lies on white. Raises `ImageError`.
    """
    image = _load(_open(data), mode, (round(width * oversampling), round(height * oversampling)))
    return image.resize((width, height), Image.Resampling.BILINEAR)


def _open(data: bytes) -> Image.Image:
    if not data:
        raise ImageError("the file is empty")
    if len(data) > MAX_BYTES:
        raise ImageError(f"the file has {len(data) / 2**20:.0f} MB; at most {MAX_BYTES // 2**20} MB are read")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ImageError(f"not an image of a known format ({', '.join(FORMATS)}), or cut off") from None
    except Image.DecompressionBombError:
        raise ImageError(f"more than {MAX_PIXELS // 1_000_000} megapixels") from None
    except (OSError, ValueError, SyntaxError, struct.error, zlib.error, TypeError, KeyError, IndexError) as error:
        raise ImageError(f"cannot be read: {error}") from error
    pixels = image.width * image.height
    cap = MAX_PIXELS_PROGRESSIVE if image.info.get("progressive") else MAX_PIXELS
    if pixels == 0:
        raise ImageError("has no pixels")
    if pixels > cap:
        raise ImageError(f"{pixels / 1e6:.0f} megapixels; at most {cap / 1e6:.0f} are decoded")
    return image


def _load(image: Image.Image, mode: Literal["L", "RGB"], least: tuple[int, int]) -> Image.Image:
    """Decode to `mode`, upright, at no less than `least` pixels where the file has them."""
    try:
        if isinstance(image, JpegImageFile):
            sideways = image.getexif().get(_ORIENTATION) in _SIDEWAYS
            image.draft(mode, (least[1], least[0]) if sideways else least)
        image.load()
        image = ImageOps.exif_transpose(image)
        return _to_8_bit(image, mode)
    except ImageError:
        raise
    # Pillow's decoders raise all of these on damaged files.
    except (OSError, ValueError, SyntaxError, struct.error, zlib.error, TypeError, KeyError, IndexError, EOFError) as error:
        raise ImageError(f"is broken: {error}") from error


def _to_8_bit(image: Image.Image, mode: Literal["L", "RGB"]) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        # 16-bit grey: Pillow's own conversion would clip at 255.
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == mode else image.convert(mode)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    try:
        sideways = image.getexif().get(_ORIENTATION) in _SIDEWAYS
    except (OSError, ValueError, SyntaxError, struct.error, TypeError, KeyError) as error:
        raise ImageError(f"has broken EXIF data: {error}") from error
    return (image.height, image.width) if sideways else (image.width, image.height)
