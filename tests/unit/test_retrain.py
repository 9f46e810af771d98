"""Reconciling: whatever comes twice, late or not at all, exactly one training starts for what is new."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from threading import Lock
from typing import Any, cast

import msgspec
import pytest

from labelloop import artifacts
from labelloop.artifacts import Bucket, Champions
from labelloop.errors import LabelStudioError, NotSetUpError, ServiceError, TrainingServiceError, UnknownModelError
from labelloop.launcher import JobState, JobStatus
from labelloop.ledger import Ledger
from labelloop.model_config import ModelConfig
from labelloop.records import Champion, Job, ManifestRow, Promotion, now
from labelloop.retrain import TRAINING_FAILED, Outcome, Reconciler
from labelloop.snapshot_index import SnapshotIndex
from tests import examples
from tests.fake_label_studio import FakeLabelStudio


@dataclass
class FakeLauncher:
    """SageMaker in memory: job names are unique for ever; `down` makes starting fail."""

    states: dict[str, JobState] = field(default_factory=dict)
    started: list[tuple[Job, Champion | None]] = field(default_factory=list)
    down: bool = False
    code: str = "s3://code/1.zip"
    lock: Any = field(default_factory=Lock)

    def start(self, config: ModelConfig, job: Job, champion: Champion | None) -> None:
        if self.down:
            raise TrainingServiceError("SageMaker does not answer")
        with self.lock:
            if job.job_name not in self.states:
                self.states[job.job_name] = JobState("InProgress", None)
                self.started.append((job, champion))

    def state(self, name: str) -> JobState | None:
        return self.states.get(name)

    def end(self, status: JobStatus, failure: str | None = None) -> None:
        self.states[self.job.job_name] = JobState(status, failure)

    @property
    def job(self) -> Job:
        """The job started last."""
        return self.started[-1][0]


@dataclass
class Loop:
    """A reconciler on real storage, with Label Studio, SageMaker and the promote queue in memory."""

    bucket: Bucket
    ledger: Ledger
    label_studio: FakeLabelStudio = field(default_factory=FakeLabelStudio)
    launcher: FakeLauncher = field(default_factory=FakeLauncher)
    recalled: list[tuple[str, str]] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ledger.set_project("digits", 1)
        self.reconciler = Reconciler(
            "local",
            examples.CONFIGS,
            self.bucket,
            self.ledger,
            cast(Any, self.label_studio),
            cast(Any, self.launcher),
            lambda model, job: self.recalled.append((model, job)),
            log=lambda message, **_: self.log.append(message),
        )

    def annotate(self, upto: int) -> None:
        """Have `upto` images annotated in all."""
        known = len(self.label_studio.annotated)
        self.label_studio.annotated += [
            examples.annotated_task(number, str(number % 10)) for number in range(known + 1, upto + 1)
        ]

    def look(self, *, asked: bool = False) -> Outcome:
        return self.reconciler.reconcile("digits", asked=asked)

    def train(self, upto: int, version: int = 1) -> None:
        """Annotate, train to the end and let the gate decide."""
        self.annotate(upto)
        assert self.look().started
        self.launcher.end("Completed")
        self.decide(version)

    def decide(self, version: int = 1) -> None:
        promotion = Promotion(
            model="digits",
            job_name=self.launcher.job.job_name,
            version=version,
            verdict="promote",
            reason="better",
            metric="accuracy",
            value=0.9,
            holdout_images=20,
            n_annotations=self.launcher.job.n_annotations,
            decided_at=now(),
        )
        self.ledger.record_promotion(promotion)


@pytest.fixture
def loop(bucket: Bucket, ledger: Ledger) -> Loop:
    return Loop(bucket, ledger)


def test_below_the_first_count_nothing_starts(loop: Loop) -> None:
    loop.annotate(99)
    outcome = loop.look()
    assert outcome == Outcome(None, "99 annotations of 100")
    assert "annotated_tasks" not in loop.label_studio.asked, "the export is not asked for needlessly"
    assert loop.bucket.keys("snapshots") == []


def test_at_the_first_count_a_snapshot_is_frozen_and_trained(loop: Loop) -> None:
    loop.annotate(100)
    outcome = loop.look()
    job, champion = loop.launcher.started[0]
    assert outcome.started == job.job_name == f"labelloop-local-digits-{job.digest[:12]}-1"
    assert (job.n_annotations, job.attempt, job.champion_version, champion) == (100, 1, None, None)
    assert loop.ledger.head("digits").running == job
    assert [training.status for training in loop.ledger.trainings("digits")] == ["running"]
    manifest = loop.bucket.get(artifacts.manifest_key("digits", job.digest))
    assert manifest is not None
    rows = [msgspec.json.decode(line, type=ManifestRow) for line in manifest.splitlines()]
    assert len(rows) == 100 == job.snapshot.n_train + job.snapshot.n_validation + job.snapshot.n_test
    assert job.snapshot.manifest == f"s3://{loop.bucket.name}/snapshots/digits/{job.digest}/manifest.jsonl"


def test_looking_again_starts_nothing_more(loop: Loop) -> None:
    loop.annotate(100)
    loop.look()
    loop.annotate(600)
    for asked in (False, True):
        outcome = loop.look(asked=asked)
        assert outcome == Outcome(None, f"{loop.launcher.job.job_name} is running", remembered=asked)
    assert len(loop.launcher.started) == 1


def test_eight_looks_at_once_start_exactly_one_job(loop: Loop) -> None:
    loop.annotate(100)
    with ThreadPoolExecutor(8) as threads:
        outcomes = list(threads.map(lambda _: loop.look(), range(8)))
    assert sum(outcome.started is not None for outcome in outcomes) == 1
    assert len(loop.launcher.started) == 1
    assert len(loop.ledger.trainings("digits")) == 1


def test_eight_requests_at_once_after_an_ended_job_start_exactly_one_more(loop: Loop) -> None:
    loop.train(100)
    loop.annotate(500)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: loop.look(asked=True), range(8)))
    assert loop.look().started is None
    assert [job.n_annotations for job, _ in loop.launcher.started] == [100, 500]


def test_a_claimed_job_that_never_started_is_started_at_the_next_look(loop: Loop) -> None:
    loop.annotate(100)
    loop.launcher.down = True
    with pytest.raises(TrainingServiceError):
        loop.look()
    claimed = loop.ledger.head("digits").running
    assert claimed is not None
    assert loop.launcher.started == []
    loop.launcher.down = False
    loop.annotate(120)
    assert loop.look().started is None
    assert [job for job, _ in loop.launcher.started] == [claimed], "the very job that was claimed"


def test_a_job_that_the_service_forgot_is_started_again(loop: Loop) -> None:
    """SageMaker forgets nothing; its stand-in on a laptop does when it is stopped in mid-training."""
    loop.annotate(100)
    started = loop.look().started
    loop.launcher.states.clear()
    loop.look()
    assert [job.job_name for job, _ in loop.launcher.started] == [started, started]


def test_a_completed_job_is_noted_and_the_gate_waited_for(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    loop.annotate(100)
    name = loop.look().started
    loop.launcher.end("Completed")
    loop.annotate(600)
    outcome = loop.look()
    assert outcome == Outcome(None, f"waiting for the promotion gate to decide about {name}")
    assert loop.recalled == [], "promote may be at it now"
    monkeypatch.setattr("labelloop.retrain._PROMOTION_GRACE", timedelta(0))
    loop.look()
    assert loop.recalled == [("digits", name)]
    head = loop.ledger.head("digits")
    assert head.running is None
    assert head.trained is not None
    assert (head.trained.n_annotations, head.trained.job_name) == (100, name)
    loop.look(asked=True)
    assert loop.recalled == [("digits", name)], "promote has it in its queue"
    monkeypatch.setattr("labelloop.retrain._RECALL_AGAIN", timedelta(0))
    loop.look()
    assert loop.recalled == [("digits", name)] * 2, "an hour later"
    assert len(loop.launcher.started) == 1
    loop.decide()
    assert loop.look().started
    assert loop.recalled == [("digits", name)] * 2


def test_a_promote_queue_that_took_nothing_is_asked_at_the_next_look(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("labelloop.retrain._PROMOTION_GRACE", timedelta(0))
    loop.annotate(100)
    name = loop.look().started
    loop.launcher.end("Completed")

    def refuse(*_: str) -> None:
        raise ServiceError("SQS does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(loop.reconciler, "_recall_promotion", refuse)
        with pytest.raises(ServiceError):
            loop.look()
    loop.look()
    assert loop.recalled == [("digits", name)]


def test_the_next_training_meets_the_champion_of_the_last(loop: Loop) -> None:
    loop.train(100)
    Champions(loop.bucket).swap(examples.champion(1), tag=None)
    loop.annotate(499)
    assert loop.look() == Outcome(None, "499 annotations of 500")
    loop.annotate(500)
    assert loop.look().started
    job, champion = loop.launcher.started[-1]
    assert (job.n_annotations, job.champion_version, champion) == (500, 1, examples.champion(1))


def test_the_counts_of_the_config_are_trained_in_turn(loop: Loop) -> None:
    for version, count in enumerate((100, 500, 1000, 2000), start=1):
        loop.train(count, version)
        assert loop.look().started is None
    assert [job.n_annotations for job, _ in loop.launcher.started] == [100, 500, 1000, 2000]
    assert {training.status for training in loop.ledger.trainings("digits")} == {"completed"}


@pytest.mark.parametrize(
    ("status", "failure", "noted", "reason"),
    [("Failed", "CUDA out of memory", "failed", "CUDA out of memory"), ("Failed", None, "failed", "the job was failed"),
     ("Stopped", None, "stopped", "the job was stopped")],
)  # fmt: skip
def test_a_failed_job_is_noted_and_the_next_snapshot_trains(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, status: JobStatus, failure: str | None, noted: str, reason: str
) -> None:
    loop.annotate(100)
    name = loop.look().started
    loop.launcher.end(status, failure)
    outcome = loop.look()
    assert outcome.started is None
    assert "waiting after a failed training" in outcome.reason
    head = loop.ledger.head("digits")
    assert (head.running, head.trained) == (None, None)
    assert head.failure is not None
    assert (head.failure.reason, head.failure.consecutive, head.failure.job_name) == (reason, 1, name)
    training = loop.ledger.training("digits", str(name))
    assert training is not None
    assert (training.status, training.failure) == (noted, reason)
    assert TRAINING_FAILED in loop.log

    monkeypatch.setattr("labelloop.policy.MAX_BACKOFF", timedelta(0))
    same = Outcome(None, f"{name} failed with the same annotations; any change of them allows another try")
    assert loop.look() == same, "they would fail again"
    loop.annotate(101)
    assert loop.look().started
    loop.launcher.end("Completed")
    loop.decide()
    loop.look()
    head = loop.ledger.head("digits")
    assert head.failure is None
    assert head.trained is not None
    assert head.trained.n_annotations == 101


def fail_at_100(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> Outcome:
    """A training of 100 annotations fails, its waiting time passes, and a look finds the same annotations."""
    monkeypatch.setattr("labelloop.policy.MAX_BACKOFF", timedelta(0))
    loop.annotate(100)
    loop.look()
    loop.launcher.end("Failed", "why")
    found = loop.look()
    assert "failed with the same annotations" in found.reason
    loop.label_studio.asked.clear()
    return found


def test_while_nothing_changes_after_a_failure_nothing_is_read(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    found = fail_at_100(loop, monkeypatch)
    sequence = loop.ledger.head("digits").sequence
    with monkeypatch.context() as patch:
        patch.setattr("labelloop.snapshot_index.opened", lambda *_, **__: pytest.fail("the index was read"))
        assert [loop.look() for _ in range(3)] == [found] * 3
    assert loop.label_studio.asked == ["tally"] * 3
    assert loop.ledger.head("digits").sequence == sequence
    assert loop.look(asked=True).started, "a person overrides it"


def test_while_annotations_change_at_this_moment_they_are_read_again(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change that is committed late may bear an earlier time than the latest that was seen."""
    loop.label_studio.clock = lambda: datetime.now(UTC)
    fail_at_100(loop, monkeypatch)
    loop.look()
    assert "annotated_tasks" in loop.label_studio.asked


def test_an_index_that_is_not_what_is_there_is_read_again(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that took several looks may keep a deleted task for an hour."""
    catch_up = SnapshotIndex.catch_up
    monkeypatch.setattr(SnapshotIndex, "catch_up", lambda *given, **more: catch_up(*given, **more) and False)
    fail_at_100(loop, monkeypatch)
    loop.look()
    assert "annotated_tasks" in loop.label_studio.asked


def test_another_config_reads_the_same_annotations_again(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at_100(loop, monkeypatch)
    for module in ("retrain", "snapshot_index"):
        monkeypatch.setattr(f"labelloop.{module}.config_digest", lambda *_: "another config")
    loop.look()
    assert "annotated_tasks" in loop.label_studio.asked


def test_annotations_that_cannot_be_trained_on_are_read_once(loop: Loop) -> None:
    loop.annotate(99)
    loop.label_studio.annotated.append(examples.annotated_task(500, ["1", "2"]))
    found, head = loop.look(), loop.ledger.head("digits")
    loop.label_studio.asked.clear()
    assert loop.look() == found
    assert loop.label_studio.asked == ["tally"]
    assert loop.ledger.head("digits") == head, "why they are left out is still noted"
    loop.label_studio.annotated[-1] = examples.annotated_task(500, "1")
    assert loop.look().started


def test_a_corrected_label_allows_another_try(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("labelloop.policy.MAX_BACKOFF", timedelta(0))
    loop.annotate(100)
    loop.look()
    loop.launcher.end("Failed", "why")
    assert loop.look().started is None
    loop.label_studio.annotated[0] = examples.annotated_task(1, "9", updated_at="2027-01-01T00:00:00Z")
    assert loop.look().started


def test_where_aws_has_no_machine_the_same_annotations_are_tried_again(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    loop.annotate(100)
    first = loop.look().started
    loop.launcher.end("Failed", "CapacityError: Unable to provision requested ML compute capacity.")
    waiting = loop.look()
    assert waiting.started is None
    assert f"AWS had no machine for {first}, until" in waiting.reason
    assert TRAINING_FAILED not in loop.log
    monkeypatch.setattr("labelloop.policy.MAX_BACKOFF", timedelta(0))
    second = loop.look().started
    assert second is not None
    assert second != first
    assert (loop.launcher.job.attempt, loop.launcher.job.shortages) == (2, 1)
    loop.launcher.end("Failed", "AlgorithmError: why")
    assert loop.look().started is None, "now the job itself is to blame"
    assert loop.ledger.head("digits").failure is not None


def test_failures_in_a_row_are_counted(loop: Loop) -> None:
    loop.annotate(100)
    for attempt in (1, 2, 3):
        started = loop.look(asked=True).started
        assert started is not None
        assert started.endswith(f"-{attempt}"), "the same snapshot again, as another job"
        loop.launcher.end("Failed", "why")
        assert loop.look().started is None
        failure = loop.ledger.head("digits").failure
        assert failure is not None
        assert failure.consecutive == attempt


def test_start_training_trains_at_once_when_there_is_anything_new(loop: Loop) -> None:
    assert loop.look(asked=True) == Outcome(None, "nothing is annotated")
    loop.annotate(3)
    assert loop.look().started is None
    assert loop.look(asked=True).started
    loop.launcher.end("Completed")
    loop.decide()
    assert loop.look(asked=True) == Outcome(None, f"{loop.launcher.job.job_name} has trained the same annotations")
    loop.annotate(4)
    assert loop.look(asked=True).started
    assert [job.n_annotations for job, _ in loop.launcher.started] == [3, 4]


def test_what_the_gate_had_to_refuse_has_trained_nothing(loop: Loop) -> None:
    loop.annotate(3)
    first = loop.look(asked=True).started
    loop.launcher.end("Completed")
    loop.look()
    loop.decide(version=0)
    again = loop.look(asked=True).started
    assert again is not None
    assert again != first


def test_who_asks_trains_the_same_annotations_again_once_config_or_code_have_changed(loop: Loop) -> None:
    loop.train(100)
    first = loop.launcher.job.job_name
    loop.launcher.code = "s3://code/2.zip"
    again = loop.look(asked=True).started
    assert again == first.removesuffix("1") + "2", "another attempt at the same snapshot"
    loop.launcher.end("Completed")
    loop.decide(2)
    assert loop.look(asked=True) == Outcome(None, f"{again} has trained the same annotations")


def test_a_corrected_label_is_something_new(loop: Loop) -> None:
    loop.train(100)
    loop.look()
    loop.label_studio.annotated[0] = examples.annotated_task(1, "9", updated_at="2027-01-01T00:00:00Z")
    assert loop.look(asked=True).started


def test_a_label_that_was_changed_and_changed_back_is_nothing_new(loop: Loop) -> None:
    loop.train(100)
    first, was = loop.launcher.job.job_name, loop.label_studio.annotated[0]
    loop.look()
    loop.label_studio.annotated[0] = examples.annotated_task(1, "9", updated_at="2027-01-01T00:00:00Z")
    assert loop.look(asked=True).started
    loop.launcher.end("Completed")
    loop.decide(2)
    loop.label_studio.annotated[0] = was
    assert loop.look(asked=True) == Outcome(None, f"{first} has trained the same annotations")
    assert len(loop.launcher.started) == 2


def test_annotations_that_cannot_be_trained_on_do_not_count(loop: Loop) -> None:
    loop.annotate(99)
    loop.label_studio.annotated.append(examples.annotated_task(500, ["1", "2"]))
    outcome = loop.look()
    assert outcome.started is None
    assert outcome.reason.startswith("99 annotations of 100; left out: ")
    assert "2 classes are chosen" in outcome.reason
    found = loop.ledger.head("digits").left_out
    assert found is not None
    assert (found.annotated, found.usable, list(found.reasons.values())) == (100, 99, [1])
    assert "2 classes are chosen" in next(iter(found.reasons))

    loop.annotate(101)
    assert loop.look().started
    loop.launcher.end("Completed")
    loop.decide()
    loop.look()
    assert loop.ledger.head("digits").left_out is None


def test_of_many_reasons_the_ledger_keeps_the_commonest(loop: Loop) -> None:
    loop.annotate(90)
    loop.label_studio.annotated += [examples.annotated_task(500 + each, f"class {each}") for each in range(9)]
    loop.label_studio.annotated.append(examples.annotated_task(600, "class 7"))
    loop.look()
    found = loop.ledger.head("digits").left_out
    assert found is not None
    assert (found.annotated, found.usable, len(found.reasons)) == (100, 90, 5)
    assert max(found.reasons.values()) == 2


def test_a_model_that_is_not_set_up_says_so(bucket: Bucket, ledger: Ledger) -> None:
    def refuse(*_: str) -> None:
        raise AssertionError

    reconciler = Reconciler(
        "local", examples.CONFIGS, bucket, ledger, cast(Any, FakeLabelStudio()), cast(Any, FakeLauncher()), refuse, log=refuse
    )
    with pytest.raises(NotSetUpError):
        reconciler.reconcile("digits")


def test_an_unknown_model_is_an_error(loop: Loop) -> None:
    with pytest.raises(UnknownModelError):
        loop.reconciler.reconcile("faces")


@pytest.mark.parametrize("method", ["tally", "annotated_tasks"])
def test_a_label_studio_that_fails_leaves_nothing_behind(loop: Loop, method: str) -> None:
    loop.annotate(100)
    loop.label_studio.down = {method}
    with pytest.raises(LabelStudioError):
        loop.look()
    assert loop.ledger.head("digits").sequence == 0
    loop.label_studio.down = set()
    assert loop.look().started


def test_start_training_is_remembered_while_nothing_can_start(loop: Loop) -> None:
    loop.train(100)
    loop.annotate(101)
    assert loop.look(asked=True).started
    loop.annotate(102)
    assert loop.look(asked=True).started is None
    assert loop.ledger.head("digits").asked
    loop.launcher.end("Completed")
    assert loop.look().reason.startswith("waiting for the promotion gate")
    loop.decide(2)
    assert loop.look().started, "what was asked for"
    assert not loop.ledger.head("digits").asked


def test_what_was_asked_for_is_forgotten_when_there_is_nothing_new(loop: Loop) -> None:
    loop.train(100)
    loop.annotate(101)
    assert loop.look(asked=True).started
    loop.look(asked=True)
    loop.launcher.end("Completed")
    loop.look()
    loop.decide(2)
    assert loop.look() == Outcome(None, f"{loop.launcher.job.job_name} has trained the same annotations")
    assert not loop.ledger.head("digits").asked
    assert len(loop.launcher.started) == 2


def test_who_made_a_request_reads_what_came_of_it(loop: Loop) -> None:
    loop.annotate(5)
    started = loop.look(asked=True)
    loop.reconciler.answer("digits", "first", started)
    busy = loop.look(asked=True)
    loop.reconciler.answer("digits", "second", busy)
    assert loop.ledger.answer("digits", "nobody's") is None
    assert [loop.reconciler.has_answered("digits", request) for request in ("first", "nobody's")] == [True, False]
    first, second = (loop.ledger.answer("digits", request) for request in ("first", "second"))
    assert first is not None
    assert second is not None
    assert (first.started, first.remembered) == (loop.launcher.job.job_name, False)
    assert (second.started, second.remembered) == (None, True)
    assert second.reason == f"{loop.launcher.job.job_name} is running"
