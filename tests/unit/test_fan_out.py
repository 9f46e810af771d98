"""Large requests over parallel invocations: every task is answered or queued, in order, by one version, within the time."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Event, Lock
from typing import Any, cast

import msgspec
import numpy as np
import pytest
from botocore.exceptions import EndpointConnectionError, ReadTimeoutError

from labelloop import fan_out, predict
from labelloop.active_learning import Place
from labelloop.artifacts import Champions
from labelloop.errors import ImageError, LabelloopError, LateError, ServiceError, StorageError
from labelloop.fan_out import FanOut
from labelloop.label_studio.payloads import PredictTask
from labelloop.messages import RANGE, PrelabelQueue
from labelloop.predict import LAST_IMAGE, PART, QUEUED, Part, PartPredictor, Predicted, Predictor, TaskPredictor
from labelloop.records import Champion, TaskRange
from tests import examples
from tests.fake_aws import refusal

SECONDS = 29.0
QUEUED_ENTRY = msgspec.to_builtins(QUEUED)

Invoke = Callable[[Part], Any]
NOWHERE = np.zeros(1, np.float32)  # an embedding


@dataclass
class Model:
    """A task predictor: the score of a task is its id's thousandth. `answers`: other than that, by id."""

    answers: dict[int, LabelloopError] = field(default_factory=dict)
    versions: list[int] = field(default_factory=list)
    boxes: int = 1

    def predict(
        self, champion: Champion, tasks: Sequence[PredictTask], context: Any = None, *, until: float
    ) -> list[Predicted | LabelloopError]:
        self.versions.append(champion.version)
        late = LateError("late")
        found = [self.answers.get(task.id) or self._predicted(task.id) for task in tasks]
        return [late if time.monotonic() >= until else one for one in found]

    def _predicted(self, number: Any) -> Predicted:
        result = [{"type": "choices", "value": {"choices": ["ü"]}}] * self.boxes
        return Predicted([], result, 0.5, Place(number / 1000 if isinstance(number, int) else 0.5, None), NOWHERE)


@dataclass
class Lambda:
    """boto3's client of Lambda; `meanwhile(part)` may wait, fail, or give another payload than the part's own."""

    model: Model
    meanwhile: Invoke = lambda _: None
    parts: list[Part] = field(default_factory=list)
    lock: Any = field(default_factory=Lock)

    def invoke(self, *, FunctionName: str, Payload: bytes) -> dict[str, Any]:
        assert FunctionName == "part"
        part = msgspec.json.decode(Payload, type=Part)
        with self.lock:
            self.parts.append(part)
        other = self.meanwhile(part)
        if other is not None:
            return dict(other)
        entries = PartPredictor(cast(TaskPredictor, self.model), log=lambda *_, **__: None)(part)
        return {"StatusCode": 200, "Payload": io.BytesIO(json.dumps({"results": msgspec.to_builtins(entries)}).encode())}


@dataclass
class Queue:
    """boto3's client of SQS; the ids that were sent."""

    sent: list[TaskRange] = field(default_factory=list)
    refuses: bool = False

    def send_message(self, *, QueueUrl: str, MessageBody: str, DelaySeconds: int) -> None:
        if self.refuses:
            raise refusal("SendMessage", "ServiceUnavailable")
        self.sent.append(msgspec.json.decode(MessageBody, type=TaskRange))

    @property
    def ids(self) -> list[int]:
        return [number for message in self.sent for number in message.asked or []]


@dataclass
class Service:
    """Predict with fakes behind it."""

    model: Model = field(default_factory=Model)
    queue: Queue = field(default_factory=Queue)
    logged: list[Any] = field(default_factory=list)
    body: bytes = b""  # of the last answer

    def __post_init__(self) -> None:
        self.functions = Lambda(self.model)
        self.champion = examples.champion(7, b"onnx")

    def read(self, model: str) -> Champion:
        return self.champion

    def log(self, message: str, **fields: Any) -> None:
        self.logged.append((message, fields))

    def ask(self, ids: Sequence[Any], *, seconds: float = SECONDS, **body: Any) -> list[Any]:
        """The entries of predict's answer, as Label Studio reads them."""
        fan = FanOut("part", self.functions, PrelabelQueue("url", self.queue), log=self.log)
        tasks = cast(TaskPredictor, self.model)
        predictor = Predictor(examples.CONFIGS, cast(Champions, self), tasks, lambda: fan, log=self.log)
        request = {"tasks": [{"id": number, "data": {}} for number in ids], **body}
        self.body = msgspec.json.encode(predictor.predict("digits", json.dumps(request).encode(), seconds=seconds))
        answer = json.loads(self.body)
        assert answer["model_version"] == "digits v7"
        assert len(answer["results"]) == len(ids)
        return list(answer["results"])


@pytest.fixture
def service() -> Service:
    return Service()


def scores(entries: Sequence[Any]) -> list[int | None]:
    """The id that each prediction was made for; None of a queued task."""
    return [None if entry == QUEUED_ENTRY else round(entry["score"] * 1000) for entry in entries]


def first_of(part: Part) -> Any:
    return part.tasks[0].id


def test_parts_are_answered_as_one_in_order(service: Service) -> None:
    ids = list(range(4 * PART + 1, 0, -1))
    assert scores(service.ask(ids)) == ids
    sizes = sorted(len(part.tasks) for part in service.functions.parts)
    assert len(sizes) == 5
    assert sizes[-1] - sizes[0] <= 4, "of one size, so that none is waited for alone"
    assert service.queue.sent == []


def test_parts_end_early_enough_for_what_they_have_to_be_answered(service: Service) -> None:
    service.ask(range(2 * PART))
    at_most = time.time() + SECONDS - predict._TO_ANSWER - LAST_IMAGE
    assert all(part.until <= at_most for part in service.functions.parts)
    assert len(service.functions.parts) == 2


def test_what_one_invocation_can_do_is_split_and_queued_nowhere(service: Service) -> None:
    ids = list(range(PART))
    assert scores(service.ask(ids)) == ids
    assert service.functions.parts == []


def test_one_answer_holds_one_version_whatever_is_promoted_meanwhile(service: Service) -> None:
    def promote(_: Part) -> None:
        service.champion = examples.champion(8, b"newer")

    service.functions.meanwhile = promote
    entries = service.ask(range(3 * PART))
    assert {entry["model_version"] for entry in entries} == {"digits v7"}
    assert {(part.champion.version, part.champion.sha256) for part in service.functions.parts} == {
        (7, examples.champion(7, b"onnx").sha256)
    }


def test_a_part_that_lambda_has_no_room_for_is_sent_again(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fan_out, "_SHORTEST", 0.001)
    refused: set[Any] = set()

    def once(part: Part) -> None:
        if first_of(part) not in refused:
            refused.add(first_of(part))
            raise refusal("Invoke", "TooManyRequestsException")

    service.functions.meanwhile = once
    ids = list(range(3 * PART))
    assert scores(service.ask(ids)) == ids
    assert len(service.functions.parts) == 6


def test_where_there_is_no_room_until_the_end_a_part_is_queued(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "_TO_ANSWER", 0.0)

    def full(part: Part) -> None:
        if first_of(part) == PART:
            raise refusal("Invoke", "TooManyRequestsException")

    service.functions.meanwhile = full
    ids = list(range(3 * PART))
    found = scores(service.ask(ids, seconds=LAST_IMAGE + 0.5))
    assert found == [None if PART <= number < 2 * PART else number for number in ids]
    assert service.queue.ids == list(range(PART, 2 * PART))


def dead(part: Part) -> Any:
    return {"FunctionError": "Unhandled", "Payload": io.BytesIO(b'{"errorMessage": "out of memory"}')}


def no_json(part: Part) -> Any:
    return {"Payload": io.BytesIO(b"{")}


def too_few(part: Part) -> Any:
    return {"Payload": io.BytesIO(b'{"results": [null]}')}


def denied(part: Part) -> Any:
    raise refusal("Invoke", "AccessDeniedException")


def unreachable(part: Part) -> Any:
    raise EndpointConnectionError(endpoint_url="http://lambda")


def silent(part: Part) -> Any:
    raise ReadTimeoutError(endpoint_url="http://lambda")


@pytest.mark.parametrize("failure", [dead, no_json, too_few, denied, unreachable, silent])
def test_a_part_that_fails_is_queued_and_fails_no_other(service: Service, failure: Invoke) -> None:
    service.functions.meanwhile = lambda part: failure(part) if first_of(part) == 0 else None
    ids = list(range(3 * PART))
    assert scores(service.ask(ids)) == [None] * PART + ids[PART:]
    assert service.queue.ids == list(range(PART))
    assert len(service.functions.parts) == 3, "nothing is sent twice that may have been done"
    assert "a part failed" in [message for message, _ in service.logged]


def test_a_part_that_does_not_answer_in_time_is_queued(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "_TO_ANSWER", 0.0)
    over = Event()
    service.functions.meanwhile = lambda part: over.wait(60) and None if first_of(part) == 0 else None
    try:
        found = scores(service.ask(range(2 * PART), seconds=LAST_IMAGE + 1.5))
        assert found == [None] * PART + list(range(PART, 2 * PART))
        assert service.queue.ids == list(range(PART))
    finally:
        over.set()


def test_when_there_is_no_time_at_all_everything_is_queued(service: Service) -> None:
    ids = list(range(1, 3 * PART + 1))
    assert scores(service.ask(ids, seconds=1)) == [None] * len(ids)
    assert service.functions.parts == []
    assert service.queue.ids == ids
    assert max(len(message.asked or []) for message in service.queue.sent) == RANGE
    assert {(message.after, message.upto) for message in service.queue.sent} == {(0, 100), (100, 150)}


def test_a_small_request_that_is_late_is_queued_as_well(service: Service) -> None:
    assert scores(service.ask([1, 2], seconds=1)) == [None, None]
    assert service.queue.ids == [1, 2]
    assert service.functions.parts == []


def test_what_a_part_had_no_time_for_or_could_not_fetch_is_queued_and_what_is_wrong_says_so(service: Service) -> None:
    service.model.answers = {1: LateError("late"), 2: StorageError("S3 is away"), 3: ImageError("is broken")}
    entries = service.ask(range(2 * PART))
    assert [number for number, entry in enumerate(entries) if entry == QUEUED_ENTRY] == service.queue.ids == [1, 2]
    assert entries[3] == {"error": "is broken"}


def test_an_answer_that_would_be_too_large_for_lambda_is_cut_and_the_rest_queued(service: Service) -> None:
    service.model.boxes = 1_000
    ids = list(range(3 * PART))
    entries = service.ask(ids)
    answered = [number for number in scores(entries) if number is not None]
    assert 0 < len(answered) < len(ids)
    assert service.queue.ids == [number for number in ids if number not in answered]
    size = len(json.dumps(service.body.decode(), ensure_ascii=False).encode())
    assert 5.5 * 2**20 < size < 6 * 2**20, "as JSON in JSON"


def test_a_queue_that_takes_nothing_fails_the_request(service: Service) -> None:
    service.queue.refuses = True
    with pytest.raises(ServiceError, match="prelabel queue takes no message"):
        service.ask(range(2 * PART), seconds=1)


def test_tasks_without_an_id_cannot_be_queued_and_are_told(service: Service) -> None:
    entries = service.ask([None, "7", True, 4], seconds=1)
    assert [("without an id" in entry["error"]) for entry in entries] == [True, True, True, False]
    assert service.queue.ids == [4]


def test_interactive_mode_is_neither_split_nor_queued(service: Service) -> None:
    entries = service.ask(range(PART + 1), seconds=0, params={"context": {"result": [1]}})
    assert scores(entries) == list(range(PART + 1))
    assert service.functions.parts == []
