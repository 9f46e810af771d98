"""Webhooks, schedule and ended jobs from the retrain queue: one reconcile for each model they name."""

from __future__ import annotations

import json
from collections import defaultdict
from functools import cache
from typing import Any

import msgspec
from aws_lambda_powertools import single_metric
from aws_lambda_powertools.metrics import MetricUnit
from aws_lambda_powertools.utilities.typing import LambdaContext
from botocore.exceptions import BotoCoreError, ClientError

from labelloop import aws
from labelloop.artifacts import Bucket
from labelloop.errors import LabelloopError, LateError, NotSetUpError, ServiceError, UnknownModelError
from labelloop.label_studio.client import connect
from labelloop.launcher import Launcher
from labelloop.ledger import Ledger
from labelloop.log import Log
from labelloop.messages import Redelivery
from labelloop.model_config import ModelConfigs
from labelloop.records import TrainingSignal
from labelloop.retrain import ASKED, SCHEDULE, Outcome, Reconciler, Watchdog
from labelloop.settings import Settings

log = Log()
redelivery = Redelivery(log=log.warning)


@cache
def reconciler() -> Reconciler:
    settings = Settings()
    sqs = aws.client("sqs")

    def recall_promotion(model: str, job_name: str) -> None:
        body = json.dumps({"model": model, "job_name": job_name})
        try:
            sqs.send_message(QueueUrl=settings.promote_queue, MessageBody=body)
        except (BotoCoreError, ClientError) as error:
            raise ServiceError(f"the promote queue takes no message: {error}") from error

    return Reconciler(
        settings.stage,
        ModelConfigs.find(),
        Bucket(settings.artifacts_bucket),
        Ledger(settings.ledger_table),
        connect(settings),
        Launcher(settings),
        recall_promotion,
        log=log.info,
    )


@cache
def watchdog() -> Watchdog:
    settings = Settings()
    return Watchdog(Ledger(settings.ledger_table), connect(settings))


@log.of_invocations
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    messages: dict[str, list[tuple[str, TrainingSignal]]] = defaultdict(list)  # model → (message id, signal)
    failed, unreadable = set[str](), set[str]()
    for record in event["Records"]:
        try:
            signal = msgspec.json.decode(record["body"], type=TrainingSignal)
        except (ValueError, RecursionError) as error:  # no JSON, no text, not of the type; nested too deep
            log.error("no training signal", message_id=record["messageId"], reason=str(error))
            unreadable.add(record["messageId"])
            continue
        for model in [signal.model] if signal.model else ModelConfigs.find().names:
            messages[model].append((record["messageId"], signal))
    for model, signals in messages.items():
        try:
            requests = {signal.request or message for message, signal in signals if signal.action == ASKED}
            new = [request for request in requests if not reconciler().has_answered(model, request)]
            outcome = reconciler().reconcile(model, asked=bool(new))
            for request in new:
                reconciler().answer(model, request, outcome)
        except (NotSetUpError, UnknownModelError) as error:  # asking again helps nobody: the schedule looks once it is set up
            log.warning("refused", model=model, reason=str(error), error=type(error).__name__)
        except LateError as error:  # nothing has failed, and no alarm should ring
            log.info("goes on", model=model, reason=str(error))
            failed.update(message for message, _ in signals)
        except LabelloopError as error:
            log.error("not reconciled", model=model, reason=str(error), error=type(error).__name__)
            failed.update(message for message, _ in signals)
        except Exception:  # a fault of ours; the other models' messages have nothing to do with it
            log.exception("failed", model=model)
            failed.update(message for message, _ in signals)
        else:
            log.info("reconciled", model=model, signals=len(signals), started=outcome.started, reason=outcome.reason)
            count(model, outcome, idle=all(signal.action == SCHEDULE for _, signal in signals))
            if any(signal.action == SCHEDULE for _, signal in signals):
                _watch(model)
    return redelivery(event, failed, unreadable)


def count(model: str, outcome: Outcome, *, idle: bool) -> None:
    """Metrics of the stage's dashboard. The schedule alone counts no annotations: metrics cost money."""
    counts = {
        "TrainingsStarted": int(outcome.started is not None),
        "PredictionsShown": outcome.acceptance.shown,
        "PredictionsKept": outcome.acceptance.kept,
        "Annotations": 0 if idle else outcome.annotated or 0,
    }
    for name, value in counts.items():
        if value or (name == "PredictionsKept" and outcome.acceptance.shown):
            with single_metric(name=name, unit=MetricUnit.Count, value=value) as metric:
                metric.add_dimension("model", model)


def _watch(model: str) -> None:
    """What fails here is looked at with the next schedule."""
    try:
        finding = watchdog()(model)
    except LabelloopError as error:
        finding = str(error)
    if finding:
        log.warning("webhook", model=model, reason=finding)
