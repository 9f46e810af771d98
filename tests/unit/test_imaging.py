"""Decoding: every kind of image comes out right, and every broken one is an `ImageError` and nothing else."""

from __future__ import annotations

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, TiffImagePlugin, TiffTags

from labelloop import imaging
from labelloop.errors import ImageError
from labelloop.image_headers import kept_aside
from tests.examples import encoded, png_chunk

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def quarters(size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Red, green, blue and white quarters, so that every turn and flip shows."""
    image = Image.new("RGB", size, RED)
    draw = ImageDraw.Draw(image)
    half_x, half_y = size[0] // 2, size[1] // 2
    draw.rectangle((half_x, 0, size[0], half_y - 1), GREEN)
    draw.rectangle((0, half_y, half_x - 1, size[1]), BLUE)
    draw.rectangle((half_x, half_y, size[0], size[1]), WHITE)
    return image


def corners(data: bytes, mode: str = "RGB") -> list[Any]:
    """The colours of the four quarters after decoding to 16 × 16: top left, top right, bottom left, bottom right."""
    image = imaging.decode(data, width=16, height=16, mode="L" if mode == "L" else "RGB")
    assert (image.size, image.mode) == ((16, 16), mode)
    return [image.getpixel(place) for place in ((3, 3), (12, 3), (3, 12), (12, 12))]


def near(found: list[Any], wanted: list[Any], tolerance: int = 8) -> bool:
    return bool((np.abs(np.array(found, dtype=int) - np.array(wanted, dtype=int)) <= tolerance).all())


FORMATS: dict[str, bytes] = {
    "PNG": encoded(quarters(), "PNG"),
    "interlaced or not, palette PNG": encoded(quarters().quantize(8), "PNG"),
    "JPEG": encoded(quarters(), "JPEG", quality=95, subsampling=0),
    "progressive JPEG": encoded(quarters(), "JPEG", quality=95, subsampling=0, progressive=True),
    "lossless WebP": encoded(quarters(), "WEBP", lossless=True),
    "WebP": encoded(quarters(), "WEBP", quality=95),
    "GIF": encoded(quarters(), "GIF"),
    "BMP": encoded(quarters(), "BMP"),
    "TIFF": encoded(quarters(), "TIFF"),
    "deflated TIFF": encoded(quarters(), "TIFF", compression="tiff_adobe_deflate"),
    "RGBA PNG": encoded(quarters().convert("RGBA"), "PNG"),
}


@pytest.mark.parametrize("data", FORMATS.values(), ids=FORMATS.keys())
def test_every_format_shows_the_same_picture(data: bytes) -> None:
    assert near(corners(data), [RED, GREEN, BLUE, WHITE], 24)
    assert near(corners(data, "L"), [76, 150, 29, 255], 24)
    info = imaging.inspect(data)
    assert (info.width, info.height) == (64, 48)
    assert info.format in imaging.FORMATS


def test_cmyk_jpeg_is_converted() -> None:
    data = encoded(quarters().convert("CMYK"), "JPEG", quality=95, subsampling=0)
    assert near(corners(data), [RED, GREEN, BLUE, WHITE], 24)
    assert near(corners(data, "L"), [76, 150, 29, 255], 24)


def test_sixteen_bit_grey_keeps_its_range() -> None:
    grey = np.zeros((32, 32), dtype=np.uint16)
    grey[:16, :16], grey[:16, 16:], grey[16:, :16], grey[16:, 16:] = 0, 0x4000, 0x8000, 0xFFFF
    data = encoded(Image.fromarray(grey), "PNG")
    assert near(corners(data, "L"), [0, 64, 128, 255], 1)
    assert near(corners(data), [(v, v, v) for v in (0, 64, 128, 255)], 1)
    assert near(corners(encoded(Image.fromarray(grey), "TIFF"), "L"), [0, 64, 128, 255], 1)


def test_sixteen_bit_grey_with_a_transparent_grey_lies_on_white() -> None:
    grey = np.full((32, 32), 0x8000, dtype=np.uint16)
    grey[:16] = 0
    data = with_chunk(encoded(Image.fromarray(grey), "PNG"), b"tRNS", b"\x00\x00")
    assert near(corners(data, "L"), [255, 255, 128, 128], 1)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_mode_of_png_decodes(mode: str) -> None:
    black_and_white = Image.new("RGB", (32, 32), BLACK)
    ImageDraw.Draw(black_and_white).rectangle((16, 0, 32, 32), WHITE)
    data = encoded(black_and_white.convert(mode), "PNG")
    assert near(corners(data, "L"), [0, 255, 0, 255])


def test_transparency_lies_on_white() -> None:
    image = quarters().convert("RGBA")
    ImageDraw.Draw(image).rectangle((0, 0, 31, 23), (0, 0, 0, 0))
    ImageDraw.Draw(image).rectangle((32, 0, 64, 23), (0, 0, 0, 128))
    for data in (encoded(image, "PNG"), encoded(image, "WEBP", lossless=True)):
        assert near(corners(data), [WHITE, (127, 127, 127), BLUE, WHITE])
        assert near(corners(data, "L"), [255, 127, 29, 255])


def test_a_transparent_palette_entry_lies_on_white() -> None:
    image = quarters().quantize(4)
    index = image.getpixel((0, 0))
    for data in (encoded(image, "PNG", transparency=index), encoded(image, "GIF", transparency=index)):
        assert near(corners(data), [WHITE, GREEN, BLUE, WHITE])


def test_a_transparent_colour_lies_on_white() -> None:
    assert near(corners(encoded(quarters(), "PNG", transparency=RED)), [WHITE, GREEN, BLUE, WHITE])


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_counts(image_format: str) -> None:
    options = {"lossless": True} if image_format == "WEBP" else {}
    second = Image.new("RGB", (64, 48), BLACK)
    data = encoded(quarters(), image_format, save_all=True, append_images=[second], **options)
    assert near(corners(data), [RED, GREEN, BLUE, WHITE])


# How a camera stores the upright picture for each EXIF orientation.
STORED: dict[int, Image.Transpose | None] = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_rotation_is_applied(orientation: int, image_format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = STORED[orientation]
    stored = quarters().transpose(turn) if turn is not None else quarters()
    data = encoded(stored, image_format, exif=exif, quality=95)
    assert near(corners(data), [RED, GREEN, BLUE, WHITE], 24)
    info = imaging.inspect(data)
    assert (info.width, info.height) == imaging.upright_size(data) == (64, 48)
    assert imaging.survey(data)[1].size == (64, 48)


def test_one_pixel_is_an_image() -> None:
    for image_format in ("PNG", "JPEG", "GIF", "WEBP"):
        assert near(corners(encoded(Image.new("RGB", (1, 1), BLUE), image_format)), [BLUE] * 4, 24)


def test_a_very_long_image_decodes() -> None:
    assert near(corners(encoded(Image.new("L", (4_000, 1), 200), "JPEG"), "L"), [200] * 4)


def photograph(size: tuple[int, int]) -> Image.Image:
    """Something with structure at every scale, as photographs have: smoothed noise, the same each time."""
    random = np.random.default_rng(7)
    image = Image.new("RGB", size)
    for cells in (4, 16, 64, 256):
        noise = Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        image = Image.blend(image, noise.resize(size, Image.Resampling.BICUBIC), 0.4)
    return image


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("progressive", [False, True])
def test_scaled_decoding_of_a_large_jpeg_agrees_with_full_decoding(mode: Any, progressive: bool) -> None:
    data = encoded(photograph((2048, 1536)), "JPEG", quality=90, progressive=progressive)
    scaled = imaging.decode(data, width=96, height=64, mode=mode, oversampling=2.0)
    with Image.open(io.BytesIO(data)) as image:
        full = image.convert(mode).resize((96, 64), Image.Resampling.BILINEAR)
    difference = np.abs(np.asarray(scaled, dtype=int) - np.asarray(full, dtype=int))
    assert difference.mean() < 2
    assert difference.max() < 24
    assert np.asarray(full).std() > 8, "the picture has something to get wrong"


def test_a_jpeg_is_decoded_at_no_less_than_what_was_asked_for() -> None:
    """640 pixels are less than eight times 96, so nothing may be scaled away."""
    data = encoded(photograph((640, 480)), "JPEG", quality=90)
    found = imaging.decode(data, width=96, height=64, mode="RGB", oversampling=8)
    with Image.open(io.BytesIO(data)) as image:
        full = image.convert("RGB").resize((96, 64), Image.Resampling.BILINEAR, reducing_gap=1.1)
    assert found.tobytes() == full.tobytes()


def test_decoding_the_same_file_twice_gives_the_same_pixels() -> None:
    data = encoded(photograph((640, 480)), "JPEG")
    first, second = (imaging.decode(data, width=32, height=32, mode="RGB").tobytes() for _ in range(2))
    assert first == second


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_size_that_comes_with_the_pixels_is_the_upright_one(image_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(quarters((640, 480)), image_format, exif=exif)
    image, size = imaging.decode_sized(data, width=32, height=16, mode="RGB", oversampling=2.0)
    assert size == imaging.upright_size(data) == ((480, 640) if orientation == 6 else (640, 480))
    assert image.size == (32, 16)


def test_a_photograph_with_a_second_picture_inside_is_a_jpeg() -> None:
    data = encoded(quarters((512, 384)), "MPO", save_all=True, append_images=[Image.new("RGB", (64, 64))], quality=95)
    assert imaging.inspect(data) == imaging.ImageInfo("JPEG", 512, 384)
    assert near(corners(data), [RED, GREEN, BLUE, WHITE], 24)


# What must be refused. Pillow also warns of odd files, which is of no interest here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")


def with_chunk(png: bytes, name: bytes, content: bytes) -> bytes:
    """A PNG file with one more chunk behind its header."""
    return png[:33] + png_chunk(name, content) + png[33:]


def png_header(width: int, height: int) -> bytes:
    """A PNG file that claims a size and has next to no data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(b"\0")) + png_chunk(b"IEND", b"")


def claiming(data: bytes, width: int, height: int) -> bytes:
    """A JPEG file whose header claims another size."""
    for marker in (b"\xff\xc0", b"\xff\xc2"):
        place = data.find(marker)
        if place >= 0:
            return data[: place + 5] + struct.pack(">HH", height, width) + data[place + 9 :]
    raise AssertionError("no start of frame")


def one_by_one(jpeg: bytes) -> bytes:
    """A baseline JPEG whose first scan says that it holds one of the three colour components."""
    place = jpeg.index(b"\xff\xda") + 4
    return jpeg[:place] + b"\1" + jpeg[place + 1 :]


def webp_header(kind: bytes, width: int, height: int) -> bytes:
    """A WebP file (extended, lossless or lossy) that claims a size and has no data."""
    size = {
        b"VP8X": bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little"),
        b"VP8L": b"\x2f" + (width - 1 | height - 1 << 14).to_bytes(4, "little"),
        b"VP8 ": b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", width, height),
    }
    return b"RIFF" + struct.pack("<I", 30) + b"WEBP" + kind + struct.pack("<I", 10) + size[kind] + bytes(8)


def behind_start(jpeg: bytes, more: bytes) -> bytes:
    return jpeg[:2] + more + jpeg[2:]


def segment(code: int, content: bytes) -> bytes:
    return bytes([0xFF, code]) + struct.pack(">H", 2 + len(content)) + content


SMALL_JPEG = encoded(quarters(), "JPEG")
SMALL_444 = encoded(quarters(), "JPEG", subsampling=0)
PROGRESSIVE = encoded(quarters(), "JPEG", progressive=True, subsampling=0)
HUGE = claiming(PROGRESSIVE, 8_000, 6_000)
COMPONENTS = PROGRESSIVE.index(b"\xff\xc2") + 9  # where it says how many it has
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "text": (b"these are no pixels", "not an image"),
    "HTML": (b"<html><body>404</body></html>", "not an image"),
    "zeros": (bytes(10_000), "not an image"),
    "an SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not an image"),
    "a format that is not read": (encoded(quarters(), "PPM"), "not an image"),
    "zero width": (png_header(0, 5), "no pixels|cannot be read|not an image"),
    "ten gigapixels": (png_header(100_000, 100_000), "megapixels"),
    "a little too much": (png_header(10_000, 8_001), "80 megapixels; at most 80"),
    "no data for its header": (png_header(4_000, 3_000), "broken"),
    "more memory than an image is given": (png_header(8_000, 9_000), "decoding takes [0-9]+ MB; at most 208 MB"),
    "a line": (png_header(70_000, 1), "70000 pixels long; at most 65535"),
    "a JPEG that claims too much": (claiming(SMALL_JPEG, 10_000, 10_000), "megapixels"),
    "a progressive JPEG that claims too much": (HUGE, "decoding takes [0-9]+ MB"),
    "the same behind a marker without a length": (behind_start(HUGE, b"\xff\xd0"), "decoding takes [0-9]+ MB"),
    "the same with a small JPEG in a segment": (behind_start(HUGE, segment(0xE5, SMALL_JPEG)), "decoding takes [0-9]+ MB"),
    "a progressive JPEG of no colours": (PROGRESSIVE[:COMPONENTS] + b"\0" + PROGRESSIVE[COMPONENTS + 1 :], "not an image"),
    "a JPEG whose colours come one after the other": (one_by_one(claiming(SMALL_444, 8_000, 6_000)), "decoding takes [0-9]+ MB"),
    "an extended WebP that claims too much": (webp_header(b"VP8X", 16_000, 15_000), "240 megapixels"),
    "a lossless WebP that claims too much": (webp_header(b"VP8L", 16_000, 15_000), "240 megapixels"),
    "a lossy WebP that claims too much": (webp_header(b"VP8 ", 16_000, 15_000), "240 megapixels"),
    "the first bytes of a WebP": (webp_header(b"VP8 ", 64, 48)[:20], "cannot be read|not an image"),
    "a JPEG cut off": (FORMATS["JPEG"][:-200], "broken|cannot be read"),
    "a PNG cut off": (FORMATS["PNG"][:80], "broken|cannot be read"),
    "a PNG cut off in its pixels": (encoded(quarters((400, 400)).effect_spread(50), "PNG")[:-1000], "^is broken"),
    "a GIF cut off": (FORMATS["GIF"][:-40], "broken"),
    "a WebP cut off": (FORMATS["lossless WebP"][:-40], "broken|cannot be read|not an image"),
    "only a header": (FORMATS["JPEG"][:20], "not an image|cannot be read"),
    "a PNG with a wrong checksum": (FORMATS["PNG"][:-20] + b"12345678" + FORMATS["PNG"][-12:], "broken"),
}


@pytest.mark.parametrize(("data", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_what_cannot_be_decoded_says_why(data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        imaging.inspect(data)
    with pytest.raises(ImageError, match=message):
        imaging.decode(data, width=16, height=16, mode="RGB")


def test_a_baseline_jpeg_of_the_same_size_is_below_its_cap() -> None:
    """So the test above sees the cap of progressive files and not a broken one."""
    assert imaging.inspect(claiming(SMALL_JPEG, 8_000, 6_000)).width == 8_000


def test_too_many_bytes_are_refused_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imaging, "MAX_BYTES", 100)
    with pytest.raises(ImageError, match="at most"):
        imaging.inspect(FORMATS["BMP"])


def test_a_compressed_text_bomb_in_a_png_is_refused() -> None:
    bomb = b"Comment\0\0" + zlib.compress(bytes(80_000_000), 9)
    with pytest.raises(ImageError):
        imaging.inspect(with_chunk(FORMATS["PNG"], b"zTXt", bomb))


def of_many_scans(scans: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    end = PROGRESSIVE.index(b"\xff\xd9")
    start = PROGRESSIVE.rindex(b"\xff\xda")
    return PROGRESSIVE[:end] + PROGRESSIVE[start:end] * scans + PROGRESSIVE[end:]


def with_comments(gif: bytes, blocks: int) -> bytes:
    place = gif.index(b",", 13)
    return gif[:place] + b"!\xfe" + b"\1x" * blocks + b"\0" + gif[place:]


def tiff(*entries: tuple[int, int, int, int], order: str = "<") -> bytes:
    """A TIFF that is nothing but its table of (tag, type, count, value)."""
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(entries))
    return head + b"".join(struct.pack(f"{order}HHII", *entry) for entry in entries) + bytes(4)


def run_length_bmp(width: int, height: int) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, 0, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 54 + 1024) + head + bytes(1024) + (b"\1\1" * width + b"\0\0") * height


# Each is small for what Pillow alone would make of it: minutes, or gigabytes.
TIRESOME: dict[str, tuple[bytes, str]] = {
    "a PNG of very many chunks": (FORMATS["PNG"][:33] + png_chunk(b"teSt", b"") * 120_000 + FORMATS["PNG"][33:], "pieces"),
    "a PNG of very many chunks at its end": (
        FORMATS["PNG"][:-12] + png_chunk(b"teSt", b"") * 120_000 + FORMATS["PNG"][-12:],
        "pieces",
    ),
    "a GIF with a comment in very many blocks": (with_comments(FORMATS["GIF"], 120_000), "pieces"),
    "a BMP of single runs": (run_length_bmp(1_000, 500), "pieces"),
    "a JPEG of very many segments": (behind_start(SMALL_JPEG, segment(0xE5, b"") * 3_000), "more than 2,000 segments"),
    "a JPEG of fill bytes": (behind_start(SMALL_JPEG, b"\xff" * 300_000), "pieces"),
    "a JPEG with EXIF data without end": (behind_start(SMALL_JPEG, segment(0xE1, b"Exif\0\0" + bytes(65_000)) * 20), "EXIF"),
    "a JPEG of very many scans": (of_many_scans(200), "more than 100 scans"),
    "a TIFF of very many strips": (tiff((256, 4, 1, 8), (257, 4, 1, 8), (273, 4, 2_000_000, 8)), "values"),
    "a TIFF of very many strips, the other way round": (tiff((256, 4, 1, 8), (273, 4, 2_000_000, 8), order=">"), "values"),
    "a BigTIFF": (b"II\x2b\0" + bytes(100), "BigTIFF"),
}


@pytest.mark.parametrize(("data", "message"), TIRESOME.values(), ids=TIRESOME.keys())
def test_what_would_take_long_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        imaging.inspect(data)
    with pytest.raises(ImageError, match=message):
        imaging.decode(data, width=16, height=16, mode="RGB")


@pytest.mark.parametrize(("mode", "subsampling", "each"), [("L", 0, 2), ("RGB", 0, 6), ("RGB", 1, 4), ("RGB", 2, 3)])
def test_a_progressive_jpeg_keeps_its_coefficients(mode: str, subsampling: int, each: int) -> None:
    """Two bytes for each, of colours as often as they are sampled; a baseline one decodes row by row."""
    image = quarters().convert(mode)
    assert kept_aside(encoded(image, "JPEG", progressive=True, subsampling=subsampling)) == each * 64 * 48
    assert kept_aside(encoded(image, "JPEG", subsampling=subsampling)) == 0


def test_a_picture_that_is_whole_after_its_first_scan_has_no_others_read() -> None:
    """Each of them would cost what the picture costs; so they need no counting."""
    scan = SMALL_JPEG[SMALL_JPEG.index(b"\xff\xda") : -2]
    with pytest.raises(ImageError, match="broken"):
        imaging.decode(SMALL_JPEG[:-2] + scan * 200 + b"\xff\xd9", width=16, height=16, mode="RGB")


def test_scans_hidden_behind_a_false_end_are_counted() -> None:
    """An end marker inside a comment between two scans ends nothing."""
    data = of_many_scans(200)
    place = data.rindex(b"\xff\xda")
    with pytest.raises(ImageError, match="scans"):
        imaging.inspect(data[:place].replace(b"\xff\xda", segment(0xFE, b"\xff\xd9") + b"\xff\xda") + data[place:])


def test_files_below_those_limits_are_read() -> None:
    rows, depth = FORMATS["PNG"], segment(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + bytes(60_000))
    photos = [Image.new("RGB", (32, 32), (value, value, value)) for value in range(0, 250, 2)]
    layers = TiffImagePlugin.ImageFileDirectory_v2()
    layers[700], layers[37724] = bytes(1_200_000), bytes(1_200_000)
    layers.tagtype.update({700: TiffTags.BYTE, 37724: TiffTags.UNDEFINED})
    for data in (
        rows[:33] + png_chunk(b"teSt", b"") * 5_000 + rows[33:],
        with_comments(FORMATS["GIF"], 5_000),
        run_length_bmp(100, 100),
        behind_start(SMALL_JPEG, segment(0xE5, bytes(10)) * 500),
        of_many_scans(20),
        behind_start(SMALL_JPEG, segment(0xE5, b"\xff\xda" * 500)),
        behind_start(SMALL_JPEG, depth * 20),
        encoded(quarters(), "TIFF", tiffinfo=layers),
        encoded(photos[0], "MPO", save_all=True, append_images=photos[1:]),
        encoded(photos[0], "MPO", save_all=True, append_images=photos[1:], progressive=True),
    ):
        assert imaging.inspect(data).width > 0


def test_a_rotation_noted_behind_the_pixels_counts() -> None:
    """PNG allows it there."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = FORMATS["PNG"][:-12] + png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + FORMATS["PNG"][-12:]
    info = imaging.inspect(data)
    assert (info.width, info.height) == imaging.upright_size(data) == (48, 64)


@pytest.mark.parametrize("mode", ["1", "L", "F", "I", "I;16", "YCbCr", "CMYK", "RGBA", "LA", "P"])
def test_every_mode_that_tiff_holds_is_made_what_the_model_takes(mode: str) -> None:
    image = quarters() if mode in ("1", "P", "YCbCr", "CMYK", "RGBA") else quarters().convert("L")
    data = encoded(image.convert(mode), "TIFF")
    for wanted in ("L", "RGB"):
        assert len(corners(data, wanted)) == 4


def test_large_images_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Side by side they would take the function's memory."""
    load, inside, most = imaging._load, [0], [0]

    def watched(*arguments: Any) -> Image.Image:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        try:
            return load(*arguments)
        finally:
            inside[0] -= 1

    monkeypatch.setattr(imaging, "_load", watched)
    large = encoded(Image.new("RGB", (2_500, 2_000)), "PNG", compress_level=1)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: imaging.decode(large, width=8, height=8, mode="L"), range(8)))
    assert most == [1]


EXIF = Image.Exif()
EXIF[0x0112], EXIF[0x010F] = 6, "maker"
EXIF.get_ifd(0x8769)[0x9003] = "2026:01:01 00:00:00"
VICTIMS = [
    *FORMATS.values(),
    encoded(quarters(), "JPEG", exif=EXIF),
    encoded(quarters(), "PNG", exif=EXIF),
    encoded(quarters(), "WEBP", exif=EXIF),
    encoded(quarters(), "TIFF", exif=EXIF),
    encoded(quarters().convert("CMYK"), "JPEG"),
    encoded(quarters().quantize(4), "GIF", save_all=True, append_images=[Image.new("P", (64, 48))]),
    encoded(quarters(), "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))]),
    encoded(quarters().convert("1"), "TIFF", compression="group4"),
]


def survives(data: bytes) -> None:
    """Neither function raises anything but `ImageError`."""
    modes: tuple[Literal["L", "RGB"], ...] = ("L", "RGB")
    for mode in modes:
        with suppress(ImageError):
            image = imaging.decode(data, width=8, height=8, mode=mode)
            assert (image.size, image.mode) == ((8, 8), mode)
    with suppress(ImageError):
        info = imaging.inspect(data)
        assert info.width * info.height > 0


@settings(max_examples=300)
@given(st.sampled_from(VICTIMS), st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=12))
def test_changed_bytes_are_an_image_or_an_image_error(data: bytes, changes: list[tuple[float, int]]) -> None:
    damaged = bytearray(data)
    for place, value in changes:
        damaged[int(place * len(damaged))] = value
    survives(bytes(damaged))


@settings(max_examples=300)
@given(st.sampled_from(VICTIMS), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_headers_are_an_image_or_an_image_error(data: bytes, changes: list[tuple[int, int]]) -> None:
    damaged = bytearray(data)
    for place, value in changes:
        damaged[place % len(damaged)] = value
    survives(bytes(damaged))


@settings(max_examples=150)
@given(st.sampled_from(VICTIMS), st.floats(0, 1), st.binary(max_size=20))
def test_a_file_that_stops_early_is_an_image_or_an_image_error(data: bytes, share: float, tail: bytes) -> None:
    survives(data[: int(share * len(data))] + tail)


@settings(max_examples=100)
@given(
    st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\x10\0\0\0WEBP", b"BM", b"II*\0"]), st.binary()
)
def test_noise_is_an_image_or_an_image_error(start: bytes, noise: bytes) -> None:
    survives(start + noise)
