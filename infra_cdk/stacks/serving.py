"""The serving stack: what Label Studio talks to."""

from __future__ import annotations

import aws_cdk as cdk
from aws_cdk import aws_cloudwatch as cloudwatch
from aws_cdk import aws_lambda as lambda_
from constructs import Construct

from infra_cdk.constructs.alarms import OperatorAlarm
from infra_cdk.constructs.canary import Canary
from infra_cdk.constructs.front_door import FrontDoor
from infra_cdk.constructs.grants import allow, allow_reading_objects
from infra_cdk.constructs.layers import Layers
from infra_cdk.constructs.monitoring import Monitoring
from infra_cdk.constructs.python_function import INFERENCE_THREADS, PythonFunction
from infra_cdk.constructs.secrets import allow_reading_backend_secrets, allow_reading_label_studio_secret
from infra_cdk.stacks.state import StateStack
from infra_cdk.stacks.training import TrainingStack
from infra_cdk.stage import Stage, output
from labelloop.predict import MAX_TASKS, PART

_FAILED_SIGN_INS = 10  # in five minutes: more than a password that somebody mistyped, or that Label Studio was not given
_FULL_CPU_MB = 1769  # memory at which Lambda gives one whole vCPU
# What anybody can cause by calling the API, at most. Lambda asks an account to keep 100 of its (usually 1,000) for the rest.
_AUTHORIZE_AT_ONCE, _PREDICT_AT_ONCE = 20, 100
_PARTS_AT_ONCE = MAX_TASKS // PART  # the largest request whole; of its own, so that requests cannot take their parts' place
_SERVE_SECONDS = 29  # as long as API Gateway waits


class ServingStack(cdk.Stack):
    """The front door, the authorizer, predict, which serves every model, and what it has large requests' parts predicted by."""

    def __init__(self, scope: Construct, id: str, *, stage: Stage, state: StateStack, training: TrainingStack) -> None:
        super().__init__(scope, id, env=stage.env, description=f"labelloop {stage.name}: ML backends of Label Studio")
        layers = Layers(self, "Layers", stage=stage)
        authorize = PythonFunction(
            self,
            "AuthorizeFunction",
            stage=stage,
            name="authorize",
            description="Lets a model's credentials through to that model",
            environment={
                "LABELLOOP_BACKEND_SECRET_PREFIX": stage.backend_secret_prefix,
                "POWERTOOLS_METRICS_NAMESPACE": stage.prefix,
            },
            layers=[layers.core, layers.library],
            memory_mb=_FULL_CPU_MB,  # its cold start is part of Label Studio's one second for health; it runs once an hour
            timeout=cdk.Duration.seconds(10),
            concurrency=_AUTHORIZE_AT_ONCE if stage.facts.reserved_concurrency else None,
        )
        allow_reading_backend_secrets(authorize.execution_role, stage=stage)
        OperatorAlarm(
            self,
            "FailedSignIns",
            stage=stage,
            says="somebody tries passwords at the API; a wrong one that is sent again within the hour counts once",
            runbook="failed-sign-ins",
            metric=cloudwatch.Metric(
                namespace=stage.prefix,
                metric_name="FailedSignIns",
                dimensions_map={"service": "authorize"},
                period=cdk.Duration.minutes(5),
                statistic="Sum",
            ),
            threshold=_FAILED_SIGN_INS,
        )

        environment = {
            "LABELLOOP_IMAGES_BUCKET": state.images.bucket_name,
            "LABELLOOP_ARTIFACTS_BUCKET": state.artifacts.bucket_name,
            **stage.label_studio_environment,
            **INFERENCE_THREADS,
        }
        with_models = [layers.core, layers.inference, layers.library, layers.model_configs]
        memory_mb = max(config.serving.memory_mb for config in stage.configs)
        part = PythonFunction(
            self,
            "PredictPartFunction",
            stage=stage,
            name="predict_part",
            description="Predicts a part of a request that is too large for one invocation",
            environment=environment,
            layers=with_models,
            memory_mb=memory_mb,
            timeout=cdk.Duration.seconds(_SERVE_SECONDS),
            concurrency=_PARTS_AT_ONCE if stage.facts.reserved_concurrency else None,
        )
        allow_reading_objects(part.execution_role, state.images, "images/")
        allow_reading_objects(part.execution_role, state.artifacts, "models/")
        allow_reading_label_studio_secret(part.execution_role, stage=stage)

        predict = PythonFunction(
            self,
            "PredictFunction",
            stage=stage,
            name="predict",
            description="Setup, predictions and versions of every model",
            environment={
                **environment,
                "LABELLOOP_PREDICT_PART_FUNCTION": part.function_name,
                "LABELLOOP_PRELABEL_QUEUE": training.prelabel_queue.queue_url,
            },
            layers=with_models,
            memory_mb=memory_mb,
            timeout=cdk.Duration.seconds(_SERVE_SECONDS),
            concurrency=_PREDICT_AT_ONCE if stage.facts.reserved_concurrency else None,
            snapshot=stage.facts.predict_start == "snapshot",
        )
        allow_reading_objects(predict.execution_role, state.images, "images/")
        allow_reading_objects(predict.execution_role, state.artifacts, "champions/", "models/")
        allow_reading_label_studio_secret(predict.execution_role, stage=stage)
        allow(predict.execution_role, "lambda:InvokeFunction", on=part.function_arn)
        allow(predict.execution_role, "sqs:SendMessage", on=training.prelabel_queue.queue_arn)  # of what is late

        live = self._live(predict, stage) if stage.serves_versions else None
        front_door = FrontDoor(
            self,
            "FrontDoor",
            stage=stage,
            authorizer=authorize,
            predict=live or predict,
            retrain_queue=training.retrain_queue,
        )
        failing = OperatorAlarm(
            self,
            "RequestsFailed",
            stage=stage,
            says="the API answered a request with 5xx",
            runbook="requests-failed",
            # Not Lambda's errors of the alias: predict answers its own with 500, which Lambda takes for success.
            metric=front_door.api.metric_server_error(period=cdk.Duration.minutes(1), statistic="Sum"),
            threshold=1,  # a new version gets a tenth of what a few annotators ask
        )
        if live and stage.facts.deployment == "canary":
            Canary(self, "Canary", function=predict, alias=live, alarm=failing)
        functions = {"authorize": authorize, "predict": predict, "predict_part": part, **training.functions}
        Monitoring(
            self,
            "Monitoring",
            stage=stage,
            api=front_door.api,
            functions=functions,
            workers=training.workers,
            trainings_failed=training.trainings_failed,
        )
        output(self, "ApiUrl", front_door.url)
        output(self, "ApiId", front_door.api.rest_api_id)

    def _live(self, predict: lambda_.Function, stage: Stage) -> lambda_.Alias:
        """What the API calls. A version of CDK's goes once the next one has come to serve, and its snapshot with it."""
        return lambda_.Alias(
            self,
            "PredictAlias",
            alias_name="live",
            version=predict.current_version,
            provisioned_concurrent_executions=stage.predict_ready or None,
        )
