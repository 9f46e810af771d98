"""Rotating a backend's password: a real secret, the real authorizer behind an API that remembers answers as API Gateway does."""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError
from rich.console import Console
from typer.testing import CliRunner

from cli import rotation
from cli.deployment import BackendAccess, Deployment
from cli.main import app
from cli.rotation import Rotated
from labelloop.authorize import authorize
from labelloop.errors import ConflictError, LabelStudioError, NotSetUpError, RequestError, ServiceError
from labelloop.secrets import KNOWN_SECONDS, BackendSecret, KnownPasswords, backend_passwords
from labelloop.settings import Settings
from tests import examples
from tests.recording_server import Answer, RecordingServer, Request, serving

DIGITS = examples.CONFIGS["digits"]
OLD = "the-old-password"


class Crash(Exception):
    pass


@dataclass
class Stage:
    """A stage whose API asks authorizers of three sandboxes in turn, and a Label Studio that holds a password.

    `crash_at`: the number of the step that never comes back; steps are all that reach out.
    """

    name: str
    api: RecordingServer
    clock: float = 1_000_000.0
    held: str = OLD
    remembered: dict[str, str] = field(default_factory=dict)
    steps: int = 0
    crash_at: int | None = None
    forgets: bool = True
    refused: list[str] = field(default_factory=list)  # what Label Studio was refused, which is nothing
    said: list[str] = field(default_factory=list)
    project: int | None = 3
    overtaken: int = 0  # changes of the backend that a page of Label Studio's undoes, which began before and saves it whole
    late: str | None = None  # what such a page saves

    def __post_init__(self) -> None:
        settings = Settings({"LABELLOOP_BACKEND_SECRET_PREFIX": f"labelloop/{self.name}/backend/"})
        self.sandboxes = [KnownPasswords(lambda m: backend_passwords(settings, m), lambda: self.clock) for _ in range(3)]
        self.api.answer = self._answer

    def _answer(self, request: Request) -> Answer:
        header = request.headers["authorization"]
        if header not in self.remembered:
            sandbox = self.sandboxes[0]
            self.sandboxes.append(self.sandboxes.pop(0))
            arn = "arn:aws:execute-api:us-east-1:000000000000:abc/v1/POST/digits/setup"
            policy = authorize(header, arn, sandbox)
            self.remembered[header] = policy["policyDocument"]["Statement"][0]["Effect"]
        return Answer(200 if self.remembered[header] == "Allow" else 403)

    def opens(self, password: str) -> bool:
        access = BackendAccess(f"{self.api.url}/v1/digits", "digits", password)
        request = Request("POST", "/v1/digits/setup", {"authorization": access.authorization}, b"")
        return self._answer(request).status == 200

    def step(self) -> None:
        """Whatever happens, Label Studio gets in, before and after."""
        self.steps += 1
        if not self.opens(self.held):
            self.refused.append(self.held)
        if self.steps == self.crash_at:
            raise Crash

    @property
    def secret(self) -> dict[str, str]:
        return dict(json.loads(boto3.client("secretsmanager").get_secret_value(SecretId=self.secret_name)["SecretString"]))

    @property
    def secret_name(self) -> str:
        return f"labelloop/{self.name}/backend/digits"

    @property
    def deployment(self) -> Deployment:
        deployment = Deployment(self.name)
        vars(deployment)["outputs"] = {"ApiUrl": f"{self.api.url}/v1", "ApiId": "abc"}
        return deployment

    def rotate(self) -> Rotated:
        return rotation.rotate(self.deployment, DIGITS, self.said.append)

    # What the command reaches

    def sleep(self, seconds: float) -> None:
        self.clock += seconds
        if self.late:
            self.held, self.late = self.late, None
        self.step()

    def flush_stage_authorizers_cache(self, **where: str) -> None:
        assert where == {"restApiId": "abc", "stageName": "v1"}
        self.step()
        if self.forgets:
            self.remembered.clear()
        self.step()

    def give_credentials(self, deployment: Deployment, _: Any) -> int | None:
        self.step()
        if self.overtaken:
            self.overtaken, self.late = self.overtaken - 1, self.held
        if self.project is not None:
            self.held = deployment.backend("digits").password
        self.step()
        return self.project

    def client(self, service: str) -> Any:
        return self if service == "apigateway" else Secrets(self, boto3.client("secretsmanager"))


@dataclass
class Secrets:
    stage: Stage
    real: Any

    def get_secret_value(self, **arguments: Any) -> Any:
        return self.real.get_secret_value(**arguments)

    def put_secret_value(self, **arguments: Any) -> Any:
        self.stage.step()
        self.real.put_secret_value(**arguments)
        self.stage.step()


@pytest.fixture
def stage(aws: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    with serving() as api:
        stage = Stage(f"s{uuid.uuid4().hex[:10]}", api)
        content = json.dumps({"username": "digits", "password": OLD})
        boto3.client("secretsmanager").create_secret(Name=stage.secret_name, SecretString=content)
        monkeypatch.setattr("cli.rotation.boto3", SimpleNamespace(client=stage.client))
        monkeypatch.setattr("cli.rotation.time", SimpleNamespace(sleep=stage.sleep))
        monkeypatch.setattr("cli.rotation.give_credentials", stage.give_credentials)
        monkeypatch.setattr("cli.rotation.is_signed_in", lambda *_: stage.opens(stage.held))
        for password in (OLD, "wrong", "another wrong one"):
            stage.opens(password)  # every sandbox and the API know the old one
        yield stage


def is_done(stage: Stage) -> bool:
    secret = stage.secret
    password = secret["password"]
    assert secret == {"username": "digits", "password": password}
    return stage.held == password != OLD and stage.opens(password) and not stage.opens(OLD) and len(password) == 40


def test_afterwards_only_the_new_password_opens_the_backend_and_label_studio_has_it(stage: Stage) -> None:
    done = stage.rotate()
    assert (done.project, done.finished, stage.refused) == (3, False, [])
    assert is_done(stage)
    said = io.StringIO()
    rotation.show(done, Console(file=said, width=200))
    assert "Label Studio (project 3) signs in with the new password, and the old one is refused" in said.getvalue()


@pytest.mark.parametrize("pages", [1, 3])
def test_pages_that_began_before_bring_the_old_password_back_and_nobody_is_refused(stage: Stage, pages: int) -> None:
    stage.overtaken = pages
    stage.rotate()
    assert stage.refused == []
    assert is_done(stage)


def test_no_password_is_ever_said(stage: Stage) -> None:
    done = stage.rotate()
    everything = " ".join([*stage.said, repr(done), repr(stage.deployment.backend("digits"))])
    assert OLD not in everything
    assert stage.held not in everything
    assert repr(BackendSecret(username="digits", password="p", previous="q")) == "BackendSecret(username='digits')"


def steps_of_a_rotation() -> range:
    return range(1, 32)


@pytest.mark.parametrize("at", steps_of_a_rotation())
def test_after_a_crash_anywhere_label_studio_gets_in_and_the_same_command_finishes(stage: Stage, at: int) -> None:
    stage.crash_at = at
    with pytest.raises(Crash):
        stage.rotate()
    begun, half_way = set(stage.secret) != {"username", "password"}, stage.secret["password"]
    stage.crash_at = None
    done = stage.rotate()
    assert (done.finished, stage.refused) == (begun, [])
    assert is_done(stage)
    if begun:
        assert stage.secret["password"] == half_way, "it goes on with the password that it had made"


def test_those_are_all_steps_that_there_are(stage: Stage) -> None:
    stage.rotate()
    assert stage.steps == steps_of_a_rotation()[-1]


def test_an_api_that_does_not_forget_is_said_and_the_new_password_goes_on_working(stage: Stage) -> None:
    stage.forgets = False
    with pytest.raises(ServiceError, match=r"answers 200 to the old password, in place of 403; nothing is locked out"):
        stage.rotate()
    assert stage.opens(stage.held)
    stage.forgets = True
    assert stage.rotate().finished
    assert is_done(stage)


def test_a_model_without_a_project_gets_a_new_password_as_well(stage: Stage) -> None:
    stage.project = None
    assert stage.rotate().project is None
    assert not stage.opens(OLD)
    assert stage.opens(stage.secret["password"])


def test_a_password_that_somebody_brought_back_to_label_studio_is_given_again(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([False, True])
    monkeypatch.setattr("cli.rotation.is_signed_in", lambda *_: next(answers))
    stage.rotate()
    assert is_done(stage)


def test_a_label_studio_that_does_not_get_in_is_said(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.rotation.is_signed_in", lambda *_: False)
    with pytest.raises(LabelStudioError, match=r"setup-label-studio-project digits --check"):
        stage.rotate()
    assert "retired" in stage.secret


def test_of_two_rotations_at_once_one_stops(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Secrets, **_: Any) -> None:
        raise ClientError({"Error": {"Code": "ResourceExistsException", "Message": ""}}, "PutSecretValue")

    monkeypatch.setattr(Secrets, "put_secret_value", refuse)
    with pytest.raises(ConflictError, match="another rotation of digits's password is under way"):
        stage.rotate()
    assert stage.secret["password"] == OLD


def test_where_somebody_else_writes_the_secret_as_well_nothing_more_is_done(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = Secrets.put_secret_value

    def late(self: Secrets, **arguments: Any) -> None:
        put(self, **arguments)
        content = json.dumps({"username": "digits", "password": "another"})
        self.real.put_secret_value(SecretId=stage.secret_name, SecretString=content)

    monkeypatch.setattr(Secrets, "put_secret_value", late)
    with pytest.raises(ConflictError, match="somebody else has changed the secret"):
        stage.rotate()
    assert stage.held == OLD


def test_a_model_that_is_not_deployed_has_no_secret(stage: Stage) -> None:
    stage.name = "nowhere"
    with pytest.raises(NotSetUpError, match=r"digits is not deployed yet; run: cdk deploy --all -c stage=nowhere"):
        stage.rotate()


def test_the_command_says_its_steps_beside_the_json(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.deployment.Deployment.find", lambda *_: stage.deployment)
    done = CliRunner().invoke(app, ["rotate-secrets", "digits", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {
        "model": "digits",
        "secret": stage.secret_name,
        "project": 3,
        "finished": False,
    }
    assert "the API refuses the old password" in done.stderr


# What a function knows of passwords


def test_a_password_is_read_once_and_again_after_some_seconds() -> None:
    now, reads = [100.0], []

    def read(model: str) -> tuple[str, ...]:
        reads.append(model)
        return (f"password {len(reads)}",) if model == "digits" else ()

    known = KnownPasswords(read, lambda: now[0])
    assert [known("digits"), known("digits")] == [("password 1",)] * 2
    now[0] += KNOWN_SECONDS
    assert known("digits") == ("password 2",)
    now[0] -= 3600  # a clock that was put right
    assert known("digits") == ("password 3",)
    assert [known("nobody"), known("nobody")] == [(), ()]
    assert reads == ["digits"] * 3 + ["nobody"] * 2, "what does not exist takes no memory"


def test_both_passwords_of_a_rotation_open_and_a_retired_one_does_not() -> None:
    secret = BackendSecret(username="digits", password="new", previous="old")
    assert secret.valid == ("new", "old")
    assert BackendSecret(username="digits", password="new", retired="old").valid == ("new",)
    with pytest.raises(RequestError):
        authorize("", "arn", lambda _: secret.valid)
