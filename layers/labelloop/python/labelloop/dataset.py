"""What a task is to a dataset snapshot: a row of its manifest in a split that never changes, or left out, and why."""

from __future__ import annotations

import hashlib
import math
import struct

from labelloop import problem_types
from labelloop.errors import AnnotationError, ImageError
from labelloop.label_studio.label_config import LabelConfig
from labelloop.label_studio.payloads import AnnotatedTask, Annotation
from labelloop.model_config import ModelConfig, ModelFolder, Splits
from labelloop.records import ManifestRow, Region, Split

_FIRST_8_BYTES = struct.Struct(">Q")


def position(purpose: str, group: str) -> float:
    """A number from 0 up to 1 that follows from a content group (hex SHA-256), independent of those for other purposes.

    Whatever deals images out goes by it, so that they stay where they are and copies stay together.
    """
    hashed: int = _FIRST_8_BYTES.unpack_from(hashlib.sha256(f"{purpose}:{group}".encode()).digest())[0]
    return hashed * 2**-64


def split_of(group: str, splits: Splits) -> Split:
    """The split of a content group (hex SHA-256): a function of it and the config's seed, so that no image ever moves.

    The test split is the holdout. Changing the shares moves only groups across the changed border.
    """
    at = position(str(splits.seed), group)
    if at < splits.test:
        return "test"
    if at >= 1 - splits.validation:
        return "validation"
    return "train"


def resolution(images: int) -> float:
    """The least difference of accuracies that a holdout of so many images can tell apart, as a share: 300 tell 0.036.

    At 95 % confidence (a two-sided paired test), for two versions that differ on one image in ten. 1 for less than one image.
    """
    return min(1.96 * math.sqrt(0.1 / images), 1.0) if images > 0 else 1.0


def row_of(task: AnnotatedTask, annotation: Annotation, config: ModelConfig, label_config: LabelConfig) -> ManifestRow | str:
    """The manifest's row of a task whose `annotation` counts, or the reason why the task is left out.

    The holdout stays apart: what resembles images of it and of another split is in neither, and what a model annotated is never
    in it.
    """
    try:
        regions = problem_types.of(config.problem_type).annotated(annotation, label_config)
        image = task.image(label_config.data_key)
        sha256, group, resembled = task.content
    except (AnnotationError, ImageError) as error:
        return str(error)
    for region in regions:
        if region.label not in config.classes:
            return f"the class {region.label!r} is not in config.yaml"
    split, by_model = split_of(group, config.splits), annotation.by_model
    if resembled and any((split_of(other, config.splits) == "test") != (split == "test") for other in resembled):
        return "the image resembles images of the holdout and of another split"
    if split == "test" and by_model:
        return "the image is of the holdout, and no person has annotated it"
    return ManifestRow(
        image=image,
        sha256=sha256,
        group=group,
        regions=regions,
        split=split,
        annotation=annotation.unique_id,
        task=task.id,
        seen=annotation.seen(config.name),
        by_model=by_model,
    )


def answer_of_a_person(task: AnnotatedTask | None, sha256: str, folder: ModelFolder) -> tuple[Annotation, list[Region]] | None:
    """The annotation that counts and what it says, where a person has annotated the image in a way that can be read."""
    annotation = task.latest if task is not None and task.shows(sha256) else None
    if annotation is None or annotation.by_model:
        return None
    try:
        return annotation, problem_types.of(folder.config.problem_type).annotated(annotation, folder.label_config)
    except AnnotationError:
        return None
