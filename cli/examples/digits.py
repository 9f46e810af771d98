"""scikit-learn's scanned digits, one an image: the data set of the model `digits`."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from cli.examples import Example
from labelloop.records import Region

Scan = np.ndarray[Any, np.dtype[np.float64]]  # [8, 8], ink from 0 to 16


def scans() -> list[tuple[Scan, str]]:
    """The 1,797 digits of `sklearn.datasets.load_digits` with their classes."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return [(pixels, str(label)) for pixels, label in zip(bunch.images, bunch.target, strict=True)]


def load() -> list[Example]:
    """Every scan as a grey PNG of 8 × 8 pixels; each content once (whatever stands twice is one image)."""
    found: dict[str, Example] = {}
    for number, (pixels, label) in enumerate(scans()):
        buffer = io.BytesIO()
        Image.fromarray((pixels * 255 / 16).round().astype("uint8")).save(buffer, "PNG")
        example = Example(f"digit-{number:04}.png", buffer.getvalue(), [Region(label=label)])
        found.setdefault(example.sha256, example)
    return list(found.values())
