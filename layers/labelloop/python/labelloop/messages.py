"""The loop's messages: the event that tells of a verdict, ranges of tasks for `prelabel`, and when what failed comes again.

Left alone, a message that could not be worked off would come again after its queue's visibility timeout, six times as long as
the function may run. It comes sooner at first and later each time: a service that hiccups is asked again within a minute, one
that is down for hours is not worn out, and with the receives that a queue allows (`infra_cdk.constructs.queue_worker`) no message
is given up before some four hours. What will never be understood comes again at once, and so is soon among the dead letters,
where it rings.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from datetime import timedelta
from functools import cached_property
from itertools import batched
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from botocore.exceptions import BotoCoreError, ClientError

from labelloop import aws
from labelloop.errors import LabelloopError, ServiceError, UnknownModelError
from labelloop.log import Log
from labelloop.records import PromoteSignal, Promotion, TaskRange, VersionJudged

if TYPE_CHECKING:
    from labelloop.label_studio.client import LabelStudioClient

RANGE = 100  # tasks
FIRST, LONGEST = 30, 30 * 60  # seconds until a failed message comes again


def announce(events: Any, bus: str, what: Literal["ModelPromoted", "ModelKept"], detail: Promotion | VersionJudged) -> None:
    """Put an event on the bus, with boto3's client of EventBridge. Raises `ServiceError`."""
    entry = {
        "EventBusName": bus,
        "Source": "labelloop",
        "DetailType": what,
        "Detail": msgspec.json.encode(detail).decode(),
    }
    try:
        answer = events.put_events(Entries=[entry])
    except (ClientError, BotoCoreError) as error:
        raise ServiceError(f"EventBridge does not take the event: {error}") from error
    if answer["FailedEntryCount"]:
        raise ServiceError(f"EventBridge refused the event: {answer['Entries'][0].get('ErrorMessage')}")


class PrelabelQueue:
    """The queue of ranges of tasks to predict, at a URL; `client` is boto3's of SQS."""

    def __init__(self, url: str, client: Any) -> None:
        self._url, self._client = url, client

    def send(self, ranges: Iterable[TaskRange], *, delay: timedelta = timedelta()) -> int:
        """Send ranges, at most a quarter of an hour late; how many. Raises `ServiceError`."""
        sent = 0
        for tasks in ranges:
            body = msgspec.json.encode(tasks).decode()
            try:
                self._client.send_message(QueueUrl=self._url, MessageBody=body, DelaySeconds=int(delay.total_seconds()))
            except (BotoCoreError, ClientError) as error:
                raise ServiceError(f"the prelabel queue takes no message: {error}") from error
            sent += 1
        return sent


def asked_ranges(model: str, tasks: Sequence[int]) -> Iterator[TaskRange]:
    """Tasks that somebody asked predictions of, by id, `RANGE` in each."""
    for some in batched(sorted(set(tasks)), RANGE, strict=False):
        yield TaskRange(model=model, after=some[0] - 1, upto=some[-1], asked=list(some))


def unlabelled_ranges(model: str, label_studio: LabelStudioClient, project: int) -> Iterator[TaskRange]:
    """All unlabelled tasks of a project, by id, in ranges of `RANGE`; a page of ids at a time is kept."""
    last = 0
    while ids := label_studio.unlabelled_ids(project, last):
        for some in batched(ids, RANGE, strict=False):
            yield TaskRange(model=model, after=last, upto=some[-1])
            last = some[-1]


class Redelivery:
    """Decides for a function's failed messages. `log(message, **fields)` hears of what fails here."""

    def __init__(self, *, log: Callable[..., None]) -> None:
        self._log = log
        self._urls: dict[str, str] = {}  # by ARN

    @cached_property
    def _sqs(self) -> Any:
        return aws.client("sqs")

    def __call__(self, event: dict[str, Any], failed: Set[str], unreadable: Set[str]) -> dict[str, Any]:
        """The answer to Lambda by which of a batch these messages come again: `failed` ones later, `unreadable` ones at once.

        When SQS does not do its part, the queue's visibility timeout holds.
        """
        try:
            for record in event["Records"]:
                if record["messageId"] in failed:
                    self._put_off(record, delay(int(record["attributes"]["ApproximateReceiveCount"])))
                elif record["messageId"] in unreadable:
                    self._put_off(record, 0)
        except (BotoCoreError, ClientError) as error:
            self._log("messages come again only after the visibility timeout", reason=str(error))
        return {"batchItemFailures": [{"itemIdentifier": message} for message in sorted(failed | unreadable)]}

    def _put_off(self, record: dict[str, Any], seconds: int) -> None:
        self._sqs.change_message_visibility(
            QueueUrl=self._url(record["eventSourceARN"]), ReceiptHandle=record["receiptHandle"], VisibilityTimeout=seconds
        )

    def _url(self, queue: str) -> str:
        if queue not in self._urls:
            self._urls[queue] = self._sqs.get_queue_url(QueueName=queue.rpartition(":")[2])["QueueUrl"]
        return self._urls[queue]


def delay(receives: int) -> int:
    """Seconds until the next receive, after that many."""
    longest = min(FIRST * 2 ** (receives - 1), LONGEST)
    return round(random.uniform(longest / 2, longest))


def work_off[Message: PromoteSignal | VersionJudged | TaskRange](
    event: dict[str, Any], kind: type[Message], take: Callable[[Message], None], *, log: Log, redelivery: Redelivery
) -> dict[str, Any]:
    """Take each message of a queue's batch; the answer to Lambda, by which those that failed, and no others, come again.

    The log says of each why: in words where it is an error of ours to expect, else with the traceback. What belongs to a model
    that there is no more is dropped.
    """
    failed, unreadable = set[str](), set[str]()
    for record in event["Records"]:
        try:
            message = msgspec.json.decode(record["body"], type=kind)
        except (ValueError, RecursionError):  # no JSON, no text, not of the type; nested too deep
            log.exception("failed", model=None, message_id=record["messageId"])
            unreadable.add(record["messageId"])
            continue
        try:
            take(message)
        except UnknownModelError as error:
            log.warning("refused", model=message.model, reason=str(error))
        except LabelloopError as error:
            log.error("comes again", model=message.model, reason=str(error), error=type(error).__name__)
            failed.add(record["messageId"])
        except Exception:  # a fault of ours; the others have nothing to do with it
            log.exception("failed", model=message.model, message_id=record["messageId"])
            failed.add(record["messageId"])
    return redelivery(event, failed, unreadable)
