"""The workflows stack: whom AWS lets in from a forge's workflows, and what each job may do. Made only where it is asked for."""

from __future__ import annotations

import aws_cdk as cdk
from aws_cdk import aws_iam as iam
from constructs import Construct

from infra_cdk.constructs.grants import allow, allow_ledger, allow_reading_objects
from infra_cdk.constructs.secrets import allow_reading_backend_secrets, allow_reading_label_studio_secret
from infra_cdk.stacks.state import StateStack
from infra_cdk.stacks.training import TrainingStack
from infra_cdk.stage import Stage, output
from infra_cdk.stage_facts import Workflows

_AUDIENCE = "sts.amazonaws.com"
_BOOTSTRAP_ROLES = ("deploy", "file-publishing", "lookup")  # of `cdk bootstrap`: all that a deployment takes over; no images here
_JOB = cdk.Duration.hours(6)  # as long as a forge lets a job run, and so wait for a training


class WorkflowsStack(cdk.Stack):
    """The forge as an identity provider, and a role for each job: compare, deploy, try, train.

    Compare is for pull requests; it reads templates and nothing else, as anybody who may push a branch decides what it runs.
    The others are for the main branch.
    """

    def __init__(
        self,
        scope: Construct,
        id: str,
        *,
        stage: Stage,
        workflows: Workflows,
        state: StateStack,
        training: TrainingStack,
    ) -> None:
        super().__init__(scope, id, env=stage.env, description=f"labelloop {stage.name}: what workflows may do")
        self._stage, self._workflows = stage, workflows
        self._provider = workflows.provider or self._make_provider()

        diff = self._role("Diff", "compares templates with what is deployed", workflows.pull_requests)
        self._allow_reading_stacks(diff, "cloudformation:DescribeStacks", "cloudformation:GetTemplate")

        deploy = self._role("Deploy", "deploys, as the roles of cdk bootstrap", workflows.on_branch)
        for name in _BOOTSTRAP_ROLES:
            allow(deploy, "sts:AssumeRole", on=self._bootstrap_role(name))

        smoke = self._role("Smoke", "tries what was deployed", workflows.on_branch)
        self._allow_reading_stacks(smoke, "cloudformation:DescribeStacks")
        allow_reading_label_studio_secret(smoke, stage=stage)
        allow_reading_backend_secrets(smoke, stage=stage)
        allow_ledger(smoke, state.ledger, "GetItem")
        allow_reading_objects(smoke, state.artifacts, "champions/")
        allow(smoke, "s3:GetBucketCORS", on=state.images.bucket_arn)

        train = self._role("Train", "starts trainings and reads how they ended", workflows.on_branch, longest=_JOB)
        self._allow_reading_stacks(train, "cloudformation:DescribeStacks")
        allow(train, "sqs:SendMessage", on=training.retrain_queue.queue_arn)
        allow_ledger(train, state.ledger, "GetItem", "Query")
        allow_reading_objects(train, state.artifacts, "champions/", "models/")

    def _make_provider(self) -> str:
        provider = iam.OidcProviderNative(
            self, "Provider", url=self._workflows.issuer, client_ids=[_AUDIENCE], removal_policy=cdk.RemovalPolicy.DESTROY
        )
        return provider.oidc_provider_arn

    def _role(self, name: str, does: str, subject: str, *, longest: cdk.Duration | None = None) -> iam.Role:
        issuer = self._workflows.issuer.removeprefix("https://")
        trusted = iam.FederatedPrincipal(
            self._provider,
            {"StringEquals": {f"{issuer}:aud": _AUDIENCE, f"{issuer}:sub": subject}},
            "sts:AssumeRoleWithWebIdentity",
        )
        role = iam.Role(
            self,
            name,
            assumed_by=trusted,
            description=f"A workflow's job that {does} ({self._stage.prefix})",
            max_session_duration=longest,
        )
        output(self, f"{name}RoleArn", role.role_arn)
        return role

    def _allow_reading_stacks(self, role: iam.Role, *actions: str) -> None:
        """All stacks of the stage. CloudFormation gives each an id of its own, which no template can know."""
        arn = self.format_arn(service="cloudformation", resource="stack", resource_name=f"{self._stage.prefix}-*/*")
        allow(role, *actions, on=arn, wildcard="the stacks of this stage, whose ids AWS makes")

    def _bootstrap_role(self, name: str) -> str:
        qualifier = self.synthesizer.bootstrap_qualifier or cdk.DefaultStackSynthesizer.DEFAULT_QUALIFIER
        return self.format_arn(
            service="iam",
            region="",
            resource="role",
            resource_name=f"cdk-{qualifier}-{name}-role-{self.account}-{self.region}",
        )
