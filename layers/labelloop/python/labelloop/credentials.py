"""The credentials of a model's backend, in Secrets Manager. The user name is the model.

While `labelloop rotate-secrets` is under way two passwords are valid: the new one and the one that Label Studio still holds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import boto3
import msgspec
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from labelloop.errors import ServiceError
from labelloop.records import Record
from labelloop.settings import Settings

KNOWN_SECONDS = 5  # how long a function goes by what it has read


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


@cache
def _client() -> Any:
    return boto3.client(
        "secretsmanager", config=Config(connect_timeout=2, read_timeout=3, retries={"mode": "standard", "total_max_attempts": 3})
    )


def backend_passwords(settings: Settings, model: str) -> tuple[str, ...]:
    """The valid passwords of a model's backend, the newest first; none where there is no such model. Raises `ServiceError`."""
    name = f"{settings.backend_secret_prefix}{model}"
    try:
        return msgspec.json.decode(_client().get_secret_value(SecretId=name)["SecretString"], type=BackendSecret).valid
    except ClientError as error:
        if error.response["Error"]["Code"] == "ResourceNotFoundException":
            return ()
        raise ServiceError(f"the secret {name} cannot be read: {error.response['Error']['Code']}") from error
    except BotoCoreError as error:
        raise ServiceError(f"Secrets Manager does not answer: {error}") from error
    except (ValueError, KeyError) as error:
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
            else:
                self._known.pop(model, None)
        return passwords
