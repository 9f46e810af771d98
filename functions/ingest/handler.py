"""S3 `Object Created` events from the ingest queue become Label Studio tasks."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

from aws_lambda_powertools.utilities.typing import LambdaContext

from labelloop import aws
from labelloop.artifacts import Bucket, Champions
from labelloop.ingest import Ingest
from labelloop.label_studio.client import connect
from labelloop.ledger import Ledger
from labelloop.log import Log
from labelloop.messages import PrelabelQueue, Redelivery
from labelloop.model_config import ModelConfigs
from labelloop.settings import Settings

log = Log()
redelivery = Redelivery(log=log.warning)


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


@log.of_invocations
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    outcome = ingest()((record["messageId"], record["body"]) for record in event["Records"])
    log.info("ingested", tasks=len(outcome.created), known=len(outcome.known), again=len(outcome.again))
    for key, reason in outcome.refused.items():
        log.warning("refused", key=key, reason=reason)
    for reason, messages in Counter(outcome.again.values()).items():
        log.error("comes again", messages=messages, reason=reason)
    return redelivery(event, outcome.again.keys() - outcome.unreadable, outcome.unreadable)
