"""What lies in Secrets Manager: the passwords of models' backends, the tokens of Label Studio and of an MLflow server.

A backend's user name is its model. While `labelloop rotate-secrets` is under way two of its passwords are valid: the new one and
the one that Label Studio still holds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from threading import Lock
from typing import Any

import msgspec
from botocore.exceptions import BotoCoreError, ClientError

from labelloop import aws
from labelloop.errors import LabelStudioError, RegistryError, ServiceError
from labelloop.records import Record
from labelloop.settings import Settings

KNOWN_SECONDS = 5  # how long a function goes by the passwords that it has read
_TOKEN_SECONDS = 300  # how long another token of MLflow's may go unnoticed
_making = Lock()  # threads of predict's ask at once, and boto3 makes clients for one at a time


class BackendSecret(Record, frozen=True, kw_only=True, omit_defaults=True):
    """What the secret holds.

    `previous` is valid as well, as long as it stands there. `retired` is not: it is what a rotation has ended, and stands there
    until API Gateway is known to have forgotten it.
    """

    username: str
    password: str
    previous: str | None = None
    retired: str | None = None

    @property
    def valid(self) -> tuple[str, ...]:
        """The passwords that open the backend, the newest first."""
        return tuple(password for password in (self.password, self.previous) if password)

    def __repr__(self) -> str:  # passwords belong into no log
        return f"BackendSecret(username={self.username!r})"


def backend_passwords(settings: Settings, model: str) -> tuple[str, ...]:
    """The valid passwords of a model's backend, the newest first; none where there is no such model. Raises `ServiceError`."""
    name = f"{settings.backend_secret_prefix}{model}"
    content = _read(name, ServiceError)
    if content is None:
        return ()
    try:
        return msgspec.json.decode(content, type=BackendSecret).valid
    except ValueError as error:
        raise ServiceError(f"the secret {name} holds no password") from error


def backend_password(settings: Settings, model: str) -> str | None:
    """The newest password of a model's backend; None where there is no such model. Raises `ServiceError`."""
    return next(iter(backend_passwords(settings, model)), None)


class KnownPasswords:
    """Valid passwords by model, each read again when it was read `KNOWN_SECONDS` ago: a rotation waits for that long."""

    def __init__(self, read: Callable[[str], tuple[str, ...]], clock: Callable[[], float] = time.time) -> None:
        self._read, self._clock = read, clock  # no monotonic clock: it may stand still while Lambda freezes the sandbox
        self._known: dict[str, tuple[float, tuple[str, ...]]] = {}

    def __call__(self, model: str) -> tuple[str, ...]:
        """Raises what reading raises; models that do not exist are not remembered."""
        read_at, passwords = self._known.get(model, (0.0, ()))
        if not 0 <= self._clock() - read_at < KNOWN_SECONDS:
            read_at, passwords = self._clock(), self._read(model)
            if passwords:
                self._known[model] = (read_at, passwords)
        return passwords


class MlflowToken:
    """The token in the secret `name`, read again when it was read five minutes ago; empty where the server asks for none."""

    def __init__(self, name: str, clock: Callable[[], float] = time.time) -> None:
        self._name, self._clock = name, clock  # no monotonic clock, as above
        self._read_at, self._token = 0.0, ""

    @classmethod
    def of(cls, settings: Settings) -> MlflowToken | None:
        """None where MLflow is an App, or a laptop's."""
        return cls(settings.mlflow_secret) if settings.mlflow_secret else None

    def __call__(self) -> str:
        """Raises `RegistryError`."""
        if not 0 <= self._clock() - self._read_at < _TOKEN_SECONDS:
            self._read_at, self._token = self._clock(), _token(self._name, RegistryError)
        return self._token


def label_studio_token(settings: Settings) -> str:
    """The token of the stage's Label Studio. Raises `LabelStudioError`, which callers of predict see, when there is none."""
    token = _token(settings.label_studio_secret, LabelStudioError)
    if not token:
        raise LabelStudioError(f"the secret {settings.label_studio_secret} holds no token yet")
    return token


class _TokenSecret(Record, frozen=True, kw_only=True):
    token: str


_TOKENS = msgspec.json.Decoder(_TokenSecret)  # msgspec crashes where two threads meet a type for the first time


def _token(name: str, error: type[ServiceError]) -> str:
    content = _read(name, error)
    if content is None:
        raise error(f"there is no secret {name}")
    try:
        return _TOKENS.decode(content).token
    except ValueError as cause:
        raise error(f'the secret {name} does not hold {{"token": …}}') from cause


def _read(name: str, error: type[ServiceError]) -> str | None:
    """What a secret holds; None where there is no such secret. Raises `error`, whose text names no role and no account."""
    with _making:
        client = _client()
    try:
        return str(client.get_secret_value(SecretId=name).get("SecretString", ""))
    except ClientError as cause:
        code = cause.response["Error"]["Code"]
        if code == "ResourceNotFoundException":
            return None
        raise error(f"the secret {name} cannot be read: {code}") from cause
    except BotoCoreError as cause:
        raise error(f"the secret {name} cannot be read: {type(cause).__name__}") from cause


@cache
def _client() -> Any:
    return aws.client("secretsmanager", connect_timeout=2, read_timeout=3, attempts=3)  # somebody signs in, and waits
