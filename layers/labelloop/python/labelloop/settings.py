"""The only reader of the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping

from labelloop.errors import SettingsError


class Settings:
    """What a deployment tells a function or a job; each value is asked for only where it is needed.

    Raises `SettingsError` naming the variable when it is missing. docs/architecture.md lists which function gets which.
    """

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        self._environ = os.environ if environ is None else environ

    def _get(self, name: str) -> str:
        value = self._environ.get(name, "")
        if not value:
            raise SettingsError(f"the environment variable {name} is not set")
        return value

    @property
    def stage(self) -> str:
        return self._get("LABELLOOP_STAGE")

    @property
    def region(self) -> str:
        """Of AWS; Lambda says it to its functions."""
        return self._get("AWS_REGION")

    @property
    def function(self) -> str:
        """Which of the functions this is, as its log and its metrics name it; nothing outside of one."""
        return self._environ.get("POWERTOOLS_SERVICE_NAME", "")

    @property
    def images_bucket(self) -> str:
        return self._get("LABELLOOP_IMAGES_BUCKET")

    @property
    def artifacts_bucket(self) -> str:
        return self._get("LABELLOOP_ARTIFACTS_BUCKET")

    @property
    def ledger_table(self) -> str:
        return self._get("LABELLOOP_LEDGER_TABLE")

    @property
    def label_studio_url(self) -> str:
        return self._get("LABELLOOP_LABEL_STUDIO_URL").rstrip("/")

    @property
    def label_studio_secret(self) -> str:
        """Name of the secret that holds the token."""
        return self._get("LABELLOOP_LABEL_STUDIO_SECRET")

    @property
    def backend_secret_prefix(self) -> str:
        return self._get("LABELLOOP_BACKEND_SECRET_PREFIX")

    @property
    def mlflow_tracking_uri(self) -> str:
        return self._get("LABELLOOP_MLFLOW_TRACKING_URI")

    @property
    def mlflow_secret(self) -> str | None:
        """Name of the secret that holds an MLflow server's token; None where there is none."""
        return self._environ.get("LABELLOOP_MLFLOW_SECRET") or None

    @property
    def event_bus(self) -> str:
        return self._get("LABELLOOP_EVENT_BUS")

    @property
    def promote_queue(self) -> str:
        """URL of the queue that `promote` reads."""
        return self._get("LABELLOOP_PROMOTE_QUEUE")

    @property
    def prelabel_queue(self) -> str:
        """URL of the queue that `prelabel` reads."""
        return self._get("LABELLOOP_PRELABEL_QUEUE")

    @property
    def predict_part_function(self) -> str:
        """Name of the function that predicts parts of large requests."""
        return self._get("LABELLOOP_PREDICT_PART_FUNCTION")

    @property
    def training_role(self) -> str:
        return self._get("LABELLOOP_TRAINING_ROLE")

    @property
    def training_image(self) -> str:
        return self._get("LABELLOOP_TRAINING_IMAGE")

    @property
    def training_code(self) -> str:
        """s3:// address of the zip with the training code."""
        return self._get("LABELLOOP_TRAINING_CODE")

    @property
    def training_subnets(self) -> list[str]:
        """Ids of the subnets that training jobs run in; none outside of a VPC."""
        return [name for name in self._environ.get("LABELLOOP_TRAINING_SUBNETS", "").split(",") if name]

    @property
    def training_security_groups(self) -> list[str]:
        return [name for name in self._environ.get("LABELLOOP_TRAINING_SECURITY_GROUPS", "").split(",") if name]

    @property
    def model_configs(self) -> str | None:
        """A folder of model configs that takes the place of the packaged one."""
        return self._environ.get("LABELLOOP_MODEL_CONFIGS") or None

    @property
    def opt_ml(self) -> str:
        """SageMaker's folder; the laptop's stand-in gives each job one of its own."""
        return self._environ.get("LABELLOOP_OPT_ML") or "/opt/ml"

    @property
    def starts_ahead(self) -> bool:
        """Whether nobody waits for this start: Lambda takes a snapshot of it, or keeps it ready (`predict_start`)."""
        return self._environ.get("AWS_LAMBDA_INITIALIZATION_TYPE") in ("snap-start", "provisioned-concurrency")

    @property
    def credentials_token(self) -> str | None:
        """Opens the address that Lambda hands out credentials at, where it gives no access key itself (SnapStart); else None."""
        given = self._environ.get("AWS_ACCESS_KEY_ID")
        return None if given else self._environ.get("AWS_CONTAINER_AUTHORIZATION_TOKEN") or None

    @property
    def gpu_driver(self) -> str | None:
        """The NVIDIA driver of SageMaker's machine that a training job runs on; None where that has no GPU, and on a laptop."""
        return self._environ.get("LABELLOOP_GPU_DRIVER") or None

    @property
    def rank(self) -> int:
        """The number of this process among those that torchrun started beside each other; 0 of one alone."""
        return int(self._environ.get("RANK", "0"))

    @property
    def ranks(self) -> int:
        """How many of them there are."""
        return int(self._environ.get("WORLD_SIZE", "1"))

    @property
    def ranks_file(self) -> str:
        """Through which they find each other."""
        return self._get("LABELLOOP_RANKS_FILE")

    @property
    def cache(self) -> str | None:
        """s3:// address under which a training job keeps what the next one need not do again; None: nowhere."""
        return self._environ.get("LABELLOOP_CACHE") or None

    @property
    def endpoint_url(self) -> str | None:
        """Where AWS is, when it is an emulator."""
        return self._environ.get("AWS_ENDPOINT_URL") or None
