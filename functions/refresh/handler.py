"""Promotions from the refresh queue: Label Studio learns which version serves."""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec
from aws_lambda_powertools import Logger
from aws_lambda_powertools.utilities.batch import BatchProcessor, EventType, process_partial_response
from aws_lambda_powertools.utilities.data_classes.sqs_event import SQSRecord
from aws_lambda_powertools.utilities.typing import LambdaContext

from labelloop.artifacts import Bucket, Champions
from labelloop.label_studio.access import connect
from labelloop.label_studio.client import LabelStudioClient
from labelloop.ledger import Ledger
from labelloop.records import ModelPromoted
from labelloop.refresh import refresh
from labelloop.settings import Settings

logger = Logger()
processor = BatchProcessor(EventType.SQS, raise_on_entire_batch_failure=False)


@cache
def parts() -> tuple[Champions, Ledger, LabelStudioClient]:
    settings = Settings()
    return Champions(Bucket(settings.artifacts_bucket)), Ledger(settings.ledger_table), connect(settings)


def take(record: SQSRecord) -> None:
    promoted = msgspec.json.decode(record.body, type=ModelPromoted)
    title = refresh(promoted.model, *parts())
    logger.info("refreshed", model=promoted.model, version=title)


@logger.inject_lambda_context
def handler(event: dict[str, Any], context: LambdaContext) -> Any:
    return process_partial_response(event, take, processor, context)
