"""Lambda authorizer of the REST API: reads one secret, answers with a policy."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import boto3
from aws_lambda_powertools import Logger
from aws_lambda_powertools.utilities.typing import LambdaContext
from botocore.config import Config

from labelloop.authorize import authorize
from labelloop.errors import RequestError
from labelloop.settings import Settings

logger = Logger()


@cache
def secrets() -> Any:
    return boto3.client("secretsmanager", config=Config(connect_timeout=2, read_timeout=3, retries={"max_attempts": 2}))


def password_of(model: str) -> str | None:
    try:
        secret = secrets().get_secret_value(SecretId=f"{Settings().backend_secret_prefix}{model}")
    except secrets().exceptions.ResourceNotFoundException:
        return None
    return str(json.loads(secret["SecretString"])["password"])


@logger.inject_lambda_context
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    header = next((value for name, value in event["headers"].items() if name.lower() == "authorization"), "")
    try:
        policy = authorize(header, event["methodArn"], password_of)
    except RequestError as error:
        logger.warning("refused", reason=str(error))
        raise Exception("Unauthorized") from None
    logger.info("answered", model=policy["principalId"], effect=policy["policyDocument"]["Statement"][0]["Effect"])
    return policy
