"""Alarms that a person has to act on, and the topic that tells one."""

from __future__ import annotations

import aws_cdk as cdk
from aws_cdk import aws_cloudwatch as cloudwatch
from aws_cdk import aws_cloudwatch_actions as actions
from aws_cdk import aws_iam as iam
from aws_cdk import aws_sns as sns
from aws_cdk import aws_sns_subscriptions as subscriptions
from constructs import Construct

from infra_cdk.stage import Stage

RUNBOOK = "docs/operations.md"


class AlarmTopic(sns.Topic):
    """Where every alarm of the stage is told, by e-mail where stages.yaml names an address."""

    def __init__(self, scope: Construct, id: str, *, stage: Stage) -> None:
        super().__init__(scope, id, topic_name=_topic_name(stage), display_name=f"labelloop {stage.name}", enforce_ssl=True)
        self.add_to_resource_policy(
            iam.PolicyStatement(
                principals=[iam.ServicePrincipal("cloudwatch.amazonaws.com")],
                actions=["sns:Publish"],
                resources=[self.topic_arn],
                conditions={"StringEquals": {"aws:SourceAccount": cdk.Aws.ACCOUNT_ID}},
            )
        )
        # EventBridge takes no conditions here; its rules reach topics of their own account only.
        self.grant_publish(iam.ServicePrincipal("events.amazonaws.com"))
        if stage.facts.alarms_email:
            self.add_subscription(subscriptions.EmailSubscription(stage.facts.alarms_email))


class OperatorAlarm(cloudwatch.Alarm):
    """Rings at `threshold` and above, in `rings_in` of the metric's last `periods`.

    `says`: what is wrong; `runbook`: the row of docs/operations.md that says what to do.
    """

    def __init__(
        self,
        scope: Construct,
        id: str,
        *,
        stage: Stage,
        says: str,
        runbook: str,
        metric: cloudwatch.IMetric,
        threshold: float,
        rings_in: int = 1,
        periods: int = 1,
    ) -> None:
        super().__init__(
            scope,
            id,
            alarm_description=f"{says}. What to do: {RUNBOOK}#{runbook}",
            metric=metric,
            threshold=threshold,
            evaluation_periods=periods,
            datapoints_to_alarm=rings_in,
            comparison_operator=cloudwatch.ComparisonOperator.GREATER_THAN_OR_EQUAL_TO_THRESHOLD,
            treat_missing_data=cloudwatch.TreatMissingData.NOT_BREACHING,
        )
        self.add_alarm_action(actions.SnsAction(alarm_topic(self, stage=stage)))


def alarm_topic(scope: Construct, *, stage: Stage) -> sns.ITopic:
    """By its name: it lies in the state stack, and an export would tie the stacks together."""
    arn = cdk.Stack.of(scope).format_arn(service="sns", resource=_topic_name(stage))
    return sns.Topic.from_topic_arn(scope, "Topic", arn)


def _topic_name(stage: Stage) -> str:
    return f"{stage.prefix}-alarms"
