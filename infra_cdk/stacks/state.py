"""The state stack: everything that holds data. All of it is kept when the stack is deleted.

But for what an update or a first deployment that failed has made: the next attempt makes the same names again.
"""

from __future__ import annotations

import aws_cdk as cdk
from aws_cdk import aws_dynamodb as dynamodb
from aws_cdk import aws_events as events
from aws_cdk import aws_s3 as s3
from constructs import Construct

from infra_cdk.constructs.alarms import AlarmTopic
from infra_cdk.constructs.bucket import PrivateBucket
from infra_cdk.constructs.mlflow_app import MlflowApp
from infra_cdk.constructs.secrets import Secrets
from infra_cdk.stage import Stage, output


class StateStack(cdk.Stack):
    """Buckets, ledger, secrets, event bus and, unless MLflow is given, an MLflow App."""

    def __init__(self, scope: Construct, id: str, *, stage: Stage) -> None:
        super().__init__(
            scope, id, env=stage.env, description=f"labelloop {stage.name}: data", termination_protection=not stage.is_local
        )
        self.images = PrivateBucket(self, "Images", stage=stage, cors=label_studio_cors(stage), sends_events=True)
        self.artifacts = PrivateBucket(
            self,
            "Artifacts",
            stage=stage,
            lifecycle_rules=[
                s3.LifecycleRule(id="checkpoints", prefix="checkpoints/", expiration=cdk.Duration.days(14)),
                s3.LifecycleRule(id="indexes", prefix="indexes/", noncurrent_version_expiration=cdk.Duration.days(1)),
                s3.LifecycleRule(id="cache", prefix="cache/", expiration=cdk.Duration.days(90)),
            ],
        )
        self.ledger = dynamodb.Table(
            self,
            "Ledger",
            partition_key=dynamodb.Attribute(name="model", type=dynamodb.AttributeType.STRING),
            sort_key=dynamodb.Attribute(name="record", type=dynamodb.AttributeType.STRING),
            billing_mode=dynamodb.BillingMode.PAY_PER_REQUEST,
            point_in_time_recovery_specification=dynamodb.PointInTimeRecoverySpecification(point_in_time_recovery_enabled=True),
            removal_policy=cdk.RemovalPolicy.RETAIN_ON_UPDATE_OR_DELETE,
        )
        self.event_bus = events.EventBus(self, "EventBus", event_bus_name=stage.prefix)
        self.event_bus.apply_removal_policy(cdk.RemovalPolicy.RETAIN_ON_UPDATE_OR_DELETE)
        self.secrets = Secrets(self, "Secrets", stage=stage)
        AlarmTopic(self, "Alarms", stage=stage)

        # None where MLflow is a server of the user's own, which knows nothing of IAM.
        self.mlflow_app = None if stage.mlflow_url else MlflowApp(self, "Mlflow", stage=stage)
        self.mlflow_tracking_uri = stage.mlflow_url or (self.mlflow_app.arn if self.mlflow_app else "")

        output(self, "ImagesBucket", self.images.bucket_name)
        output(self, "ArtifactsBucket", self.artifacts.bucket_name)
        output(self, "LedgerTable", self.ledger.table_name)
        output(self, "LabelStudioSecret", stage.label_studio_secret)
        output(self, "EventBus", self.event_bus.event_bus_name)
        output(self, "MlflowTrackingUri", self.mlflow_tracking_uri)
        if stage.label_studio_url:
            output(self, "LabelStudioUrl", stage.label_studio_url)
        else:
            cdk.Annotations.of(self).add_warning_v2(
                "labelloop:label-studio-url", "no Label Studio is named yet: name it in stages.yaml before use"
            )


def label_studio_cors(stage: Stage) -> list[s3.CorsRule]:
    """Label Studio's editor loads images from the bucket by script, which a browser allows to named origins only."""
    if not stage.label_studio_origin:
        return []
    return [
        s3.CorsRule(
            allowed_origins=[stage.label_studio_origin],
            allowed_methods=[s3.HttpMethods.GET, s3.HttpMethods.HEAD],
            allowed_headers=["*"],
            max_age=3600,
        )
    ]
