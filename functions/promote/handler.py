"""Ended training jobs from the promote queue: the promotion gate decides about each one's version."""

from __future__ import annotations

from functools import cache
from typing import Any

from aws_lambda_powertools import single_metric
from aws_lambda_powertools.metrics import MetricUnit
from aws_lambda_powertools.utilities.typing import LambdaContext

from labelloop import aws
from labelloop.artifacts import Bucket
from labelloop.ledger import Ledger
from labelloop.log import Log
from labelloop.messages import Redelivery, announce, work_off
from labelloop.promotion import Promoter
from labelloop.records import PromoteSignal, Promotion
from labelloop.registry import Registry
from labelloop.secrets import MlflowToken
from labelloop.settings import Settings

log = Log()
redelivery = Redelivery(log=log.warning)


@cache
def promoter() -> Promoter:
    settings = Settings()
    events = aws.client("events")

    def tell(promotion: Promotion) -> None:
        announce(events, settings.event_bus, "ModelPromoted" if promotion.verdict == "promote" else "ModelKept", promotion)

    registry = Registry(settings.mlflow_tracking_uri, MlflowToken.of(settings))
    return Promoter(Bucket(settings.artifacts_bucket), Ledger(settings.ledger_table), registry, tell, count, log=log.warning)


def decide(signal: PromoteSignal) -> None:
    promotion = promoter().decide(signal.model, signal.job_name)
    if promotion is None:
        log.info("no model to decide about", model=signal.model, job_name=signal.job_name)
    else:
        told = ("version", "reason", "metric", "value", "n_annotations")
        log.info(promotion.verdict, model=signal.model, **{name: getattr(promotion, name) for name in told})


def count(promotion: Promotion) -> None:
    """Metrics of the stage's dashboard."""
    found: list[tuple[str, MetricUnit, float]] = (
        [(promotion.metric, MetricUnit.NoUnit, promotion.value)] if promotion.metric else []
    )
    if promotion.timing:
        found.append(("TrainingSeconds", MetricUnit.Seconds, sum(promotion.timing.seconds.values())))
    for name, unit, value in found:
        with single_metric(name=name, unit=unit, value=value) as metric:
            metric.add_dimension("model", promotion.model)
            metric.add_metadata("version", promotion.version)


@log.of_invocations
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    return work_off(event, PromoteSignal, decide, log=log, redelivery=redelivery)
