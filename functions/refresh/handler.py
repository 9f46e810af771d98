"""Promotions from the refresh queue: Label Studio learns which version serves."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import msgspec
from aws_lambda_powertools import Logger
from aws_lambda_powertools.utilities.batch import BatchProcessor, EventType, process_partial_response
from aws_lambda_powertools.utilities.data_classes.sqs_event import SQSRecord
from aws_lambda_powertools.utilities.typing import LambdaContext

from labelloop.artifacts import Bucket, Champions
from labelloop.credentials import backend_password
from labelloop.errors import LabelloopError
from labelloop.label_studio.access import connect
from labelloop.ledger import Ledger
from labelloop.records import ModelPromoted
from labelloop.refresh import refresh
from labelloop.settings import Settings

logger = Logger()
processor = BatchProcessor(EventType.SQS, raise_on_entire_batch_failure=False)


@cache
def refresher() -> Callable[[str], str]:
    settings = Settings()
    champions, ledger, label_studio = (
        Champions(Bucket(settings.artifacts_bucket)),
        Ledger(settings.ledger_table),
        connect(settings),
    )
    return lambda model: refresh(model, champions, ledger, label_studio, partial(backend_password, settings))


def take(record: SQSRecord) -> None:
    promoted = msgspec.json.decode(record.body, type=ModelPromoted)
    try:
        title = refresher()(promoted.model)
    except LabelloopError as error:
        logger.error("comes again", model=promoted.model, reason=str(error), error=type(error).__name__)
        raise
    logger.info("refreshed", model=promoted.model, version=title)


@logger.inject_lambda_context
def handler(event: dict[str, Any], context: LambdaContext) -> Any:
    return process_partial_response(event, take, processor, context)
