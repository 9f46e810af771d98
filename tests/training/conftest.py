"""A real MLflow server for the session, and training jobs that run in this process through their own `main`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from local.environment import clean_environment
from tests.mlflow_server import mlflow_server
from tests.training.opt_ml import OptMl, model_configs
from training_jobs import train

EPOCHS = 4


@pytest.fixture(scope="session")
def mlflow_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as url:
        yield url


@pytest.fixture
def mlflow(mlflow_url: str) -> MlflowClient:
    return MlflowClient(mlflow_url)


@pytest.fixture(scope="session")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_configs(tmp_path_factory.mktemp("model_configs"), epochs=EPOCHS)


@pytest.fixture
def run_here(mlflow_url: str, configs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[OptMl], int]]:
    """Runs a job in this process; returns its exit status."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_url)
    monkeypatch.setenv("LABELLOOP_MODEL_CONFIGS", str(configs))

    def run(job: OptMl) -> int:
        monkeypatch.setenv("LABELLOOP_OPT_ML", str(job.folder))
        return train.main()

    yield run
    signal.signal(signal.SIGTERM, before)


def job_environment(job: OptMl, mlflow_url: str, configs: Path | None = None) -> dict[str, str]:
    """What a job's own process starts with."""
    return {
        **clean_environment(),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "MLFLOW_TRACKING_URI": mlflow_url,
        "LABELLOOP_OPT_ML": str(job.folder),
        **({"LABELLOOP_MODEL_CONFIGS": str(configs)} if configs else {}),
    }
