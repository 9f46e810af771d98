"""What is deployed: each function's folder with its layers, built as they are built for AWS.

The layers are kept in the cache that `cdk` uses; the first run builds them, taking a minute.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from infra_cdk.constructs.layers import library_folder, model_configs_folder
from infra_cdk.dependency_build import LAMBDA_PLATFORM, DependencyBuild, host_platform
from infra_cdk.sources import FUNCTIONS, LAYERS, LIBRARY, ROOT
from labelloop.artifacts import Bucket, Champions, onnx_key, s3_uri
from labelloop.imaging import FORMATS
from labelloop.model_config import ModelConfigs, config_digest
from local.environment import aws_environment
from tests import examples
from tests.recording_server import Answer, Request, serving

LIMIT_BYTES = 95_000_000
FORBIDDEN = {"torch", "torchvision", "mlflow", "sagemaker", "pandas", "boto3", "botocore"}
LAYERS_OF = dict.fromkeys(("predict", "predict_part", "prelabel"), ("core", "inference"))
HANDLERS = sorted(handler.parent.name for handler in FUNCTIONS.glob("*/handler.py"))


def built(layer: str, platform: str | None = LAMBDA_PLATFORM) -> Path:
    return DependencyBuild(requirements=LAYERS / layer / "requirements.txt", platform=platform).folder()


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_predicts_layers_are_below_95_mb() -> None:
    with library_folder(compiled=True) as library:
        assert size(built("core")) + size(built("inference")) + size(Path(library)) < LIMIT_BYTES


@pytest.mark.parametrize("function", HANDLERS)
def test_no_package_holds_what_only_training_needs(function: str) -> None:
    folders = [FUNCTIONS / function, *(built(layer) / "python" for layer in LAYERS_OF.get(function, ("core",)))]
    names = {path.name.partition(".")[0] for folder in folders for path in folder.iterdir()}
    assert not names & FORBIDDEN


@pytest.mark.parametrize("function", HANDLERS)
def test_a_handler_loads_from_its_package_alone(function: str) -> None:
    loaded = alone(
        function,
        """
import handler, json, sys
assert callable(handler.handler)
print(json.dumps(sorted(name for name in sys.modules if "." not in name)))
""",
    )
    found = set(json.loads(loaded))
    assert not found & (FORBIDDEN - {"boto3", "botocore"})
    if function in ("predict", "predict_part"):  # somebody waits for their start
        assert not found & {"aws_lambda_powertools", "boto3", "botocore", "dataclasses", "urllib3", "yaml"}


def alone(function: str, code: str, **extra: str) -> str:
    """What code prints with the layers, the library and what Lambda's runtime brings, and nothing else of this environment."""
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
{code}
"""
    environment = {
        "PATH": os.environ["PATH"],
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "POWERTOOLS_SERVICE_NAME": function,
        "OPENBLAS_NUM_THREADS": "1",
        **extra,
    }
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_predict_answers_for_every_format_from_its_package_alone(new_bucket: Callable[[], Bucket], aws: str) -> None:
    """S3, decoding and the model's run, with nothing but what is deployed."""
    bucket, onnx = new_bucket(), examples.brightness_model()
    bucket.put(onnx_key("digits", 1), onnx)
    Champions(bucket).swap(examples.champion(1, onnx), tag=None)
    image = Image.open(io.BytesIO(examples.png(5, size=(64, 64), mode="RGB")))
    files = {name: examples.encoded(image, name) for name in FORMATS}
    files |= {f"TIFF {kind}": examples.encoded(image, "TIFF", compression=kind) for kind in ("tiff_lzw", "jpeg", "zstd", "lzma")}
    for name, data in files.items():
        bucket.put(f"images/digits/{name}", data)
    tasks = [{"id": number, "data": {"image": s3_uri(bucket.name, f"images/digits/{name}")}} for number, name in enumerate(files)]
    event = examples.api_event("POST", "digits", "predict", json.dumps({"tasks": tasks}))
    with model_configs_folder(examples.CONFIGS) as configs:
        printed = alone(
            "predict",
            f"""
import handler
class Context:
    function_name = function_version = invoked_function_arn = aws_request_id = "none"
    memory_limit_in_mb = 1769
    get_remaining_time_in_millis = lambda self: 29_000
print(handler.handler({event!r}, Context())["body"])
""",
            **aws_environment(aws),
            LABELLOOP_MODEL_CONFIGS=f"{configs}/python/model_configs",
            LABELLOOP_IMAGES_BUCKET=bucket.name,
            LABELLOOP_ARTIFACTS_BUCKET=bucket.name,
            LABELLOOP_LABEL_STUDIO_URL="http://127.0.0.1:1",
        )
    answers = json.loads(printed.splitlines()[-1])["results"]
    said = {name: answer.get("result") or answer for name, answer in zip(files, answers, strict=True)}
    assert {name: regions[0]["value"]["choices"] for name, regions in said.items()} == {name: ["5"] for name in files}, said


@pytest.mark.parametrize("kind", ["snap-start", "provisioned-concurrency", "on-demand"])
def test_the_model_runtime_is_loaded_ahead_only_where_nobody_waits(kind: str) -> None:
    code = "import handler\nprint('onnxruntime' in sys.modules)"
    assert alone("predict", code, AWS_LAMBDA_INITIALIZATION_TYPE=kind).strip() == str(kind != "on-demand")


def test_the_layer_of_configs_says_what_the_repository_does() -> None:
    with model_configs_folder(examples.CONFIGS) as folder:
        packed = ModelConfigs(Path(folder) / "python" / "model_configs")
        assert packed.names == examples.CONFIGS.names
        for name in packed.names:
            assert packed[name].config == examples.CONFIGS[name].config
            assert packed[name].label_config == examples.CONFIGS[name].label_config
            digests = {config_digest(models[name].config, models[name].label_config) for models in (packed, examples.CONFIGS)}
            assert len(digests) == 1, "else everything would be said to run with another config"


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


def test_predict_reads_s3_after_it_was_restored_from_a_snapshot() -> None:
    """Then Lambda gives no access key: it has an address that hands one out to whoever has the token."""

    def answer(request: Request) -> Answer:
        if request.path != "/credentials":
            return Answer(404)
        if request.headers.get("authorization") != "a-token":
            return Answer(401)
        expires = "2100-01-01T00:00:00Z"
        return Answer(body={"AccessKeyId": "HANDEDOUT", "SecretAccessKey": "secret", "Token": "session", "Expiration": expires})

    event = examples.api_event("GET", "digits", "versions", "")
    with serving(answer) as recorder, model_configs_folder(examples.CONFIGS) as configs:
        printed = alone(
            "predict",
            f"""
import handler, os
del os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
os.environ["AWS_CONTAINER_CREDENTIALS_FULL_URI"] = "{recorder.url}/credentials"
os.environ["AWS_CONTAINER_AUTHORIZATION_TOKEN"] = "a-token"
class Context:
    function_name = function_version = invoked_function_arn = aws_request_id = "none"
    memory_limit_in_mb = 1769
    get_remaining_time_in_millis = lambda self: 29_000
print(handler.handler({event!r}, Context())["statusCode"])
""",
            AWS_LAMBDA_INITIALIZATION_TYPE="snap-start",
            AWS_ENDPOINT_URL=recorder.url,
            LABELLOOP_MODEL_CONFIGS=f"{configs}/python/model_configs",
            LABELLOOP_IMAGES_BUCKET="images",
            LABELLOOP_ARTIFACTS_BUCKET="artifacts",
            LABELLOOP_LABEL_STUDIO_URL="http://127.0.0.1:1",
        )
    assert printed.splitlines()[-1] == "200"
    (read,) = (request for request in recorder.requests if request.path == "/artifacts/champions/digits.json")
    assert "Credential=HANDEDOUT/" in read.headers["authorization"]
