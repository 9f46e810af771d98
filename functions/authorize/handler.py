"""Lambda authorizer of the REST API: reads one secret, answers with a policy."""

from __future__ import annotations

from functools import partial
from typing import Any

from aws_lambda_powertools import Logger
from aws_lambda_powertools.utilities.typing import LambdaContext

from labelloop.authorize import authorize
from labelloop.credentials import backend_password
from labelloop.errors import RequestError
from labelloop.settings import Settings

logger = Logger()


@logger.inject_lambda_context
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    header = next((value for name, value in (event.get("headers") or {}).items() if name.lower() == "authorization"), "")
    try:
        policy = authorize(header, event["methodArn"], partial(backend_password, Settings()))
    except RequestError as error:
        logger.warning("refused", reason=str(error))
        raise Exception("Unauthorized") from None
    logger.info("answered", model=policy["principalId"], effect=policy["policyDocument"]["Statement"][0]["Effect"])
    return policy
