"""Grants that name single actions and prefixes (CDK's own come with wildcards); each wildcard that is left has its reason."""

from __future__ import annotations

import aws_cdk as cdk
from aws_cdk import aws_dynamodb as dynamodb
from aws_cdk import aws_iam as iam
from aws_cdk import aws_s3 as s3

from infra_cdk.nag import acknowledge_wildcard


def allow(role: iam.Role, *actions: str, on: str, wildcard: str | None = None) -> None:
    """Let `role` do `actions` on the ARN `on`; `wildcard` is the reason for one that holds a wildcard."""
    iam.Grant.add_to_principal(grantee=role, actions=list(actions), resource_arns=[on])
    if wildcard:
        acknowledge_wildcard(role, on, reason=wildcard)


def allow_reading_objects(role: iam.Role, bucket: s3.IBucket, *prefixes: str) -> None:
    """Read what lies under the prefixes.

    S3 says that a missing object is missing (404, not 403) only to who may list the bucket. A condition on the prefix would
    not hold there: reading an object carries none.
    """
    _allow_objects(role, bucket, prefixes, "s3:GetObject")
    allow(role, "s3:ListBucket", on=bucket.bucket_arn)


def allow_writing_objects(role: iam.Role, bucket: s3.IBucket, *prefixes: str) -> None:
    """Create and replace what lies under the prefixes; never delete."""
    _allow_objects(role, bucket, prefixes, "s3:PutObject", "s3:AbortMultipartUpload")


def allow_ledger(role: iam.Role, ledger: dynamodb.ITable, *operations: str) -> None:
    """Do DynamoDB's `operations`, such as `GetItem`, on the ledger. A transaction asks for those that it consists of."""
    allow(role, *(f"dynamodb:{operation}" for operation in operations), on=ledger.table_arn)


def _allow_objects(role: iam.Role, bucket: s3.IBucket, prefixes: tuple[str, ...], *actions: str) -> None:
    owner, user = cdk.Stack.of(bucket), cdk.Stack.of(role)
    arn = bucket.bucket_arn if owner is user else owner.export_value(bucket.bucket_arn)
    for prefix in prefixes:
        allow(role, *actions, on=f"{arn}/{prefix}*", wildcard="objects are granted by prefix")
