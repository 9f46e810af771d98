"""SageMaker's serverless MLflow App: costs nothing while nobody calls it, unlike a tracking server."""

from __future__ import annotations

import aws_cdk as cdk
from aws_cdk import aws_iam as iam
from aws_cdk import aws_sagemaker as sagemaker
from constructs import Construct

from infra_cdk.constructs.bucket import PrivateBucket
from infra_cdk.constructs.grants import allow, allow_reading_objects, allow_writing_objects
from infra_cdk.stage import Stage


class MlflowApp(Construct):
    """The app with the bucket its artifacts go to. `arn` is its tracking URI as well."""

    def __init__(self, scope: Construct, id: str, *, stage: Stage) -> None:
        super().__init__(scope, id)
        self._bucket = bucket = PrivateBucket(self, "Artifacts", stage=stage)
        role = iam.Role(self, "Role", assumed_by=iam.ServicePrincipal("sagemaker.amazonaws.com"))
        allow_reading_objects(role, bucket, "mlflow/")
        allow_writing_objects(role, bucket, "mlflow/")
        app = sagemaker.CfnMlflowApp(
            self,
            "App",
            name=stage.prefix,
            artifact_store_uri=f"s3://{bucket.bucket_name}/mlflow",
            role_arn=role.role_arn,
            model_registration_mode="AutoModelRegistrationDisabled",
        )
        app.apply_removal_policy(cdk.RemovalPolicy.RETAIN_ON_UPDATE_OR_DELETE)
        app.node.add_dependency(role)
        self.arn = app.attr_arn

    def allow_calling(self, role: iam.Role) -> None:
        allow(role, "sagemaker:CallMlflowAppApi", on=self.arn)

    def allow_recording(self, role: iam.Role) -> None:
        """Call it, and put a run's files where it looks for them: MLflow's client writes to the bucket itself."""
        self.allow_calling(role)
        allow_writing_objects(role, self._bucket, "mlflow/")
