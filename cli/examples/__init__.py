"""Data sets that need no download and whose truth is known: what `labelloop demo` uploads and its annotator knows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from labelloop.records import Region

ExampleModel = Literal["digits", "digit_detector"]  # the models of model_configs that have an example data set


@dataclass(frozen=True)
class Example:
    """An image file under its name, with all that a careful annotator says of it."""

    name: str
    image: bytes
    truth: list[Region]

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.image).hexdigest()


def load(model: ExampleModel) -> list[Example]:
    """The data set of that model: the same bytes in the same order every time, and no image twice."""
    # scikit-learn is slow to import, and the command line asks this module for the models' names.
    from cli.examples import digit_detector, digits

    loaders: dict[ExampleModel, Callable[[], list[Example]]] = {"digits": digits.load, "digit_detector": digit_detector.load}
    return loaders[model]()
