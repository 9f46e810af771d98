"""What is deployed: each function's folder with its layers, built as they are built for AWS.

The layers are kept in the cache that `cdk` uses; the first run builds them, taking a minute.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from infra_cdk.dependency_build import LAMBDA_PLATFORM, DependencyBuild, host_platform
from infra_cdk.sources import FUNCTIONS, LAYERS, LIBRARY, ROOT

LIMIT_BYTES = 100_000_000
FORBIDDEN = {"torch", "torchvision", "mlflow", "sagemaker", "pandas", "boto3", "botocore"}
LAYERS_OF = dict.fromkeys(("predict", "predict_part", "prelabel"), ("core", "inference"))
HANDLERS = sorted(handler.parent.name for handler in FUNCTIONS.glob("*/handler.py"))


def built(layer: str, platform: str | None = LAMBDA_PLATFORM) -> Path:
    return DependencyBuild(requirements=LAYERS / layer / "requirements.txt", platform=platform).folder()


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_predicts_layers_are_below_100_mb() -> None:
    assert size(built("core")) + size(built("inference")) + size(LIBRARY) < LIMIT_BYTES


@pytest.mark.parametrize("function", HANDLERS)
def test_no_package_holds_what_only_training_needs(function: str) -> None:
    folders = [FUNCTIONS / function, *(built(layer) / "python" for layer in LAYERS_OF.get(function, ("core",)))]
    names = {path.name.partition(".")[0] for folder in folders for path in folder.iterdir()}
    assert not names & FORBIDDEN


@pytest.mark.parametrize("function", HANDLERS)
def test_a_handler_loads_from_its_package_alone(function: str) -> None:
    """With the layers, the library and what Lambda's runtime brings, in an interpreter that sees nothing else."""
    layers = [str(built(layer, host_platform()) / "python") for layer in LAYERS_OF.get(function, ("core",))]
    program = f"""
import importlib.machinery, importlib.util, json, sys
NAMES = {{"boto3", "botocore", "s3transfer", "urllib3", "dateutil", "six"}}
class Runtime:  # these come with Lambda's runtime; nothing else of this environment is to be found
    def find_spec(self, name, path=None, target=None):
        if name in NAMES:
            return importlib.machinery.PathFinder.find_spec(name, {json.dumps(_site_packages())})
sys.path[:0] = {json.dumps([str(FUNCTIONS / function), *layers, str(LIBRARY.parent)])}
sys.meta_path.append(Runtime())
import handler
assert callable(handler.handler)
print(json.dumps(sorted(name for name in sys.modules if "." not in name)))
"""
    environment = {
        "PATH": os.environ["PATH"],
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "POWERTOOLS_SERVICE_NAME": function,
        "OPENBLAS_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert not set(json.loads(done.stdout)) & (FORBIDDEN - {"boto3", "botocore"})


def test_layers_hold_the_versions_that_are_tested_here() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    pinned = dict(re.findall(r"^([a-z0-9_-]+)==(\S+)$", "\n".join(project), re.MULTILINE))
    for layer in ("core", "inference"):
        text = (LAYERS / layer / "requirements.txt").read_text()
        required = dict(re.findall(r"^([a-z0-9_-]+)==(\S+)", text, re.MULTILINE))
        assert required
        for name, version in required.items():
            assert version == pinned.get(name, _installed(name)), name


def _installed(name: str) -> str:
    from importlib.metadata import version

    return version(name)


def _site_packages() -> list[str]:
    import boto3

    return [str(Path(boto3.__file__).parent.parent)]
