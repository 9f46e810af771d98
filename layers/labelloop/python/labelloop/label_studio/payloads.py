"""What Label Studio sends and what it expects back, as typed structures. Unknown fields are ignored."""

from __future__ import annotations

import hashlib
from datetime import datetime, timedelta
from typing import Any

import msgspec

from labelloop.errors import ImageError
from labelloop.records import version_number

_BY_MODEL = "6c616265-6c6c-8"
_AT_ONCE = timedelta(seconds=1)  # between the two times that Label Studio notes when it makes an annotation


class Value(msgspec.Struct, frozen=True, gc=False):
    """What a region says: the fields of every problem type's tags, whatever they hold. Typed, as dicts take twice as long."""

    choices: Any = None
    rectanglelabels: Any = None
    x: Any = None
    y: Any = None
    width: Any = None
    height: Any = None
    rotation: Any = 0


_Otherwise = list[Any] | str | int | float | bool | None  # with an object: all that JSON can hold


class DrawnRegion(msgspec.Struct, frozen=True, gc=False):
    """A region of an annotation's result, as its editor left it."""

    from_name: Any = None
    type: Any = None
    value: Value | _Otherwise = None
    image_rotation: Any = None


class _Shown(msgspec.Struct, frozen=True, gc=False):
    model_version: Any = None
    result: msgspec.Raw = msgspec.Raw(b"null")


class Annotation(msgspec.Struct, frozen=True, gc=False):
    """An annotation; `result` is its list of regions, an empty one where the annotator found nothing."""

    id: int
    unique_id: str = ""
    result: list[DrawnRegion] | None = None
    was_cancelled: bool = False  # skipped by the annotator
    updated_at: str = ""
    created_at: str = ""
    # Label Studio's copy of the task's prediction by the version shown at the submit; {} without one. It is the larger half of
    # many annotations, and read only by who asks for it.
    prediction: _Shown | _Otherwise = None

    def seen(self, model: str) -> int | None:
        """The version whose prediction the annotator had before them (0: an order without a model); None where there was none."""
        by = self.prediction.model_version if isinstance(self.prediction, _Shown) else None
        return version_number(model, by) if isinstance(by, str) else None

    @property
    def shown(self) -> list[DrawnRegion] | None:
        """The regions of the prediction that the annotator had before them, as a `result`."""
        if not isinstance(self.prediction, _Shown):
            return None
        return msgspec.json.decode(self.prediction.result, type=list[DrawnRegion] | None)

    @property
    def by_model(self) -> bool:
        """Whether auto-accept made it and nobody has changed or confirmed it since; see `model_annotation_id`."""
        return self.unique_id.startswith(_BY_MODEL) and not self._was_touched

    @property
    def _was_touched(self) -> bool:
        created, updated = (datetime.fromisoformat(moment) for moment in (self.created_at, self.updated_at))
        return updated - created > _AT_ONCE


class TaskMeta(msgspec.Struct, frozen=True, gc=False):
    """What `ingest` noted of a task's image, if it made the task."""

    sha256: Any = None
    group: Any = None
    resembles: Any = None
    width: Any = None
    height: Any = None


class AnnotatedTask(msgspec.Struct, frozen=True, gc=False):
    """A task with its annotations, as the Data Manager lists them."""

    id: int
    data: dict[str, Any]
    meta: TaskMeta | None = None
    annotations: list[Annotation] = []

    @property
    def latest(self) -> Annotation | None:
        """The annotation that counts: a person's before the model's, then the one changed last, skips aside.

        An empty one says that there is nothing in the image.
        """
        if len(self.annotations) == 1 and not self.annotations[0].was_cancelled:  # as most have it
            return self.annotations[0]
        return max(self.counting, key=lambda one: (not one.by_model, one.updated_at, one.id), default=None)

    @property
    def counting(self) -> list[Annotation]:
        """The annotations without skips."""
        return [annotation for annotation in self.annotations if not annotation.was_cancelled]

    def image(self, data_key: str) -> str:
        """The image's address. Raises `ImageError` when the task has none."""
        return image_address(self.data, data_key)

    @property
    def content(self) -> tuple[str, str, list[str]]:
        """What `ingest` noted of the image: its SHA-256, its content group, and the other groups that it resembles.

        An image from before there were groups is its own. Raises `ImageError` for tasks that `ingest` did not make.
        """
        meta = self.meta
        if meta is None or not isinstance(meta.sha256, str) or len(meta.sha256) != 64:
            raise ImageError("the task was not made by labelloop (no sha256 in its meta data)")
        resembled = meta.resembles if isinstance(meta.resembles, list) else []
        return meta.sha256, str(meta.group or meta.sha256), [str(group) for group in resembled]

    def shows(self, sha256: str) -> bool:
        """Whether its image is the one. Label Studio may use a deleted task's id again."""
        return self.meta is not None and self.meta.sha256 == sha256


class PredictTask(msgspec.Struct, frozen=True):
    """A task of a predict request."""

    id: Any = None
    data: Any = None
    meta: Any = None

    @property
    def group(self) -> str | None:
        """The image's content group, as `ingest` noted it; None of tasks that it did not make."""
        group = self.meta.get("group") if isinstance(self.meta, dict) else None
        return group if isinstance(group, str) and group else None


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


class Prediction(msgspec.Struct, frozen=True):
    """One prediction of a predict answer. `score` lies between 0 and 1; uncertainty sampling hands out the lowest first."""

    result: list[dict[str, Any]]
    score: float
    model_version: str


class NotPredicted(msgspec.Struct, frozen=True, omit_defaults=True):
    """No prediction for a task: Label Studio skips an answer without `result`, logs it, and stores the others."""

    error: str = ""


class PredictResponse(msgspec.Struct, frozen=True):
    """Answer of `POST predict`: one entry for each task, in their order; `model_version` is the one that answered.

    An entry that another invocation has made stays the JSON that it came as.
    """

    results: list[Prediction | NotPredicted | msgspec.Raw]
    model_version: str


def model_annotation_id(project: int, sha256: str) -> str:
    """The `unique_id` of the annotation that auto-accept makes of an image in a project; those of people are random.

    A UUID of version 8 that begins with "labell". Label Studio keeps it, exports it, and refuses a second annotation with it.
    """
    tail = hashlib.sha256(f"{project}:{sha256}".encode()).hexdigest()
    return f"{_BY_MODEL}{tail[:3]}-8{tail[3:6]}-{tail[6:18]}"


def can_be_shown(name: str) -> bool:
    """Whether Label Studio shows an image with this in its address: it takes what follows a ? for the address's query."""
    return "?" not in name


def image_address(data: Any, data_key: str) -> str:
    """The image's address in a task's data. Raises `ImageError` when there is none."""
    address = data.get(data_key) if isinstance(data, dict) else None
    if not isinstance(address, str) or not address:
        raise ImageError(f"the task has no image under {data_key!r}")
    return address
