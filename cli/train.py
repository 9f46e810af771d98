"""`labelloop train`: a training of an engineer's own, beside the loop: the same code, image, role and channels, another machine.

It trains on the last snapshot. Its job's name is none of the loop's, so that neither `retrain` nor the gate hears of it, and what
serves stays; the version is in MLflow, and says there how it compares.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable

import boto3
import msgspec
from botocore.exceptions import BotoCoreError, ClientError
from rich.console import Console

from cli.deployment import Deployment
from cli.training_job import progress
from labelloop import artifacts, aws
from labelloop.errors import ConflictError, NotSetUpError, ServiceError, TrainingServiceError
from labelloop.launcher import Launcher
from labelloop.model_config import ModelConfig, ModelFolder
from labelloop.promotion import in_points, unpack
from labelloop.records import METRIC_TITLES, Interval, Job, Metric, Snapshot, now
from labelloop.settings import Settings
from labelloop.wording import counted

type Say = Callable[[str], None]

PREFIX = "try-"  # the rules that listen for the loop's own jobs ask for another
_LONGEST_NAME = 63  # characters, SageMaker's limit
_LOOK_SECONDS = 5.0


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it. Without waiting nothing is known but the job; `difference`: to the champion of then."""

    model: str
    stage: str
    job_name: str
    instance_type: str
    annotations: int
    version: int | None = None
    metric: Metric | None = None
    value: float | None = None
    difference: Interval | None = None
    holdout_images: int | None = None


def train(
    deployment: Deployment, folder: ModelFolder, say: Say, *, instance_type: str | None, spot: bool | None, wait: bool
) -> Trial:
    """Start the job and, with `wait`, follow it to its end. Interrupted, it goes on.

    Raises `NotSetUpError` before the loop's first snapshot, `ConflictError` during an erasure, `TrainingServiceError` when
    SageMaker refuses the job or it fails.
    """
    config = _on_machine(folder.config, instance_type, spot)
    champion = deployment.champions.read(config.name)
    snapshot = _last_snapshot(deployment, config.name)
    job = Job(
        job_name=f"{PREFIX}{uuid.uuid4().hex[:8]}-{config.name.replace('_', '-')}"[:_LONGEST_NAME],
        digest=snapshot.digest,
        n_annotations=snapshot.n_annotations,
        attempt=1,
        started_at=now(),
        snapshot=snapshot,
        champion_version=champion.version if champion else None,
    )
    launcher = Launcher(_settings(deployment))
    launcher.start(config, job, champion)
    say(f"{job.job_name}: {counted(job.n_annotations, 'annotation')}, {config.training.instance_type}")
    trial = Trial(
        model=config.name,
        stage=deployment.stage,
        job_name=job.job_name,
        instance_type=config.training.instance_type,
        annotations=job.n_annotations,
    )
    if not wait:
        return trial
    _follow(launcher, deployment, config, job, say)
    return _outcome(deployment, trial)


def running(bucket: str, model: str) -> list[str]:
    """Trials that run and write to the model's folder in this bucket. Raises `TrainingServiceError`."""
    client, output = aws.client("sagemaker"), artifacts.s3_uri(bucket, artifacts.training_prefix(model))
    try:
        pages = client.get_paginator("list_training_jobs")
        names = [
            job["TrainingJobName"]
            for status in ("InProgress", "Stopping")
            for page in pages.paginate(NameContains=PREFIX, StatusEquals=status)
            for job in page["TrainingJobSummaries"]
        ]
        told = [client.describe_training_job(TrainingJobName=name) for name in names]
    except (ClientError, BotoCoreError) as error:
        raise TrainingServiceError(f"SageMaker does not say which trials run: {error}") from error
    return [job["TrainingJobName"] for job in told if job["OutputDataConfig"]["S3OutputPath"] == output]


def _on_machine(config: ModelConfig, instance_type: str | None, spot: bool | None) -> ModelConfig:
    training = config.training
    if instance_type:
        training = msgspec.structs.replace(training, instance_type=instance_type, fallback_instance_types=[])
    if spot is not None:
        training = msgspec.structs.replace(training, spot=spot)
    return msgspec.structs.replace(config, training=training)


def _last_snapshot(deployment: Deployment, model: str) -> Snapshot:
    """The newest that is still what it was: an erasure takes images out of manifests, which jobs refuse then."""
    erasures = deployment.ledger.erasures(model)
    if any(erasure.finished_at is None for erasure in erasures):
        raise ConflictError(
            f"images of {model} are being erased, or that was interrupted; finish it first, for any image: "
            f"{deployment.command(f'erase {model} --image …')}"
        )
    erased = {digest for erasure in erasures for digest in erasure.snapshots}
    snapshots = [training.job.snapshot for training in deployment.ledger.trainings(model)]
    whole = [snapshot for snapshot in snapshots if snapshot.digest not in erased]
    if not whole:
        why = "images of all its snapshots were erased" if snapshots else "it has no snapshot yet"
        raise NotSetUpError(
            f"{model} cannot be trained: {why}; annotate until its next training, "
            f"or run: {deployment.command(f'retrain {model}')}"
        )
    return whole[-1]


def _settings(deployment: Deployment) -> Settings:
    """What `retrain` itself starts jobs with."""
    function = deployment.outputs["RetrainFunction"]
    try:
        client = boto3.client("lambda")
        told = client.get_function_configuration(FunctionName=function)
    except (BotoCoreError, ClientError) as error:
        raise ServiceError(f"the function {function} cannot be looked at: {error}") from error
    return Settings({**told["Environment"]["Variables"], "AWS_REGION": client.meta.region_name})


def _follow(launcher: Launcher, deployment: Deployment, config: ModelConfig, job: Job, say: Say) -> None:
    before = ""
    while True:
        state = launcher.state(job.job_name)
        if state is None:
            raise TrainingServiceError(f"SageMaker does not know {job.job_name} any more")
        if state.ended:
            break
        at = progress(job, config, deployment.registry)
        line = at.phase.lower() + (f", epoch {at.epoch} of {at.epochs}" if at.epoch else "")
        if line != before:
            say(line)
        before = line
        time.sleep(_LOOK_SECONDS)
    if state.status != "Completed":
        raise TrainingServiceError(f"{job.job_name} {state.status.lower()}: {state.failure or 'its log may say why'}")


def _outcome(deployment: Deployment, trial: Trial) -> Trial:
    archive = deployment.artifacts.get(artifacts.training_archive_key(trial.model, trial.job_name))
    if archive is None:
        raise TrainingServiceError(f"{trial.job_name} completed, but left no archive in the artifacts bucket")
    _, evaluation = unpack(archive)
    comparison = evaluation.comparison
    return msgspec.structs.replace(
        trial,
        version=evaluation.challenger.version,
        metric=evaluation.challenger.metric,
        value=evaluation.challenger.value,
        difference=comparison.difference if comparison else None,
        holdout_images=len(evaluation.holdout),
    )


def show(done: Trial, console: Console) -> None:
    """What came of it, for a person."""
    lines = [f"{done.job_name} runs on {done.instance_type}; MLflow shows its epochs"]
    if done.metric and done.value is not None:
        versus = f"; to the champion {in_points(done.difference)}" if done.difference else ""
        lines = [
            f"version {done.version} of {done.model} in MLflow: {METRIC_TITLES[done.metric]} {done.value:.1%} "
            f"on {counted(done.holdout_images or 0, 'holdout image')}{versus}",
            "a trial: it does not serve, and the gate was not asked",
        ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
