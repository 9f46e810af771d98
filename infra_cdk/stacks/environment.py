"""Parts of the functions' environment that several functions share."""

from __future__ import annotations

from infra_cdk.stage import Stage

INFERENCE_THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # functions spread images over the cores themselves


def label_studio_environment(stage: Stage) -> dict[str, str]:
    """Without an address `labelloop.settings` says at run time what is missing; synth has warned."""
    url = {"LABELLOOP_LABEL_STUDIO_URL": stage.label_studio_url} if stage.label_studio_url else {}
    return {**url, "LABELLOOP_LABEL_STUDIO_SECRET": stage.label_studio_secret}


def mlflow_environment(stage: Stage, tracking_uri: str) -> dict[str, str]:
    secret = {"LABELLOOP_MLFLOW_SECRET": stage.mlflow_secret} if stage.mlflow_secret else {}
    return {"LABELLOOP_MLFLOW_TRACKING_URI": tracking_uri, **secret}
