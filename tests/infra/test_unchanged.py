"""What must not change: logical ids of what outlives a stack, and all of a template and its assets where the tree is the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from infra_cdk.sources import ROOT
from tests.infra.templates import LOCAL_CONTEXT, Templates, context_of, synthesize

# CloudFormation knows a resource by its logical id: under another it makes a new, empty one, and forgets the old. Once a stage is
# deployed nothing may be taken from here or renamed.
RETAINED = {
    "state": {
        "Images2D38C313": "S3::Bucket",
        "Artifacts82DD59A1": "S3::Bucket",
        "LedgerB7379752": "DynamoDB::Table",
        "EventBus7B8748AA": "Events::EventBus",
        "SecretsLabelStudioB4D6D5F7": "SecretsManager::Secret",
        "SecretsBackenddigits8C75C929": "SecretsManager::Secret",
        "SecretsBackenddigitdetector84BBDFBA": "SecretsManager::Secret",
    },
    "training": {},
    "serving": {
        "FrontDoorApiCloudWatchRoleF64EE322": "IAM::Role",
        "FrontDoorApiAccount1210532F": "ApiGateway::Account",
    },
}
APP = {"MlflowArtifacts3D6BA9CD": "S3::Bucket", "MlflowApp434C8BD0": "SageMaker::MlflowApp"}
SERVER = {"SecretsMlflow6520EC12": "SecretsManager::Secret"}
KEEPS = ("Retain", "RetainExceptOnCreate")
ONE_OF_A_MODEL = "SecretsBackend"  # each model adds one


def retained(templates: Templates) -> dict[str, dict[str, str]]:
    """What stays when its stack goes, or when it is replaced: type by logical id, by stack."""
    return {
        name: {
            id: resource["Type"].removeprefix("AWS::")
            for id, resource in template.resources.items()
            if resource.get("DeletionPolicy") in KEEPS or resource.get("UpdateReplacePolicy") in KEEPS
        }
        for name, template in zip(RETAINED, templates, strict=True)
    }


@pytest.mark.parametrize("kind", ["app", "server", "local"])
def test_what_outlives_its_stack_keeps_its_logical_id(kind: str, tmp_path: Path) -> None:
    facts: dict[str, Any] = {"mlflow": "https://mlflow.example.org"} if kind == "server" else {}
    context = LOCAL_CONTEXT if kind == "local" else context_of(tmp_path, **facts)
    found = retained(synthesize(context, tmp_path / "out"))
    more = {"app": APP, "server": SERVER, "local": {}}[kind]
    for stack, pinned in {**RETAINED, "state": {**RETAINED["state"], **more}}.items():
        assert {id: found[stack].get(id) for id in pinned} == pinned
        assert {id for id in found[stack].keys() - pinned.keys() if not id.startswith(ONE_OF_A_MODEL)} == set()


PARTS = ("functions", "infra_cdk", "layers", "model_configs", "training_jobs", "cli", "cdk.json", "stages.yaml")


def assembly(checkout: Path, out: Path) -> dict[str, Any]:
    """Templates and lists of assets as `cdk synth` in this checkout has them written, in a process of its own."""
    context = {**json.loads((ROOT / "cdk.json").read_text())["context"], "stage": "prod"}
    environment = {
        **{name: os.environ[name] for name in ("PATH", "HOME", "LABELLOOP_CACHE") if name in os.environ},
        "PYTHONPATH": os.pathsep.join([str(checkout), str(checkout / "layers" / "labelloop" / "python")]),
        "CDK_OUTDIR": str(out),
        "CDK_CONTEXT_JSON": json.dumps(context),
    }
    done = subprocess.run(
        [sys.executable, "-m", "infra_cdk.app"], cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    files = sorted([*out.glob("*.template.json"), *out.glob("*.assets.json")])
    return {file.name: json.loads(file.read_text()) for file in files}


def test_the_same_tree_elsewhere_and_at_another_time_is_the_same_to_cdk_diff(tmp_path: Path) -> None:
    """Byte code and caches of one checkout, which the other has not, count as nothing. Layers are built, or kept from before."""
    other = tmp_path / "a checkout elsewhere"
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, other / part, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copyfile(ROOT / part, other / part)
    here, there = assembly(ROOT, tmp_path / "here"), assembly(other, tmp_path / "there")
    assert len(here) == 6
    assert here == there
