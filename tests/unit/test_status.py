"""`labelloop status`: what it reads from the ledger and Label Studio, and how a person sees it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from rich.console import Console

from cli.status import FailedTraining, Status, _of_the_trainings, read_status, show
from labelloop import artifacts
from labelloop.artifacts import Bucket, Champions
from labelloop.dataset import resolution
from labelloop.errors import LabelStudioError
from labelloop.label_studio.client import Webhook
from labelloop.label_studio.payloads import AnnotatedTask, Annotation
from labelloop.ledger import Ledger
from labelloop.model_config import AutoAccept, ModelFolder
from labelloop.records import (
    Drift,
    Failure,
    GateRules,
    Interval,
    LabelsSaved,
    LeftOut,
    Promotion,
    ReviewCase,
    Scored,
    Served,
    Shadow,
    ShadowPair,
    Takeover,
    Timing,
    Training,
)
from tests import examples

NOON = "2026-01-01T12:00:00.000+00:00"
DIGITS = examples.CONFIGS["digits"]


@dataclass
class LabelStudio:
    """One project; it counts what it is asked."""

    annotated: list[AnnotatedTask] = field(default_factory=list)
    down: bool = False
    asked: list[str] = field(default_factory=list)
    hooks: list[Webhook] = field(default_factory=lambda: [Webhook(1, "http://api/digits/webhook", is_active=True, actions=[])])
    backend: dict[str, Any] = field(default_factory=lambda: {"url": "http://api/digits", "state": "CO"})

    def webhooks(self, project: int) -> list[Webhook]:
        return self.hooks

    def backends(self, project: int) -> list[dict[str, Any]]:
        return [self.backend]

    def counts(self, project: int) -> dict[str, int]:
        self._ask("counts")
        return {"tasks": 1800, "annotated": len(self.annotated)}

    def count_predicted(self, project: int, version: str) -> int:
        self._ask("predicted")
        return 1200 if version == "digits v2" else 0

    def annotated_tasks(self, project: int) -> Iterator[list[AnnotatedTask]]:
        self._ask("annotated tasks")
        yield self.annotated

    def _ask(self, what: str) -> None:
        self.asked.append(what)
        if self.down:
            raise LabelStudioError("Label Studio does not answer")


@dataclass
class Stage:
    ledger: Ledger
    bucket: Bucket
    label_studio: LabelStudio = field(default_factory=LabelStudio)
    folder: ModelFolder = DIGITS

    def __post_init__(self) -> None:
        self.ledger.set_project("digits", 1)

    def status(self) -> Status:
        deployment = SimpleNamespace(
            stage="local",
            ledger=self.ledger,
            champions=Champions(self.bucket),
            label_studio=self.label_studio,
            backend_url=lambda model: f"http://api/{model}",
            command=lambda words: f"labelloop {words}",
        )
        return read_status(cast(Any, deployment), self.folder)

    def decide(self, version: int, value: float, **more: Any) -> None:
        fields: dict[str, Any] = {
            "model": "digits",
            "job_name": f"job-{version}",
            "version": version,
            "verdict": "promote",
            "reason": f"reason {version}",
            "metric": "accuracy",
            "value": value,
            "holdout_images": 100 * version,
            "n_annotations": 500 * version,
            "decided_at": NOON,
        }
        promotion = Promotion(**{**fields, **more})
        self.ledger.record_promotion(promotion)
        if promotion.verdict == "promote":
            champions = Champions(self.bucket)
            champions.swap(examples.champion(version), tag=champions.read_tagged("digits")[1])
            at = f"2026-01-0{version}T12:00:00.000+00:00"
            self.ledger.record_takeover(
                Takeover(model="digits", version=version, before=version - 1 or None, by="gate", reason="won", at=at)
            )


@pytest.fixture
def stage(ledger: Ledger, bucket: Bucket) -> Stage:
    return Stage(ledger, bucket)


@pytest.fixture
def busy(stage: Stage) -> Stage:
    """Three versions, the last of them undecided."""
    stage.decide(1, 0.88, calibration_error=0.051)
    saved = LabelsSaved(share=Interval(value=0.42, low=0.13, high=0.61), control=96)
    difference = Interval(value=0.083, low=0.041, high=0.125)
    stage.decide(2, 0.963, difference=difference, calibration_error=0.021, labels_saved=saved)
    unclear = Interval(value=0.004, low=-0.021, high=0.029)
    timing = Timing(seconds={"read": 0.25, "fit": 20.0, "record": 1.5}, images_per_second=1234.5, waiting=0.002, decoded=400)
    stage.decide(3, 0.967, difference=unclear, calibration_error=0.018, verdict="undecided", suspects=7, timing=timing)
    return stage


def said(status: Status, width: int = 300) -> list[str]:
    file = io.StringIO()
    show(status, Console(file=file, width=width))
    return file.getvalue().splitlines()


def stripped(stage: Stage) -> list[str]:
    return [line.rstrip() for line in said(stage.status())]


def drawn(number: int, label: str, version: int, kept: str) -> AnnotatedTask:
    """A task whose annotator had a version's `kept` before them and said `label`."""
    task = examples.annotated_task(number, label)
    result = examples.annotated_task(number, kept).annotations[0].result
    prediction = {"id": number, "model_version": f"digits v{version}", "result": result}
    exported = msgspec.json.decode(msgspec.json.encode({"id": number, "prediction": prediction}), type=Annotation)
    annotation = msgspec.structs.replace(task.annotations[0], prediction=exported.prediction)
    return msgspec.structs.replace(task, annotations=[annotation])


def test_versions_with_verdict_difference_and_calibration(busy: Stage) -> None:
    status = busy.status()
    assert [(v.version, v.verdict, v.champion, v.suspects) for v in status.versions] == [
        (1, "promote", False, 0),
        (2, "promote", True, 0),
        (3, "undecided", False, 7),
    ]
    assert status.versions[1].difference == Interval(value=0.083, low=0.041, high=0.125)
    lines = said(status)
    row = next(line for line in lines if line.startswith("      2 "))
    for part in ("1,000", "96.3%", "2.1%", "+8.3 (+4.1 to +12.5)", "promote", "champion"):
        assert part in row
    assert any("undecided: reason 3" in line for line in lines)


def test_it_says_what_the_last_training_took(busy: Stage) -> None:
    status = busy.status()
    assert [version.timing is None for version in status.versions] == [True, True, False]
    (line,) = (line for line in said(status) if line.startswith("last training"))
    assert "22 s: read 0.2, fit 20.0, record 1.5; 1,234 images/s, 0.2% of it waiting for images; 400 images decoded" in line


def test_the_table_fits_a_hundred_columns(busy: Stage) -> None:
    lines = said(busy.status())
    assert max(len(line.rstrip()) for line in lines[1:6]) <= 100


def test_at_eighty_columns_nothing_is_lost(busy: Stage) -> None:
    address = f"s3://labelloop-prod-images-123456789012/images/digits/{'very-' * 20}long.jpg"
    status = msgspec.structs.replace(busy.status(), problems=[f"{address} is no image"])
    lines = said(status, width=80)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= 80
    assert "…" not in text
    assert address in "".join(text.split())
    assert {"annotations", "calibration", "champion", "undecided", "96.3%"} <= set(text.split())


def test_the_holdout_says_what_it_tells_apart_and_a_small_one_warns(stage: Stage) -> None:
    assert stage.status().holdout is None
    stage.decide(1, 0.9, holdout_images=5)
    assert any("5 images tell apart no less than" in line for line in said(stage.status()))
    stage.decide(2, 0.9, holdout_images=2000)
    status = stage.status()
    assert status.holdout is not None
    assert (status.holdout.images, status.holdout.resolution) == (2000, resolution(2000))
    assert any(f"2,000 images tell apart {100 * resolution(2000):.1f} points" in line for line in said(status))


def test_labels_saved_are_those_of_the_last_version_that_measured_them(busy: Stage) -> None:
    status = busy.status()
    assert status.queue.labels_saved is not None
    saved = "uncertainty, 10% at random; labels saved against random: 42% (13% to 61%), by 96"
    assert any(saved in line for line in said(status))


def test_a_version_in_shadow_and_what_is_known_of_it(busy: Stage) -> None:
    assert busy.status().shadow is None
    champion = Champions(busy.bucket).read("digits")
    assert champion is not None
    rules = GateRules(margin=0.02, class_floor=0.1, confidence=0.95, shadow=200)
    busy.decide(4, 0.98, verdict="shadow", shadow=Shadow(challenger=examples.champion(4), champion=champion, rules=rules))
    answer = Scored(answered_at=NOON, scored_at=NOON, labels=["1"], challenger=True, champion=True, seen=True)
    pairs = [
        ShadowPair(
            model="digits",
            version=4,
            champion=2,
            task=task,
            sha256="0" * 64,
            says=[],
            champion_says=[],
            noted_at=NOON,
            scored=answer if task < 3 else None,
        )
        for task in range(5)
    ]
    busy.ledger.note_pairs(pairs)
    status = busy.status()
    assert status.shadow is not None
    assert (status.shadow.version, status.shadow.champion, status.shadow.tasks, status.shadow.answered) == (4, 2, 5, 3)
    (line,) = (line for line in said(status) if line.startswith("in shadow"))
    assert "version 4 beside version 2: 5 tasks predicted by both, 3 answered" in line
    assert "annotators have answered 3 of 200 tasks" in line


def test_drift_of_the_version_that_serves(busy: Stage) -> None:
    assert busy.status().drift is None
    served = [Served(task=number, sha256=f"{number:064x}", certainty=0.5, place=[0.0]) for number in range(40)]
    busy.ledger.change_drift("digits", 2, lambda _: Drift(served=served, embedding=1.12, confidence=0.88))
    assert any(
        "1.1 (embedding), 0.9 (confidence) over the last 40 holdout images; 1 is chance" in one for one in said(busy.status())
    )
    busy.ledger.change_drift("digits", 2, lambda _: Drift(served=served[:10]))
    assert any("not measured yet, 10 of 30 images" in one for one in said(busy.status()))


def test_takeovers_come_latest_first(busy: Stage) -> None:
    status = busy.status()
    assert [takeover.version for takeover in status.takeovers] == [2, 1]
    assert any("version 2 took over from version 1" in line for line in said(status))


def test_acceptance_by_version_from_one_export(busy: Stage) -> None:
    kept = [drawn(1, "1", 1, "1"), drawn(2, "2", 1, "7"), drawn(3, "3", 2, "3")]
    busy.label_studio.annotated = [*kept, examples.annotated_task(4)]
    status = busy.status()
    assert [v.acceptance and (v.acceptance.kept, v.acceptance.shown) for v in status.versions] == [(1, 2), (1, 1), None]
    assert busy.label_studio.asked.count("annotated tasks") == 1
    assert "50%" in next(line for line in said(status) if line.startswith("      1 "))


def test_without_a_version_nothing_is_exported(stage: Stage) -> None:
    assert stage.status().auto_accept is None
    assert stage.label_studio.asked == ["counts"]


def test_review_cases_are_counted(stage: Stage) -> None:
    assert not any(line.startswith("review") for line in said(stage.status()))
    for number, settled_at in ((1, None), (2, None), (3, NOON)):
        case = ReviewCase(
            model="digits",
            project=1,
            sha256=examples.sha256(str(number)),
            task=number,
            annotation=f"annotation-{number}",
            annotated_at=NOON,
            version=1,
            quality=0.1,
            suggested=[],
            raised_at=NOON,
            settled_at=settled_at,
        )
        stage.ledger.record_review_case(case)
    assert any("2 annotations to look at again, 1 settled" in line for line in said(stage.status()))


@pytest.mark.parametrize(("accept_from", "expected"), [(0.97, "from a certainty of 0.970"), (None, "nowhere as precise")])
def test_auto_accept_says_how_it_stands(busy: Stage, accept_from: float | None, expected: str) -> None:
    assert not any(line.startswith("auto-accept") for line in said(busy.status()))
    busy.folder = ModelFolder(DIGITS.folder)
    busy.folder.__dict__["config"] = msgspec.structs.replace(DIGITS.config, auto_accept=AutoAccept(precision=0.99))
    report = msgspec.structs.replace(examples.evaluation(version=2), accept_from=accept_from)
    busy.bucket.put(artifacts.evaluation_key("digits", 2), msgspec.json.encode(report))
    assert any(line.startswith("auto-accept") and expected in line for line in said(busy.status()))


def test_what_the_champion_has_predicted_is_counted(busy: Stage) -> None:
    busy.label_studio.annotated = [examples.annotated_task(number) for number in range(1, 4)]
    assert busy.status().predicted == 1200
    (line,) = (line for line in said(busy.status()) if line.startswith("annotations"))
    assert "3 of 1,800 tasks; the champion has predicted 1,200 of the others" in line


def test_a_label_studio_that_is_down_costs_only_its_own_figures(busy: Stage) -> None:
    busy.label_studio.down = True
    status = busy.status()
    assert (status.tasks, status.annotations, status.next_training, status.auto_accept) == (None, None, None, None)
    assert [v.version for v in status.versions] == [1, 2, 3]
    assert status.problems == ["Label Studio does not answer"]
    assert any(line.startswith("problem") for line in said(status))


@pytest.mark.parametrize(
    "hooks",
    [
        [],
        [Webhook(1, "http://api/digits/webhook", is_active=False, actions=[])],
        [Webhook(1, "http://elsewhere/digits/webhook", is_active=True, actions=[])],
    ],
)
def test_a_label_studio_that_tells_nothing_of_annotations_is_a_problem(stage: Stage, hooks: list[Webhook]) -> None:
    assert stage.status().problems == []
    stage.label_studio.hooks = hooks
    (problem,) = stage.status().problems
    assert problem.endswith("run: labelloop setup-label-studio-project digits")


@pytest.mark.parametrize("backend", [{"url": "http://api/digits", "state": "ER"}, {"url": "http://api/faces", "state": "CO"}])
def test_a_backend_that_label_studio_does_not_get_into_is_a_problem(stage: Stage, backend: dict[str, Any]) -> None:
    stage.label_studio.backend = backend
    (problem,) = stage.status().problems
    assert "labelloop setup-label-studio-project digits" in problem


def test_a_training_that_is_due_by_the_count_alone_says_what_is_left_out(stage: Stage) -> None:
    stage.label_studio.annotated = [examples.annotated_task(number, "1") for number in range(100)]
    assert "next training  at the next look (100 annotations, due at 100)" in stripped(stage)
    left_out = LeftOut(annotated=100, usable=99, reasons={"2 classes are chosen": 1})
    stage.ledger.remember(stage.ledger.head("digits"), asked=False, left_out=left_out)
    lines = stripped(stage)
    assert "next training  at 100 annotations (99 of 100 annotated tasks can be trained on)" in lines
    assert "left out       1 of the annotated tasks (2 classes are chosen)" in lines
    stage.label_studio.annotated.append(examples.annotated_task(100, "1"))
    assert "next training  at the next look (101 annotations, due at 100)" in stripped(stage), "nobody looked since"


def test_a_training_that_failed_with_as_many_annotations_is_not_said_to_come(stage: Stage) -> None:
    stage.label_studio.annotated = [examples.annotated_task(number, "1") for number in range(501)]
    job = examples.job("job-1", 500)
    job = msgspec.structs.replace(job, snapshot=msgspec.structs.replace(job.snapshot, skipped={"2 classes are chosen": 1}))
    claimed = stage.ledger.claim(stage.ledger.head("digits"), job)
    failure = Failure(digest=job.digest, n_annotations=500, job_name="job-1", reason="why", ended_at=NOON, consecutive=1)
    after = msgspec.structs.replace(claimed, failure=failure)
    stage.ledger.finish(claimed, after, Training(job=job, status="failed", ended_at=NOON, failure="why"))
    assert any("job-1 failed with as many annotations" in line for line in stripped(stage))
    stage.label_studio.annotated.pop()
    assert "next training  at the next look (500 annotations, due at 100)" in stripped(stage)


def test_of_the_failed_trainings_the_last_are_shown_and_all_are_told(stage: Stage) -> None:
    failures = [
        FailedTraining(job_name=f"job-{number}", annotations=100, ended_at=NOON, reason=f"why {number}") for number in range(5)
    ]
    last = Failure(digest="d", n_annotations=100, job_name="job-4", reason="why 4", ended_at=NOON, consecutive=1)
    status = msgspec.structs.replace(stage.status(), failures=failures, last_failure=last)
    shown = [fact for fact in _of_the_trainings(status) if fact[0] == "failed"]
    assert [(text.rpartition(": ")[2], colour) for _, text, colour in shown] == [("why 4", "red"), ("why 3", ""), ("why 2", "")]


def test_json_holds_all_of_it(busy: Stage) -> None:
    status = busy.status()
    assert msgspec.json.decode(msgspec.json.encode(status), type=Status) == status
