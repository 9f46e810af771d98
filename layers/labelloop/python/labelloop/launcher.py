"""Start, watch and name SageMaker training jobs.

A job's name follows from model, snapshot and attempt, and is unique for ever in an account: starting one twice is harmless.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from botocore.exceptions import BotoCoreError, ClientError

from labelloop import artifacts, aws
from labelloop.errors import TrainingServiceError
from labelloop.model_config import ModelConfig
from labelloop.records import Champion, Job
from labelloop.settings import Settings

# What the container runs: its own copy of the code, and what the image lacks of the requirements.
# SageMaker takes one line of at most 256 characters.
COMMAND = "; ".join(
    (
        "set -eu",
        "mkdir -p /opt/ml/code",
        "python -m zipfile -e /opt/ml/input/data/code/*.zip /opt/ml/code",
        "cd /opt/ml/code",
        "export LABELLOOP_MODEL_CONFIGS=/opt/ml/code/model_configs PYTHONPATH=/opt/ml/code",
        "exec bash training_jobs/start.sh",
    )
)

NO_MACHINE = "CapacityError"  # SageMaker's code for it, with which a reason begins
_JOB_NAME = 63  # characters, SageMaker's limit

JobStatus = Literal["InProgress", "Completed", "Failed", "Stopping", "Stopped", "Deleting"]


# Why SageMaker stopped a job itself, by its secondary status; it gives no reason then.
_STOPPED_BY = {
    "MaxWaitTimeExceeded": f"{NO_MACHINE}: no spot machine for long enough, in twice the time that the job may take",
    "MaxRuntimeExceeded": "it took longer than training.max_runtime_minutes",
}


@dataclass(frozen=True)
class JobState:
    """What SageMaker says of a job."""

    status: JobStatus
    failure: str | None

    @property
    def ended(self) -> bool:
        return self.status in ("Completed", "Failed", "Stopped")

    @property
    def no_machine(self) -> bool:
        """Whether AWS had none to spare. What comes before the colon of a reason is SageMaker's code."""
        return self.status in ("Failed", "Stopped") and (self.failure or "").partition(":")[0] == NO_MACHINE


def job_name(stage: str, model: str, digest: str, attempt: int) -> str:
    """At most 63 characters, letters, digits and hyphens: a long model name is cut, the digest still tells models apart."""
    before, after = f"labelloop-{stage}-", f"-{digest[:12]}-{attempt}"
    return before + model.replace("_", "-")[: _JOB_NAME - len(before) - len(after)] + after


class Launcher:
    """SageMaker as the loop needs it. Methods raise `TrainingServiceError`."""

    def __init__(self, settings: Settings, client: Any = None) -> None:
        self._settings = settings
        self._client = client or aws.client("sagemaker", read_timeout=20)

    @property
    def code(self) -> str:
        """Address of what jobs run: the training code with the configs and networks. Other content has another one."""
        return self._settings.training_code

    def start(self, config: ModelConfig, job: Job, champion: Champion | None) -> None:
        """Start a job on the first type of instance that the account has a quota for; that it was started already is fine."""
        refused: ClientError | None = None
        for instance_type in config.training.instance_types(job.shortages):
            try:
                self._client.create_training_job(**training_request(self._settings, config, job, champion, instance_type))
            except ClientError as error:
                match error.response["Error"]["Code"]:
                    case "ResourceInUse":
                        return
                    case "ResourceLimitExceeded":
                        refused = refused or error
                    case _:
                        raise TrainingServiceError(f"SageMaker refused {job.job_name}: {error}") from error
            except BotoCoreError as error:
                raise TrainingServiceError(f"SageMaker does not answer: {error}") from error
            else:
                return
        raise TrainingServiceError(
            f"SageMaker refused {job.job_name}: {refused}; raise the quota, or name other instances under "
            "training.fallback_instance_types in config.yaml"
        ) from refused

    def state(self, name: str) -> JobState | None:
        """The state of a job; None when it was never started."""
        try:
            answer = self._client.describe_training_job(TrainingJobName=name)
        except ClientError as error:
            code = error.response["Error"]["Code"]
            # SageMaker has no code of its own for "not found"; the request is otherwise valid.
            if code in ("ValidationException", "ResourceNotFound"):
                return None
            raise TrainingServiceError(f"SageMaker refused to describe {name}: {error}") from error
        except BotoCoreError as error:
            raise TrainingServiceError(f"SageMaker does not answer: {error}") from error
        failure = answer.get("FailureReason") or _STOPPED_BY.get(answer.get("SecondaryStatus", ""))
        return JobState(status=answer["TrainingJobStatus"], failure=failure)


def training_request(
    settings: Settings, config: ModelConfig, job: Job, champion: Champion | None, instance_type: str | None = None
) -> dict[str, Any]:
    """The CreateTrainingJob request, for the config's own type of instance unless told otherwise.

    docs/architecture.md has the contract of the job.
    """
    bucket, training = settings.artifacts_bucket, config.training
    seconds = training.max_runtime_minutes * 60
    channels = [
        _channel("code", settings.training_code),
        _channel("manifest", job.snapshot.manifest),
        _channel("images", f"s3://{settings.images_bucket}/{config.images_prefix}", mode="FastFile"),
    ]
    if champion is not None:
        channels.append(_channel("champion", f"s3://{bucket}/{champion.onnx}"))
    if config.architecture.weights_uri is not None:
        channels.append(_channel("weights", config.architecture.weights_uri))
    return {
        "TrainingJobName": job.job_name,
        "RoleArn": settings.training_role,
        "AlgorithmSpecification": {
            "TrainingImage": settings.training_image,
            "TrainingInputMode": "File",
            "ContainerEntrypoint": ["bash", "-c"],
            "ContainerArguments": [COMMAND],
        },
        "HyperParameters": {
            "model": config.name,
            "digest": job.digest,
            "n_annotations": str(job.n_annotations),
            "job_name": job.job_name,
            "champion_version": str(champion.version) if champion else "",
            "champion_annotations": str(champion.n_annotations) if champion else "",
        },
        "Environment": {
            "MLFLOW_TRACKING_URI": settings.mlflow_tracking_uri,
            **({"LABELLOOP_MLFLOW_SECRET": settings.mlflow_secret} if settings.mlflow_secret else {}),
            "LABELLOOP_STAGE": settings.stage,
            "AWS_DEFAULT_REGION": settings.region,  # SageMaker tells a container at most AWS_REGION, which boto3 does not read
            "LABELLOOP_CACHE": f"s3://{bucket}/{artifacts.cache_prefix(config.name)}",
        },
        "InputDataConfig": channels,
        "OutputDataConfig": {"S3OutputPath": f"s3://{bucket}/{artifacts.training_prefix(config.name)}"},
        "CheckpointConfig": {"S3Uri": f"s3://{bucket}/{artifacts.checkpoints_prefix(config.name, job.job_name)}"},
        "ResourceConfig": {
            "InstanceType": instance_type or training.instance_type,
            "InstanceCount": 1,
            "VolumeSizeInGB": training.volume_gb,
        },
        **_network(settings),
        "StoppingCondition": {
            "MaxRuntimeInSeconds": seconds,
            **({"MaxWaitTimeInSeconds": 2 * seconds} if training.spot else {}),
        },
        "EnableManagedSpotTraining": training.spot,
        "ProfilerConfig": {"DisableProfiler": True},
        "Tags": [{"Key": "labelloop:model", "Value": config.name}, {"Key": "labelloop:digest", "Value": job.digest}],
    }


def _network(settings: Settings) -> dict[str, Any]:
    """The VPC that the job runs in, where the stage has one; then it reaches nothing but what that lets it reach."""
    if not settings.training_subnets:
        return {}
    return {"VpcConfig": {"Subnets": settings.training_subnets, "SecurityGroupIds": settings.training_security_groups}}


def _channel(name: str, uri: str, mode: str = "File") -> dict[str, Any]:
    source = {"S3DataType": "S3Prefix", "S3Uri": uri, "S3DataDistributionType": "FullyReplicated"}
    return {"ChannelName": name, "InputMode": mode, "DataSource": {"S3DataSource": source}}
