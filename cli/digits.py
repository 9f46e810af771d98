"""scikit-learn's scanned digits as image files: the demo's data set, with its truth."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Digit:
    """One scanned digit: a grey PNG of 8 × 8 pixels."""

    name: str
    png: bytes
    label: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.png).hexdigest()


def load() -> list[Digit]:
    """The 1,797 digits of `sklearn.datasets.load_digits`; each content once (whatever stands twice is one image)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    found: dict[str, Digit] = {}
    for number, (pixels, label) in enumerate(zip(bunch.images, bunch.target, strict=True)):
        buffer = io.BytesIO()
        Image.fromarray((pixels * 255 / 16).round().astype("uint8")).save(buffer, "PNG")
        digit = Digit(name=f"digit-{number:04}.png", png=buffer.getvalue(), label=str(label))
        found.setdefault(digit.sha256, digit)
    return list(found.values())
