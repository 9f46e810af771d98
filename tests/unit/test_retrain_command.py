"""`labelloop retrain`: a request that `retrain` answers, followed to the verdict; the ledger and the queue are the emulator's."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, cast
from unittest.mock import Mock

import boto3
import msgspec
import pytest

from cli.deployment import Deployment
from cli.retrain import ANSWER_SECONDS, Clock, Retrained, retrain
from labelloop.artifacts import Bucket
from labelloop.errors import NotSetUpError, ServiceError, TrainingServiceError
from labelloop.ledger import Ledger
from labelloop.records import Job, Promotion, Snapshot, Trained, Training, now
from labelloop.retrain import Outcome, Reconciler
from tests import examples

DIGITS = examples.CONFIGS["digits"]


def job(number: int, annotations: int = 100) -> Job:
    snapshot = Snapshot(
        model="digits",
        digest=f"{number:064}",
        manifest="s3://artifacts/manifest.jsonl",
        n_annotations=annotations,
        n_train=70,
        n_validation=10,
        n_test=20,
    )
    return Job(
        job_name=f"job-{number}",
        digest=snapshot.digest,
        n_annotations=annotations,
        attempt=1,
        started_at=now(),
        snapshot=snapshot,
        champion_version=None,
    )


@dataclass
class Stage:
    """A stage whose time passes only when somebody waits; `meanwhile` is what happens at each wait, one after the other."""

    ledger: Ledger
    bucket: Bucket
    queue: str
    meanwhile: list[Callable[[], None]] = field(default_factory=list)
    seconds: float = 0.0
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ledger.set_project("digits", 1)
        self.deployment = Deployment("dev")
        vars(self.deployment).update(outputs={"RetrainQueue": self.queue}, ledger=self.ledger, artifacts=self.bucket)
        nothing = cast(Any, None)
        parts = (self.bucket, self.ledger, nothing, nothing, nothing)
        self.reconciler = Reconciler("dev", examples.CONFIGS, *parts, log=Mock())

    def retrain(self, *, wait: bool = True, minutes: float | None = None) -> Retrained:
        clock = Clock(lambda: self.seconds, self._sleep)
        return retrain(self.deployment, DIGITS, self.said.append, wait=wait, minutes=minutes, clock=clock)

    def _sleep(self, seconds: float) -> None:
        self.seconds += seconds
        if self.meanwhile:
            self.meanwhile.pop(0)()

    def messages(self) -> list[dict[str, Any]]:
        received = boto3.client("sqs").receive_message(QueueUrl=self.queue, MaxNumberOfMessages=10)
        return [json.loads(message["Body"]) for message in received.get("Messages", [])]

    # What `retrain` and `promote` do

    def answer(self, outcome: Outcome) -> None:
        (message,) = self.messages()
        assert (message["model"], message["action"]) == ("digits", "START_TRAINING")
        self.reconciler.answer("digits", message["request"], outcome)

    def start(self, started: Job) -> None:
        self.ledger.claim(self.ledger.head("digits"), started)

    def begin(self, started: Job) -> None:
        self.start(started)
        self.answer(Outcome(started.job_name, "asked for"))

    def end(
        self, ended: Job, failure: str | None = None, status: Literal["completed", "failed", "stopped"] = "completed"
    ) -> None:
        head = self.ledger.head("digits")
        trained = Trained(digest=ended.digest, n_annotations=ended.n_annotations, job_name=ended.job_name, ended_at=now())
        after = head if failure else msgspec.structs.replace(head, trained=trained)
        training = Training(job=ended, status=status, ended_at=now(), failure=failure)
        self.ledger.finish(head, after, training)

    def judge(self, judged: Job, version: int = 1) -> None:
        self.ledger.record_promotion(
            Promotion(
                model="digits",
                job_name=judged.job_name,
                version=version,
                verdict="keep",
                reason="not better",
                metric="accuracy",
                value=0.91,
                holdout_images=20,
                n_annotations=judged.n_annotations,
                decided_at=now(),
            )
        )


@pytest.fixture
def stage(ledger: Ledger, bucket: Bucket) -> Stage:
    return Stage(ledger, bucket, boto3.client("sqs").create_queue(QueueName=f"retrain-{bucket.name}")["QueueUrl"])


def test_a_training_is_followed_to_the_verdict(stage: Stage) -> None:
    first = job(1)
    stage.meanwhile = [
        lambda: stage.begin(first),
        lambda: stage.end(first),
        lambda: stage.judge(first),
    ]
    done = stage.retrain()
    assert (done.state, done.job_name, done.version, done.verdict, done.reason) == ("judged", "job-1", 1, "keep", "not better")
    assert (done.metric, done.value, done.annotations, done.champion) == ("accuracy", 0.91, 100, None)
    assert stage.said == ["asked for a training", "job-1: 100 annotations", "trained; the gate compares it with the champion"]


def test_nothing_new_is_said_with_its_reason(stage: Stage) -> None:
    stage.meanwhile = [lambda: stage.answer(Outcome(None, "job-1 has trained the same annotations"))]
    done = stage.retrain()
    assert (done.state, done.reason, done.job_name) == (
        "nothing new",
        "job-1 has trained the same annotations",
        None,
    )


def test_while_a_training_runs_the_request_waits_for_the_next(stage: Stage) -> None:
    first, second = job(1), job(2, 150)
    stage.start(first)

    def remember() -> None:
        stage.ledger.remember(stage.ledger.head("digits"), asked=True)
        stage.answer(Outcome(None, "job-1 is running", remembered=True))

    stage.meanwhile = [
        remember,
        lambda: stage.end(first),
        lambda: stage.judge(first),
        lambda: stage.start(second),
        lambda: stage.end(second),
        lambda: stage.judge(second, 2),
    ]
    done = stage.retrain()
    assert (done.job_name, done.version, done.annotations) == ("job-2", 2, 150)
    assert "has to wait: job-1 is running" in stage.said


def test_a_request_that_was_remembered_for_nothing_ends(stage: Stage) -> None:
    stage.start(job(1))

    def forget() -> None:
        stage.ledger.remember(stage.ledger.head("digits"), asked=False)

    def remember() -> None:
        stage.ledger.remember(stage.ledger.head("digits"), asked=True)
        stage.answer(Outcome(None, "job-1 is running", remembered=True))

    stage.meanwhile = [remember, forget]
    assert stage.retrain().state == "nothing new"


@pytest.mark.parametrize("status", ["failed", "stopped"])
def test_a_training_that_ends_without_a_model_is_an_error_with_its_reason(
    stage: Stage, status: Literal["failed", "stopped"]
) -> None:
    first = job(1)
    stage.meanwhile = [
        lambda: stage.begin(first),
        lambda: stage.end(first, "no GPU left", status),
    ]
    with pytest.raises(TrainingServiceError, match=f"job-1 {status}: no GPU left"):
        stage.retrain()


def test_nobody_is_waited_for_for_ever(stage: Stage) -> None:
    with pytest.raises(ServiceError, match="retrain has not answered"):
        stage.retrain()
    assert ANSWER_SECONDS <= stage.seconds < ANSWER_SECONDS + 10

    first, began = job(1), stage.seconds
    stage.messages()
    stage.meanwhile = [lambda: stage.begin(first)]
    with pytest.raises(ServiceError, match="job-1 is not judged yet"):
        stage.retrain(minutes=20)
    assert 20 * 60 <= stage.seconds - began < 20 * 60 + 10


def test_without_waiting_the_request_is_sent_and_that_is_all(stage: Stage) -> None:
    assert stage.retrain(wait=False).state == "asked"
    assert (len(stage.messages()), stage.seconds) == (1, 0)


def test_a_model_without_a_project_is_not_asked_for(stage: Stage, ledger_table: str) -> None:
    vars(stage.deployment)["ledger"] = Ledger(ledger_table)
    with pytest.raises(NotSetUpError):
        retrain(stage.deployment, examples.CONFIGS["digit_detector"], stage.said.append, wait=True)
    assert stage.messages() == []
