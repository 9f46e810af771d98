"""The training stack: from an image or an annotation to a promoted model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import aws_cdk as cdk
from aws_cdk import aws_cloudwatch as cloudwatch
from aws_cdk import aws_events as events
from aws_cdk import aws_events_targets as targets
from aws_cdk import aws_iam as iam
from aws_cdk import aws_lambda as lambda_
from aws_cdk import aws_logs as logs
from constructs import Construct

from infra_cdk.constructs.alarms import RUNBOOK, OperatorAlarm, alarm_topic
from infra_cdk.constructs.grants import (
    allow,
    allow_ledger,
    allow_reading_objects,
    allow_writing_objects,
)
from infra_cdk.constructs.layers import Layers
from infra_cdk.constructs.python_function import INFERENCE_THREADS, PythonFunction
from infra_cdk.constructs.queue_worker import FailingAlarm, QueueWorker
from infra_cdk.constructs.secrets import (
    allow_reading_backend_secrets,
    allow_reading_label_studio_secret,
    allow_reading_mlflow_secret,
)
from infra_cdk.constructs.training_jobs import TrainingJobs
from infra_cdk.stacks.state import StateStack
from infra_cdk.stage import Stage, output
from labelloop import drift
from labelloop.launcher import NO_MACHINE
from labelloop.retrain import TRAINING_FAILED


class TrainingStack(cdk.Stack):
    """Five queues, each worked off by one function, the rules that fill them, and what a training job needs."""

    def __init__(self, scope: Construct, id: str, *, stage: Stage, state: StateStack) -> None:
        super().__init__(scope, id, env=stage.env, description=f"labelloop {stage.name}: ingest, training, promotion")
        self._stage, self._state = stage, state
        self._layers = Layers(self, "Layers", stage=stage)
        self._jobs = TrainingJobs(
            self, "Jobs", stage=stage, images=state.images, artifacts=state.artifacts, mlflow_app=state.mlflow_app
        )
        ingest = QueueWorker(
            self,
            "Ingest",
            stage=stage,
            timeout=cdk.Duration.seconds(60),
            batch_size=100,
            batching_window=cdk.Duration.seconds(5),
            max_concurrency=4,
            longest_wait=cdk.Duration.days(1),  # hundreds of thousands of images may come at once
        )
        minutes, hour = cdk.Duration.minutes, cdk.Duration.hours(1)
        retrain = QueueWorker(self, "Retrain", stage=stage, timeout=minutes(5), max_concurrency=2, longest_wait=hour)
        promote = QueueWorker(self, "Promote", stage=stage, timeout=minutes(2), max_concurrency=2, longest_wait=hour)
        # What keeps Lambda from taking these keeps it from retrain's as well, as a rule, which the schedule fills all the time.
        refresh = QueueWorker(self, "Refresh", stage=stage, timeout=minutes(2), max_concurrency=2, longest_wait=None)
        prelabel = QueueWorker(
            self, "Prelabel", stage=stage, timeout=minutes(5), batch_size=1, max_concurrency=2, longest_wait=None
        )
        FailingAlarm(self, "Failing", stage=stage)
        self.retrain_queue, self.prelabel_queue = retrain.queue, prelabel.queue
        self.functions: dict[str, PythonFunction] = {}

        self._add_ingest(ingest, prelabel)
        self._add_retrain(retrain, promote)
        self._add_promote(promote)
        self._add_refresh(refresh, prelabel)
        self._add_prelabel(prelabel)
        self._add_rules(ingest=ingest, retrain=retrain, promote=promote, refresh=refresh)

        self.workers = {"ingest": ingest, "retrain": retrain, "promote": promote, "refresh": refresh, "prelabel": prelabel}
        for name, worker in self.workers.items():
            output(self, f"{name.capitalize()}Queue", worker.queue.queue_url)
            output(self, f"{name.capitalize()}QueueDeadLetters", worker.dead_letters.queue_url)
        output(self, "RetrainFunction", self.functions["retrain"].function_name)  # `labelloop train` reads its settings
        self.trainings_failed = logs.MetricFilter(
            self,
            "FailedTrainings",
            log_group=self.functions["retrain"].log_group,
            filter_pattern=logs.FilterPattern.string_value("$.message", "=", TRAINING_FAILED),
            metric_namespace=stage.prefix,
            metric_name="TrainingsFailed",
        )

    @property
    def _serving_memory_mb(self) -> int:
        return max(config.serving.memory_mb for config in self._stage.configs)

    def _add_ingest(self, worker: QueueWorker, prelabel: QueueWorker) -> None:
        role = self._function(
            "ingest",
            worker,
            description="Image in S3 to task in Label Studio",
            memory_mb=1024,
            environment={
                "LABELLOOP_IMAGES_BUCKET": self._state.images.bucket_name,
                "LABELLOOP_ARTIFACTS_BUCKET": self._state.artifacts.bucket_name,
                "LABELLOOP_LEDGER_TABLE": self._state.ledger.table_name,
                "LABELLOOP_PRELABEL_QUEUE": prelabel.queue.queue_url,
                **self._stage.label_studio_environment,
            },
        )
        allow_reading_objects(role, self._state.images, "images/")
        allow_reading_objects(role, self._state.artifacts, "champions/")
        allow_ledger(role, self._state.ledger, "GetItem", "Query", "PutItem", "UpdateItem", "BatchWriteItem")
        allow_reading_label_studio_secret(role, stage=self._stage)
        allow(role, "sqs:SendMessage", on=prelabel.queue.queue_arn)

    def _add_retrain(self, worker: QueueWorker, promote: QueueWorker) -> None:
        role = self._function(
            "retrain",
            worker,
            description="Compares what is annotated with what is trained, and starts a training job when it is time",
            memory_mb=1024,
            environment={
                "POWERTOOLS_METRICS_NAMESPACE": self._stage.prefix,
                "LABELLOOP_IMAGES_BUCKET": self._state.images.bucket_name,
                "LABELLOOP_ARTIFACTS_BUCKET": self._state.artifacts.bucket_name,
                "LABELLOOP_LEDGER_TABLE": self._state.ledger.table_name,
                **self._stage.label_studio_environment,
                **self._stage.mlflow_environment(self._state.mlflow_tracking_uri),
                "LABELLOOP_PROMOTE_QUEUE": promote.queue.queue_url,
                "LABELLOOP_TRAINING_ROLE": self._jobs.role.role_arn,
                "LABELLOOP_TRAINING_IMAGE": self._jobs.image,
                "LABELLOOP_TRAINING_CODE": self._jobs.code,
                **self._stage.network_environment,
                **self._stage.sagemaker_environment,
            },
        )
        allow_reading_objects(role, self._state.artifacts, "champions/", "indexes/")
        allow_writing_objects(role, self._state.artifacts, "snapshots/", "indexes/")
        allow_ledger(role, self._state.ledger, "GetItem", "Query", "PutItem")
        allow_reading_label_studio_secret(role, stage=self._stage)
        self._jobs.allow_running(role)
        allow(role, "sqs:SendMessage", on=promote.queue.queue_arn)

    def _add_promote(self, worker: QueueWorker) -> None:
        role = self._function(
            "promote",
            worker,
            description="Decides whether a trained version becomes the champion",
            memory_mb=max(1024, self._serving_memory_mb),  # it unpacks what predict loads
            environment={
                "POWERTOOLS_METRICS_NAMESPACE": self._stage.prefix,
                "LABELLOOP_ARTIFACTS_BUCKET": self._state.artifacts.bucket_name,
                "LABELLOOP_LEDGER_TABLE": self._state.ledger.table_name,
                **self._stage.mlflow_environment(self._state.mlflow_tracking_uri),
                "LABELLOOP_EVENT_BUS": self._state.event_bus.event_bus_name,
            },
        )
        allow_reading_objects(role, self._state.artifacts, "training/", "champions/", "models/")
        allow_writing_objects(role, self._state.artifacts, "models/", "champions/")
        allow_ledger(role, self._state.ledger, "GetItem", "Query", "PutItem")
        allow(role, "events:PutEvents", on=self._state.event_bus.event_bus_arn)
        if self._state.mlflow_app:
            self._state.mlflow_app.allow_calling(role)
        allow_reading_mlflow_secret(role, stage=self._stage)

    def _add_refresh(self, worker: QueueWorker, prelabel: QueueWorker) -> None:
        role = self._function(
            "refresh",
            worker,
            description="Tells Label Studio which version serves, and has its tasks predicted anew",
            memory_mb=512,
            environment={
                "LABELLOOP_ARTIFACTS_BUCKET": self._state.artifacts.bucket_name,
                "LABELLOOP_LEDGER_TABLE": self._state.ledger.table_name,
                "LABELLOOP_BACKEND_SECRET_PREFIX": self._stage.backend_secret_prefix,
                "LABELLOOP_PRELABEL_QUEUE": prelabel.queue.queue_url,
                **self._stage.label_studio_environment,
            },
        )
        allow_reading_objects(role, self._state.artifacts, "champions/", "models/")
        allow_ledger(role, self._state.ledger, "GetItem", "Query", "PutItem")  # cases for review
        allow_reading_label_studio_secret(role, stage=self._stage)
        allow_reading_backend_secrets(role, stage=self._stage)  # a change of the backend signs in again
        allow(role, "sqs:SendMessage", on=prelabel.queue.queue_arn)

    def _add_prelabel(self, worker: QueueWorker) -> None:
        role = self._function(
            "prelabel",
            worker,
            description="Predicts the tasks that nobody has annotated, which orders the queue",
            memory_mb=self._serving_memory_mb,
            environment={
                "LABELLOOP_IMAGES_BUCKET": self._state.images.bucket_name,
                "LABELLOOP_ARTIFACTS_BUCKET": self._state.artifacts.bucket_name,
                "LABELLOOP_LEDGER_TABLE": self._state.ledger.table_name,
                "LABELLOOP_PRELABEL_QUEUE": worker.queue.queue_url,
                "POWERTOOLS_METRICS_NAMESPACE": self._stage.prefix,
                **self._stage.label_studio_environment,
                **INFERENCE_THREADS,
            },
            layers=[self._layers.inference],
        )
        allow_reading_objects(role, self._state.images, "images/")
        allow_reading_objects(role, self._state.artifacts, "champions/", "models/")
        allow_ledger(role, self._state.ledger, "GetItem", "Query", "PutItem")  # audits, versions in shadow, drift
        allow_reading_label_studio_secret(role, stage=self._stage)
        allow(role, "sqs:SendMessage", on=worker.queue.queue_arn)  # to look again at what somebody may have open
        OperatorAlarm(
            self,
            "Drift",
            stage=self._stage,
            says="the newest images are not like those that a version was measured on: labelloop status says how",
            runbook="drift",
            metric=cloudwatch.Metric(
                namespace=self._stage.prefix,
                metric_name="Drift",
                dimensions_map={"service": "prelabel"},
                period=cdk.Duration.minutes(5),
                statistic="Maximum",
            ),
            threshold=drift.ALARM,
        )

    def _function(
        self,
        name: str,
        worker: QueueWorker,
        *,
        description: str,
        memory_mb: int,
        environment: dict[str, str],
        layers: Sequence[lambda_.ILayerVersion] = (),
    ) -> iam.Role:
        function = PythonFunction(
            self,
            f"{name.capitalize()}Function",
            stage=self._stage,
            name=name,
            description=description,
            environment=environment,
            layers=[self._layers.core, self._layers.library, self._layers.model_configs, *layers],
            memory_mb=memory_mb,
            timeout=worker.timeout,
        )
        worker.work_with(function)
        self.functions[name] = function
        return function.execution_role

    def _tell_operator(self, id: str, detail: dict[str, Any], what: str) -> None:
        """Of a job that ended so, at once, as an alarm would for ten cents a month."""
        rule = events.Rule(
            self,
            id,
            description="tells the operator",
            event_pattern=events.EventPattern(
                source=self._stage.training_event_sources,
                detail_type=["SageMaker Training Job State Change"],
                detail={"TrainingJobName": events.Match.prefix(self._stage.job_prefix), **detail},
            ),
        )
        message = events.RuleTargetInput.from_text(
            f"The training job {events.EventField.from_path('$.detail.TrainingJobName')} {what} "
            f"What to do: {RUNBOOK}#trainings-failed"
        )
        rule.add_target(targets.SnsTopic(alarm_topic(rule, stage=self._stage), message=message))

    def _add_rules(self, *, ingest: QueueWorker, retrain: QueueWorker, promote: QueueWorker, refresh: QueueWorker) -> None:
        field = events.EventField.from_path
        events.Rule(
            self,
            "ImageUploaded",
            description="an image arrived",
            event_pattern=events.EventPattern(
                source=["aws.s3"],
                detail_type=["Object Created"],
                detail={
                    "bucket": {"name": [self._state.images.bucket_name]},
                    "object": {"key": events.Match.prefix("images/")},
                },
            ),
            targets=[targets.SqsQueue(ingest.queue)],
        )
        model = field("$.detail.HyperParameters.model")
        events.Rule(
            self,
            "TrainingEnded",
            description="a training job of this stage ended, one way or another",
            event_pattern=events.EventPattern(
                source=self._stage.training_event_sources,
                detail_type=["SageMaker Training Job State Change"],
                detail={
                    "TrainingJobStatus": ["Completed", "Failed", "Stopped"],
                    "TrainingJobName": events.Match.prefix(self._stage.job_prefix),
                },
            ),
            targets=[
                targets.SqsQueue(
                    retrain.queue, message=events.RuleTargetInput.from_object({"model": model, "action": "TRAINING_ENDED"})
                ),
                targets.SqsQueue(
                    promote.queue,
                    message=events.RuleTargetInput.from_object({"model": model, "job_name": field("$.detail.TrainingJobName")}),
                ),
            ],
        )
        self._tell_operator(
            "TrainingFailed",
            # Where AWS had no machine the training comes again by itself.
            {"TrainingJobStatus": ["Failed"], "FailureReason": events.Match.anything_but_prefix(NO_MACHINE)},
            # Without its reason, in which quotes and line ends are usual: EventBridge escapes nothing that it puts into a text.
            "failed; labelloop status says why.",
        )
        self._tell_operator(
            "TrainingOutOfTime",
            {"TrainingJobStatus": ["Stopped"], "SecondaryStatus": ["MaxRuntimeExceeded"]},
            "was stopped: it took longer than training.max_runtime_minutes.",
        )
        events.Rule(
            self,
            "Schedule",
            description="makes up for webhooks that were lost, and for jobs whose end went by unseen",
            schedule=events.Schedule.rate(self._stage.schedule),
            targets=[targets.SqsQueue(retrain.queue, message=events.RuleTargetInput.from_object({"action": "SCHEDULE"}))],
        )
        events.Rule(
            self,
            "VersionJudged",
            description="the promotion gate, or a person, decided about a version",
            event_bus=self._state.event_bus,
            event_pattern=events.EventPattern(source=["labelloop"], detail_type=["ModelPromoted", "ModelKept"]),
            targets=[
                targets.SqsQueue(
                    retrain.queue,
                    message=events.RuleTargetInput.from_object({"model": field("$.detail.model"), "action": "VERSION_JUDGED"}),
                ),
                targets.SqsQueue(
                    refresh.queue,
                    message=events.RuleTargetInput.from_object(
                        {"model": field("$.detail.model"), "version": field("$.detail.version")}
                    ),
                ),
            ],
        )
