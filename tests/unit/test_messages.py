"""When failed messages come again, on a real queue."""

from __future__ import annotations

import json
import time
import uuid
from types import SimpleNamespace
from typing import Any, cast

import boto3
import msgspec
import pytest

from labelloop.log import Log
from labelloop.messages import FIRST, LONGEST, Redelivery, delay, work_off
from labelloop.records import PromoteSignal
from tests.examples import sqs_event

GOOD = json.dumps({"model": "digits", "job_name": "job"})


class Queue:
    """A queue with a visibility timeout of an hour, and the function's side of it."""

    def __init__(self) -> None:
        self.name = f"test-{uuid.uuid4().hex}"
        self.sqs: Any = boto3.client("sqs")
        self.url = self.sqs.create_queue(QueueName=self.name, Attributes={"VisibilityTimeout": "3600"})["QueueUrl"]
        self.logged: list[str] = []

    def receive(self, seconds: int = 0) -> list[dict[str, Any]]:
        answer = self.sqs.receive_message(QueueUrl=self.url, MaxNumberOfMessages=10, WaitTimeSeconds=seconds)
        return list(answer.get("Messages", []))

    def fail(self, *bodies: str) -> None:
        """Receive these messages, and fail with all of them; what has no brace is unreadable."""
        for body in bodies:
            self.sqs.send_message(QueueUrl=self.url, MessageBody=body)
        event = sqs_event(*bodies)
        by_body = {message["Body"]: message["ReceiptHandle"] for message in self.receive()}
        for record in event["Records"]:
            record["eventSourceARN"] = f"arn:aws:sqs:us-east-1:000000000000:{self.name}"
            record["receiptHandle"] = by_body[record["body"]]
            record["attributes"]["ApproximateReceiveCount"] = "1"
        readable = {record["messageId"] for record in event["Records"] if "{" in record["body"]}
        every = {record["messageId"] for record in event["Records"]}
        redelivery = Redelivery(log=lambda message, **_: self.logged.append(message))
        answer = redelivery(event, readable, every - readable)
        assert {entry["itemIdentifier"] for entry in answer["batchItemFailures"]} == every


@pytest.fixture
def queue(aws: str) -> Queue:
    return Queue()


def test_what_is_no_message_comes_again_at_once_and_what_is_one_does_not(queue: Queue) -> None:
    queue.fail("no json", GOOD, "none either")
    assert {message["Body"] for message in queue.receive()} == {"no json", "none either"}


@pytest.mark.parametrize("body", ["no json", '{"model": 3}', "[" * 100_000])
def test_what_is_no_message_is_decoded_once(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []

    def decode(given: Any, **more: Any) -> Any:
        decoded.append(given)
        return msgspec.json.decode(given, **more)

    monkeypatch.setattr("labelloop.messages.msgspec", SimpleNamespace(json=SimpleNamespace(decode=decode)))
    given = []

    def redelivery(_event: Any, failed: set[str], unreadable: set[str]) -> dict[str, Any]:
        given.append((failed, unreadable))
        return {}

    work_off(sqs_event(body), PromoteSignal, lambda _: pytest.fail("it was taken"), log=Log(), redelivery=cast(Any, redelivery))
    assert (decoded, given) == ([body], [(set(), {"m0"})])


def test_what_failed_comes_sooner_than_after_the_visibility_timeout(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("labelloop.messages.FIRST", 2)
    queue.fail(GOOD)
    began = time.monotonic()
    while not (found := queue.receive(seconds=1)):
        assert time.monotonic() < began + 60
    assert [message["Body"] for message in found] == [GOOD]


def test_it_waits_longer_each_time_up_to_half_an_hour() -> None:
    for receives in range(1, 30):
        longest = min(FIRST * 2 ** (receives - 1), LONGEST)
        assert longest // 2 <= delay(receives) <= longest
    assert len({delay(20) for _ in range(50)}) > 1, "messages that failed together do not come again together"


def test_without_failures_sqs_is_not_asked() -> None:
    answer = Redelivery(log=pytest.fail)(sqs_event(GOOD), set(), set())  # no emulator: AWS is a closed port
    assert answer == {"batchItemFailures": []}


def test_a_queue_that_does_not_answer_is_said_and_changes_nothing(queue: Queue) -> None:
    queue.name = "gone"
    queue.fail(GOOD)
    assert queue.logged == ["messages come again only after the visibility timeout"]
