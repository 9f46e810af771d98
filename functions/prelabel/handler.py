"""Ranges of tasks from the prelabel queue: the champion predicts those that nobody has annotated."""

from __future__ import annotations

from functools import cache
from typing import Any

from aws_lambda_powertools import single_metric
from aws_lambda_powertools.metrics import MetricUnit
from aws_lambda_powertools.utilities.typing import LambdaContext

from labelloop import aws
from labelloop.artifacts import Bucket, Champions
from labelloop.label_studio.client import connect
from labelloop.ledger import Ledger
from labelloop.log import Log
from labelloop.messages import PrelabelQueue, Redelivery, work_off
from labelloop.model_config import ModelConfigs
from labelloop.predict import TaskPredictor
from labelloop.prelabel import SETTLED, Prelabeller
from labelloop.records import TaskRange
from labelloop.settings import Settings

log = Log()
redelivery = Redelivery(log=log.warning)


@cache
def prelabeller() -> Prelabeller:
    settings = Settings()
    champions = Champions(Bucket(settings.artifacts_bucket))
    predictor = TaskPredictor.of(settings, ModelConfigs.find(), champions)
    return Prelabeller(champions, Ledger(settings.ledger_table), connect(settings), predictor, log=log.warning)


@cache
def queue() -> PrelabelQueue:
    return PrelabelQueue(Settings().prelabel_queue, aws.client("sqs"))


def prelabel(tasks: TaskRange) -> None:
    outcome = prelabeller()(tasks)
    if outcome.unsettled:
        queue().send([tasks], delay=SETTLED)
    drift = outcome.drift.figures if outcome.drift else {}
    if drift:
        with single_metric(name="Drift", unit=MetricUnit.NoUnit, value=max(drift.values())):
            pass
    told = {**vars(outcome), "drift": drift}
    log.info("prelabelled", model=tasks.model, after=tasks.after, upto=tasks.upto, outcome=told)


@log.of_invocations
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    return work_off(event, TaskRange, prelabel, log=log, redelivery=redelivery)
