"""How often annotators kept a pre-annotation, from what Label Studio exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from labelloop.acceptance import Acceptance, acceptance
from labelloop.label_studio.payloads import AnnotatedTask, model_annotation_id
from tests import examples

MADE, CHANGED = "2026-01-01T00:00:00.000000Z", "2026-01-02T00:00:00.000000Z"


def choice(label: str) -> list[dict[str, Any]]:
    return [{"from_name": "digit", "to_name": "image", "type": "choices", "value": {"choices": [label]}}]


def annotation(said: str | None, saw: str | None = None, version: str | None = None, **more: Any) -> dict[str, Any]:
    """As Label Studio exports it: the prediction that the annotator saw is copied into it."""
    seen = {"id": 7, "model_version": version, "score": 0.5, "result": choice(saw) if saw else []} if version else {}
    return {
        "id": 1,
        "unique_id": "3b9a7c1e-0000-4000-8000-000000000000",
        "result": choice(said) if said else [],
        "created_at": MADE,
        "updated_at": MADE,
        "prediction": seen,
        **more,
    }


def exported(*annotations: dict[str, Any]) -> AnnotatedTask:
    task = {"id": 1, "data": {"image": "s3://images/1.png"}, "annotations": list(annotations)}
    return msgspec.json.decode(msgspec.json.encode(task), type=AnnotatedTask)


def accepted(*tasks: AnnotatedTask) -> dict[int, Acceptance]:
    return acceptance(tasks, examples.DIGITS, examples.LABELS)


def test_kept_and_changed_pre_annotations_are_counted_for_each_version() -> None:
    tasks = [
        exported(annotation("1", "1", "digits v1")),
        exported(annotation("2", "1", "digits v1")),
        exported(annotation("3", "3", "digits v2")),
        exported(annotation("4", "4", "digits v10")),
    ]
    assert accepted(*tasks) == {1: Acceptance(2, 1), 2: Acceptance(1, 1), 10: Acceptance(1, 1)}


@pytest.mark.parametrize(
    "task",
    [
        exported(annotation("1")),
        exported(annotation("1", None, "digits v0")),
        exported(annotation("1", "1", "numerals v1")),
        exported(annotation("1", "1", "digits review")),
        exported(annotation("1", "1", "digits v1", prediction=None)),
        exported(annotation("1", "1", "digits v1", prediction="elsewhere")),
        exported(annotation("1", "1", "digits v1", was_cancelled=True)),
        exported(annotation(None, "1", "digits v1")),
        exported(annotation("1", None, "digits v1")),
        exported(annotation("1", "1", "digits v1", unique_id=model_annotation_id(1, "a" * 64))),
        exported(),
    ],
    ids=[
        "none",
        "before the first",
        "other model",
        "review",
        "null",
        "no mapping",
        "skip",
        "no class",
        "no prediction",
        "model's",
        "no",
    ],
)
def test_what_says_nothing_of_a_pre_annotation_is_left_out(task: AnnotatedTask) -> None:
    assert accepted(task) == {}


def test_the_annotation_that_counts_is_the_latest_of_a_person() -> None:
    corrected = annotation("2", "1", "digits v1", id=2, updated_at=CHANGED)
    by_model = annotation(
        "1", "1", "digits v1", unique_id=model_annotation_id(1, "a" * 64), created_at=CHANGED, updated_at=CHANGED
    )
    task = exported(annotation("1", "1", "digits v1"), corrected)
    assert accepted(task) == {1: Acceptance(1, 0)}
    assert accepted(exported(by_model, annotation("2", "1", "digits v1"))) == {1: Acceptance(1, 0)}


def test_the_models_own_annotation_that_a_person_changed_is_theirs() -> None:
    mine = model_annotation_id(1, "a" * 64)
    changed = exported(annotation("2", "1", "digits v1", unique_id=mine, updated_at=CHANGED))
    assert accepted(changed) == {1: Acceptance(1, 0)}
    assert changed.latest is not None
    assert not changed.latest.by_model


def test_moved_boxes_are_kept_boxes_while_they_are_the_same_thing(tmp_path: Path) -> None:
    folder = examples.make_model_folder(tmp_path, "boxes", "detection", ["a", "b"])

    def box(x: float, label: str = "a") -> list[dict[str, Any]]:
        value = {"x": x, "y": 10, "width": 40, "height": 40, "rotation": 0, "rectanglelabels": [label]}
        return [{"from_name": "what", "to_name": "image", "type": "rectanglelabels", "value": value}]

    def task(said: list[dict[str, Any]]) -> AnnotatedTask:
        return exported(annotation(None, result=said, prediction={"model_version": "boxes v1", "result": box(10)}))

    answers = [task(box(12)), task(box(45)), task(box(10, "b")), task([])]
    assert acceptance(answers, folder.config, folder.label_config) == {1: Acceptance(4, 1)}
