"""Who may call the front door: Basic credentials per model, and a policy that covers that model's whole path.

API Gateway keeps the policy for an hour for each Authorization header, so it must not depend on the path of one request.
"""

from __future__ import annotations

import base64
import hmac
from collections.abc import Callable
from typing import Any

from labelloop.errors import RequestError
from labelloop.model_config import NAME


def authorize(header: str, method_arn: str, passwords_of: Callable[[str], tuple[str, ...]]) -> dict[str, Any]:
    """The IAM policy for an Authorization header. `passwords_of` knows a model's one or two valid passwords; none: no such model.

    Right credentials allow everything under `/{model}/`; wrong ones are denied. Raises `RequestError` when the header
    holds no Basic credentials at all.
    """
    model, password = _basic(header)
    valid = passwords_of(model) if NAME.fullmatch(model) else ()
    # Always compared with two, so that time tells nothing about names, nor which of the two it was.
    matches = [hmac.compare_digest(password.encode(), expected.encode()) for expected in (*valid, "", "")[:2]]
    stage_arn = "/".join(method_arn.split("/")[:2])
    if password and any(matches):
        return _policy(model, "Allow", f"{stage_arn}/*/{model}/*")
    return _policy("nobody", "Deny", f"{stage_arn}/*")


def _basic(header: str) -> tuple[str, str]:
    scheme, _, encoded = header.partition(" ")
    try:
        user, colon, password = base64.b64decode(encoded.strip(), validate=True).decode().partition(":")
    except ValueError:  # no base64, not ASCII, not UTF-8
        user, colon, password = "", "", ""
    if scheme.lower() != "basic" or not colon:
        raise RequestError("the Authorization header holds no Basic credentials")
    return user, password


def _policy(principal: str, effect: str, resource: str) -> dict[str, Any]:
    statement = {"Action": "execute-api:Invoke", "Effect": effect, "Resource": resource}
    return {"principalId": principal, "policyDocument": {"Version": "2012-10-17", "Statement": [statement]}}
