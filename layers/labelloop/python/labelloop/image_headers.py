"""What an image file says of itself, read before Pillow believes it.

Pillow reads headers in Python, piece by piece, and keeps the pieces: millions of tiny ones take it minutes and gigabytes. Nor
does it bound the scans of a JPEG. Files that people make stay far below the limits here; what else is wrong Pillow says itself.
"""

from __future__ import annotations

import io
import re
import struct
from math import prod

from labelloop.errors import ImageError

_READS = 200_000  # of a file; of 64 MB in the usual pieces of 8 KB each takes a few
_SEGMENTS = 2_000  # of a JPEG ahead of its picture; a colour profile or a depth map takes some hundreds
_EXIF = 1_000_000  # bytes; one segment holds 64 KB
_SCANS = 100  # of a JPEG; encoders make about ten, and each one can cost as much as the whole picture
_TABLE = 1_000_000  # values in the tables of a TIFF; it has some hundreds of strips

_TO_CODE = re.compile(rb"\xff+")
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_BARE = {0x00, 0x01, *range(0xD0, 0xDA)}  # codes without a length
_EXIF_SEGMENT, _SCAN, _END = 0xE1, 0xDA, 0xD9
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
_TIFF = (b"II\x2a\0", b"II\0\x2a", b"MM\0\x2a", b"MM\x2a\0")
_BIG_TIFF = (b"II\x2b\0", b"MM\0\x2b")
_FORMATS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"RIFF": "WEBP",
    b"BM": "BMP",
    b"GIF8": "GIF",
    **dict.fromkeys(_TIFF, "TIFF"),
}


def format_of(data: bytes) -> str | None:
    """The one format that an image file can be of, by its first bytes; None where it is of none that is read."""
    return next((name for prefix, name in _FORMATS.items() if data.startswith(prefix)), None)


class BoundedReader(io.BytesIO):
    """A file that raises `ImageError` once it is read in too many pieces."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self._reads += 1
        if self._reads > _READS:
            raise ImageError("a file in more pieces than are read; save it anew")
        return super().read(size)


def kept_aside(data: bytes) -> int:
    """The bytes that decoding keeps besides pixels: a JPEG's coefficients. Raises `ImageError` on a file made to take long."""
    try:
        if data.startswith(b"\xff\xd8\xff"):
            return _check_jpeg(data)
        if data.startswith(_TIFF):
            _check_tiff(data)
    except (struct.error, IndexError, ValueError):  # it ends too soon, or has no components
        return 0
    if data.startswith(_BIG_TIFF):
        raise ImageError("a BigTIFF, which is not read; save it as a plain TIFF")
    return 0


def webp_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a WebP's canvas, for which the decoder takes memory as it opens; None of another file."""
    if len(data) < 30 or data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return None
    match data[12:16]:
        case b"VP8X":
            return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
        case b"VP8L":
            bits = int.from_bytes(data[21:25], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8 ":
            width, height = struct.unpack("<HH", data[26:30])
            return width & 0x3FFF, height & 0x3FFF
        case _:
            return None


def _check_jpeg(data: bytes) -> int:
    """Coefficients of several scans stay in memory until the last one, however small the picture is decoded."""
    code_of_frame, frame, place, exif = 0, b"", 2, 0
    for _ in range(_SEGMENTS):
        found = _TO_CODE.search(data, place)
        if found is None:
            return 0
        code, place = data[found.end()], found.end() + 1
        if code in _BARE:
            continue
        length = int.from_bytes(data[place : place + 2])
        if code == _SCAN:
            if code_of_frame not in _PROGRESSIVE and data[place + 2] >= frame[5]:
                return 0  # all is in the first scan, and libjpeg reads no other
            _check_scans(data, place + length)
            return _coefficients(frame)
        if code in _FRAMES:
            code_of_frame, frame = code, data[place + 2 : place + length]
        elif code == _EXIF_SEGMENT and data.startswith(b"Exif\0\0", place + 2):
            exif += length
            if exif > _EXIF:
                raise ImageError("more EXIF data than is read; save it anew")
        place += max(length, 2)
    raise ImageError(f"a JPEG of more than {_SEGMENTS:,} segments; save it anew")


def _check_scans(data: bytes, place: int) -> None:
    if data.count(bytes([0xFF, _SCAN]), place) < _SCANS:  # quick, and enough for nearly all
        return
    for _ in range(_SCANS):
        found = _END_OF_SCAN.search(data, place)
        if found is None or data[found.end() - 1] == _END:  # phones put more pictures behind the first
            return
        place = found.end() + int.from_bytes(data[found.end() : found.end() + 2])
    raise ImageError(f"a JPEG of more than {_SCANS} scans; save it anew")


def _coefficients(frame: bytes) -> int:
    height, width, components = struct.unpack(">xHHB", frame[:6])
    factors = [divmod(frame[7 + 3 * number], 16) for number in range(components)]
    largest = max(across for across, _ in factors) * max(down for _, down in factors)
    return int(2 * height * width * sum(map(prod, factors)) // max(largest, 1))


def _check_tiff(data: bytes) -> None:
    """Pillow makes a number of its own of each value; not of text and opaque bytes."""
    order = "<" if data[:2] == b"II" else ">"
    (place,) = struct.unpack_from(f"{order}I", data, 4)
    (entries,) = struct.unpack_from(f"{order}H", data, place)
    kinds = (struct.unpack_from(f"{order}HI", data, place + 4 + 12 * number) for number in range(entries))
    if sum(count for kind, count in kinds if kind not in (1, 2, 7)) > _TABLE:
        raise ImageError(f"a TIFF of more than {_TABLE:,} values; save it anew")
