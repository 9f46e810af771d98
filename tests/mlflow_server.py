"""A real MLflow server on a free port of 127.0.0.1."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from local import processes
from local.environment import LOOPBACK, clean_environment


@contextmanager
def mlflow_server(folder: Path, *artifacts: str) -> Iterator[str]:
    """Its address. `artifacts`: its options that say where those go; else it takes and hands them out itself."""
    port = processes.free_port()
    command = [sys.executable, "-P", "-m", "mlflow", "server", "--host", LOOPBACK, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    command += artifacts or ["--artifacts-destination", str(folder / "artifacts")]
    switches = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment = {**clean_environment(), **switches}
    started = processes.start("mlflow", command, log=folder / "log", environment=environment, folder=folder)
    try:
        url = f"http://{LOOPBACK}:{port}"
        processes.wait_until_ready(started, lambda: processes.answers(f"{url}/health"), limit_s=180)
        yield url
    finally:
        processes.stop([started.record], grace_s=5)
