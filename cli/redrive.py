"""What lies in the dead-letter queues, and back into the queues with it: `labelloop redrive`.

Each message is received, sent to its queue, and then deleted, in this order: an interruption can double a message and lose none,
and every consumer takes doubled ones. SQS has an operation for that, StartMessageMoveTask, but it moves whole queues, whatever
model their messages are about, and the laptop's emulator lacks it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import boto3
from botocore.exceptions import BotoCoreError, ClientError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cli.deployment import Deployment
from labelloop.errors import ServiceError
from labelloop.wording import counted

QueueName = Literal["ingest", "retrain", "promote", "refresh", "prelabel"]
QUEUES: tuple[QueueName, ...] = get_args(QueueName)

_BATCH = 10  # SQS's limit
_HELD_SECONDS = 120  # for which a received message is nobody else's; a look is over long before
_WAIT_SECONDS = 1  # asks all of SQS's servers; without it, an empty answer would mean nothing
_MOST = 10_000  # messages of one queue that a run takes
_SHOWN = 100  # characters of a body
_LISTED = 10  # messages of a queue that a person is shown; --json has all


@dataclass(frozen=True)
class DeadLetter:
    """A message that its consumer gave up on. `model`: None where it names none, and so is about all; `age` in seconds."""

    id: str
    model: str | None
    age: float
    body: str


@dataclass(frozen=True)
class DeadLetters:
    """What one dead-letter queue holds of what was asked for. `moved`: into the queue, of them. `others`: about other models."""

    queue: QueueName
    messages: list[DeadLetter] = field(default_factory=list)
    moved: int = 0
    others: int = 0


def look(deployment: Deployment, queues: Sequence[QueueName], model: str | None) -> list[DeadLetters]:
    """What lies in the dead-letter queues, about one model or all. It stays there. Raises `NotSetUpError`, `ServiceError`."""
    return [_Queue(deployment, queue).look(model) for queue in queues]


def redrive(deployment: Deployment, queues: Sequence[QueueName], model: str | None) -> list[DeadLetters]:
    """Put the messages back into their queues. Raises as `look` does, with what was moved; the rest then still lies there."""
    asked = [_Queue(deployment, queue) for queue in queues]
    try:
        return [queue.redrive(model) for queue in asked]
    except ServiceError as error:
        before = ", ".join(f"{len(queue.moved):,} in {queue.name}" for queue in asked if queue.moved)
        raise ServiceError(f"{error}; messages put back before that: {before or 'none'}") from error


class _Queue:
    """A queue with its dead letters."""

    def __init__(self, deployment: Deployment, name: QueueName) -> None:
        self.name: QueueName = name
        self.moved: list[dict[str, Any]] = []
        key = f"{name.capitalize()}Queue"
        self._url, self._dead = deployment.outputs[key], deployment.outputs[f"{key}DeadLetters"]
        self._sqs: Any = boto3.client("sqs")

    def look(self, model: str | None) -> DeadLetters:
        received = []
        with self._errors():
            try:
                for batch in self._received():
                    received += batch
            finally:
                self._release(received)
        ours = [message for message in received if _is_about(message, model)]
        return DeadLetters(self.name, _oldest_first(ours), others=len(received) - len(ours))

    def redrive(self, model: str | None) -> DeadLetters:
        held: list[dict[str, Any]] = []
        with self._errors():
            try:
                for batch in self._received():
                    held += batch
                    self._move([message for message in batch if _is_about(message, model)])
            finally:
                self._release([message for message in held if message not in self.moved])
        return DeadLetters(self.name, _oldest_first(self.moved), len(self.moved), len(held) - len(self.moved))

    def _received(self) -> Iterator[list[dict[str, Any]]]:
        """Batches of the dead letters, each message once, until there are no more."""
        count = 0
        while count < _MOST:
            batch = self._sqs.receive_message(
                QueueUrl=self._dead,
                MaxNumberOfMessages=_BATCH,
                VisibilityTimeout=_HELD_SECONDS,
                WaitTimeSeconds=_WAIT_SECONDS,
                MessageSystemAttributeNames=["SentTimestamp"],
            ).get("Messages", [])
            if not batch:
                return
            count += len(batch)
            yield batch

    def _move(self, messages: list[dict[str, Any]]) -> None:
        if not messages:
            return
        by_id = {str(number): message for number, message in enumerate(messages)}
        entries = [{"Id": number, "MessageBody": message["Body"]} for number, message in by_id.items()]
        sent = self._sqs.send_message_batch(QueueUrl=self._url, Entries=entries)
        arrived = [by_id[one["Id"]] for one in sent.get("Successful", [])]
        if arrived:
            entries = [{"Id": str(at), "ReceiptHandle": one["ReceiptHandle"]} for at, one in enumerate(arrived)]
            self._sqs.delete_message_batch(QueueUrl=self._dead, Entries=entries)
            self.moved += arrived
        if sent.get("Failed"):
            said = sent["Failed"][0].get("Message") or sent["Failed"][0].get("Code")
            raise ServiceError(f"SQS did not take {counted(len(sent['Failed']), 'message')} for the queue {self.name}: {said}")

    def _release(self, messages: list[dict[str, Any]]) -> None:
        """Let others see them again at once."""
        for start in range(0, len(messages), _BATCH):
            some = messages[start : start + _BATCH]
            entries = [{"Id": str(at), "ReceiptHandle": m["ReceiptHandle"], "VisibilityTimeout": 0} for at, m in enumerate(some)]
            self._sqs.change_message_visibility_batch(QueueUrl=self._dead, Entries=entries)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except ClientError as error:
            raise ServiceError(
                f"SQS refused at the queue {self.name}: {error.response['Error'].get('Message', error)}"
            ) from error
        except BotoCoreError as error:
            raise ServiceError(f"SQS does not answer: {error}") from error


def _letter(message: dict[str, Any]) -> DeadLetter:
    sent = int(message.get("Attributes", {}).get("SentTimestamp", 0)) / 1000
    return DeadLetter(
        id=message["MessageId"],
        model=_model(message["Body"]),
        age=round(max(0.0, time.time() - sent), 1),
        body=message["Body"],
    )


def _is_about(message: dict[str, Any], model: str | None) -> bool:
    """Whether a message is about the model: it names it, or, as the schedule's, no model at all."""
    return model is None or _model(message["Body"]) in (model, None)


def _model(body: str) -> str | None:
    """The model that a message names: as a field, or, in an event of S3, in the image's key."""
    try:
        content = json.loads(body)
    except ValueError:
        return None
    match content:
        case {"model": str(name)}:
            return name
        case {"detail": {"object": {"key": str(key)}}} if key.startswith("images/"):
            return key.split("/")[1]
    return None


def _oldest_first(messages: Iterable[dict[str, Any]]) -> list[DeadLetter]:
    return sorted(map(_letter, messages), key=lambda letter: -letter.age)


def parse_queue(name: str) -> QueueName:
    """Raises `ValueError` for what is no queue."""
    if name not in QUEUES:
        raise ValueError(f"{name!r} is no queue; there are: {', '.join(QUEUES)}")
    return name


def show_list(found: Sequence[DeadLetters], console: Console, *, deployment: Deployment) -> None:
    """What lies there, the oldest first."""
    if not any(queue.messages for queue in found):
        _say_nothing(found, console)
        return
    table = Table(box=None, pad_edge=False)
    for column in ("queue", "count", "age", "message"):
        table.add_column(column, justify="right" if column in ("count", "age") else "left", overflow="fold")
    for queue in found:
        for at, letter in enumerate(queue.messages[:_LISTED]):
            first = (queue.queue, f"{len(queue.messages):,}") if at == 0 else ("", "")
            table.add_row(*first, _age(letter.age), escape(_shortened(letter.body)))
        if len(queue.messages) > _LISTED:
            table.add_row("", "", "", f"and {len(queue.messages) - _LISTED:,} more; --json lists them")
    console.print(table)
    following = f"mend what they failed at, which the functions' logs say; then: {deployment.command('redrive')}"
    console.print(following, highlight=False, soft_wrap=True, markup=False)


def show_moved(moved: Sequence[DeadLetters], console: Console) -> None:
    """What was put back."""
    for queue in moved:
        if queue.moved:
            back = counted(queue.moved, "message is", "messages are")
            console.print(f"{back} in the queue {queue.queue} again", highlight=False, soft_wrap=True)
    if not any(queue.moved for queue in moved):
        _say_nothing(moved, console)


def _say_nothing(found: Sequence[DeadLetters], console: Console) -> None:
    others = ", ".join(f"{queue.others:,} in {queue.queue}" for queue in found if queue.others)
    what = (
        f"only messages about other models lie in the dead-letter queues: {others}"
        if others
        else "nothing lies in the dead-letter queues"
    )
    console.print(what, highlight=False, soft_wrap=True)


def _shortened(body: str) -> str:
    text = " ".join(body.split())
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _age(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
