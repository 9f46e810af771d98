"""Scanned digits on photographs and textures: the data set of the model `digit_detector`.

The digits are scikit-learn's, each scan in one image only, so that no digit of the holdout was ever learnt. The backgrounds are
crops of images that scikit-image's wheel contains. The boxes are not annotated but follow from where the ink was laid.
"""

from __future__ import annotations

import importlib.resources
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from cli.examples import Example
from cli.examples.digits import Scan, scans
from labelloop.records import Region

SIZE = 128  # pixels, width and height of the images
_BACKGROUNDS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "moon.png",
    "rocket.jpg",
)
_DIGITS = (2, 4)  # fewest and most in an image
_SCAN_SIZES = (26, 46)  # pixels, of a scan with its margin
_CONTRASTS = (80, 150)  # grey levels between the ink and the mean of what lies under it
_TINT = 30  # grey levels by which a colour of the ink may leave grey
_FAINTEST = 0.25  # share of ink that counts as a stroke; what is fainter is left away
_GAP = 2  # pixels between two scans
_TRIES = 100  # places for a digit, before it is made smaller

_Pixels = np.ndarray[Any, np.dtype[np.uint8]]  # [height, width, 3]
_Ink = np.ndarray[Any, np.dtype[np.float64]]  # [height, width], how much of the ground it hides
_Square = tuple[int, int, int]  # left, top and size in pixels


@dataclass(frozen=True)
class Scene:
    """An image before and after the digits were laid on it: uint8 `[SIZE, SIZE, 3]`."""

    ground: _Pixels
    image: _Pixels
    truth: list[Region]


def load() -> list[Example]:
    """Some six hundred PNGs of 128 × 128 pixels with two to four digits each."""
    return [Example(f"scene-{number:04}.png", _png(scene.image), scene.truth) for number, scene in enumerate(scenes())]


def scenes() -> Iterator[Scene]:
    """What the data set's images are made of, one after another, until every scan has been used."""
    random = np.random.default_rng(0)
    grounds = [_background(name) for name in _BACKGROUNDS]
    digits = scans()
    order = random.permutation(len(digits))
    used = 0
    while used < len(order):
        chosen = [digits[number] for number in order[used : used + random.integers(_DIGITS[0], _DIGITS[1] + 1)]]
        used += len(chosen)
        yield _scene(_crop(grounds[random.integers(len(grounds))], random), chosen, random)


def _scene(ground: _Pixels, digits: list[tuple[Scan, str]], random: np.random.Generator) -> Scene:
    image, taken, truth = ground, list[_Square](), list[Region]()
    for scan, label in digits:
        square = _free_square(taken, random)
        taken.append(square)
        left, top, size = square
        ink = np.zeros((SIZE, SIZE))
        ink[top : top + size, left : left + size] = _strokes(scan, size)
        image = _laid(image, ink, random)
        truth.append(Region(label=label, box=_box(ink)))
    return Scene(ground, image, truth)


def _free_square(taken: list[_Square], random: np.random.Generator) -> _Square:
    """Where a digit touches none of the others."""
    size = int(random.integers(_SCAN_SIZES[0], _SCAN_SIZES[1] + 1))
    while True:
        for _ in range(_TRIES):
            left, top = (int(at) for at in random.integers(0, SIZE - size + 1, 2))
            if all(_apart((left, top, size), other) for other in taken):
                return left, top, size
        size -= 1


def _apart(one: _Square, other: _Square) -> bool:
    return any(one[axis] + one[2] + _GAP <= other[axis] or other[axis] + other[2] + _GAP <= one[axis] for axis in (0, 1))


def _strokes(scan: Scan, size: int) -> _Ink:
    """The scan in another size, its faintest parts left away."""
    larger = Image.fromarray((scan / 16).astype("float32")).resize((size, size), Image.Resampling.BICUBIC)
    ink = np.asarray(larger, dtype=np.float64).clip(0, 1)
    return np.where(ink < _FAINTEST, 0, ink)


def _laid(image: _Pixels, ink: _Ink, random: np.random.Generator) -> _Pixels:
    """The image with ink that is lighter or darker than what lies under it."""
    under = float(image[ink > 0].mean())
    contrast = random.uniform(*_CONTRASTS)
    lighter = under + contrast <= 255 and (under - contrast < 0 or random.random() < 0.5)
    colour = under + (contrast if lighter else -contrast) + random.uniform(-_TINT, _TINT, 3)
    laid: _Pixels = (image + (colour.clip(0, 255) - image) * ink[..., np.newaxis]).round().astype(np.uint8)
    return laid


def _box(ink: _Ink) -> tuple[float, float, float, float]:
    """The smallest box around the ink, as shares of the image."""
    rows, columns = (np.flatnonzero(ink.any(axis=axis)).tolist() for axis in (1, 0))
    return columns[0] / SIZE, rows[0] / SIZE, (columns[-1] + 1) / SIZE, (rows[-1] + 1) / SIZE


def _background(name: str) -> _Pixels:
    """An image of scikit-image's wheel, halved so that a crop shows more of it than a detail."""
    with importlib.resources.files("skimage").joinpath("data", name).open("rb") as file:
        return np.asarray(Image.open(file).convert("RGB").reduce(2))


def _crop(ground: _Pixels, random: np.random.Generator) -> _Pixels:
    top, left = (int(random.integers(0, side - SIZE + 1)) for side in ground.shape[:2])
    return ground[top : top + SIZE, left : left + SIZE]


def _png(image: _Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
