"""How a function gets its Label Studio client: the address from the environment, the token from Secrets Manager."""

from __future__ import annotations

import json
from functools import cache

from aws_lambda_powertools.utilities.parameters import SecretsProvider
from aws_lambda_powertools.utilities.parameters.exceptions import GetParameterError

from labelloop import aws
from labelloop.errors import LabelStudioError
from labelloop.label_studio.client import LabelStudioClient
from labelloop.settings import Settings

_TOKEN_SECONDS = 300  # how long a rotated token may go unnoticed


def connect(settings: Settings) -> LabelStudioClient:
    """A client for the stage's Label Studio. Raises `LabelStudioError` when there is no token to use."""
    name = settings.label_studio_secret
    try:
        secret = json.loads(str(_secrets().get(name, max_age=_TOKEN_SECONDS)))
        token = str(secret["token"])
    except GetParameterError as error:  # its text names roles and accounts, and a caller of predict sees this
        cause = type(error.__cause__ or error.__context__ or error).__name__
        raise LabelStudioError(f"the secret {name} cannot be read: {cause}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise LabelStudioError(f'the secret {name} does not hold {{"token": …}}: {type(error).__name__}') from error
    if not token:
        raise LabelStudioError(f"the secret {name} holds no token yet")
    return LabelStudioClient(settings.label_studio_url, token)


@cache
def _secrets() -> SecretsProvider:
    return SecretsProvider(boto_config=aws.options())
