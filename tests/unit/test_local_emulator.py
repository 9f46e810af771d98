"""The emulator as labelloop starts it, and that what it puts right in ministack is still wrong without it."""

from __future__ import annotations

import io
import json
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
import urllib3
from botocore.exceptions import ClientError

from local import emulator
from local.environment import aws_client
from local.processes import ProcessRecord, answers, free_port, start, stop, wait_until_ready
from local.toolchain import find_uv, tool_environment
from tests.laptop import wait_for

LAMBDA_TRUST = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Principal": {"Service": "lambda.amazonaws.com"}, "Action": "sts:AssumeRole"}],
}


@dataclass(frozen=True)
class Running:
    endpoint: str
    function_logs: Path
    process: ProcessRecord

    def client(self, service: str) -> Any:
        return aws_client(service, self.endpoint)


def run(folder: Path, *, patched: bool = True) -> Iterator[Running]:
    port = free_port()
    command = emulator.command(find_uv(), sys.executable)
    if not patched:
        command = [*command[: command.index("python")], "python", "-m", "ministack"]
    settings = emulator.environment(port, folder, folder / "functions")
    for name in ("STATE_DIR", "S3_DATA_DIR", "TMPDIR"):
        Path(settings[name]).mkdir(parents=True, exist_ok=True)
    started = start("emulator", command, log=folder / "log", environment={**tool_environment(), **settings}, folder=folder)
    endpoint = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(started, lambda: answers(endpoint + emulator.READY_PATH), limit_s=180)
        yield Running(endpoint, folder / "functions", started.record)
    finally:
        stop([started.record], grace_s=20)


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    yield from run(tmp_path_factory.mktemp("patched"))


@pytest.fixture(scope="module")
def unpatched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    yield from run(tmp_path_factory.mktemp("unpatched"), patched=False)


def create_function(running: Running, name: str, code: str) -> Callable[[], dict[str, Any]]:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("index.py", code)
    role = running.client("iam").create_role(RoleName=f"role-{name}", AssumeRolePolicyDocument=json.dumps(LAMBDA_TRUST))["Role"]
    client = running.client("lambda")
    client.create_function(
        FunctionName=name, Runtime="python3.13", Role=role["Arn"], Handler="index.handler", Code={"ZipFile": archive.getvalue()}
    )
    return lambda: json.loads(client.invoke(FunctionName=name)["Payload"].read())


def client_of_a_user(running: Running) -> Any:
    """An S3 client whose bucket policies count; those of the account's root do not."""
    iam = running.client("iam")
    iam.create_user(UserName="reader")
    allow = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}
    iam.put_user_policy(UserName="reader", PolicyName="all", PolicyDocument=json.dumps(allow))
    key = iam.create_access_key(UserName="reader")["AccessKey"]
    return boto3.client(
        "s3",
        endpoint_url=running.endpoint,
        region_name="us-east-1",
        aws_access_key_id=key["AccessKeyId"],
        aws_secret_access_key=key["SecretAccessKey"],
    )


def make_bucket_that_wants_tls(running: Running, name: str) -> None:
    s3 = running.client("s3")
    s3.create_bucket(Bucket=name)
    statement = {
        "Effect": "Deny",
        "Principal": "*",
        "Action": "s3:*",
        "Resource": [f"arn:aws:s3:::{name}", f"arn:aws:s3:::{name}/*"],
        "Condition": {"Bool": {"aws:SecureTransport": "false"}},
    }
    s3.put_bucket_policy(Bucket=name, Policy=json.dumps({"Version": "2012-10-17", "Statement": [statement]}))


def test_loopback_counts_as_tls(patched: Running) -> None:
    make_bucket_that_wants_tls(patched, "guarded")
    s3 = client_of_a_user(patched)
    s3.put_object(Bucket="guarded", Key="a", Body=b"1")
    assert s3.get_object(Bucket="guarded", Key="a")["Body"].read() == b"1"


def test_without_the_patch_loopback_is_denied(unpatched: Running) -> None:
    make_bucket_that_wants_tls(unpatched, "guarded")
    unpatched.client("s3").create_bucket(Bucket="open")
    s3 = client_of_a_user(unpatched)
    s3.put_object(Bucket="open", Key="a", Body=b"1")
    with pytest.raises(ClientError, match="AccessDenied"):
        s3.put_object(Bucket="guarded", Key="a", Body=b"1")


BROKEN = "import sys\nprint('the layer lacks a file', file=sys.stderr)\nsys.stderr.flush()\nraise ImportError('gone')\n"


def logged_in_cloudwatch(running: Running, function: str) -> str:
    events = running.client("logs").filter_log_events(logGroupName=f"/aws/lambda/{function}")["events"]
    return "\n".join(event["message"] for event in events)


def test_what_a_function_writes_while_it_fails_to_start_is_kept(patched: Running) -> None:
    invoke = create_function(patched, "broken", BROKEN)
    assert "gone" in invoke()["errorMessage"]
    log = patched.function_logs / "broken.log"
    deadline = time.monotonic() + 30
    while not (log.exists() and "the layer lacks a file" in log.read_text()):
        assert time.monotonic() < deadline, "the function's log does not hold what it wrote"
        time.sleep(0.05)


def test_without_the_patch_it_is_lost(unpatched: Running) -> None:
    invoke = create_function(unpatched, "broken", BROKEN)
    assert "gone" in invoke()["errorMessage"]
    assert "the layer lacks a file" not in logged_in_cloudwatch(unpatched, "broken")
    assert not list(unpatched.function_logs.glob("*"))


SEEN = """
import importlib.util, os, sys
def handler(event, context):
    names = ("labelloop", "local", "infra_cdk", "mlflow", "torch", "numpy", "boto3")
    return {"path": sys.path, "environment": dict(os.environ), "found": [n for n in names if importlib.util.find_spec(n)]}
"""


def test_functions_see_neither_the_project_nor_the_users_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = str(Path(emulator.__file__).parent.parent)
    monkeypatch.setenv("PYTHONPATH", repository)
    monkeypatch.setenv("LABELLOOP_IMAGES_BUCKET", "not-from-the-stack")
    monkeypatch.setenv("SECRET_OF_THE_USER", "x")
    for running in run(tmp_path):
        seen = create_function(running, "seen", SEEN)()
    assert seen["found"] == ["boto3"]  # as in Lambda's own Python
    assert not [path for path in seen["path"] if path.startswith(repository)]
    assert not {"PYTHONPATH", "LABELLOOP_IMAGES_BUCKET", "SECRET_OF_THE_USER", "VIRTUAL_ENV"} & set(seen["environment"])


def test_a_function_without_a_grant_is_denied(patched: Running) -> None:
    patched.client("s3").create_bucket(Bucket="private")
    code = "import botocore.session\ndef handler(event, context):\n"
    code += "    botocore.session.get_session().create_client('s3').put_object(Bucket='private', Key='a', Body=b'')\n"
    assert "AccessDenied" in create_function(patched, "nosy", code)()["errorMessage"]


AUTHORIZER = """
def handler(event, context):
    statement = {"Action": "execute-api:Invoke", "Effect": "Allow", "Resource": "*"}
    print("asked")
    return {"principalId": "p", "policyDocument": {"Version": "2012-10-17", "Statement": [statement]}}
"""


def api_with_authorizer(running: Running) -> tuple[str, Callable[[], int]]:
    """An API whose authorizer's answers are kept for an hour; its id, and a request to it."""
    create_function(running, "authorizer", AUTHORIZER)
    arn = running.client("lambda").get_function(FunctionName="authorizer")["Configuration"]["FunctionArn"]
    gateway = running.client("apigateway")
    api = gateway.create_rest_api(name="api")["id"]
    (root,) = gateway.get_resources(restApiId=api)["items"]
    authorizer = gateway.create_authorizer(
        restApiId=api,
        name="a",
        type="REQUEST",
        identitySource="method.request.header.Authorization",
        authorizerUri=f"arn:aws:apigateway:us-east-1:lambda:path/2015-03-31/functions/{arn}/invocations",
        authorizerResultTtlInSeconds=3600,
    )["id"]
    where = {"restApiId": api, "resourceId": root["id"], "httpMethod": "GET"}
    gateway.put_method(**where, authorizationType="CUSTOM", authorizerId=authorizer)
    gateway.put_integration(**where, type="MOCK", requestTemplates={"application/json": '{"statusCode":200}'})
    gateway.put_method_response(**where, statusCode="200")
    gateway.put_integration_response(**where, statusCode="200")
    gateway.create_deployment(restApiId=api, stageName="v1")

    def ask() -> int:
        url = f"{running.endpoint}/restapis/{api}/v1/_user_request_/"
        answer = urllib3.request("GET", url, headers={"Authorization": "a"}, retries=False)
        assert answer.status == 200, answer.data
        return (running.function_logs / "authorizer.log").read_text().count("asked")

    return api, ask


def test_what_authorizers_answered_can_be_forgotten(patched: Running) -> None:
    api, ask = api_with_authorizer(patched)
    before = ask()
    assert ask() == before
    patched.client("apigateway").flush_stage_authorizers_cache(restApiId=api, stageName="v1")
    assert ask() == before + 1


def test_without_the_patch_it_cannot(unpatched: Running) -> None:
    api = unpatched.client("apigateway").create_rest_api(name="api")["id"]
    with pytest.raises(ClientError):
        unpatched.client("apigateway").flush_stage_authorizers_cache(restApiId=api, stageName="v1")


def fill(running: Running) -> None:
    s3, sqs, tables = (running.client(service) for service in ("s3", "sqs", "dynamodb"))
    s3.create_bucket(Bucket="kept")
    s3.put_object(Bucket="kept", Key="ä b/1.png", Body=b"pixels")
    sqs.send_message(QueueUrl=sqs.create_queue(QueueName="kept")["QueueUrl"], MessageBody="waiting")
    tables.create_table(
        TableName="kept",
        KeySchema=[{"AttributeName": "model", "KeyType": "HASH"}],
        AttributeDefinitions=[{"AttributeName": "model", "AttributeType": "S"}],
        BillingMode="PAY_PER_REQUEST",
    )
    tables.put_item(TableName="kept", Item={"model": {"S": "digits"}})


def is_full(running: Running) -> bool:
    s3, sqs, tables = (running.client(service) for service in ("s3", "sqs", "dynamodb"))
    url = sqs.get_queue_url(QueueName="kept")["QueueUrl"]
    return (
        s3.get_object(Bucket="kept", Key="ä b/1.png")["Body"].read() == b"pixels"
        and [message["Body"] for message in sqs.receive_message(QueueUrl=url)["Messages"]] == ["waiting"]
        and tables.get_item(TableName="kept", Key={"model": {"S": "digits"}})["Item"] == {"model": {"S": "digits"}}
    )


def test_state_survives_a_stop(tmp_path: Path) -> None:
    for running in run(tmp_path):
        fill(running)
    for running in run(tmp_path):
        assert is_full(running)


def test_state_survives_a_kill(tmp_path: Path) -> None:
    """A machine that goes down, too: what was there some seconds ago is there again."""
    state = Path(emulator.environment(0, tmp_path, tmp_path)["STATE_DIR"])
    for running in run(tmp_path):
        fill(running)
        wait_for(lambda: all(b"kept" in read(state / f"{name}.json") for name in ("s3", "sqs", "dynamodb")), 60, "it is saved")
        running.client("dynamodb").put_item(TableName="kept", Item={"model": {"S": "pets"}})
        wait_for(lambda: b"pets" in read(state / "dynamodb.json"), 60, "a change is saved")
        family = [process := psutil.Process(running.process.pid), *process.children(recursive=True)]
        for member in family:
            member.kill()
        psutil.wait_procs(family, timeout=30)
    for running in run(tmp_path):
        assert is_full(running)
        assert running.client("dynamodb").scan(TableName="kept")["Count"] == 2


def read(file: Path) -> bytes:
    return file.read_bytes() if file.exists() else b""
