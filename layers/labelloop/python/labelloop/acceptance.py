"""How often annotators kept what a version had drawn for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from labelloop import problem_types
from labelloop.errors import AnnotationError
from labelloop.label_studio.label_config import LabelConfig
from labelloop.label_studio.payloads import AnnotatedTask, Annotation
from labelloop.model_config import ModelConfig


@dataclass(frozen=True)
class Acceptance:
    """Pre-annotations of a version: how many annotators had before them, and how many of these they said the same as."""

    shown: int
    kept: int


NONE_SEEN = Acceptance(shown=0, kept=0)


def acceptance(tasks: Iterable[AnnotatedTask], config: ModelConfig, label_config: LabelConfig) -> dict[int, Acceptance]:
    """By version, in order. A task's latest annotation counts, unless auto-accept made it or it cannot be read.

    Label Studio copies a task's prediction into the annotation when it is submitted. Where a new version was predicted while
    an annotator had the task open, that is the new one, not the one they saw.
    """
    problem_type = problem_types.of(config.problem_type)
    answers: dict[int, list[bool]] = {}
    for task in tasks:
        annotation = task.latest
        if annotation is None or annotation.by_model:
            continue
        version = annotation.seen(config.name)
        if not version:
            continue
        drawn = Annotation(id=annotation.id, result=annotation.shown)
        try:
            kept = problem_type.agrees(
                problem_type.annotated(drawn, label_config), problem_type.annotated(annotation, label_config)
            )
        except AnnotationError:
            continue
        answers.setdefault(version, []).append(kept)
    return {version: Acceptance(len(kept), sum(kept)) for version, kept in sorted(answers.items())}
