"""A bucket as every one of labelloop's is."""

from __future__ import annotations

from collections.abc import Sequence

import aws_cdk as cdk
from aws_cdk import aws_s3 as s3
from constructs import Construct

from infra_cdk.nag import acknowledge
from infra_cdk.stage import Stage


class PrivateBucket(s3.Bucket):
    """Nothing public, TLS only, encrypted, versioned, kept when the stack goes, unless its own creation is taken back."""

    def __init__(
        self,
        scope: Construct,
        id: str,
        *,
        stage: Stage,
        cors: Sequence[s3.CorsRule] = (),
        lifecycle_rules: Sequence[s3.LifecycleRule] = (),
        sends_events: bool = False,
    ) -> None:
        super().__init__(
            scope,
            id,
            block_public_access=s3.BlockPublicAccess.BLOCK_ALL,
            cors=list(cors),
            encryption=s3.BucketEncryption.S3_MANAGED,
            enforce_ssl=True,
            lifecycle_rules=[
                s3.LifecycleRule(
                    id="replaced-and-unfinished",
                    noncurrent_version_expiration=cdk.Duration.days(stage.facts.retention.replaced_objects_days),
                    abort_incomplete_multipart_upload_after=cdk.Duration.days(7),
                ),
                *lifecycle_rules,
            ],
            minimum_tls_version=1.2,
            object_ownership=s3.ObjectOwnership.BUCKET_OWNER_ENFORCED,
            removal_policy=cdk.RemovalPolicy.RETAIN_ON_UPDATE_OR_DELETE,
            versioned=True,
        )
        if sends_events:
            # CloudFormation can do this itself; `event_bridge_enabled` would deploy a function for it.
            bucket = self.node.default_child
            assert isinstance(bucket, s3.CfnBucket)  # noqa: S101
            bucket.notification_configuration = s3.CfnBucket.NotificationConfigurationProperty(
                event_bridge_configuration=s3.CfnBucket.EventBridgeConfigurationProperty(event_bridge_enabled=True)
            )
        acknowledge(self, S1="access logs cost by the request; CloudTrail's data events serve where an audit is wanted")
