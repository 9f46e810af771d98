"""A training job as SageMaker and MLflow see it: what its description says, and how far it is."""

from __future__ import annotations

from typing import Any

import msgspec
from botocore.exceptions import BotoCoreError, ClientError

from labelloop import aws
from labelloop.errors import LabelloopError, ServiceError
from labelloop.model_config import ModelConfig
from labelloop.records import Job
from labelloop.registry import Registry


class Progress(msgspec.Struct, frozen=True, kw_only=True):
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


def progress(job: Job, config: ModelConfig, registry: Registry) -> Progress:
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
    return Progress(
        phase=phase, since=since, epoch=epoch, epochs=config.hyperparameters.epochs, problem="; ".join(problems) or None
    )
