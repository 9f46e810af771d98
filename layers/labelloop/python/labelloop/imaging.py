"""Decode and preprocess images: the same function serves and trains, so that a model is asked about what it has learnt from.

Half of a prediction's CPU time is decoding: JPEGs are decoded at the smallest DCT scale that leaves `oversampling` times the
model's input. Pixels and the memory for them are capped by the header, before anything is decoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from PIL import Image

from labelloop.errors import ImageError
from labelloop.image_headers import BoundedReader, format_of, kept_aside, webp_size

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 80_000_000
MAX_SIDE = 65_535  # pixels, as in a JPEG; resizing takes memory for each
MAX_MEMORY = 208_000_000  # bytes that decoding one image may take: a WebP of 12 megapixels; a JPEG is decoded scaled
_PLUGINS = {"JPEG": "Jpeg", "PNG": "Png", "WEBP": "WebP", "BMP": "Bmp", "GIF": "Gif", "TIFF": "Tiff"}  # of Pillow
FORMATS = tuple(_PLUGINS)
Mode = Literal["L", "RGB"]
_TEXT = 4 * 2**20  # bytes of a PNG's comments that Pillow unpacks; its own limit is 64 MB
_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_REDUCING_GAP = 1.1  # a picture twice this many times too large is first averaged over whole blocks: a fifth less time, at least
_BLOCK = 8 * 2**20  # bytes that decoders are handed at a time; a file below that is not copied for them
_SMALL = 16_000_000  # bytes; several images of that are decoded at once, of the others one
_LARGE_ONES = Lock()
_UNKNOWN = f"not an image of a known format ({', '.join(FORMATS)}), or cut off"


class ImageInfo(NamedTuple):
    """What an image is: its format and its size in pixels as a person sees it (EXIF rotation applied)."""

    format: str
    width: int
    height: int


class _Opened(NamedTuple):
    """An image that is not decoded yet: its size in the file, before a JPEG is scaled, and the memory that decoding takes."""

    image: ImageFile
    width: int
    height: int
    memory: int

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """While its pixels take memory; they are gone afterwards."""
        with _LARGE_ONES if self.memory > _SMALL else nullcontext():
            try:
                yield
            finally:
                self.image.close()

    @property
    def upright_size(self) -> tuple[int, int]:
        """As a person sees it. Pillow decodes a PNG for this, and turns a TIFF by itself."""
        sideways = self.image.format != "TIFF" and _orientation(self.image) in _SIDEWAYS
        return (self.height, self.width) if sideways else (self.width, self.height)


def inspect(data: bytes) -> ImageInfo:
    """Say what an image file is, and prove that it decodes. Raises `ImageError` with the reason when it does not."""
    return survey(data)[0]


def survey(data: bytes) -> tuple[ImageInfo, Image.Image]:
    """What an image file is, and the image, upright, of no less than 64 × 64 pixels where it has them. Raises `ImageError`."""
    opened = _open(data, "RGB", (64, 64))
    image = opened.image
    width, height = opened.upright_size
    decoded = _load(image, "RGB")
    return ImageInfo(format=image.format or "", width=width, height=height), _turned(decoded, _orientation(image))


def upright_size(data: bytes) -> tuple[int, int]:
    """Width and height in pixels as a person sees the image. Raises `ImageError`."""
    opened = _open(data, "L", (1, 1))
    with opened.in_turn():
        return opened.upright_size


def decode(data: bytes, *, width: int, height: int, mode: Mode, oversampling: float = 2.0) -> Image.Image:
    """Decode an image file to exactly `width` × `height` pixels, 8 bits a channel, upright.

    The aspect ratio is not kept: the model sees the whole image. Of an animation the first frame counts; transparency
    lies on white. Raises `ImageError`.
    """
    return decode_sized(data, width=width, height=height, mode=mode, oversampling=oversampling)[0]


def decode_sized(data: bytes, *, width: int, height: int, mode: Mode, oversampling: float) -> tuple[Image.Image, tuple[int, int]]:
    """What `decode` and `upright_size` say of an image file, which is opened once for both. Raises `ImageError`."""
    opened = _open(data, mode, (round(width * oversampling), round(height * oversampling)))
    with opened.in_turn():
        image = _load(opened.image, mode)
        orientation = _orientation(opened.image)
        size = (height, width) if orientation in _SIDEWAYS else (width, height)
        image = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=_REDUCING_GAP)
        return _turned(image, orientation), opened.upright_size


def _open(data: bytes, mode: Mode, least: tuple[int, int]) -> _Opened:
    """Read the header, and choose the scale of a JPEG: to no less than `least` pixels."""
    if not data:
        raise ImageError("the file is empty")
    if len(data) > MAX_BYTES:
        raise ImageError(f"the file has {len(data) / 2**20:.0f} MB; at most {MAX_BYTES // 2**20} MB are read")
    kept = kept_aside(data)
    _check_size(*(webp_size(data) or (1, 1)))
    name = format_of(data)
    if name is None:
        raise ImageError(_UNKNOWN)
    try:
        image = _read_header(name, data)
    except ImageError:
        raise
    except SyntaxError:  # Pillow's word for a file that is not of the format
        raise ImageError(_UNKNOWN) from None
    except Exception as error:
        raise ImageError(f"cannot be read: {_said(error)}") from error
    image.decodermaxblock = _BLOCK
    width, height = image.size
    _check_size(width, height)
    if name == "JPEG":
        image.draft(mode, (least[1], least[0]) if _orientation(image) in _SIDEWAYS else least)
    memory = kept + image.width * image.height * _bytes_a_pixel(image, mode)
    if memory > MAX_MEMORY:
        text = f"decoding takes {memory / 1e6:.0f} MB; at most {MAX_MEMORY // 1_000_000} MB are given to one image"
        raise ImageError(f"{text}; make it smaller, or a plain JPEG")
    return _Opened(image, width, height, memory)


def _read_header(name: str, data: bytes) -> ImageFile:
    """By the one format that it can be: `Image.open` would first import several, which is felt in a cold start.

    Of the pictures that phones put behind each other in a JPEG it is the first.
    """
    plugin: Any = import_module(f"PIL.{_PLUGINS[name]}ImagePlugin")
    if name == "PNG":
        plugin.MAX_TEXT_MEMORY = _TEXT
    image: ImageFile = getattr(plugin, f"{_PLUGINS[name]}ImageFile")(BoundedReader(data))
    return image


def _check_size(width: int, height: int) -> None:
    if width * height == 0:
        raise ImageError("has no pixels")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width * height / 1e6:.0f} megapixels; at most {MAX_PIXELS / 1e6:.0f} are decoded")
    if max(width, height) > MAX_SIDE:
        raise ImageError(f"{max(width, height)} pixels long; at most {MAX_SIDE} are decoded")


def _bytes_a_pixel(image: Image.Image, mode: Mode) -> int:
    """The most memory that decoding takes, as measured."""
    if image.format == "WEBP":  # two canvases, the frame, the image, what becomes of it
        return 17
    each = 1 if image.mode in ("1", "L", "P") else 4
    if image.mode.startswith("I"):
        each += 8
    if _is_transparent(image):
        each += (4 if image.mode == "RGBA" else 8) + (mode == "L")
    elif image.mode != mode:
        each += 1 if mode == "L" else 4
    if image.format == "TIFF" and image.info.get("compression") != "raw":
        each += 8  # a strip may be the whole picture
    return each


def _load(image: Image.Image, mode: Mode) -> Image.Image:
    """Decode to `mode`; the orientation is known for sure from now on."""
    try:
        image.load()
        return _to_8_bit(image, mode)
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"is broken: {_said(error)}") from error


def _said(error: Exception) -> str:
    return str(error)[:200] or type(error).__name__


def _is_transparent(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info


def _to_8_bit(image: Image.Image, mode: Mode) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        # 16-bit grey: Pillow's own conversion would clip at 255.
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    if _is_transparent(image):
        white = Image.new("RGB", image.size, "white")
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        white.paste(image, mask=image)
        image = white
    return image if image.mode == mode else image.convert(mode)


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    return image if orientation == 1 else image.transpose(_UPRIGHT[orientation])


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8."""
    try:
        found: Any = image.getexif().get(_ORIENTATION)
    except OSError as error:  # a PNG's is looked for behind the pixels
        raise ImageError(f"is broken: {_said(error)}") from error
    except Exception as error:
        raise ImageError(f"has broken EXIF data: {_said(error)}") from error
    return int(found) if found in range(1, 9) else 1
