"""What a SageMaker training job of labelloop consists of: its role, its image, its code. `retrain` starts the jobs."""

from __future__ import annotations

from pathlib import Path

import aws_cdk as cdk
from aws_cdk import aws_iam as iam
from aws_cdk import aws_s3 as s3
from aws_cdk import aws_s3_assets as s3_assets
from aws_cdk import region_info
from constructs import Construct

from infra_cdk.constructs.grants import allow, allow_reading_objects, allow_writing_objects
from infra_cdk.constructs.mlflow_app import MlflowApp
from infra_cdk.constructs.secrets import allow_reading_mlflow_secret
from infra_cdk.nag import acknowledge_wildcard
from infra_cdk.sources import LIBRARY, TRAINING_JOBS, assembled
from infra_cdk.stage import Stage
from infra_cdk.stage_facts import Network
from labelloop.artifacts import parse_s3_uri
from labelloop.errors import ConfigError

# What `image_uris.retrieve("pytorch-amzn2023", version="2.14", …)` of the sagemaker SDK says, which tests/infra asks; the
# registry's account goes by region.
_REPOSITORY = "pytorch"
_TAG = "2.14-cu133-amzn2023-sagemaker"
_ACCOUNTS = {  # of regions that the CDK knows none of
    "af-south-1": "626614931356",
    "ap-northeast-3": "364406365360",
    "ap-southeast-5": "550225433462",
    "ap-southeast-7": "590183813437",
    "ca-west-1": "204538143572",
    "il-central-1": "780543022126",
    "me-west-1": "124382933778",
    "mx-central-1": "637423239942",
}


def registry_account(stack: cdk.Stack) -> str | None:
    """The account whose registry has AWS's containers in the stack's region; None where there is none."""
    fact = region_info.FactName.DLC_REPOSITORY_ACCOUNT
    if cdk.Token.is_unresolved(stack.region):
        return stack.regional_fact(fact)
    return region_info.Fact.find(stack.region, fact) or _ACCOUNTS.get(stack.region)


class TrainingJobs(Construct):
    """`role`, `image` and `code` (s3 address of a zip) of the stage's training jobs."""

    def __init__(
        self,
        scope: Construct,
        id: str,
        *,
        stage: Stage,
        images: s3.IBucket,
        artifacts: s3.IBucket,
        mlflow_app: MlflowApp | None,
    ) -> None:
        super().__init__(scope, id)
        self._stage = stage
        with assembled(
            {"labelloop": LIBRARY, "training_jobs": TRAINING_JOBS, "model_configs": Path(str(stage.models.root))}
        ) as folder:
            code = s3_assets.Asset(self, "Code", path=folder)
        self.code = code.s3_object_url

        self.role = iam.Role(
            self,
            "Role",
            assumed_by=iam.ServicePrincipal("sagemaker.amazonaws.com"),
            description=f"What a training job of {stage.prefix} may do",
        )
        allow_reading_objects(self.role, images, "images/")
        allow_reading_objects(self.role, artifacts, "snapshots/", "models/", "checkpoints/", "cache/")
        allow_writing_objects(self.role, artifacts, "training/", "checkpoints/", "cache/")
        allow(self.role, "s3:GetObject", on=code.bucket.arn_for_objects(code.s3_object_key))
        allow(self.role, "s3:ListBucket", on=code.bucket.bucket_arn)  # a channel is a prefix, even when it is one file
        self._allow_reading_weights()
        self._allow_logs_and_metrics()
        if mlflow_app:
            mlflow_app.allow_recording(self.role)
        allow_reading_mlflow_secret(self.role, stage=stage)
        if stage.facts.training_network:
            self._allow_joining_network(stage.facts.training_network)
        self.image = "local" if stage.is_local else self._container_image()

    def allow_running(self, role: iam.Role) -> None:
        """Start and watch the stage's jobs, and hand them their role."""
        jobs = cdk.Stack.of(self).format_arn(
            service="sagemaker", resource="training-job", resource_name=f"{self._stage.job_prefix}*"
        )
        allow(
            role,
            "sagemaker:CreateTrainingJob",
            "sagemaker:DescribeTrainingJob",
            "sagemaker:AddTags",
            on=jobs,
            wildcard="the jobs of this stage",
        )
        role.add_to_policy(
            iam.PolicyStatement(
                actions=["iam:PassRole"],
                resources=[self.role.role_arn],
                conditions={"StringEquals": {"iam:PassedToService": "sagemaker.amazonaws.com"}},
            )
        )

    def _container_image(self) -> str:
        """AWS's PyTorch container, and leave for the role to pull it."""
        stack = cdk.Stack.of(self)
        account = registry_account(stack)
        if account is None:
            raise ConfigError(
                self._stage.file,
                f"training jobs find no PyTorch container of AWS in {stack.region}",
                f"{self._stage.name}.region",
            )
        repository = stack.format_arn(service="ecr", account=account, resource="repository", resource_name=_REPOSITORY)
        allow(self.role, "ecr:BatchCheckLayerAvailability", "ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer", on=repository)
        allow(self.role, "ecr:GetAuthorizationToken", on="*", wildcard="signing in to ECR knows no resource")
        return f"{account}.dkr.ecr.{stack.region}.{stack.url_suffix}/{_REPOSITORY}:{_TAG}"

    def _allow_reading_weights(self) -> None:
        """The very files that model configs start from, wherever in S3 they lie."""
        for uri in sorted({uri for config in self._stage.configs if (uri := config.architecture.weights_uri)}):
            bucket, key = parse_s3_uri(uri)
            arn = f"arn:{cdk.Aws.PARTITION}:s3:::{bucket}"
            allow(self.role, "s3:GetObject", on=f"{arn}/{key}")
            allow(self.role, "s3:ListBucket", on=arn)  # a channel is a prefix, even when it is one file

    def _allow_joining_network(self, network: Network) -> None:
        """What SageMaker asks of a job's role for a VPC: network interfaces of its own there, and looking at what is there."""
        stack = cdk.Stack.of(self)
        made = stack.format_arn(service="ec2", resource="network-interface", resource_name="*")
        groups = [("subnet", id) for id in network.subnets] + [("security-group", id) for id in network.security_groups]
        interfaces = ("ec2:CreateNetworkInterface", "ec2:DeleteNetworkInterface")
        permissions = ("ec2:CreateNetworkInterfacePermission", "ec2:DeleteNetworkInterfacePermission")
        allow(self.role, *interfaces, *permissions, on=made, wildcard="network interfaces of jobs, whose ids AWS makes")
        for kind, id in groups:
            allow(self.role, "ec2:CreateNetworkInterface", on=stack.format_arn(service="ec2", resource=kind, resource_name=id))
        looks = ("NetworkInterfaces", "Vpcs", "DhcpOptions", "Subnets", "SecurityGroups")
        allow(self.role, *(f"ec2:Describe{what}" for what in looks), on="*", wildcard="EC2's Describe actions know no resource")

    def _allow_logs_and_metrics(self) -> None:
        groups = cdk.Stack.of(self).format_arn(
            service="logs",
            resource="log-group",
            resource_name="/aws/sagemaker/TrainingJobs*",
            arn_format=cdk.ArnFormat.COLON_RESOURCE_NAME,
        )
        allow(
            self.role,
            "logs:CreateLogGroup",
            "logs:CreateLogStream",
            "logs:DescribeLogStreams",
            "logs:PutLogEvents",
            on=groups,
            wildcard="the log group that SageMaker makes, and its streams",
        )
        self.role.add_to_policy(
            iam.PolicyStatement(
                actions=["cloudwatch:PutMetricData"],
                resources=["*"],
                conditions={"StringEquals": {"cloudwatch:namespace": "/aws/sagemaker/TrainingJobs"}},
            )
        )
        acknowledge_wildcard(self.role, "*", reason="metrics know no resource; the namespace is fixed instead")
