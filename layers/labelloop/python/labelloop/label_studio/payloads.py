"""What Label Studio sends and what it expects back, as typed structures. Unknown fields are ignored."""

from __future__ import annotations

from typing import Any

import msgspec

from labelloop.errors import ImageError


class Annotation(msgspec.Struct, frozen=True):
    """An annotation; `result` is its list of regions, an empty one where the annotator found nothing."""

    id: int
    unique_id: str = ""
    result: list[dict[str, Any]] | None = None
    was_cancelled: bool = False  # skipped by the annotator
    updated_at: str = ""


class AnnotatedTask(msgspec.Struct, frozen=True):
    """A task with its annotations, as the Data Manager lists them."""

    id: int
    data: dict[str, Any]
    meta: dict[str, Any] | None = None
    annotations: list[Annotation] = []

    @property
    def latest(self) -> Annotation | None:
        """The annotation that counts: the one changed last, skips aside. An empty one says that there is nothing in the image."""
        return max((a for a in self.annotations if not a.was_cancelled), key=lambda a: a.updated_at, default=None)

    def image(self, data_key: str) -> str:
        """The image's address. Raises `ImageError` when the task has none."""
        return image_address(self.data, data_key)

    @property
    def content_hash(self) -> str:
        """SHA-256 of the image, as `ingest` noted it. Raises `ImageError` for tasks that `ingest` did not make."""
        value = (self.meta or {}).get("sha256")
        if not isinstance(value, str) or len(value) != 64:
            raise ImageError("the task was not made by labelloop (no sha256 in its meta data)")
        return value


class PredictTask(msgspec.Struct, frozen=True):
    """A task of a predict request."""

    id: Any = None
    data: Any = None


class PredictRequest(msgspec.Struct, frozen=True):
    """Body of `POST predict`. `params` may be null, or hold `context` (interactive mode) and the server's login."""

    tasks: list[PredictTask] | None = None
    project: Any = None
    label_config: Any = None
    params: Any = None


class SetupRequest(msgspec.Struct, frozen=True):
    """Body of `POST setup`; `project` is `{id}.{creation time}`."""

    project: Any = None
    schema: Any = None
    hostname: Any = None
    extra_params: Any = None


class Prediction(msgspec.Struct, frozen=True):
    """One prediction of a predict answer. `score` lies between 0 and 1; uncertainty sampling hands out the lowest first."""

    result: list[dict[str, Any]]
    score: float
    model_version: str


class NotPredicted(msgspec.Struct, frozen=True, omit_defaults=True):
    """No prediction for a task: Label Studio skips an answer without `result`, logs it, and stores the others."""

    error: str = ""


class PredictResponse(msgspec.Struct, frozen=True):
    """Answer of `POST predict`: one entry for each task, in their order; `model_version` is the one that answered."""

    results: list[Prediction | NotPredicted]
    model_version: str


def image_address(data: Any, data_key: str) -> str:
    """The image's address in a task's data. Raises `ImageError` when there is none."""
    address = data.get(data_key) if isinstance(data, dict) else None
    if not isinstance(address, str) or not address:
        raise ImageError(f"the task has no image under {data_key!r}")
    return address
