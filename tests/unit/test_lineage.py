"""`labelloop lineage`: every step of the way from a prediction back to annotations, and from an image to versions."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console
from typer.testing import CliRunner

from cli import lineage
from cli.deployment import Deployment
from cli.lineage import Answer, ImageLineage, Lineage
from cli.main import app
from labelloop import artifacts, snapshot_index
from labelloop.artifacts import Bucket, Champions
from labelloop.dataset import split_of
from labelloop.errors import LabelStudioError, RequestError, StorageError
from labelloop.label_studio.client import KnownTask, StoredPrediction
from labelloop.label_studio.payloads import AnnotatedTask
from labelloop.ledger import Ledger
from labelloop.records import Interval, Job, Promotion, Takeover, Training
from tests import examples

PROJECT = 7
NOON = "2026-01-01T12:00:00.000+00:00"
DIGITS = examples.CONFIGS["digits"]


@dataclass
class LabelStudio:
    """One project with its annotated tasks and its predictions."""

    annotated: list[AnnotatedTask] = field(default_factory=list)
    predictions: dict[int, StoredPrediction] = field(default_factory=dict)

    def annotated_tasks(self, project: int) -> Iterator[list[AnnotatedTask]]:
        yield list(self.annotated)

    def tasks(self, project: int, data_key: str) -> list[KnownTask]:
        return [_known(task) for task in self.annotated]

    def tasks_after(self, project: int, last: int, data_key: str, *, limit: int = 500) -> list[KnownTask]:
        return [task for task in self.tasks(project, data_key) if task.id > last][:limit]

    def prediction(self, prediction: int) -> StoredPrediction:
        if prediction not in self.predictions:
            raise LabelStudioError("not found", status=404)
        return self.predictions[prediction]


def _known(task: AnnotatedTask) -> KnownTask:
    sha256, group, _ = task.content
    return KnownTask(task.id, task.image("image"), sha256, (8, 8), 1, group)


def annotated(number: int, label: str = "1", *, group: str | None = None, **more: Any) -> AnnotatedTask:
    """A task that ingest made; `group` is the content that it looks like."""
    meta = {"sha256": examples.sha256(str(number)), "width": 8, "height": 8, "group": examples.sha256(group or str(number))}
    return examples.annotated_task(number, label, meta=meta, **more)


@dataclass
class Traced:
    """A model with a ledger and buckets; `train` turns what is annotated now into a version."""

    ledger: Ledger
    artifacts: Bucket
    images: Bucket
    label_studio: LabelStudio = field(default_factory=LabelStudio)

    def __post_init__(self) -> None:
        self.ledger.set_project("digits", PROJECT)

    @property
    def lineage(self) -> Lineage:
        deployment = Deployment("dev")
        vars(deployment).update(
            ledger=self.ledger,
            artifacts=self.artifacts,
            images=self.images,
            champions=Champions(self.artifacts),
            label_studio=self.label_studio,
        )
        return Lineage(deployment, DIGITS)

    def train(self, version: int, tasks: list[AnnotatedTask], **decided: Any) -> Job:
        self.label_studio.annotated = tasks
        uri = f"s3://{self.artifacts.name}/{artifacts.manifest_key('digits', '{digest}')}"
        snapshot, manifest = snapshot_index.freeze(tasks, DIGITS.config, DIGITS.label_config, uri)
        self.artifacts.put(artifacts.manifest_key("digits", snapshot.digest), manifest)
        job = msgspec.structs.replace(examples.job(f"job-{version}", snapshot.n_annotations, snapshot.digest), snapshot=snapshot)
        head = self.ledger.claim(self.ledger.head("digits"), job)
        self.ledger.finish(head, head, Training(job=job, status="completed", ended_at=NOON))
        self.ledger.record_promotion(promotion(version, **decided))
        return job


def stored(made_by: str, *, task: int) -> StoredPrediction:
    return StoredPrediction(30, task, made_by, 0.4, NOON, NOON, None)


def promotion(version: int, **more: Any) -> Promotion:
    fields: dict[str, Any] = {
        "model": "digits",
        "job_name": f"job-{version}",
        "version": version,
        "verdict": "promote",
        "reason": "better",
        "metric": "accuracy",
        "value": 0.9,
        "holdout_images": 20,
        "n_annotations": 100,
        "decided_at": NOON,
    }
    return Promotion(**{**fields, **more})


@pytest.fixture
def traced(ledger: Ledger, bucket: Bucket) -> Traced:
    return Traced(ledger, bucket, bucket)


def said(found: Answer) -> str:
    """What a person reads, in one line."""
    file = io.StringIO()
    lineage.show(found, Console(file=file, width=100))
    return " ".join(file.getvalue().split())


# A version


def test_a_version_knows_its_job_snapshot_annotations_and_takeovers(traced: Traced) -> None:
    difference = Interval(value=0.03, low=-0.01, high=0.07)
    job = traced.train(1, [annotated(number) for number in range(1, 6)], difference=difference)
    traced.ledger.record_takeover(
        Takeover(model="digits", version=1, before=None, by="gate", reason="the first", at="2026-01-01T12:00:01.000+00:00")
    )
    traced.ledger.record_takeover(
        Takeover(model="digits", version=2, before=1, by="promote", reason="I say so", at="2026-01-01T12:00:02.000+00:00")
    )
    traced.ledger.record_takeover(
        Takeover(model="digits", version=3, before=2, by="gate", reason="no matter", at="2026-01-01T12:00:03.000+00:00")
    )
    found = traced.lineage.of_version(1)
    assert (found.job_name, found.job_status, found.dataset.digest) == ("job-1", "completed", job.digest)
    assert sorted(found.dataset.annotations) == [f"annotation-{number}" for number in range(1, 6)]
    assert found.dataset.train + found.dataset.validation + found.dataset.test == 5
    assert [takeover.reason for takeover in found.takeovers] == ["the first", "I say so"]
    shown = said(found)
    for part in ("job-1", job.digest, "5 annotations", "+3.0 points (-1.0 to +7.0)", "took over", "to version 2, by promote"):
        assert part in shown


def test_an_unknown_version_is_said_with_those_there_are(traced: Traced) -> None:
    traced.train(1, [annotated(1)])
    with pytest.raises(RequestError, match="no version 4 of digits; there are: 1"):
        traced.lineage.of_version(4)


def test_a_manifest_that_is_gone_is_an_error(traced: Traced, new_bucket: Any) -> None:
    traced.train(1, [annotated(1)])
    traced.artifacts = new_bucket()
    with pytest.raises(StorageError, match=r"manifest\.jsonl is missing"):
        traced.lineage.of_version(1)


# A prediction


def test_a_prediction_leads_to_its_version(traced: Traced) -> None:
    traced.train(1, [annotated(1), annotated(2)])
    traced.label_studio.predictions[30] = stored("digits v1", task=2)
    found = traced.lineage.of_prediction(30)
    assert found.version is not None
    assert (found.task, found.image, found.version.job_name) == (2, "s3://images/images/digits/2.png", "job-1")
    assert "made by digits v1" in said(found)


def test_a_prediction_before_the_first_version_only_orders(traced: Traced) -> None:
    traced.train(1, [annotated(1)])
    traced.label_studio.predictions[30] = stored("digits v0", task=1)
    found = traced.lineage.of_prediction(30)
    assert found.version is None
    assert "only orders the tasks" in said(found)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "no prediction 30"),
        (stored("letters v1", task=1), "no version of digits"),
        (stored("digits review", task=1), "no version of digits"),
        (stored("digits v9", task=1), "no version 9"),
        (stored("digits v1", task=99), "project 7 has no task 99"),
    ],
)
def test_a_prediction_that_is_not_the_models(traced: Traced, found: StoredPrediction | None, message: str) -> None:
    traced.train(1, [annotated(1)])
    if found:
        traced.label_studio.predictions[30] = found
    with pytest.raises(RequestError, match=message):
        traced.lineage.of_prediction(30)


# An image


def test_an_image_and_its_near_duplicates_lead_to_every_version_that_saw_them(traced: Traced) -> None:
    alike, alone = [annotated(1, "7"), annotated(2, "8", group="1")], annotated(3)
    traced.train(1, [alike[0], alone])
    traced.train(2, [*alike, alone])
    found = traced.lineage.of_image(examples.sha256("2"))
    split = split_of(examples.sha256("1"), DIGITS.config.splits)
    assert (found.task, found.group, found.split) == (2, examples.sha256("1"), split)
    assert set(found.members) == {examples.sha256("1"), examples.sha256("2")}
    assert [(use.version, use.task, use.labels, use.split) for use in found.uses] == [
        (1, 1, ["7"], split),
        (2, 1, ["7"], split),
        (2, 2, ["8"], split),
    ]
    assert "looks like s3://images/images/digits/1.png" in said(found)
    assert _uses(traced.lineage.of_task(3)) == [(1, 3), (2, 3)]


def test_an_image_is_found_by_file_address_and_content(traced: Traced, tmp_path: Path) -> None:
    content = b"1"
    traced.train(1, [annotated(1)])
    (tmp_path / "mine.png").write_bytes(content)
    traced.images.put("images/digits/elsewhere.png", content)
    for image in (
        examples.sha256(content),
        str(tmp_path / "mine.png"),
        f"s3://{traced.images.name}/images/digits/elsewhere.png",
        "s3://images/images/digits/1.png",  # gone, but a task shows it
    ):
        assert _uses(traced.lineage.of_image(image)) == [(1, 1)], image


def test_an_image_whose_task_is_gone_is_found_in_the_snapshots(traced: Traced) -> None:
    traced.train(1, [annotated(1), annotated(2)])
    traced.label_studio.annotated = []
    for image in (examples.sha256("2"), "s3://images/images/digits/2.png"):
        assert _uses(traced.lineage.of_image(image)) == [(1, 2)]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("0" * 64, "upload-images digits FILE"),
        ("s3://images/nothing.png", "nothing lies at"),
        ("s3:/images", "no file that can be read"),
        ("s3://images", "is no s3://bucket/key address"),
        ("/nowhere.png", "no file that can be read"),
    ],
)
def test_an_image_that_nobody_knows(traced: Traced, image: str, message: str) -> None:
    traced.train(1, [annotated(1)])
    with pytest.raises(RequestError, match=message):
        traced.lineage.of_image(image)


def _uses(found: ImageLineage) -> list[tuple[int, int]]:
    return [(use.version, use.task) for use in found.uses]


# A snapshot, built again


def test_a_snapshot_is_the_same_whatever_was_annotated_since(traced: Traced) -> None:
    tasks = [annotated(number) for number in range(1, 5)]
    job = traced.train(1, tasks)
    later = annotated(1, "2", updated_at="2027-01-01T00:00:00.000000Z", unique_id="later").annotations
    again = msgspec.structs.replace(tasks[0], annotations=[*tasks[0].annotations, *later])
    traced.label_studio.annotated = [annotated(9), again, *reversed(tasks[1:])]
    found = traced.lineage.rebuild(1)
    assert (found.same, found.rebuilt, found.changes) == (True, job.digest, [])
    assert "the same: every annotation is what it was" in said(found)


def test_what_changed_since_is_listed(traced: Traced) -> None:
    job = traced.train(1, [annotated(number) for number in range(1, 6)])
    unusable = annotated(4, "no class of ours")
    traced.label_studio.annotated = [annotated(1), annotated(2, "3"), unusable, annotated(5)]
    found = traced.lineage.rebuild(1)
    assert (found.same, found.stored) == (False, job.digest)
    assert found.rebuilt != job.digest
    assert {change.task: change.what for change in found.changes} == {
        2: "changed: regions 1 → 3",
        3: "gone from Label Studio",
        4: "left out now: the class 'no class of ours' is not in config.yaml",
    }
    assert "3 annotations changed since" in said(found)


def test_a_manifest_that_was_overwritten_is_told_from_annotations_that_changed(traced: Traced) -> None:
    job = traced.train(1, [annotated(1), annotated(2)])
    key = artifacts.manifest_key("digits", job.digest)
    first, *_ = (traced.artifacts.get(key) or b"").splitlines(keepends=True)
    traced.artifacts.put(key, first)
    assert "overwritten" in said(traced.lineage.rebuild(1))


# The command


@pytest.mark.parametrize(
    ("words", "said_"),
    [
        ([], "give one of"),
        (["--task", "1", "--version", "2"], "give one of"),
        (["--task", "1", "--rebuild"], "--version N --rebuild"),
        (["--version", "1"], "labelloop up"),
    ],
)
def test_a_question_that_has_no_answer(tmp_path: Path, words: list[str], said_: str) -> None:
    done = CliRunner().invoke(app, ["lineage", "digits", *words, "--home", str(tmp_path)], env={"COLUMNS": "200"})
    assert done.exit_code in (1, 2)
    assert said_ in done.output + str(done.exception)


def test_the_command_fails_where_the_digest_differs(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    traced.train(1, [annotated(1), annotated(2)])
    monkeypatch.setattr("cli.lineage.Lineage", lambda *_: traced.lineage)
    monkeypatch.setattr("cli.deployment.Deployment.find", lambda *_: None)
    command = ["lineage", "digits", "--version", "1", "--rebuild", "--json"]
    assert CliRunner().invoke(app, command).exit_code == 0
    traced.label_studio.annotated = [annotated(1)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert [change["task"] for change in json.loads(done.stdout)["changes"]] == [2]
