"""How a new version of a function comes to serve: a tenth of the requests first, all of them five minutes later, or none."""

from __future__ import annotations

import aws_cdk as cdk
from aws_cdk import aws_cloudwatch as cloudwatch
from aws_cdk import aws_codedeploy as codedeploy
from aws_cdk import aws_iam as iam
from aws_cdk import aws_lambda as lambda_
from constructs import Construct

from infra_cdk.constructs.grants import allow


class Canary(Construct):
    """CodeDeploy moves `alias` to a new version, and back when `alarm` rings meanwhile: the stack is then rolled back."""

    def __init__(
        self, scope: Construct, id: str, *, function: lambda_.Function, alias: lambda_.Alias, alarm: cloudwatch.IAlarm
    ) -> None:
        super().__init__(scope, id)
        role = iam.Role(self, "Role", assumed_by=iam.ServicePrincipal("codedeploy.amazonaws.com"))
        # In place of AWSCodeDeployRoleForLambdaLimited, which may move every alias of the account and read from any bucket.
        aliases = "lambda:GetAlias", "lambda:UpdateAlias", "lambda:GetProvisionedConcurrencyConfig"
        for arn in (function.function_arn, f"{function.function_arn}:{alias.alias_name}"):
            allow(role, *aliases, on=arn)
        alarms = cdk.Stack.of(self).format_arn(
            service="cloudwatch", resource="alarm", resource_name="*", arn_format=cdk.ArnFormat.COLON_RESOURCE_NAME
        )
        allow(role, "cloudwatch:DescribeAlarms", on=alarms, wildcard="CloudWatch asks this of who looks up a single alarm")
        group = codedeploy.LambdaDeploymentGroup(
            self,
            "Group",
            alias=alias,
            role=role.without_policy_updates(),  # keeps the managed policy off
            deployment_config=codedeploy.LambdaDeploymentConfig.CANARY_10_PERCENT_5_MINUTES,
            alarms=[alarm],
            auto_rollback=codedeploy.AutoRollbackConfig(
                failed_deployment=True, stopped_deployment=True, deployment_in_alarm=True
            ),
        )
        group.node.add_dependency(role)  # with its policy: a deployment may follow at once
