"""`labelloop redrive`: real queues, whose messages go back to where they failed, each at least once."""

from __future__ import annotations

import io
import json
import uuid
from functools import partial
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
from botocore.exceptions import EndpointConnectionError
from rich.console import Console
from typer.testing import CliRunner

from cli import redrive
from cli.deployment import Deployment
from cli.main import app
from cli.redrive import QUEUES, DeadLetters, QueueName
from labelloop.errors import ServiceError

DIGITS, FACES = json.dumps({"model": "digits", "job_name": "j"}), json.dumps({"model": "faces", "version": 1})
EVERY = json.dumps({"action": "SCHEDULE"})
UPLOAD = json.dumps({"detail": {"object": {"key": "images/digits/a/b.png"}}})


@pytest.fixture
def sqs(aws: str) -> Any:
    return boto3.client("sqs")


@pytest.fixture
def deployment(sqs: Any, monkeypatch: pytest.MonkeyPatch) -> Deployment:
    """A stage with empty queues."""
    stage = Deployment("dev")
    names = [f"{queue.capitalize()}Queue{kind}" for queue in QUEUES for kind in ("", "DeadLetters")]
    prefix = uuid.uuid4().hex
    vars(stage)["outputs"] = {name: sqs.create_queue(QueueName=f"{prefix}-{name}")["QueueUrl"] for name in names}
    monkeypatch.setattr("cli.deployment.Deployment.find", lambda *_: stage)
    monkeypatch.setattr("cli.redrive._WAIT_SECONDS", 0)  # the emulator is one server
    return stage


def put(deployment: Deployment, queue: QueueName, *bodies: str) -> None:
    for body in bodies:
        url = deployment.outputs[f"{queue.capitalize()}QueueDeadLetters"]
        boto3.client("sqs").send_message(QueueUrl=url, MessageBody=body)


def lying(deployment: Deployment, queue: QueueName, kind: str = "") -> list[str]:
    """The messages of a queue, or with `DeadLetters` its dead ones, that anybody can receive now."""
    url = deployment.outputs[f"{queue.capitalize()}Queue{kind}"]
    found: list[str] = []
    while (
        batch := boto3.client("sqs").receive_message(QueueUrl=url, MaxNumberOfMessages=10, VisibilityTimeout=600).get("Messages")
    ):
        found += [message["Body"] for message in batch]
    return sorted(found)


def said(show: Any, found: list[DeadLetters]) -> str:
    file = io.StringIO()
    show(found, Console(file=file, width=160))
    return file.getvalue()


def test_every_message_goes_back_into_its_own_queue(deployment: Deployment) -> None:
    put(deployment, "promote", DIGITS, FACES)
    put(deployment, "ingest", *[f'{UPLOAD[:-1]}, "n": {n}}}' for n in range(23)])
    moved = redrive.redrive(deployment, QUEUES, None)
    assert {queue.queue: queue.moved for queue in moved if queue.moved} == {"promote": 2, "ingest": 23}
    assert lying(deployment, "promote") == sorted([DIGITS, FACES])
    assert len(set(lying(deployment, "ingest"))) == 23
    assert lying(deployment, "promote", "DeadLetters") == lying(deployment, "ingest", "DeadLetters") == []
    assert "23 messages are in the queue ingest again" in said(redrive.show_moved, moved)
    again = redrive.redrive(deployment, QUEUES, None)
    assert said(redrive.show_moved, again).strip() == "nothing lies in the dead-letter queues"


def test_one_models_messages_go_and_those_about_all_and_no_others(deployment: Deployment) -> None:
    put(deployment, "retrain", DIGITS, FACES, EVERY, "no json")
    put(deployment, "ingest", UPLOAD, UPLOAD.replace("digits", "faces"))
    redrive.redrive(deployment, QUEUES, "digits")
    assert lying(deployment, "retrain") == sorted([DIGITS, EVERY, "no json"])
    assert lying(deployment, "retrain", "DeadLetters") == [FACES]
    assert lying(deployment, "ingest") == [UPLOAD]


def test_what_lies_there_of_other_models_is_counted(deployment: Deployment) -> None:
    put(deployment, "retrain", FACES, FACES)
    put(deployment, "ingest", UPLOAD.replace("digits", "faces"))
    for show, found in (
        (partial(redrive.show_list, deployment=deployment), redrive.look(deployment, QUEUES, "digits")),
        (redrive.show_moved, redrive.redrive(deployment, QUEUES, "digits")),
    ):
        assert {queue.queue: queue.others for queue in found if queue.others} == {"ingest": 1, "retrain": 2}
        assert (
            said(show, found).strip()
            == "only messages about other models lie in the dead-letter queues: 1 in ingest, 2 in retrain"
        )
    put(deployment, "retrain", DIGITS)
    assert [(queue.moved, queue.others) for queue in redrive.redrive(deployment, ["retrain"], "digits")] == [(1, 2)]


def test_one_queue_can_be_named(deployment: Deployment) -> None:
    put(deployment, "retrain", EVERY)
    put(deployment, "promote", DIGITS)
    done = CliRunner().invoke(app, ["redrive", "--queue", "promote", "--json"])
    assert done.exit_code == 0, done.output
    (queue,) = json.loads(done.stdout)["queues"]
    assert (queue["queue"], queue["moved"], queue["messages"][0]["model"]) == ("promote", 1, "digits")
    assert lying(deployment, "retrain") == []


def test_a_list_shows_what_lies_there_and_leaves_it(deployment: Deployment) -> None:
    put(deployment, "refresh", FACES, *[f"[red]{n}[/red] {'x' * 200}" for n in range(14)])
    for _ in range(2):
        done = CliRunner().invoke(app, ["redrive", "--list"], env={"COLUMNS": "200"})
        assert done.exit_code == 0, done.output
        assert "refresh" in done.stdout
        assert " 15 " in done.stdout
        assert "and 5 more; --json lists them" in done.stdout
        assert "[red]" in done.stdout
        assert "x" * 101 not in done.stdout
    assert len(lying(deployment, "refresh", "DeadLetters")) == 15
    assert lying(deployment, "refresh") == []


def test_ages_are_said_as_people_say_them() -> None:
    letters = [redrive.DeadLetter(str(age), None, age, "body") for age in (5.0, 125.0, 7_300.0, 200_000.0)]
    text = said(partial(redrive.show_list, deployment=Deployment("dev")), [DeadLetters("ingest", letters)])
    assert [age for age in ("5 s", "2 min", "2 h", "2 d") if age in text] == ["5 s", "2 min", "2 h", "2 d"]
    assert "then: labelloop redrive --stage dev" in text


class Lossy:
    """SQS that takes every second message of a batch for `promote`, or breaks when it has taken all."""

    def __init__(self, real: Any, *, breaks: bool) -> None:
        self._real, self._breaks = real, breaks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def send_message_batch(self, *, QueueUrl: str, Entries: list[dict[str, str]]) -> dict[str, Any]:
        if "PromoteQueue" not in QueueUrl:
            return dict(self._real.send_message_batch(QueueUrl=QueueUrl, Entries=Entries))
        if self._breaks:
            self._real.send_message_batch(QueueUrl=QueueUrl, Entries=Entries)
            raise EndpointConnectionError(endpoint_url=QueueUrl)
        sent = self._real.send_message_batch(QueueUrl=QueueUrl, Entries=Entries[::2])
        return {**sent, "Failed": [{"Id": entry["Id"], "Message": "too much"} for entry in Entries[1::2]]}


@pytest.mark.parametrize(
    ("breaks", "message", "arrived"),
    [
        (False, "SQS did not take 2 messages for the queue promote: too much; .* before that: 1 in ingest, 2 in promote", 2),
        (True, "SQS does not answer: .* before that: 1 in ingest$", 4),
    ],
)
def test_no_message_is_lost(
    deployment: Deployment, sqs: Any, monkeypatch: pytest.MonkeyPatch, breaks: bool, message: str, arrived: int
) -> None:
    bodies = {json.dumps({"model": "digits", "n": n}) for n in range(4)}
    put(deployment, "promote", *bodies)
    put(deployment, "ingest", UPLOAD)
    with monkeypatch.context() as patch:
        patch.setattr("cli.redrive.boto3", SimpleNamespace(client=lambda _: Lossy(sqs, breaks=breaks)))
        with pytest.raises(ServiceError, match=message):
            redrive.redrive(deployment, QUEUES, None)
    there = lying(deployment, "promote")
    assert len(there) == arrived
    redrive.redrive(deployment, QUEUES, None)
    assert {*there, *lying(deployment, "promote")} == bodies
    assert lying(deployment, "promote", "DeadLetters") == []
