"""`labelloop retrain`: start a training now, as Label Studio's button does, and wait for what the gate says of it.

The request goes through the same queue as the button's, with a number of its own, by which `retrain` answers in the ledger. Any
training that starts after the request serves it: it has at least the annotations that were there.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import boto3
import msgspec
from botocore.exceptions import BotoCoreError, ClientError
from rich.console import Console

from cli.deployment import Deployment
from labelloop.errors import ServiceError, TrainingServiceError
from labelloop.model_config import ModelFolder
from labelloop.records import METRIC_TITLES, Answer, Interval, Metric, Promotion, Training, Verdict
from labelloop.retrain import ASKED
from labelloop.wording import counted

Say = Callable[[str], None]
State = Literal["asked", "nothing new", "judged"]

ANSWER_SECONDS = 600.0  # for the queue and a cold start; with a service down, `retrain` is asked again for hours
_LOOK_SECONDS, _AFTERWARDS_SECONDS = 5.0, 1800.0


class Retrained(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a request.

    `state`: `asked`, nobody waited; `nothing new`, no training was due, and `reason` says why; `judged`, trained and judged.
    `per_class`: the new version's figure of each class (recall, F1 or average precision), `classes`: its difference to the
    champion of then. `champion`: the version that serves afterwards.
    """

    model: str
    stage: str
    state: State
    reason: str
    job_name: str | None = None
    annotations: int | None = None
    version: int | None = None
    verdict: Verdict | None = None
    metric: Metric | None = None
    value: float | None = None
    difference: Interval | None = None
    holdout_images: int | None = None
    per_class: dict[str, float] = {}
    classes: dict[str, Interval] = {}
    champion: int | None = None


@dataclass(frozen=True)
class Clock:
    """The time in seconds, and how to let it pass."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


def retrain(
    deployment: Deployment, folder: ModelFolder, say: Say, *, wait: bool, minutes: float | None = None, clock: Clock | None = None
) -> Retrained:
    """Ask for a training and, with `wait`, follow it to the gate's verdict, for at most `minutes`.

    Raises `NotSetUpError` for a model without a project, `TrainingServiceError` when the training fails, and `ServiceError`
    when nobody answers or the time is over; the training itself goes on then.
    """
    return _Request(deployment, folder, say, clock or Clock(), minutes).run(wait=wait)


class _Request:
    def __init__(self, deployment: Deployment, folder: ModelFolder, say: Say, clock: Clock, minutes: float | None) -> None:
        self._deployment, self._ledger, self._model = deployment, deployment.ledger, folder.config.name
        self._say, self._clock, self._id = say, clock, uuid.uuid4().hex
        self._status = deployment.command(f"status {self._model}")
        self._until = clock.now() + (_longest(folder) if minutes is None else 60 * minutes)

    def run(self, *, wait: bool) -> Retrained:
        self._ledger.project(self._model)
        before = {training.job.job_name for training in self._ledger.trainings(self._model)}
        self._send()
        if not wait:
            return self._outcome("asked", f"{self._status} shows what comes of it")
        self._say("asked for a training")
        training, reason = self._started(before)
        if training is None:
            return self._outcome("nothing new", reason)
        job = training.job
        self._say(f"{job.job_name}: {counted(job.n_annotations, 'annotation')}")
        return self._judged(self._verdict(job.job_name))

    def _send(self) -> None:
        body = json.dumps({"model": self._model, "action": ASKED, "request": self._id})
        queue = self._deployment.outputs["RetrainQueue"]
        try:
            boto3.client("sqs").send_message(QueueUrl=queue, MessageBody=body)
        except (BotoCoreError, ClientError) as error:
            raise ServiceError(f"the retrain queue takes no message: {error}") from error

    def _started(self, before: set[str]) -> tuple[Training | None, str]:
        """The training that serves the request, or why there is none."""
        letters = self._deployment.command(f"redrive {self._model} --queue retrain --list")
        nobody = f"retrain has not answered; look at its log and at: {letters}"
        answer = self._wait_for(self._answer, nobody, ANSWER_SECONDS)
        if answer.remembered:
            self._say(f"has to wait: {answer.reason}")

        def decided() -> tuple[Training | None, str] | None:
            still = answer.remembered and self._ledger.head(self._model).asked  # read first: it ends with the claim
            new = [one for one in self._ledger.trainings(self._model) if one.job.job_name not in before]
            if new:
                return new[0], ""
            if still:
                return None
            return None, "nothing was new when its turn came" if answer.remembered else answer.reason

        return self._wait_for(decided, f"no training has started yet; {self._status} shows why")

    def _answer(self) -> Answer | None:
        return self._ledger.answer(self._model, self._id)

    def _verdict(self, job_name: str) -> Promotion:
        ended = False

        def found() -> Promotion | None:
            nonlocal ended
            promotion = self._ledger.promotion(self._model, job_name)
            training = self._ledger.training(self._model, job_name)
            if training is not None and training.status in ("failed", "stopped"):
                raise TrainingServiceError(f"{job_name} {training.status}: {training.failure}")
            if training is not None and training.status == "completed" and not ended:
                ended = True
                self._say("trained; the gate compares it with the champion")
            return promotion

        return self._wait_for(found, f"{job_name} is not judged yet; {self._status} shows how far it is")

    def _judged(self, promotion: Promotion) -> Retrained:
        evaluation = self._deployment.champions.evaluation(self._model, promotion.version)
        champion = self._deployment.champions.read(self._model)
        comparison = evaluation.comparison if evaluation else None
        return msgspec.structs.replace(
            self._outcome("judged", promotion.reason),
            job_name=promotion.job_name,
            annotations=promotion.n_annotations,
            version=promotion.version,
            verdict=promotion.verdict,
            metric=promotion.metric,
            value=promotion.value,
            difference=promotion.difference,
            holdout_images=promotion.holdout_images,
            per_class=evaluation.challenger.per_class if evaluation else {},
            classes=comparison.per_class if comparison else {},
            champion=champion.version if champion else None,
        )

    def _outcome(self, state: State, reason: str) -> Retrained:
        return Retrained(model=self._model, stage=self._deployment.stage, state=state, reason=reason)

    def _wait_for[T](self, look: Callable[[], T | None], late: str, seconds: float | None = None) -> T:
        until = self._until if seconds is None else min(self._until, self._clock.now() + seconds)
        while (found := look()) is None:
            if self._clock.now() >= until:
                raise ServiceError(late)
            self._clock.sleep(_LOOK_SECONDS)
        return found


def _longest(folder: ModelFolder) -> float:
    """Seconds that a training may take, waiting for a spot instance included, and what comes before and after."""
    training = folder.config.training
    return 60.0 * training.max_runtime_minutes * (2 if training.spot else 1) + _AFTERWARDS_SECONDS


def show(done: Retrained, console: Console) -> None:
    """What came of it, for a person."""
    lines = [f"{done.state}: {done.reason}"]
    if done.state == "judged":
        lines = [f"version {done.version} of {done.model}: {done.verdict}; {done.reason}"]
        if done.metric:
            lines.append(f"{METRIC_TITLES[done.metric]} {done.value:.1%} on {counted(done.holdout_images or 0, 'holdout image')}")
        lines.append(f"version {done.champion} serves" if done.champion else "no version serves yet")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
