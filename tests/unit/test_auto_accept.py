"""Auto-accept: what becomes an annotation, what is audited, and when it turns itself off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import onnx as onnx_file
import pytest
from onnx import helper

from labelloop import auto_accept
from labelloop.active_learning import Place, stream_of
from labelloop.artifacts import Bucket, Champions
from labelloop.auto_accept import AutoAcceptState, evidence
from labelloop.dataset import split_of
from labelloop.inference import Model
from labelloop.label_studio.client import StoredPrediction, StoredTask
from labelloop.label_studio.payloads import AnnotatedTask, Prediction, PredictTask, Value, model_annotation_id
from labelloop.ledger import Ledger
from labelloop.model_config import AutoAccept, ModelConfigs, ModelFolder
from labelloop.predict import Predicted, TaskPredictor
from labelloop.prelabel import Prelabeller
from labelloop.records import ModelCard, Region, TaskRange
from tests import examples

RULES = AutoAccept(precision=0.99, audit=0.2)
CARD = msgspec.structs.replace(examples.model_card(), accept_from=0.9)
PROJECT = 1
NOWHERE = np.zeros(1, np.float32)  # an embedding


@dataclass
class Annotations:
    """Label Studio's annotations of one project, as far as auto-accept asks."""

    tasks: dict[int, AnnotatedTask] = field(default_factory=dict)
    exports: int = 0

    def annotations_of(self, project: int, tasks: Sequence[int]) -> list[AnnotatedTask]:
        self.exports += 1
        return [self.tasks[task] for task in tasks if task in self.tasks]

    def annotate_once(self, task: int, result: list[dict[str, Any]], unique_id: str) -> bool:
        if any(unique_id == annotation.unique_id for known in self.tasks.values() for annotation in known.annotations):
            return False
        label = result[0]["value"]["choices"][0]
        self.tasks[task] = annotated(task, label, unique_id)
        return True

    def by_model(self) -> set[int]:
        return {number for number, task in self.tasks.items() if task.latest is not None and task.latest.by_model}


def annotated(task: int, label: str, unique_id: str | None = None) -> AnnotatedTask:
    made = examples.annotated_task(task, label, unique_id=unique_id)
    annotation = msgspec.structs.replace(made.annotations[0], created_at=made.annotations[0].updated_at)
    return msgspec.structs.replace(made, annotations=[annotation])


def task(number: int) -> PredictTask:
    sha256 = examples.sha256(str(number))
    return PredictTask(id=number, data={}, meta={"sha256": sha256, "group": sha256})


def says(number: int, label: str = "1", certainty: float = 0.95) -> tuple[PredictTask, Predicted]:
    result = [{"from_name": "digit", "to_name": "image", "type": "choices", "value": {"choices": [label]}}]
    return task(number), Predicted([Region(label=label, score=certainty)], result, certainty, Place(certainty, None), NOWHERE)


@pytest.fixture
def folder() -> ModelFolder:
    folder = ModelFolder(examples.CONFIGS["digits"].folder)
    folder.__dict__["config"] = msgspec.structs.replace(examples.DIGITS, auto_accept=RULES)
    return folder


@pytest.fixture
def label_studio() -> Annotations:
    return Annotations()


def accept(
    folder: ModelFolder,
    ledger: Ledger,
    label_studio: Annotations,
    predicted: Sequence[tuple[PredictTask, Predicted]],
    *,
    card: ModelCard = CARD,
    version: int = 1,
    look_seconds: float = 0,
) -> int:
    client = cast(Any, label_studio)
    return auto_accept.accept(folder, card, version, PROJECT, ledger, client, predicted, look_seconds=look_seconds)


def audited(ledger: Ledger, version: int = 1) -> set[int]:
    return {audit.task for audit in ledger.audits("digits", version)}


def open_to_it(numbers: Sequence[int]) -> set[int]:
    """Those of the train split and of the active stream."""
    groups = {number: examples.sha256(str(number)) for number in numbers}
    config = examples.DIGITS
    return {
        number
        for number, group in groups.items()
        if stream_of(group, config) == "active" and split_of(group, config.splits) == "train"
    }


def test_the_sure_ones_become_annotations_and_a_share_is_left_to_people(
    folder: ModelFolder, ledger: Ledger, label_studio: Annotations
) -> None:
    numbers = range(300)
    made = accept(folder, ledger, label_studio, [says(n, certainty=0.95 if n % 2 else 0.85) for n in numbers])
    sure = {number for number in open_to_it(numbers) if number % 2}
    assert made == len(label_studio.by_model()) > 60
    assert label_studio.by_model() | audited(ledger) == sure
    assert not label_studio.by_model() & audited(ledger)
    assert 0.1 < len(audited(ledger)) / len(sure) < 0.3


def test_without_the_section_or_a_threshold_nothing_is_accepted(ledger: Ledger, label_studio: Annotations) -> None:
    plain = examples.CONFIGS["digits"]
    assert plain.config.auto_accept is None, "it is off unless asked for"
    assert accept(plain, ledger, label_studio, [says(n) for n in range(50)]) == 0


def test_a_version_without_a_threshold_accepts_nothing(folder: ModelFolder, ledger: Ledger, label_studio: Annotations) -> None:
    card = msgspec.structs.replace(CARD, accept_from=None)
    assert accept(folder, ledger, label_studio, [says(n) for n in range(50)], card=card) == 0
    assert (label_studio.tasks, audited(ledger)) == ({}, set())


@pytest.mark.parametrize("change", [{"classes": ["seven", *CARD.classes[1:]]}, {"classes": CARD.classes[1:]},
                                    {"problem_type": "multilabel"}])  # fmt: skip
def test_a_version_of_other_classes_accepts_nothing(
    folder: ModelFolder, ledger: Ledger, label_studio: Annotations, change: dict[str, Any]
) -> None:
    old = msgspec.structs.replace(CARD, **change)
    assert accept(folder, ledger, label_studio, [says(n) for n in range(50)], card=old) == 0
    assert not audited(ledger)


def test_tasks_that_ingest_did_not_make_are_left_alone(folder: ModelFolder, ledger: Ledger, label_studio: Annotations) -> None:
    _, predicted = says(1)
    strangers = [PredictTask(id=1, data={}), PredictTask(id=2, data={}, meta={"group": examples.sha256("2")})]
    assert accept(folder, ledger, label_studio, [(stranger, predicted) for stranger in strangers]) == 0


def test_the_same_range_again_annotates_nothing_twice(folder: ModelFolder, ledger: Ledger, label_studio: Annotations) -> None:
    batch = [says(number) for number in range(40)]
    first = accept(folder, ledger, label_studio, batch)
    notes = audited(ledger)
    assert first > 10
    assert accept(folder, ledger, label_studio, batch) == 0
    assert (audited(ledger), len(label_studio.by_model())) == (notes, first)


def test_a_persons_annotation_counts_before_the_models_whichever_came_last() -> None:
    made = model_annotation_id(PROJECT, examples.sha256("1"))
    person, model = annotated(1, "7").annotations[0], annotated(1, "1", made).annotations[0]
    later = msgspec.structs.replace(model, created_at="2026-02-01T00:00:00Z", updated_at="2026-02-01T00:00:00.2Z")
    both = msgspec.structs.replace(annotated(1, "7"), annotations=[person, later])
    assert later.by_model
    assert both.latest == person


def answer(ledger: Ledger, label_studio: Annotations, truth: Any, *, version: int = 1) -> None:
    """People annotate what is audited."""
    for number in sorted(audited(ledger, version)):
        if number not in label_studio.tasks:
            label_studio.tasks[number] = annotated(number, truth(number))


def test_while_people_agree_it_goes_on(folder: ModelFolder, ledger: Ledger, label_studio: Annotations) -> None:
    accept(folder, ledger, label_studio, [says(number) for number in range(300)])
    answer(ledger, label_studio, lambda _: "1")
    assert accept(folder, ledger, label_studio, [says(number) for number in range(300, 400)]) > 20
    state = auto_accept.summary(folder, 1, ledger, list(label_studio.tasks.values()))
    assert state is not None
    assert state.right == state.audited > 20
    assert (state.off, state.accepted) == (None, len(label_studio.by_model()))
    assert state.waiting > 0  # of the second batch


def test_when_people_disagree_it_turns_itself_off_for_that_version_only(
    folder: ModelFolder, ledger: Ledger, label_studio: Annotations
) -> None:
    accept(folder, ledger, label_studio, [says(number) for number in range(200)])
    answer(ledger, label_studio, lambda number: "1" if number % 2 else "2")
    before = label_studio.by_model()
    assert accept(folder, ledger, label_studio, [says(number) for number in range(200, 300)]) == 0
    assert accept(folder, ledger, label_studio, [says(number) for number in range(300, 400)]) == 0
    assert label_studio.by_model() == before
    off = ledger.turned_off("digits", 1)
    assert off is not None
    assert off.right < off.audited == len(audited(ledger))
    assert f"{off.right} of {off.audited}" in off.reason
    assert "99.0%" in off.reason
    state = auto_accept.summary(folder, 1, ledger, list(label_studio.tasks.values()))
    assert state == AutoAcceptState(len(before), off.right, off.audited, 0, off.reason)
    assert accept(folder, ledger, label_studio, [says(number) for number in range(400, 500)], version=2) > 20


def test_the_first_answer_to_an_audit_counts_whatever_becomes_of_it(
    folder: ModelFolder, ledger: Ledger, label_studio: Annotations
) -> None:
    """Else evidence could be taken back: an annotation is changed, or the task is deleted."""
    accept(folder, ledger, label_studio, [says(number) for number in range(100)])
    wrong, deleted, *_ = sorted(audited(ledger))
    label_studio.tasks |= {number: annotated(number, "2") for number in (wrong, deleted)}
    accept(folder, ledger, label_studio, [says(number) for number in range(100)])
    label_studio.tasks[wrong] = annotated(wrong, "1")
    del label_studio.tasks[deleted]
    state = auto_accept.summary(folder, 1, ledger, list(label_studio.tasks.values()))
    assert state is not None
    assert (state.right, state.audited) == (0, 2)


def test_people_are_asked_for_their_answers_once_in_a_while(
    folder: ModelFolder, ledger: Ledger, label_studio: Annotations
) -> None:
    for start in range(0, 300, 100):
        accept(folder, ledger, label_studio, [says(number) for number in range(start, start + 100)], look_seconds=60)
    assert label_studio.exports == 1


def test_a_skip_and_another_task_of_the_same_number_answer_no_audit(
    folder: ModelFolder, ledger: Ledger, label_studio: Annotations
) -> None:
    accept(folder, ledger, label_studio, [says(number) for number in range(100)])
    first, second, *_ = sorted(audited(ledger))
    label_studio.tasks[first] = examples.annotated_task(first, "2", was_cancelled=True)
    label_studio.tasks[second] = examples.annotated_task(second, "2", content="another image")
    state = auto_accept.summary(folder, 1, ledger, list(label_studio.tasks.values()))
    assert state is not None
    assert (state.audited, state.waiting) == (0, len(audited(ledger)))


def test_drifted_images_turn_it_off(folder: ModelFolder, ledger: Ledger, label_studio: Annotations) -> None:
    """A model that goes by brightness is sure of images whose brightness no longer means anything."""
    model = Model(examples.brightness_model())

    def seen(number: int) -> tuple[PredictTask, Predicted]:
        candidates = model.candidates(model.pixels(examples.png(number % 10, salt=number)))
        return says(number, candidates[0].label, candidates[0].score or 0.0)

    def true(number: int) -> str:
        return str(number % 10)

    def drifted(number: int) -> str:
        return str((7 * number + 3) % 10)

    assert accept(folder, ledger, label_studio, [seen(number) for number in range(200)]) > 60
    answer(ledger, label_studio, true)
    assert accept(folder, ledger, label_studio, [seen(number) for number in range(200, 400)]) > 60
    answer(ledger, label_studio, drifted)
    kept = label_studio.by_model()
    assert accept(folder, ledger, label_studio, [seen(number) for number in range(400, 600)]) == 0
    assert label_studio.by_model() == kept
    assert ledger.turned_off("digits", 1) is not None


@dataclass
class Unlabelled(Annotations):
    """The same with tasks to predict, for the worker that calls auto-accept."""

    images: dict[int, str] = field(default_factory=dict)
    stored: dict[int, list[StoredPrediction]] = field(default_factory=dict)

    def unlabelled_tasks(self, project: int, after: int, upto: int) -> list[StoredTask]:
        return [
            StoredTask(PredictTask(number, {"image": image}, task(number).meta), self.stored.get(number, []))
            for number, image in self.images.items()
            if after < number <= upto and number not in self.tasks
        ]

    def add_prediction(self, project: int, task: int, prediction: Prediction, cluster: int | None) -> None:
        made = "2026-01-01T00:00:00Z"
        self.stored[task] = [StoredPrediction(task, task, prediction.model_version, prediction.score, made, made, cluster)]


def test_the_worker_that_predicts_unlabelled_tasks_accepts(
    tmp_path: Path, ledger: Ledger, new_bucket: Callable[[], Bucket]
) -> None:
    source = examples.CONFIGS["digits"].folder
    (tmp_path / "digits").mkdir()
    for file in ("config.yaml", "labeling_template.xml"):
        (tmp_path / "digits" / file).write_text((source / file).read_text())
    with (tmp_path / "digits" / "config.yaml").open("a") as config:
        config.write("\nauto_accept:\n  precision: 0.99\n  audit: 0.2\n")
    images, artifacts = new_bucket(), new_bucket()
    onnx = examples.brightness_model(card=False)
    model = onnx_file.load_from_string(onnx)
    helper.set_model_props(model, {"labelloop": msgspec.json.encode(CARD).decode()})
    onnx = model.SerializeToString()
    champions = Champions(artifacts)
    artifacts.put("models/digits/4/model.onnx", onnx)
    champions.swap(examples.champion(4, onnx), tag=None)
    ledger.set_project("digits", PROJECT)
    label_studio = Unlabelled()
    for number in range(1, 41):
        images.put(f"images/digits/{number}.png", examples.png(number % 10, salt=number))
        label_studio.images[number] = f"s3://{images.name}/images/digits/{number}.png"
    client = cast(Any, label_studio)
    predictor = TaskPredictor(ModelConfigs(tmp_path), images, champions, lambda: client, label_studio_url="http://127.0.0.1:9")
    outcome = Prelabeller(champions, ledger, client, predictor, log=print)(TaskRange(model="digits", after=0, upto=40))
    assert label_studio.by_model() | audited(ledger, 4) == open_to_it(range(1, 41))
    assert outcome.accepted == len(label_studio.by_model()) > 5
    for number in label_studio.by_model():
        latest = label_studio.tasks[number].latest
        assert latest is not None
        assert latest.result is not None
        assert latest.result[0].value == Value(choices=[str(number % 10)])


def alarms(promise: float, precision: float, audits: int) -> float:
    """The exact probability that it is turned off within so many audits, looked at after each of them."""
    going, alarmed = {0: 1.0}, 0.0  # errors so far → probability
    for done in range(1, audits + 1):
        after: dict[int, float] = {}
        for errors, chance in going.items():
            for more, share in ((errors + 1, chance * (1 - precision)), (errors, chance * precision)):
                if evidence(done - more, more, promise) >= 1 / auto_accept.FALSE_ALARM:
                    alarmed += share
                elif share > 1e-12:
                    after[more] = after.get(more, 0.0) + share
        going = after
    return alarmed


@pytest.mark.parametrize("promise", [0.9, 0.95, 0.99])
def test_a_version_that_keeps_its_promise_is_seldom_turned_off_however_often_one_looks(promise: float) -> None:
    assert 0 < alarms(promise, promise, 500) < auto_accept.FALSE_ALARM


@pytest.mark.parametrize(("precision", "audits"), [(0.5, 20), (0.8, 50), (0.95, 500)])
def test_a_version_that_breaks_it_is_found_out(precision: float, audits: int) -> None:
    assert alarms(0.99, precision, audits) > 0.95


def test_much_evidence_is_a_number(tmp_path: Path) -> None:
    assert evidence(0, 100_000, 0.99) > 1e100
    assert evidence(100_000, 0, 0.99) < 1
    assert evidence(0, 0, 0.99) == 1
