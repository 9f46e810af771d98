"""Lambda authorizer of the REST API: reads one secret, answers with a policy."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

from aws_lambda_powertools import single_metric
from aws_lambda_powertools.metrics import MetricUnit
from aws_lambda_powertools.utilities.typing import LambdaContext

from labelloop.authorize import authorize
from labelloop.errors import RequestError
from labelloop.log import Log
from labelloop.secrets import KnownPasswords, backend_passwords
from labelloop.settings import Settings

log = Log()


@cache
def passwords() -> KnownPasswords:
    return KnownPasswords(partial(backend_passwords, Settings()))


@log.of_invocations
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    header = next((value for name, value in (event.get("headers") or {}).items() if name.lower() == "authorization"), "")
    try:
        policy = authorize(header, event["methodArn"], passwords())
    except RequestError as error:
        log.warning("refused", reason=str(error))
        _count_failure()
        raise Exception("Unauthorized") from None
    effect = policy["policyDocument"]["Statement"][0]["Effect"]
    log.info("answered", model=policy["principalId"], effect=effect)
    if effect == "Deny":
        _count_failure()
    return policy


def _count_failure() -> None:
    with single_metric(name="FailedSignIns", unit=MetricUnit.Count, value=1):
        pass
