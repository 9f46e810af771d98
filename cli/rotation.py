"""Give a model's backend a new password while everything goes on: `labelloop rotate-secrets`.

The secret itself says how far a rotation has come: with `previous` the old password is valid beside the new one, with `retired`
it is not any more, and with neither the rotation is done. So one that was interrupted is finished by running it again, and at
no moment does Label Studio hold a password that is refused.
"""

from __future__ import annotations

import secrets
import string
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import boto3
import msgspec
import urllib3
from botocore.exceptions import BotoCoreError, ClientError
from rich.console import Console

from cli.deployment import Deployment
from cli.label_studio_project import give_credentials, is_signed_in
from labelloop.errors import ConflictError, LabelStudioError, NotSetUpError, ServiceError
from labelloop.model_config import ModelFolder
from labelloop.secrets import KNOWN_SECONDS, BackendSecret

_SETTLE_SECONDS = KNOWN_SECONDS + 2.0  # after which every function goes by what the secret holds now
_TRIES = 8  # to see a change of the secret at the API
_PAUSE_SECONDS = 2.0  # between them, and between gifts
_GIFTS = 5  # of the new password to Label Studio
_TIMEOUT = urllib3.Timeout(connect=3, read=30)  # s
_LETTERS = string.ascii_letters + string.digits  # punctuation is at the mercy of every client's Basic auth
_LENGTH = 40
_VERSIONS = uuid.UUID("6c616265-6c6c-8000-8000-000000000000")  # namespace of the secret's versions that are written here


@dataclass(frozen=True)
class Rotated:
    """What was done. `project`: None where the model has none in Label Studio yet. `finished`: an interrupted one is done."""

    model: str
    secret: str
    project: int | None
    finished: bool


def rotate(deployment: Deployment, folder: ModelFolder, report: Callable[[str], None]) -> Rotated:
    """Change the password of a model's backend, at the API and in Label Studio; `report` hears of each step.

    Raises `NotSetUpError` when there is no such stage or secret, `SettingsError` when AWS is not configured, `ConflictError` when
    another rotation is under way, `ConfigError`, `ServiceError`. After any of them the same call goes on where it stopped.
    """
    return _Rotation(deployment, folder, report).run()


class _Rotation:
    def __init__(self, deployment: Deployment, folder: ModelFolder, report: Callable[[str], None]) -> None:
        self._deployment, self._folder, self._report = deployment, folder, report
        self._model = folder.config.name
        self._name = deployment.backend_secret(self._model)
        outputs = deployment.outputs  # before any client: it says what is wrong with AWS's configuration
        self._api = {"restApiId": outputs["ApiId"], "stageName": outputs["ApiUrl"].rstrip("/").rpartition("/")[2]}
        self._client: Any = boto3.client("secretsmanager")
        self._gateway: Any = boto3.client("apigateway")
        self._secret, self._version = self._read()

    def run(self) -> Rotated:
        interrupted = bool(self._secret.previous or self._secret.retired)
        if interrupted:
            self._report("an earlier rotation was interrupted; this finishes it")
        else:
            self._write(password=_new_password(), previous=self._secret.password)
            self._report("made a new password; the old one is valid beside it")
        if self._secret.previous:
            self._settle()
            self._demand(self._secret.password, HTTPStatus.OK)
            self._report("the API takes the new password")
            if self._give() is not None:
                self._report("Label Studio has the new password")
            self._write(previous=None, retired=self._secret.previous)
        self._settle()
        if self._secret.retired:
            self._demand(self._secret.retired, HTTPStatus.FORBIDDEN)
        self._demand(self._secret.password, HTTPStatus.OK)
        self._report("the API refuses the old password")
        project = self._demand_sign_in()
        self._write(retired=None)
        return Rotated(self._model, self._name, project, interrupted)

    def _give(self) -> int | None:
        """Give Label Studio the new password while both are valid, until nothing of it goes by the old one; the project.

        It saves a backend whole whenever somebody looks at it, so a look that began before brings the old password back, and
        the next looks go by that. A look takes less than a pause, so each gift finds others than the last.
        """
        for _ in range(_GIFTS):
            project = give_credentials(self._deployment, self._folder)
            if project is None:
                return None
            time.sleep(_PAUSE_SECONDS)  # after the last one, too: what began with the old password still gets in
        return project

    def _demand_sign_in(self) -> int | None:
        """Label Studio gets in with the new password. Whatever wrote the backend meanwhile may have brought the old one back."""
        for _ in range(2):
            project = give_credentials(self._deployment, self._folder)
            if project is None or is_signed_in(self._deployment, self._folder, project):
                return project
        raise LabelStudioError(
            "Label Studio does not get in with the new password; look with: "
            f"{self._deployment.command(f'setup-label-studio-project {self._model} --check')}, then run the command again"
        )

    # The secret

    def _read(self) -> tuple[BackendSecret, str]:
        try:
            found = self._client.get_secret_value(SecretId=self._name)
            return msgspec.json.decode(found["SecretString"], type=BackendSecret), str(found["VersionId"])
        except ClientError as error:
            code = error.response["Error"]["Code"]
            if code == "ResourceNotFoundException":
                raise NotSetUpError(f"{self._model} is not deployed yet; run: {self._deployment.deploy_command}") from error
            raise ServiceError(f"the secret {self._name} cannot be read: {code}") from error
        except BotoCoreError as error:
            raise ServiceError(f"Secrets Manager does not answer: {error}") from error
        except (ValueError, KeyError) as error:
            raise ServiceError(f"the secret {self._name} holds no password") from error

    def _write(self, **changes: str | None) -> None:
        """Write the secret's next version. It is called after the one that was read: of two commands one gets that name."""
        following = msgspec.structs.replace(self._secret, **changes)
        name = str(uuid.uuid5(_VERSIONS, self._version))
        content = msgspec.json.encode(following).decode()
        try:
            self._client.put_secret_value(SecretId=self._name, SecretString=content, ClientRequestToken=name)
        except ClientError as error:
            code = error.response["Error"]["Code"]
            if code == "ResourceExistsException":
                raise ConflictError(f"another rotation of {self._model}'s password is under way; let it finish") from error
            raise ServiceError(f"the secret {self._name} cannot be written: {code}") from error
        except BotoCoreError as error:
            raise ServiceError(f"Secrets Manager does not answer: {error}") from error
        written, self._version = self._read()
        if written != following:
            raise ConflictError(f"somebody else has changed the secret {self._name} meanwhile; run the command again")
        self._secret = following

    # The API

    def _settle(self) -> None:
        self._report(f"waiting {_SETTLE_SECONDS:.0f} s, until every function has read the secret")
        time.sleep(_SETTLE_SECONDS)

    def _demand(self, password: str, status: HTTPStatus) -> None:
        """See that the API answers a password with a status, now that it has forgotten what it answered before."""
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(_PAUSE_SECONDS)
            self._flush()
            answered = self._ask(password)
            if answered == status:
                return
        which = "new" if password == self._secret.password else "old"
        raise ServiceError(
            f"the API answers {answered} to the {which} password, in place of {status}; nothing is locked out: "
            "the new password is valid. Run the command again; it goes on from here"
        )

    def _flush(self) -> None:
        """Let API Gateway forget what it has let in: it keeps that for an hour."""
        try:
            self._gateway.flush_stage_authorizers_cache(**self._api)
        except (ClientError, BotoCoreError) as error:
            raise ServiceError(f"API Gateway does not forget the old password: {error}") from error

    def _ask(self, password: str) -> int:
        url = f"{self._deployment.backend(self._model).url}/setup"
        headers = urllib3.make_headers(basic_auth=f"{self._secret.username}:{password}")
        body = {"project": "0.0", "schema": self._folder.template}
        try:
            return urllib3.request("POST", url, json=body, headers=headers, timeout=_TIMEOUT, retries=False).status
        except urllib3.exceptions.HTTPError as error:
            raise ServiceError(f"{url} does not answer: {type(error).__name__}") from error


def _new_password() -> str:
    return "".join(secrets.choice(_LETTERS) for _ in range(_LENGTH))


def show(rotated: Rotated, console: Console) -> None:
    """What happened, and what somebody may still have to do."""
    done = "an interrupted rotation is finished: " if rotated.finished else ""
    who = f"Label Studio (project {rotated.project}) signs in" if rotated.project else "the model has no project yet; sign in"
    for line in (
        f"{done}{who} with the new password, and the old one is refused",
        f"scripts of your own that call {rotated.model}'s backend find it in the secret {rotated.secret}",
    ):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
