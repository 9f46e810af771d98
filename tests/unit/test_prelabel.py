"""Every unlabelled task gets one prediction, of the version that serves, whatever happens meanwhile."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any, cast

import boto3
import msgspec
import numpy as np
import onnx
import pytest

from labelloop import artifacts, drift, shadow
from labelloop.active_learning import stream_of
from labelloop.artifacts import Bucket, Champions, s3_uri
from labelloop.errors import LabelStudioError, ServiceError, StorageError
from labelloop.label_studio.client import StoredPrediction, StoredTask
from labelloop.label_studio.payloads import Prediction, PredictTask
from labelloop.ledger import Ledger
from labelloop.messages import RANGE, PrelabelQueue, asked_ranges, unlabelled_ranges
from labelloop.predict import Predicted, Predictor, TaskPredictor
from labelloop.prelabel import SETTLED, Prelabelled, Prelabeller
from labelloop.records import GateRules, Promotion, Shadow, TaskRange
from tests import examples

RANGE_OF_ALL = TaskRange(model="digits", after=0, upto=1000)


@dataclass
class Task:
    image: str
    group: str
    sha256: str = ""
    predictions: list[StoredPrediction] = field(default_factory=list)
    begun: bool = False  # annotated, skipped, or with a draft

    @property
    def meta(self) -> dict[str, str] | None:
        """What `ingest` noted; None where it did not make the task."""
        return {"group": self.group, "sha256": self.sha256} if self.group else None


@dataclass
class LabelStudio:
    """Tasks by id and their predictions. `meanwhile` runs once before the next write; `broken` writes fail first."""

    tasks: dict[int, Task] = field(default_factory=dict)
    writes: list[str] = field(default_factory=list)
    meanwhile: Callable[[], object] | None = None
    broken: int = 0
    _last: int = 0

    def add(self, image: str, *made_by: str, hours_ago: float = 24) -> int:
        number = len(self.tasks) + 1
        self.tasks[number] = Task(image, examples.sha256(image))
        for version in made_by:
            self._store(number, version, 0.5, None, hours_ago)
        return number

    def _store(self, task: int, made_by: str, score: float, cluster: int | None, hours_ago: float = 0) -> None:
        self._last += 1
        changed = (datetime.now(UTC) - timedelta(hours=hours_ago)).isoformat()
        stored = StoredPrediction(self._last, task, made_by, score, changed, changed, cluster)
        self.tasks[task].predictions.append(stored)

    def _write(self, kind: str) -> None:
        if self.meanwhile:
            event, self.meanwhile = self.meanwhile, None
            event()
        if self.broken:
            self.broken -= 1
            raise LabelStudioError("database is locked", status=500)
        self.writes.append(kind)

    def unlabelled_tasks(self, project: int, after: int, upto: int) -> list[StoredTask]:
        return [
            StoredTask(PredictTask(number, {"image": task.image}, task.meta), list(task.predictions))
            for number, task in self.tasks.items()
            if after < number <= upto and not task.begun
        ]

    def tasks_with_ids(self, project: int, tasks: Sequence[int]) -> list[StoredTask]:
        return [
            StoredTask(PredictTask(number, {"image": task.image}, task.meta), list(task.predictions), task.begun)
            for number, task in self.tasks.items()
            if number in tasks
        ]

    def unlabelled_ids(self, project: int, last: int) -> list[int]:
        return [number for number, task in self.tasks.items() if number > last and not task.begun][:250]

    def add_prediction(self, project: int, task: int, prediction: Prediction, cluster: int | None) -> None:
        self._write("add")
        self._store(task, prediction.model_version, prediction.score, cluster)

    def change_prediction(self, project: int, stored: StoredPrediction, prediction: Prediction, cluster: int | None) -> None:
        self._write("change")
        there = self.tasks[stored.task].predictions
        changed = datetime.now(UTC).isoformat()
        there[[one.id for one in there].index(stored.id)] = replace(
            stored, made_by=prediction.model_version, score=prediction.score, cluster=cluster, updated_at=changed
        )

    def delete_prediction(self, prediction: int) -> None:
        self._write("delete")
        for task in self.tasks.values():
            task.predictions = [stored for stored in task.predictions if stored.id != prediction]

    def let_time_pass(self) -> None:
        earlier = (datetime.now(UTC) - SETTLED).isoformat()
        for task in self.tasks.values():
            task.predictions = [replace(stored, updated_at=earlier) for stored in task.predictions]

    def versions(self, task: int) -> list[tuple[int, str]]:
        return [(stored.id, stored.made_by) for stored in self.tasks[task].predictions]


@dataclass
class World:
    images: Bucket
    artifacts: Bucket
    ledger: Ledger
    label_studio: LabelStudio = field(default_factory=LabelStudio)
    logged: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ledger.set_project("digits", 1)
        self.champions = Champions(self.artifacts)
        self.predictor = TaskPredictor(
            examples.CONFIGS, self.images, self.champions, lambda: cast(Any, None), label_studio_url="http://127.0.0.1:9"
        )

    def promote(self, version: int) -> None:
        onnx = examples.brightness_model(sharpness=0.001 * version)
        self.artifacts.put(artifacts.onnx_key("digits", version), onnx)
        self.champions.swap(examples.champion(version, onnx), tag=self.champions.read_tagged("digits")[1])

    def image(self, name: str, data: bytes | None = None) -> str:
        key = f"images/digits/{name}.png"
        self.images.put(key, examples.png(len(name) % 10) if data is None else data)
        return s3_uri(self.images.name, key)

    def work(self, tasks: TaskRange = RANGE_OF_ALL) -> Prelabelled:
        studio = cast(Any, self.label_studio)
        return Prelabeller(self.champions, self.ledger, studio, self.predictor, log=self._log)(tasks)

    def _log(self, message: str, **fields: Any) -> None:
        self.logged.append((message, fields))


@pytest.fixture
def world(new_bucket: Callable[[], Bucket], ledger: Ledger) -> World:
    return World(new_bucket(), new_bucket(), ledger)


def test_every_task_of_the_range_gets_one_prediction_of_the_champion(world: World) -> None:
    world.promote(3)
    studio = world.label_studio
    for name in ("a", "bb", "ccc"):
        studio.add(world.image(name))
    outcome = world.work(TaskRange(model="digits", after=1, upto=2))
    assert (outcome.version, outcome.tasks, outcome.written) == ("digits v3", 1, 1)
    assert [len(task.predictions) for task in studio.tasks.values()] == [0, 1, 0]
    world.work()
    assert [[stored.made_by for stored in task.predictions] for task in studio.tasks.values()] == [["digits v3"]] * 3
    assert studio.writes == ["add"] * 3


def test_a_new_version_takes_the_place_of_the_old_one_in_the_same_prediction(world: World) -> None:
    """An editor that has the old one open names it when it submits, and Label Studio wants it to exist."""
    task = world.label_studio.add(world.image("a"), "digits v0")
    for version in (1, 2):
        world.promote(version)
        world.work()
        assert world.label_studio.versions(task) == [(1, f"digits v{version}")]


def test_a_second_delivery_changes_nothing(world: World) -> None:
    world.promote(1)
    world.label_studio.add(world.image("a"), "digits v0")
    world.label_studio.add(world.image("b"))
    world.work()
    before = list(world.label_studio.writes)
    assert world.work().written == 0
    assert world.label_studio.writes == before


def test_before_the_first_version_there_is_nothing_to_do(world: World) -> None:
    task = world.label_studio.add(world.image("a"), "digits v0")
    assert world.work().version is None
    assert world.label_studio.versions(task) == [(1, "digits v0")]


def test_tasks_that_somebody_has_begun_and_predictions_of_others_are_left_alone(world: World) -> None:
    world.promote(2)
    begun = world.label_studio.add(world.image("a"), "digits v1")
    world.label_studio.tasks[begun].begun = True
    imported = world.label_studio.add(world.image("b"), "sam v1", "digits", "digits v1", "review of digits v1")
    world.work()
    assert world.label_studio.versions(begun) == [(1, "digits v1")]
    versions = [made_by for _, made_by in world.label_studio.versions(imported)]
    assert versions == ["sam v1", "digits", "digits v2", "review of digits v1"]


def test_a_range_in_which_all_is_labelled_needs_no_model(world: World) -> None:
    world.promote(1)
    world.artifacts.put(artifacts.onnx_key("digits", 1), b"which to read would be an error")
    assert world.work().tasks == 0


def test_a_broken_image_spoils_no_other_task(world: World) -> None:
    world.promote(2)
    broken = world.label_studio.add(world.image("a", b"no image"), "digits v1")
    good = world.label_studio.add(world.image("b"), "digits v1")
    world.work()
    assert world.label_studio.versions(broken) == [(1, "digits v1")]
    assert world.label_studio.versions(good) == [(2, "digits v2")]
    [(message, fields)] = world.logged
    assert (message, fields["task"]) == ("not predicted", broken)


def test_an_s3_that_is_away_brings_the_message_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.promote(1)
    lost, good = (world.label_studio.add(world.image(name)) for name in ("lost", "good"))
    get = Bucket.get

    def sometimes(self: Bucket, key: str, **limit: Any) -> bytes | None:
        if "lost" in key:
            raise StorageError("S3 does not answer")
        return get(self, key, **limit)

    monkeypatch.setattr(Bucket, "get", sometimes)
    with pytest.raises(StorageError, match="does not answer"):
        world.work()
    assert [len(world.label_studio.tasks[task].predictions) for task in (lost, good)] == [0, 1]


def test_a_promotion_meanwhile_is_seen_by_whoever_writes_last(world: World) -> None:
    """The slower of two workers would otherwise leave the version that it began with."""
    world.promote(1)
    tasks = [world.label_studio.add(world.image(name), "digits v0") for name in ("a", "bb")]
    world.label_studio.meanwhile = lambda: world.promote(2)
    assert world.work().version == "digits v2"
    assert [world.label_studio.versions(task)[0][1] for task in tasks] == ["digits v2"] * 2


def test_after_a_promotion_meanwhile_what_is_stored_is_the_new_versions_and_not_only_its_name(world: World) -> None:
    world.promote(1)
    task = world.label_studio.add(world.image("a"), "digits v0")
    there = world.label_studio.tasks[task]
    there.group = next(group for group in map(examples.sha256, "abcdefgh") if stream_of(group, examples.DIGITS) == "active")
    world.label_studio.meanwhile = lambda: world.promote(2)
    world.work()
    champion = world.champions.read("digits")
    assert champion is not None
    [answer] = world.predictor.predict(champion, [PredictTask(task, {"image": there.image}, there.meta)])
    assert isinstance(answer, Predicted)
    assert there.predictions[0].score == answer.place.score


def test_what_is_annotated_while_the_model_runs_is_not_touched(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.promote(1)
    begun, waiting = (world.label_studio.add(world.image(name), "digits v0") for name in ("a", "b"))
    predict = world.predictor.predict

    def slowly(*arguments: Any) -> Any:
        world.label_studio.tasks[begun].begun = True
        return predict(*arguments)

    monkeypatch.setattr(world.predictor, "predict", slowly)
    world.work()
    assert world.label_studio.versions(begun) == [(1, "digits v0")]
    assert world.label_studio.versions(waiting) == [(2, "digits v1")]


def test_a_superfluous_prediction_goes_when_nobody_has_it_open_any_more(world: World) -> None:
    """Opened between the swap of the pointer and the worker's coming: the old version's, and a live one of the new."""
    world.promote(2)
    task = world.label_studio.add(world.image("a"), "digits v1", "digits v2")
    outcome = world.work()
    assert world.label_studio.versions(task) == [(1, "digits v2"), (2, "digits v2")]
    assert (outcome.deleted, outcome.unsettled) == (0, 1)
    assert world.work().unsettled == 1
    world.label_studio.let_time_pass()
    outcome = world.work()
    assert world.label_studio.versions(task) == [(1, "digits v2")]
    assert (outcome.deleted, outcome.unsettled) == (1, 0)


def test_a_write_that_fails_is_tried_again(world: World) -> None:
    world.promote(1)
    tasks = [world.label_studio.add(world.image(name)) for name in ("a", "bb", "ccc")]
    world.label_studio.broken = 2
    world.work()
    assert [len(world.label_studio.tasks[task].predictions) for task in tasks] == [1, 1, 1]


def test_a_deletion_that_fails_is_tried_again(world: World) -> None:
    world.promote(1)
    task = world.label_studio.add(world.image("a"), *["digits v1"] * 3)
    world.work()
    world.label_studio.let_time_pass()
    world.label_studio.broken = 1
    world.work()
    assert world.label_studio.versions(task) == [(1, "digits v1")]


def test_a_label_studio_that_takes_nothing_is_an_error(world: World) -> None:
    world.promote(1)
    world.label_studio.add(world.image("a"))
    world.label_studio.broken = 100
    with pytest.raises(LabelStudioError, match="locked"):
        world.work()


def test_the_live_answer_has_the_same_score_and_gets_its_cluster_afterwards(world: World) -> None:
    world.promote(1)
    task = world.label_studio.add(world.image("a"))
    live = Predictor(examples.CONFIGS, world.champions, world.predictor, lambda: cast(Any, None), log=world._log)
    there = world.label_studio.tasks[task]
    body = {"tasks": [{"id": task, "data": {"image": there.image}, "meta": {"group": there.group}}]}
    answer = msgspec.to_builtins(live.predict("digits", json.dumps(body).encode(), seconds=29))["results"][0]
    world.label_studio._store(task, answer["model_version"], answer["score"], cluster=7)  # no cluster of this version
    world.work()
    [stored] = world.label_studio.tasks[task].predictions
    assert stored.score == pytest.approx(answer["score"])
    assert stored.cluster is None


# Versions in shadow, and drift


def into_shadow(world: World, version: int, onnx: bytes) -> Promotion:
    """Let a version run in shadow beside the champion."""
    world.artifacts.put(artifacts.onnx_key("digits", version), onnx)
    champion = world.champions.read("digits")
    assert champion is not None
    rules = GateRules(margin=0.02, class_floor=0.1, confidence=0.95, shadow=20)
    return world.ledger.record_promotion(
        Promotion(
            model="digits",
            job_name=f"job-{version}",
            version=version,
            verdict="shadow",
            reason="better",
            metric="accuracy",
            value=0.9,
            holdout_images=20,
            n_annotations=200,
            decided_at="2026-01-01",
            shadow=Shadow(challenger=examples.champion(version, onnx), champion=champion, rules=rules),
        )
    )


def with_card(onnx_file: bytes, **changes: Any) -> bytes:
    made = onnx.load_from_string(onnx_file)
    onnx.helper.set_model_props(
        made, {"labelloop": msgspec.json.encode(msgspec.structs.replace(examples.model_card(), **changes)).decode()}
    )
    return bytes(made.SerializeToString())


def held_out(world: World, count: int) -> list[int]:
    """So many tasks of the holdout, and as many others between them; the former's ids."""
    found: list[int] = []
    salt = 0
    while len(found) < count:
        salt += 1
        data = examples.png(salt % 10, salt=salt)
        task = world.label_studio.add(world.image(f"n{salt}", data))
        there = world.label_studio.tasks[task]
        there.group = there.sha256 = examples.sha256(data)
        if shadow.counts(there.group, examples.DIGITS):
            found.append(task)
    return found


def test_a_version_in_shadow_is_asked_about_the_holdout_and_shown_to_nobody(world: World) -> None:
    world.promote(1)
    backwards = with_card(examples.brightness_model(), classes=list(reversed(examples.DIGITS.classes)))
    into_shadow(world, 2, backwards)
    tasks = held_out(world, 4)
    assert len(world.label_studio.tasks) > 4
    assert world.work().in_shadow == 4
    pairs = {pair.task: pair for pair in world.ledger.pairs("digits", 2)}
    assert sorted(pairs) == tasks
    for pair in pairs.values():
        assert (pair.version, pair.champion, pair.scored) == (2, 1, None)
        assert int(pair.says[0].label) == 9 - int(pair.champion_says[0].label)
        assert pair.sha256 == world.label_studio.tasks[pair.task].sha256
    shown = {stored.made_by for task in world.label_studio.tasks.values() for stored in task.predictions}
    assert shown == {"digits v1"}
    world.work()
    assert {pair.task: pair for pair in world.ledger.pairs("digits", 2)} == pairs, "a second delivery changes nothing"


def test_tasks_that_somebody_has_begun_tell_nothing_of_a_version_in_shadow(world: World) -> None:
    world.promote(1)
    into_shadow(world, 2, examples.brightness_model())
    (task,) = held_out(world, 1)
    world.label_studio.tasks[task].begun = True
    (message,) = asked_ranges("digits", [task])
    assert world.work(message).in_shadow == 0
    assert world.ledger.pairs("digits", 2) == []


def test_a_task_that_somebody_made_by_hand_is_predicted_and_tells_nothing(world: World) -> None:
    world.promote(1)
    into_shadow(world, 2, examples.brightness_model())
    held_out(world, 1)
    by_hand = world.label_studio.add(world.image("by hand"))
    world.label_studio.tasks[by_hand].group = ""
    assert world.work().in_shadow == 1
    assert world.label_studio.versions(by_hand)[0][1] == "digits v1"


def test_a_damaged_version_in_shadow_keeps_nobody_waiting(world: World) -> None:
    world.promote(1)
    into_shadow(world, 2, b"no model")
    tasks = held_out(world, 2)
    assert world.work().in_shadow == 0
    assert all(world.label_studio.versions(task)[0][1] == "digits v1" for task in tasks)
    assert [message for message, _ in world.logged] == ["not run in shadow"]


def test_nobody_is_asked_once_another_version_serves(world: World) -> None:
    world.promote(1)
    into_shadow(world, 2, examples.brightness_model())
    world.promote(3)
    held_out(world, 2)
    assert world.work().in_shadow == 0
    assert world.ledger.pairs("digits", 2) == []


def test_drift_is_that_of_the_holdouts_newest_images(world: World) -> None:
    """The model sees brightness alone; it was measured on images that are a third as bright."""
    brightness = np.random.default_rng(0).uniform(0, 80, (60, 1)).astype(np.float32)
    against = drift.reference(brightness, [0.5] * 60)
    file = with_card(examples.brightness_model(), drift=against)
    world.artifacts.put(artifacts.onnx_key("digits", 1), file)
    world.champions.swap(examples.champion(1, file), tag=None)
    tasks = held_out(world, drift.FEWEST)
    outcome = world.work()
    found = world.ledger.drift("digits", 1)
    assert outcome.drift == found
    assert found is not None
    assert [one.task for one in found.served] == tasks
    assert (found.embedding or 0) > drift.ALARM
    world.work()
    assert world.ledger.drift("digits", 1) == found


# Tasks that somebody asked predictions of


def asked(*tasks: int) -> TaskRange:
    (message,) = asked_ranges("digits", tasks)
    return message


def test_asked_tasks_get_the_champions_prediction_once_labelled_or_not_and_no_other_does(world: World) -> None:
    world.promote(2)
    studio = world.label_studio
    names = ("new", "stale", "labelled", "labelled before", "has it", "nobody asked")
    made_by: list[list[str]] = [[], ["digits v1"], [], ["digits v1", "sam v1"], ["digits v2"], []]
    tasks = [studio.add(world.image(name), *versions) for name, versions in zip(names, made_by, strict=True)]
    for begun in tasks[2:5]:
        studio.tasks[begun].begun = True
    message = asked(*tasks[:5])
    assert world.work(message).tasks == 5
    versions = [[made for _, made in studio.versions(task)] for task in tasks]
    assert versions == [["digits v2"], ["digits v2"], ["digits v2"], ["digits v1", "sam v1", "digits v2"], ["digits v2"], []]
    before = list(studio.writes)
    assert world.work(message).written == 0
    assert studio.writes[len(before) :] == []


def test_a_labelled_tasks_second_prediction_of_the_champion_goes_when_nobody_has_it_open(world: World) -> None:
    world.promote(2)
    task = world.label_studio.add(world.image("a"), "digits v1", "digits v2", "digits v2")
    world.label_studio.tasks[task].begun = True
    assert world.work(asked(task)).unsettled == 1
    world.label_studio.let_time_pass()
    assert world.work(asked(task)).unsettled == 0
    assert world.label_studio.versions(task) == [(1, "digits v1"), (2, "digits v2")]


def test_asked_tasks_that_are_gone_are_no_error(world: World) -> None:
    world.promote(1)
    assert world.work(asked(3, 4)).tasks == 0


# The queue


@pytest.fixture
def queue(aws: str) -> tuple[PrelabelQueue, str]:
    url = boto3.client("sqs").create_queue(QueueName=f"prelabel-{uuid.uuid4().hex}")["QueueUrl"]
    return PrelabelQueue(url, boto3.client("sqs")), url


def received(url: str) -> list[TaskRange]:
    found: list[TaskRange] = []
    while messages := boto3.client("sqs").receive_message(QueueUrl=url, MaxNumberOfMessages=10).get("Messages"):
        found += [msgspec.json.decode(message["Body"], type=TaskRange) for message in messages]
    return sorted(found, key=lambda tasks: tasks.after)


def test_all_unlabelled_tasks_are_sent_in_ranges(queue: tuple[PrelabelQueue, str]) -> None:
    studio = LabelStudio(tasks={number: Task("", "", begun=number % 2 == 0) for number in range(1, 3001)})
    sent = queue[0].send(unlabelled_ranges("digits", cast(Any, studio), 1))
    ranges = received(queue[1])
    assert len(ranges) == sent >= 1500 / RANGE
    assert ranges[0].after == 0
    assert ranges[-1].upto == 2999
    assert all(before.upto == after.after for before, after in pairwise(ranges))
    assert max(len(studio.unlabelled_tasks(1, one.after, one.upto)) for one in ranges) <= RANGE


def test_a_later_look_waits(queue: tuple[PrelabelQueue, str]) -> None:
    queue[0].send([RANGE_OF_ALL], delay=SETTLED)
    attributes = boto3.client("sqs").get_queue_attributes(QueueUrl=queue[1], AttributeNames=["All"])["Attributes"]
    assert (attributes["ApproximateNumberOfMessages"], attributes["ApproximateNumberOfMessagesDelayed"]) == ("0", "1")


def test_a_queue_that_is_gone_is_an_error(aws: str) -> None:
    with pytest.raises(ServiceError, match="takes no message"):
        PrelabelQueue(f"{aws}/000000000000/gone", boto3.client("sqs")).send([RANGE_OF_ALL])
