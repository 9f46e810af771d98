"""A queue, its dead-letter queue, their alarms, and the function that works it off."""

from __future__ import annotations

import aws_cdk as cdk
from aws_cdk import aws_cloudwatch as cloudwatch
from aws_cdk import aws_lambda as lambda_
from aws_cdk import aws_lambda_event_sources as event_sources
from aws_cdk import aws_logs as logs
from aws_cdk import aws_sqs as sqs
from constructs import Construct

from infra_cdk.constructs.alarms import OperatorAlarm
from infra_cdk.stage import Stage

# With the pauses that functions make (`labelloop.messages`) a message outlives an outage of some four hours.
_MAX_RECEIVES = 20
_FAILED = "MessagesFailed"
_DIED = ("[ERROR]", "Task timed out", "Runtime exited", "OutOfMemory")  # what Lambda writes of a function that said nothing


class QueueWorker(Construct):
    """`function` gets batches and answers which messages failed; after twenty receives one moves to `dead_letters`.

    `longest_wait`: how old a message may become that nobody takes, longer than a large batch takes; None where nobody is told,
    for an alarm costs ten cents a month. SQS leaves out of that age what was received three times, so that messages fail is
    told from the function's log (`FailingAlarm`).
    """

    def __init__(
        self,
        scope: Construct,
        id: str,
        *,
        stage: Stage,
        timeout: cdk.Duration,
        batch_size: int = 10,
        batching_window: cdk.Duration | None = None,
        max_concurrency: int,
        longest_wait: cdk.Duration | None,
    ) -> None:
        super().__init__(scope, id)
        self.timeout, self._stage = timeout, stage
        self._batch_size, self._batching_window, self._max_concurrency = batch_size, batching_window, max_concurrency
        self.dead_letters = sqs.Queue(
            self,
            "DeadLetters",
            encryption=sqs.QueueEncryption.SQS_MANAGED,
            enforce_ssl=True,
            retention_period=cdk.Duration.days(14),
        )
        self.queue = sqs.Queue(
            self,
            "Queue",
            encryption=sqs.QueueEncryption.SQS_MANAGED,
            enforce_ssl=True,
            visibility_timeout=cdk.Duration.seconds(6 * timeout.to_seconds()),  # what Lambda asks for
            dead_letter_queue=sqs.DeadLetterQueue(queue=self.dead_letters, max_receive_count=_MAX_RECEIVES),
        )
        OperatorAlarm(
            self,
            "Alarm",
            stage=stage,
            says=f"messages that {id} gave up on lie in its dead-letter queue",
            runbook="dead-letters",
            metric=self.dead_letters.metric_approximate_number_of_messages_visible(
                period=cdk.Duration.minutes(5), statistic="Maximum"
            ),
            threshold=1,
        )
        if longest_wait:
            OperatorAlarm(
                self,
                "OldAlarm",
                stage=stage,
                says=f"nobody takes the messages of {id}",
                runbook="old-messages",
                metric=self.queue.metric_approximate_age_of_oldest_message(period=cdk.Duration.minutes(5), statistic="Maximum"),
                threshold=longest_wait.to_seconds(),
            )

    def work_with(self, function: lambda_.Function) -> None:
        """Let `function` work the queue off; its timeout is the `timeout` given here."""
        function.add_event_source(
            event_sources.SqsEventSource(
                self.queue,
                batch_size=self._batch_size,
                max_batching_window=self._batching_window,
                max_concurrency=self._max_concurrency,
                report_batch_item_failures=True,
            )
        )
        said = logs.FilterPattern.string_value("$.level", "=", "ERROR")
        for id, pattern in (("SaidFailed", said), ("Died", logs.FilterPattern.any_term(*_DIED))):
            logs.MetricFilter(
                self,
                id,
                log_group=function.log_group,
                filter_pattern=pattern,
                metric_namespace=self._stage.prefix,
                metric_name=_FAILED,
            )


class FailingAlarm(OperatorAlarm):
    """Rings when messages of any queue have been failing for more than an hour; one that fails comes again within half of one."""

    def __init__(self, scope: Construct, id: str, *, stage: Stage) -> None:
        super().__init__(
            scope,
            id,
            stage=stage,
            says="messages have been failing for more than an hour: the log of the function that fails says why",
            runbook="failing-messages",
            metric=cloudwatch.Metric(
                namespace=stage.prefix, metric_name=_FAILED, period=cdk.Duration.minutes(30), statistic="Sum"
            ),
            threshold=1,
            rings_in=3,
            periods=4,
        )
