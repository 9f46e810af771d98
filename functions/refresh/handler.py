"""Judged versions from the refresh queue: Label Studio learns which one serves, and its tasks are predicted anew."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

from aws_lambda_powertools.utilities.typing import LambdaContext

from labelloop import aws
from labelloop.artifacts import Bucket, Champions
from labelloop.label_studio.client import connect
from labelloop.ledger import Ledger
from labelloop.log import Log
from labelloop.messages import PrelabelQueue, Redelivery, work_off
from labelloop.model_config import ModelConfigs
from labelloop.records import VersionJudged
from labelloop.refresh import Refresher
from labelloop.secrets import backend_password
from labelloop.settings import Settings

log = Log()
redelivery = Redelivery(log=log.warning)


@cache
def refresher() -> Refresher:
    settings = Settings()
    return Refresher(
        ModelConfigs.find(),
        Champions(Bucket(settings.artifacts_bucket)),
        Ledger(settings.ledger_table),
        connect(settings),
        PrelabelQueue(settings.prelabel_queue, aws.client("sqs")),
        partial(backend_password, settings),
    )


def refresh(judged: VersionJudged) -> None:
    refreshed = refresher()(judged)
    log.info("refreshed", model=judged.model, outcome=vars(refreshed))


@log.of_invocations
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    return work_off(event, VersionJudged, refresh, log=log, redelivery=redelivery)
