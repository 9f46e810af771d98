"""The bearer token of an MLflow server, in the secret `{"token": …}`: whoever talks to the server reads it there itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

import msgspec
from botocore.exceptions import BotoCoreError, ClientError

from labelloop import aws
from labelloop.errors import RegistryError
from labelloop.settings import Settings

_SECONDS = 300  # how long a rotated token may go unnoticed


class MlflowToken:
    """The token in the secret `name`, read again when it was read five minutes ago; empty where the server asks for none."""

    def __init__(self, name: str, clock: Callable[[], float] = time.time) -> None:
        self._name, self._clock = name, clock  # no monotonic clock: it may stand still while Lambda freezes the sandbox
        self._read_at, self._token = 0.0, ""

    @classmethod
    def of(cls, settings: Settings) -> MlflowToken | None:
        """None where MLflow is an App, or a laptop's."""
        return cls(settings.mlflow_secret) if settings.mlflow_secret else None

    def __call__(self) -> str:
        """Raises `RegistryError`."""
        if not 0 <= self._clock() - self._read_at < _SECONDS:
            self._read_at, self._token = self._clock(), self._read()
        return self._token

    def _read(self) -> str:
        try:
            secret = msgspec.json.decode(self._client.get_secret_value(SecretId=self._name)["SecretString"], type=dict[str, str])
            return secret["token"]
        except ClientError as error:
            raise RegistryError(f"the secret {self._name} cannot be read: {error.response['Error']['Code']}") from error
        except BotoCoreError as error:
            raise RegistryError(f"Secrets Manager does not answer: {error}") from error
        except (ValueError, KeyError) as error:
            raise RegistryError(f'the secret {self._name} does not hold {{"token": …}}') from error

    @cached_property
    def _client(self) -> Any:
        return aws.client("secretsmanager")
