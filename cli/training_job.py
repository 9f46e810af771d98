"""A training job as SageMaker and MLflow see it: what its description says, how far it is, and what the time went to from the
annotation that decided to the version that serves."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import msgspec
from botocore.exceptions import BotoCoreError, ClientError

from labelloop import aws
from labelloop.errors import LabelloopError, ServiceError
from labelloop.model_config import ModelConfig
from labelloop.records import Job, Promotion
from labelloop.registry import Registry

TRAINING = ("probe", "fit", "out-of-fold")  # phases of the job that are training itself; the rest is what the loop adds


class JobProgress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a running job is. `phase`: SageMaker's secondary status, such as Downloading or Training, `since` a time of it.

    `epoch` of `epochs`: None before the first. `problem`: why some of it is not known.
    """

    phase: str
    since: str | None
    epoch: int | None
    epochs: int
    problem: str | None = None


def description(job_name: str) -> dict[str, Any]:
    """What SageMaker says of a training job, with the times of its states. Raises `ServiceError`."""
    try:
        return dict(aws.client("sagemaker").describe_training_job(TrainingJobName=job_name))
    except (ClientError, BotoCoreError) as error:
        raise ServiceError(f"the training job {job_name} cannot be looked at: {error}") from error


def progress(job: Job, config: ModelConfig, registry: Registry) -> JobProgress:
    """Asks SageMaker for the phase and MLflow for the epoch; where one does not answer, `problem` says so."""
    phase, since, epoch, problems = "claimed", job.started_at, None, []
    try:
        told = description(job.job_name)
        phase = told["SecondaryStatus"]
        transitions = told.get("SecondaryStatusTransitions", [])
        since = transitions[-1]["StartTime"].isoformat() if transitions else since
    except ServiceError as error:
        problems.append(str(error))
    try:
        epoch = registry.epoch(config.name, job.job_name)
    except LabelloopError as error:
        problems.append(str(error))
    return JobProgress(
        phase=phase, since=since, epoch=epoch, epochs=config.hyperparameters.epochs, problem="; ".join(problems) or None
    )


def turnaround(
    job: Mapping[str, Any], promotion: Promotion, *, annotated_at: datetime | None = None, served_at: datetime | None = None
) -> dict[str, float]:
    """Seconds that each part of the loop takes from the annotation that decides to the version that serves, in their order.

    Their sum is the whole. `job` is SageMaker's description of the training job. Without `annotated_at` it begins with the
    job, without `served_at` it ends with the verdict.
    """
    began = {each["Status"]: each["StartTime"] for each in reversed(job["SecondaryStatusTransitions"])}  # of each the first
    decided_at, phases = datetime.fromisoformat(promotion.decided_at), promotion.timing.seconds if promotion.timing else {}
    running = _seconds(began["Training"], began["Uploading"])
    parts = {
        **({"queue": _seconds(annotated_at, job["CreationTime"])} if annotated_at else {}),
        "machine and channels": _seconds(job["CreationTime"], began["Training"]),
        "start of the process": running - sum(phases.values()),
        **phases,
        "upload of the model": _seconds(began["Uploading"], job["TrainingEndTime"]),
        "gate": _seconds(job["TrainingEndTime"], decided_at),
        **({"Label Studio told": _seconds(decided_at, served_at)} if served_at else {}),
    }
    return {part: round(seconds, 2) for part, seconds in parts.items()}


def turnaround_in_words(parts: Mapping[str, float]) -> str:
    """For a person: the whole, what of it is not training, and all parts."""
    whole, training = sum(parts.values()), sum(parts.get(phase, 0.0) for phase in TRAINING)
    each = ", ".join(f"{part} {seconds:.1f}" for part, seconds in parts.items())
    return f"{whole:.0f} s from the deciding annotation, {whole - training:.0f} s of it beyond training: {each}"


def _seconds(since: datetime, until: datetime) -> float:
    return (until - since).total_seconds()
