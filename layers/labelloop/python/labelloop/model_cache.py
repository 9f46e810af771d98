"""Loaded models, kept over invocations of a function. This module itself loads no model runtime."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from labelloop.inference import Model

_CAPACITY = 200 * 2**20  # bytes of model files


class ModelCache:
    """The most recently used models, by SHA-256, up to a sum of their files' sizes; kept over invocations of a function.

    The one used last stays, whatever its size.
    """

    def __init__(self, capacity: int = _CAPACITY) -> None:
        self._capacity = capacity
        self._models: OrderedDict[str, Model] = OrderedDict()
        self._lock = Lock()

    def get(self, sha256: str) -> Model | None:
        with self._lock:
            if sha256 in self._models:
                self._models.move_to_end(sha256)
            return self._models.get(sha256)

    def put(self, sha256: str, model: Model) -> None:
        with self._lock:
            self._models[sha256] = model
            self._models.move_to_end(sha256)
            while len(self._models) > 1 and sum(kept.file_size for kept in self._models.values()) > self._capacity:
                self._models.popitem(last=False)
