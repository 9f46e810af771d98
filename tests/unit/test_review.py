"""The Review tab: which annotations it shows, in which order, and how a case is settled for good."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from labelloop import review
from labelloop.label_studio.client import StoredPrediction
from labelloop.label_studio.payloads import AnnotatedTask, Annotation, Prediction, TaskMeta
from labelloop.ledger import Ledger
from labelloop.model_config import ModelFolder, Review
from labelloop.records import Region, Suspect
from tests import examples

PROJECT = 1


@dataclass
class DataManager:
    """Tasks, predictions and tabs of one project, as far as Label Studio's rules about them matter here."""

    tasks: dict[int, AnnotatedTask] = field(default_factory=dict)
    predictions: dict[int, StoredPrediction] = field(default_factory=dict)
    results: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    changed: dict[int, str] = field(default_factory=dict)
    tabs_: dict[int, dict[str, Any]] = field(default_factory=dict)
    moment: int = 0
    writes: int = 0

    def touch(self, task: int) -> str:
        self.moment += 1
        self.changed[task] = f"2026-02-01T00:00:{self.moment // 10**6:02}.{self.moment % 10**6:06}Z"
        return self.changed[task]

    # What a person does

    def annotate(self, task: AnnotatedTask) -> None:
        self.tasks[task.id] = task
        self.touch(task.id)

    def answer(self, number: int, **change: Any) -> None:
        """Submit an annotation again, changed or not."""
        task = self.tasks[number]
        updated = msgspec.structs.replace(task.annotations[0], updated_at=self.touch(number), **change)
        self.tasks[number] = msgspec.structs.replace(task, annotations=[updated])

    def listed(self) -> list[int]:
        """The tasks of the Review tab, as Label Studio filters and orders them."""
        (tab,) = (tab for tab in self.tabs_.values() if tab["title"].startswith("Review"))
        by, until = tab["filters"]["items"]
        assert (by["filter"], until["filter"]) == ("filter:tasks:predictions_model_versions", "filter:tasks:updated_at")
        assert (by["operator"], until["operator"], tab["ordering"]) == ("contains", "less_or_equal", ["tasks:updated_at"])
        shown = {stored.task for stored in self.predictions.values() if stored.made_by in by["value"]}
        return sorted((task for task in shown if self.changed[task] <= until["value"]), key=self.changed.__getitem__)

    # The client's methods

    def annotations_of(self, project: int, tasks: Sequence[int]) -> list[AnnotatedTask]:
        return [self.tasks[task] for task in tasks if task in self.tasks]

    def predicted_by(self, project: int, version: str) -> dict[int, tuple[str, StoredPrediction]]:
        found = (stored for stored in self.predictions.values() if stored.made_by == version)
        return {stored.task: (self.changed[stored.task], stored) for stored in found}

    def add_prediction(self, project: int, task: int, prediction: Prediction, cluster: int | None) -> None:
        self._write(len(self.results) + 1, task, prediction)

    def change_prediction(self, project: int, stored: StoredPrediction, prediction: Prediction, cluster: int | None) -> None:
        self._write(stored.id, stored.task, prediction)

    def _write(self, number: int, task: int, prediction: Prediction) -> None:
        moment = self.touch(task)
        self.predictions[number] = StoredPrediction(
            id=number,
            task=task,
            made_by=prediction.model_version,
            score=prediction.score,
            created_at=moment,
            updated_at=moment,
            cluster=None,
        )
        self.results[number] = prediction.result
        self.writes += 1

    def delete_prediction(self, prediction: int) -> None:
        del self.predictions[prediction]

    def tabs(self, project: int) -> dict[str, int]:
        return {tab["title"]: number for number, tab in self.tabs_.items()}

    def add_tab(self, project: int, data: dict[str, Any]) -> None:
        self.tabs_[len(self.tabs_) + 1] = data

    def change_tab(self, project: int, tab: int, data: dict[str, Any]) -> None:
        assert tab in self.tabs_
        self.tabs_[tab] = data

    def delete_tab(self, tab: int) -> None:
        del self.tabs_[tab]


@pytest.fixture
def folder() -> ModelFolder:
    return with_limit(3)


def with_limit(limit: int) -> ModelFolder:
    folder = ModelFolder(examples.CONFIGS["digits"].folder)
    folder.__dict__["config"] = msgspec.structs.replace(examples.DIGITS, review=Review(limit=limit))
    return folder


@pytest.fixture
def label_studio() -> DataManager:
    made = DataManager()
    for number in range(1, 9):
        made.annotate(examples.annotated_task(number, "1"))
    made.tabs_[1] = {"title": "Mine"}
    return made


def suspect(number: int, quality: float, given: str = "1", suggested: str = "7") -> Suspect:
    return Suspect(
        task=number,
        annotation=f"annotation-{number}",
        sha256=examples.sha256(str(number)),
        quality=quality,
        given=[Region(label=given)],
        suggested=[Region(label=suggested, score=0.9)],
    )


def offer(folder: ModelFolder, ledger: Ledger, label_studio: DataManager, *suspects: Suspect, version: int = 1) -> int:
    return review.offer(folder, PROJECT, version, suspects, ledger, cast(Any, label_studio))


def titles(label_studio: DataManager) -> list[str]:
    return [tab["title"] for tab in label_studio.tabs_.values()]


def test_the_worst_are_shown_first_with_what_the_model_says(
    folder: ModelFolder, ledger: Ledger, label_studio: DataManager
) -> None:
    assert offer(folder, ledger, label_studio, suspect(5, 0.01), suspect(2, 0.02), suspect(7, 0.03), suspect(1, 0.04)) == 3
    assert label_studio.listed() == [5, 2, 7]
    assert titles(label_studio) == ["Mine", "Review (3)"]
    (stored,) = (stored for stored in label_studio.predictions.values() if stored.task == 5)
    assert (stored.made_by, stored.score) == ("digits review", 0.99)
    assert label_studio.results[stored.id][0]["value"] == {"choices": ["7"]}


def test_offering_again_writes_nothing(folder: ModelFolder, ledger: Ledger, label_studio: DataManager) -> None:
    suspects = suspect(5, 0.01), suspect(2, 0.02)
    offer(folder, ledger, label_studio, *suspects)
    writes = label_studio.writes
    assert offer(folder, ledger, label_studio, *suspects) == 2
    assert (label_studio.writes, label_studio.listed()) == (writes, [5, 2])
    assert titles(label_studio) == ["Mine", "Review (2)"]


@pytest.mark.parametrize("change", [{}, {"result": []}], ids=["confirmed", "changed"])
def test_an_answer_leaves_the_tab_at_once_and_settles_the_case_for_good(
    folder: ModelFolder, ledger: Ledger, label_studio: DataManager, change: dict[str, Any]
) -> None:
    offer(folder, ledger, label_studio, suspect(5, 0.01), suspect(2, 0.02))
    label_studio.answer(5, **change)
    assert label_studio.listed() == [2]
    again = suspect(5, 0.001), suspect(3, 0.03)
    assert offer(folder, ledger, label_studio, *again, version=2) == 2
    assert label_studio.listed() == [2, 3]
    cases = ledger.review_cases("digits", PROJECT)
    assert {case.task: case.settled_at is None for case in cases} == {5: False, 2: True, 3: True}
    assert offer(folder, ledger, label_studio, *again, version=3) == 2
    assert ledger.review_cases("digits", PROJECT) == cases, "when it was settled is noted once"
    assert {stored.task for stored in label_studio.predictions.values()} == {2, 3}


def test_an_annotation_made_anew_settles_it_too(folder: ModelFolder, ledger: Ledger, label_studio: DataManager) -> None:
    offer(folder, ledger, label_studio, suspect(5, 0.01), suspect(2, 0.02))
    label_studio.annotate(examples.annotated_task(5, "1", unique_id="another"))
    del label_studio.tasks[2]
    anew = msgspec.structs.replace(suspect(5, 0.01), annotation="another")
    assert offer(folder, ledger, label_studio, anew, version=2) == 0
    assert (titles(label_studio), label_studio.predictions) == (["Mine"], {})


def test_open_cases_stay_before_new_ones_are_raised(folder: ModelFolder, ledger: Ledger, label_studio: DataManager) -> None:
    offer(folder, ledger, label_studio, suspect(5, 0.03), suspect(2, 0.04))
    assert offer(folder, ledger, label_studio, suspect(1, 0.01), suspect(3, 0.02), version=2) == 3
    assert label_studio.listed() == [1, 5, 2]
    cases = {case.task: case for case in ledger.review_cases("digits", PROJECT)}
    assert {number: case.version for number, case in cases.items()} == {5: 1, 2: 1, 1: 2}


@pytest.mark.parametrize(
    "wrong",
    [
        suspect(9, 0.01),
        suspect(5, 0.01, given="3"),
        msgspec.structs.replace(suspect(5, 0.01), annotation="another"),
        msgspec.structs.replace(suspect(5, 0.01), sha256=examples.sha256("another image")),
    ],
    ids=["no task", "annotated differently since", "another annotation", "another image"],
)
def test_what_no_longer_stands_as_it_was_trained_on_is_not_shown(
    folder: ModelFolder, ledger: Ledger, label_studio: DataManager, wrong: Suspect
) -> None:
    assert offer(folder, ledger, label_studio, wrong, suspect(2, 0.02)) == 1
    assert label_studio.listed() == [2]
    assert [case.task for case in ledger.review_cases("digits", PROJECT)] == [2]


def test_an_annotation_that_cannot_be_read_is_not_shown(folder: ModelFolder, ledger: Ledger, label_studio: DataManager) -> None:
    label_studio.annotate(examples.annotated_task(5, ["1", "2"]))
    assert offer(folder, ledger, label_studio, suspect(5, 0.01)) == 0


def test_what_broke_off_half_way_is_finished(folder: ModelFolder, ledger: Ledger, label_studio: DataManager) -> None:
    offer(folder, ledger, label_studio, suspect(5, 0.01), suspect(2, 0.02), suspect(7, 0.03))
    first, second, third = (stored for stored in label_studio.predictions.values())
    assert (first.task, second.task, third.task) == (5, 2, 7)
    del label_studio.predictions[third.id]
    label_studio.touch(5)  # now behind the second
    assert offer(folder, ledger, label_studio) == 3
    assert label_studio.listed() == [5, 2, 7]


def test_no_cases_no_tab(folder: ModelFolder, ledger: Ledger, label_studio: DataManager) -> None:
    assert offer(folder, ledger, label_studio) == 0
    assert titles(label_studio) == ["Mine"]
    offer(folder, ledger, label_studio, suspect(5, 0.01))
    assert offer(with_limit(0), ledger, label_studio, suspect(2, 0.01)) == 0
    assert (titles(label_studio), label_studio.predictions) == (["Mine"], {})


def test_the_first_tab_of_a_project_is_not_the_review(folder: ModelFolder, ledger: Ledger, label_studio: DataManager) -> None:
    """Label Studio shows its own first tab only as long as none is stored."""
    label_studio.tabs_.clear()
    offer(folder, ledger, label_studio, suspect(5, 0.01))
    assert titles(label_studio) == ["Default", "Review (1)"]


def test_boxes_are_suggested_in_pixels_of_their_image(tmp_path: Path, ledger: Ledger, label_studio: DataManager) -> None:
    folder = examples.make_model_folder(tmp_path, "boxes", "detection", ["a"])
    meta = TaskMeta(sha256="a" * 64, width=640, height=480)
    annotation = Annotation(id=1, unique_id="u", result=[], updated_at="2026-01-01T00:00:00Z")
    label_studio.annotate(AnnotatedTask(id=20, data={}, meta=meta, annotations=[annotation]))
    missed = Suspect(
        task=20,
        annotation="u",
        sha256="a" * 64,
        quality=0.1,
        given=[],
        suggested=[Region(label="a", box=(0.1, 0.2, 0.5, 0.6), score=0.9)],
    )
    assert offer(folder, ledger, label_studio, missed) == 1
    (result,) = label_studio.results.values()
    assert (result[0]["original_width"], result[0]["original_height"]) == (640, 480)
    assert [stored.made_by for stored in label_studio.predictions.values()] == ["boxes review"]
