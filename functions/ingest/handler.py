"""S3 `Object Created` events from the ingest queue become Label Studio tasks."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

from aws_lambda_powertools import Logger
from aws_lambda_powertools.utilities.typing import LambdaContext

from labelloop import aws
from labelloop.artifacts import Bucket, Champions
from labelloop.ingest import Ingest
from labelloop.label_studio.access import connect
from labelloop.ledger import Ledger
from labelloop.model_config import ModelConfigs
from labelloop.prelabel_queue import PrelabelQueue
from labelloop.redelivery import Redelivery
from labelloop.settings import Settings

logger = Logger()
redelivery = Redelivery(log=logger.warning)


@cache
def ingest() -> Ingest:
    settings = Settings()
    prelabel = PrelabelQueue(settings.prelabel_queue, aws.client("sqs"))
    return Ingest(
        ModelConfigs.find(),
        Bucket(settings.images_bucket),
        Champions(Bucket(settings.artifacts_bucket)),
        Ledger(settings.ledger_table),
        connect(settings),
        prelabel.send,
    )


@logger.inject_lambda_context
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    outcome = ingest()((record["messageId"], record["body"]) for record in event["Records"])
    logger.info("ingested", tasks=len(outcome.created), known=len(outcome.known), again=len(outcome.again))
    for key, reason in outcome.refused.items():
        logger.warning("refused", key=key, reason=reason)
    for reason, messages in Counter(outcome.again.values()).items():
        logger.error("comes again", messages=messages, reason=reason)
    answer = {"batchItemFailures": [{"itemIdentifier": message} for message in outcome.again]}
    return redelivery(event, answer, dict)
