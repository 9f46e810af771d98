"""cdk-nag's rules that are knowingly not followed: each where it applies, with its reason."""

from __future__ import annotations

from typing import Any

import aws_cdk as cdk
from constructs import IConstruct


def acknowledge(construct: IConstruct, **reasons: str) -> None:
    """Acknowledge AwsSolutions rules for a construct and what is below it: `acknowledge(bucket, S1="why")`."""
    for rule, reason in reasons.items():
        acknowledge_finding(construct, f"AwsSolutions-{rule}", reason=reason)


def acknowledge_finding(construct: IConstruct, finding: str, *, reason: str) -> None:
    """Acknowledge one finding of a rule, for example `AwsSolutions-IAM5[Resource::*]`."""
    cdk.Validations.of(construct).acknowledge(cdk.Acknowledgment(id=finding, reason=reason))


def acknowledge_wildcard(construct: IConstruct, arn: str, *, reason: str) -> None:
    """Acknowledge that a policy names this ARN, which holds a wildcard."""
    text = _flat(cdk.Stack.of(construct).resolve(arn))
    acknowledge_finding(construct, f"AwsSolutions-IAM5[Resource::{text}]", reason=reason)


def _flat(value: Any) -> str:
    """An intrinsic function in the words in which cdk-nag's findings name it."""
    match value:
        case {"Fn::Join": [separator, parts]}:
            return str(separator).join(_flat(part) for part in parts)
        case {"Fn::GetAtt": [resource, attribute]}:
            return f"<{resource}.{attribute}>"
        case {"Ref": name}:
            return f"<{name}>"
        case {"Fn::ImportValue": name} | {"Fn::Sub": str(name)}:
            return str(name).replace("${", "<").replace("}", ">")
        case _:
            return str(value)
