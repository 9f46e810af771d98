"""MLflow: the run of a training job and the model version it registers.

A restarted job finds its run and its version by the job's name and goes on with them.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient, is_tracking_uri_set

from labelloop.errors import LabelloopError, RegistryError, SettingsError
from labelloop.secrets import MlflowToken
from labelloop.settings import Settings
from training_jobs.job import TrainingJob

log = logging.getLogger(__name__)

# Enough for a server to be started again: what was trained so far would be lost with the job. MLflow's own waits add up to a
# quarter of an hour before it gives a dead one up.
_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",  # seconds
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "8",  # after 2, 4, … 120 seconds, each up to a second more: some four minutes in all
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class Run:
    """The MLflow run of a training job; as a context it ends as FINISHED, FAILED, or KILLED when the job is stopped.

    Methods raise `RegistryError` when MLflow does not do its part.
    """

    def __init__(self, job: TrainingJob) -> None:
        """Raises `SettingsError` without MLFLOW_TRACKING_URI: MLflow would write to a file here that nobody reads."""
        if not is_tracking_uri_set():  # type: ignore[no-untyped-call]
            raise SettingsError("the environment variable MLFLOW_TRACKING_URI is not set")
        for name, value in _PATIENCE.items():
            os.environ.setdefault(name, value)
        if token := MlflowToken.of(Settings()):
            os.environ.update(MLFLOW_TRACKING_TOKEN=token())  # MLflow's own way in; of this process, not of the job's description
        # The plugin for SageMaker's MLflow warns at every request whose server is another's.
        logging.getLogger("mlflow.tracking.request_header.registry").setLevel(logging.ERROR)
        self._job = job
        with _translated():
            self._client = MlflowClient()
            self._id, self._artifacts = self._begin()

    @property
    def id(self) -> str:
        return self._id

    def _begin(self) -> tuple[str, str]:
        experiment = self._client.get_experiment_by_name(self._job.model)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(self._job.model)
        tags = {"job_name": self._job.name, "dataset_digest": self._job.digest, "mlflow.runName": self._job.name}
        found = self._client.search_runs([experiment_id], f"tags.job_name = '{self._job.name}'", max_results=1)
        if found:
            log.info("going on with the MLflow run %s", found[0].info.run_id)
            self._client.update_run(found[0].info.run_id, status="RUNNING")
        run = found[0] if found else self._client.create_run(experiment_id, tags=tags)
        return run.info.run_id, run.info.artifact_uri

    def parameters(self, values: Mapping[str, object]) -> None:
        with _translated():
            self._client.log_batch(self._id, params=[Param(key, str(value)) for key, value in values.items()])

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        now = round(time.time() * 1000)
        with _translated():
            self._client.log_batch(self._id, metrics=[Metric(key, value, now, step) for key, value in values.items()])

    def keep(self, *files: Path) -> None:
        """Upload files as the run's artifacts."""
        with _translated():
            for file in files:
                self._client.log_artifact(self._id, str(file))

    def register(self, tags: Mapping[str, object]) -> int:
        """The number of the model version that this run made, registered now unless it was before."""
        with _translated():
            known = self._client.search_model_versions(f"run_id = '{self._id}'")
            if known:
                return int(known[0].version)
            try:
                self._client.create_registered_model(self._job.model)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            text = {key: str(value) for key, value in tags.items()}
            version = self._client.create_model_version(self._job.model, self._artifacts, run_id=self._id, tags=text)
            return int(version.version)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        status = "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"
        try:
            with _translated():
                self._client.set_terminated(self._id, status)
        except LabelloopError as unreachable:
            if kind is None:
                raise
            log.warning("the run could not be marked as %s: %s", status, unreachable)  # the error under way says more


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (MlflowException, OSError) as error:  # requests' errors are OSErrors
        raise RegistryError(f"MLflow does not do its part: {str(error).strip().splitlines()[0]}") from error
