"""The credentials of a model's backend, in Secrets Manager. The user name is the model."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from labelloop.errors import ServiceError
from labelloop.settings import Settings


@cache
def _client() -> Any:
    return boto3.client("secretsmanager", config=Config(connect_timeout=2, read_timeout=3, retries={"max_attempts": 2}))


def backend_password(settings: Settings, model: str) -> str | None:
    """The password of a model's backend; None where there is no such model. Raises `ServiceError`."""
    name = f"{settings.backend_secret_prefix}{model}"
    try:
        return str(json.loads(_client().get_secret_value(SecretId=name)["SecretString"])["password"])
    except ClientError as error:
        if error.response["Error"]["Code"] == "ResourceNotFoundException":
            return None
        raise ServiceError(f"the secret {name} cannot be read: {error.response['Error']['Code']}") from error
    except BotoCoreError as error:
        raise ServiceError(f"Secrets Manager does not answer: {error}") from error
    except (ValueError, KeyError) as error:
        raise ServiceError(f"the secret {name} holds no password") from error
