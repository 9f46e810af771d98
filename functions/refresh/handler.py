"""Judged versions from the refresh queue: Label Studio learns which one serves, and its tasks are predicted anew."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import msgspec
from aws_lambda_powertools.utilities.batch import BatchProcessor, EventType, process_partial_response
from aws_lambda_powertools.utilities.data_classes.sqs_event import SQSRecord
from aws_lambda_powertools.utilities.typing import LambdaContext

from labelloop import aws
from labelloop.artifacts import Bucket, Champions
from labelloop.credentials import backend_password
from labelloop.errors import LabelloopError
from labelloop.label_studio.access import connect
from labelloop.ledger import Ledger
from labelloop.log import Log
from labelloop.messages import PrelabelQueue, Redelivery
from labelloop.model_config import ModelConfigs
from labelloop.records import VersionJudged
from labelloop.refresh import Refresher
from labelloop.settings import Settings

log = Log()
processor = BatchProcessor(EventType.SQS, raise_on_entire_batch_failure=False)
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


def take(record: SQSRecord) -> None:
    judged = msgspec.json.decode(record.body, type=VersionJudged)
    try:
        refreshed = refresher()(judged)
    except LabelloopError as error:
        log.error("comes again", model=judged.model, reason=str(error), error=type(error).__name__)
        raise
    log.info("refreshed", model=judged.model, outcome=vars(refreshed))


@log.of_invocations
def handler(event: dict[str, Any], context: LambdaContext) -> Any:
    answer = process_partial_response(event, take, processor, context)
    return redelivery(event, dict(answer), VersionJudged)
