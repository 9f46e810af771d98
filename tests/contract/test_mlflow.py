"""Both kinds of MLflow, as the promote function and a training job talk to them: a server that wants a bearer token from Secrets
Manager, and SageMaker's MLflow App, which wants requests signed with SigV4 and keeps artifacts in S3.

A real MLflow server stands behind a door that lets in what that kind lets in. AWS's own door was never tried.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import pytest
import urllib3
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from mlflow.tracking import MlflowClient

from labelloop.artifacts import Bucket
from labelloop.errors import NotRegisteredError, RegistryError
from labelloop.launcher import training_request
from labelloop.registry import Registry
from labelloop.secrets import MlflowToken
from labelloop.settings import Settings
from tests import examples
from tests.mlflow_server import mlflow_server
from tests.recording_server import Answer, RecordingServer, Request, serving
from training_jobs.job import TrainingJob
from training_jobs.tracking import Run

ARN = "arn:aws:sagemaker:eu-west-1:000000000000:mlflow-app/app-1"
REGION = "eu-west-1"
SECRET = "labelloop/prod/mlflow"
TOKEN = "a-token-of-the-server"
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_SESSION_TOKEN": "a-session"}
KEPT_OUT = {"authorization", "host", "content-length", "connection"}  # of a request that is handed on


def signature(request: Request, url: str) -> str:
    """The Authorization header that botocore's own signer gives this request, from what of it the sender says it has signed."""
    signed = request.headers["authorization"].partition("SignedHeaders=")[2].partition(",")[0].split(";")
    again = AWSRequest(
        request.method, url + request.path, data=request.body, headers={name: request.headers[name] for name in signed}
    )
    again.context["timestamp"] = request.headers["x-amz-date"]
    credentials = Credentials(KEYS["AWS_ACCESS_KEY_ID"], KEYS["AWS_SECRET_ACCESS_KEY"], KEYS["AWS_SESSION_TOKEN"])
    signer: Any = SigV4Auth(credentials, "sagemaker", REGION)
    text = signer.string_to_sign(again, signer.canonical_request(again))
    signer._inject_signature_to_request(again, signer.signature(text, again))
    return str(again.headers["Authorization"])


def opens_with_token(request: Request, url: str) -> bool:
    return request.headers.get("authorization") == f"Bearer {TOKEN}"


def opens_with_signature(request: Request, url: str) -> bool:
    given = request.headers.get("authorization", "")
    signed = given.partition("SignedHeaders=")[2].partition(",")[0].split(";")
    return (
        {"host", "x-amz-content-sha256", "x-amz-date", "x-amz-security-token", "x-sm-mlflow-app-arn"} <= set(signed)
        and request.headers["x-amz-content-sha256"] == hashlib.sha256(request.body).hexdigest()
        and request.headers["x-sm-mlflow-app-arn"] == ARN
        and given == signature(request, url)
    )


@dataclass
class Kind:
    """An MLflow: the environment that a function or job finds it by, and the door."""

    environment: dict[str, str]
    door: RecordingServer
    server: str
    refused: list[Request] = field(default_factory=list)

    @property
    def registry(self) -> Registry:
        """As the promote function has it; the App's address is the door's."""
        settings = Settings(self.environment)
        app = settings.mlflow_tracking_uri.startswith("arn:")
        return Registry(settings.mlflow_tracking_uri, MlflowToken.of(settings), endpoint=self.door.url if app else None)

    @property
    def behind(self) -> MlflowClient:
        """The server itself."""
        return MlflowClient(self.server)


def door(server: str, opens: Callable[[Request, str], bool]) -> tuple[Callable[[Request], Answer], list[Request], list[str]]:
    http, refused, address = urllib3.PoolManager(retries=False), list[Request](), list[str]()

    def answer(request: Request) -> Answer:
        if not opens(request, address[0]):
            refused.append(request)
            return Answer(401, {"error_code": "UNAUTHENTICATED", "message": "who are you?"})
        headers = {name: value for name, value in request.headers.items() if name not in KEPT_OUT}
        found = http.request(request.method, server + request.path, body=request.body or None, headers=headers)
        return Answer(found.status, found.data, {"Content-Type": found.headers.get("Content-Type", "text/plain")})

    return answer, refused, address


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    folder = tmp_path_factory.mktemp("server")
    app = tmp_path_factory.mktemp("app")
    in_s3 = ("--no-serve-artifacts", "--default-artifact-root", "s3://mlflow-app/mlflow")
    with mlflow_server(folder) as server, mlflow_server(app, *in_s3) as behind_app:
        yield {"server": server, "app": behind_app}


@pytest.fixture(params=["server", "app"])
def kind(request: pytest.FixtureRequest, servers: dict[str, str], aws: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kind]:
    name = request.param
    s3, secrets = boto3.client("s3"), boto3.client("secretsmanager")
    if "mlflow-app" not in [bucket["Name"] for bucket in s3.list_buckets()["Buckets"]]:
        s3.create_bucket(Bucket="mlflow-app")
        secrets.create_secret(Name=SECRET, SecretString=json.dumps({"token": TOKEN}))
    for key, value in KEYS.items():
        monkeypatch.setenv(key, value)
    answer, refused, address = door(servers[name], opens_with_token if name == "server" else opens_with_signature)
    with serving(answer) as gate:
        address.append(gate.url)
        monkeypatch.setenv("SAGEMAKER_MLFLOW_CUSTOM_ENDPOINT", gate.url)  # the plugin's way of being led elsewhere
        environment = (
            {"LABELLOOP_MLFLOW_TRACKING_URI": gate.url, "LABELLOOP_MLFLOW_SECRET": SECRET}
            if name == "server"
            else {"LABELLOOP_MLFLOW_TRACKING_URI": ARN}
        )
        yield Kind(environment, gate, servers[name], refused)


@pytest.fixture
def run_of(kind: Kind, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Run]:
    """The run of a training job that was described by `retrain`, in the environment that its description gives it."""

    def begin(name: str) -> Run:
        for key, value in job_environment(kind).items():
            monkeypatch.setenv(key, value)
        monkeypatch.delenv("MLFLOW_TRACKING_TOKEN", raising=False)
        job = TrainingJob(
            folder=tmp_path,
            model="digits",
            digest="d" * 64,
            n_annotations=100,
            name=name,
            champion_version=None,
            champion_annotations=None,
        )
        return Run(job)

    return begin


def description(kind: Kind) -> dict[str, Any]:
    names = ("STAGE", "IMAGES_BUCKET", "ARTIFACTS_BUCKET", "TRAINING_ROLE", "TRAINING_IMAGE", "TRAINING_CODE")
    named = {f"LABELLOOP_{name}": f"s3://{name.lower()}/x" for name in names}
    settings = Settings({"AWS_REGION": "us-east-1", **named, **kind.environment})
    return training_request(settings, examples.DIGITS, examples.job("job"), None)


def job_environment(kind: Kind) -> dict[str, str]:
    return {key: value for key, value in description(kind)["Environment"].items() if "MLFLOW" in key}


def test_a_job_records_its_run_and_a_function_moves_the_version(kind: Kind, run_of: Callable[[str], Run], tmp_path: Path) -> None:
    report = tmp_path / "evaluation.json"
    report.write_text('{"accuracy": 0.9}')
    with run_of("job-1") as run:
        run.parameters({"epochs": 3})
        run.metrics(1, {"loss": 0.5})
        run.keep(report)
        version = run.register({"accuracy": 0.9})
    assert run_of("job-1").id == run.id, "a restarted job goes on with its run"

    registry = kind.registry
    registry.tag("digits", version, {"verdict": "promote", "verdict_reason": "not worse + surely"})
    registry.set_alias("digits", "champion", version)
    (known,) = registry.runs_of("digits", "d" * 64)
    assert (known.id, known.name) == (run.id, "job-1")
    assert registry.runs_of("digits two", "d" * 64) == [], "a space in a query is signed as it is sent"

    champion = kind.behind.get_model_version_by_alias("digits", "champion")
    assert (int(champion.version), champion.run_id) == (version, run.id)
    assert champion.tags == {"accuracy": "0.9", "verdict": "promote", "verdict_reason": "not worse + surely"}
    assert kind.behind.get_run(run.id).data.metrics == {"loss": 0.5}
    assert kind.refused == []
    assert len(kind.door.requests) > 10


def test_a_version_that_was_deleted_is_said_to_be_gone_and_its_number_is_never_given_again(
    kind: Kind, run_of: Callable[[str], Run]
) -> None:
    with run_of("job-3") as run:
        version = run.register({"accuracy": 0.9})
    kind.behind.delete_model_version("digits", str(version))
    with pytest.raises(NotRegisteredError):
        kind.registry.tag("digits", version, {"verdict": "promote"})
    with pytest.raises(NotRegisteredError):
        kind.registry.set_alias("digits", "champion", version)
    with run_of("job-4") as run:
        assert run.register({"accuracy": 0.9}) == version + 1


def test_an_artifact_is_where_the_run_says(kind: Kind, run_of: Callable[[str], Run], tmp_path: Path) -> None:
    report = tmp_path / "evaluation.json"
    report.write_text("the report")
    with run_of("job-2") as run:
        run.keep(report)
    found = next(one for one in kind.registry.runs_of("digits", "d" * 64) if one.id == run.id)
    if found.served:
        assert kind.registry.artifact(f"{found.served}/evaluation.json") == b"the report"
    else:
        prefix = found.artifacts.removeprefix("s3://mlflow-app/")
        assert bytes(Bucket("mlflow-app").get(f"{prefix}/evaluation.json") or b"") == b"the report"
    assert kind.refused == []


def test_without_the_right_credentials_nothing_is_let_in(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = kind.registry
    registry.runs_of("digits", "d" * 64)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    kind.environment.pop("LABELLOOP_MLFLOW_SECRET", None)
    with pytest.raises(RegistryError, match="who are you") as caught:
        kind.registry.set_alias("digits", "champion", 1)
    assert caught.value.status == 401
    assert len(kind.refused) == 1


def test_no_description_of_a_job_holds_a_token(kind: Kind) -> None:
    assert TOKEN not in json.dumps(description(kind))
    named = {"LABELLOOP_MLFLOW_SECRET": SECRET} if "LABELLOOP_MLFLOW_SECRET" in kind.environment else {}
    assert job_environment(kind) == {"MLFLOW_TRACKING_URI": kind.environment["LABELLOOP_MLFLOW_TRACKING_URI"], **named}


def test_a_body_that_was_changed_on_its_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the door above can refuse."""
    for key, value in KEYS.items():
        monkeypatch.setenv(key, value)
    with serving() as recorder:
        Registry(ARN, endpoint=recorder.url).set_alias("digits", "champion", 3)
        (request,) = recorder.requests
        assert opens_with_signature(request, recorder.url)
        assert (
            f"Credential=test/{request.headers['x-amz-date'][:8]}/{REGION}/sagemaker/aws4_request"
            in request.headers["authorization"]
        )
        changed = Request(request.method, request.path, request.headers, request.body.replace(b"3", b"4"))
        assert hashlib.sha256(changed.body).digest() != hashlib.sha256(request.body).digest()
        assert not opens_with_signature(changed, recorder.url)
        assert not opens_with_signature(Request("PUT", request.path, request.headers, request.body), recorder.url)


def test_a_token_that_was_rotated_is_noticed(aws: str) -> None:
    secrets, now = boto3.client("secretsmanager"), [1000.0]
    secrets.create_secret(Name="labelloop/test/mlflow", SecretString=json.dumps({"token": "old"}))
    token = MlflowToken("labelloop/test/mlflow", clock=lambda: now[0])
    assert token() == "old"
    secrets.put_secret_value(SecretId="labelloop/test/mlflow", SecretString=json.dumps({"token": "new"}))
    assert token() == "old"
    now[0] += 301
    assert token() == "new"
    secrets.put_secret_value(SecretId="labelloop/test/mlflow", SecretString="no JSON")
    now[0] += 301
    with pytest.raises(RegistryError, match="does not hold"):
        token()
    with pytest.raises(RegistryError, match="there is no secret labelloop/none/mlflow"):
        MlflowToken("labelloop/none/mlflow")()
