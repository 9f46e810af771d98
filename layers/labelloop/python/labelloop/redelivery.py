"""When a message comes again that could not be worked off.

Left alone, that would be after its queue's visibility timeout, six times as long as the function may run. It comes sooner at
first and later each time: a service that hiccups is asked again within a minute, one that is down for hours is not worn out, and
with the receives that a queue allows (`infra_cdk.constructs.queue_worker`) no message is given up before some four hours.
What will never be understood comes again at once, and so is soon among the dead letters, where it rings.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cached_property
from typing import Any

import msgspec
from botocore.exceptions import BotoCoreError, ClientError

from labelloop import aws

FIRST, LONGEST = 30, 30 * 60  # seconds


class Redelivery:
    """Decides for a function's failed messages. `log(message, **fields)` hears of what fails here."""

    def __init__(self, *, log: Callable[..., None]) -> None:
        self._log = log
        self._urls: dict[str, str] = {}  # by ARN

    @cached_property
    def _sqs(self) -> Any:
        return aws.client("sqs")

    def __call__(self, event: dict[str, Any], answer: dict[str, Any], message: type) -> dict[str, Any]:
        """Put off what a partial batch answer says has failed, and hand the answer on. `message` is what a body should hold.

        When SQS does not do its part, the queue's visibility timeout holds.
        """
        failed = {entry["itemIdentifier"] for entry in answer["batchItemFailures"]}
        try:
            for record in event["Records"]:
                if record["messageId"] in failed:
                    self._put_off(record, message)
        except (BotoCoreError, ClientError) as error:
            self._log("messages come again only after the visibility timeout", reason=str(error))
        return answer

    def _put_off(self, record: dict[str, Any], message: type) -> None:
        self._sqs.change_message_visibility(
            QueueUrl=self._url(record["eventSourceARN"]),
            ReceiptHandle=record["receiptHandle"],
            VisibilityTimeout=_seconds(record, message),
        )

    def _url(self, queue: str) -> str:
        if queue not in self._urls:
            self._urls[queue] = self._sqs.get_queue_url(QueueName=queue.rpartition(":")[2])["QueueUrl"]
        return self._urls[queue]


def delay(receives: int) -> int:
    """Seconds until the next receive, after that many."""
    longest = min(FIRST * 2 ** (receives - 1), LONGEST)
    return round(random.uniform(longest / 2, longest))


def _seconds(record: dict[str, Any], message: type) -> int:
    try:
        msgspec.json.decode(record["body"], type=message)
    except (ValueError, RecursionError):  # no JSON, no text, not of the type; nested too deep
        return 0
    return delay(int(record["attributes"]["ApproximateReceiveCount"]))
