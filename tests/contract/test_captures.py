"""Every request that a real Label Studio sent is answered: the ML backend's by `predict`, the webhooks' by `retrain`."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from labelloop.retrain import ASKED, Outcome
from tests import examples
from tests.contract.conftest import Backend

CAPTURES = {file.stem: json.loads(file.read_text()) for file in sorted((Path(__file__).parent / "captures").glob("*.json"))}


def route(capture: dict[str, Any]) -> str:
    """The part of the path that comes after the backend's address."""
    return str(capture["path"]).rpartition("/")[2]


BACKEND = {name: capture for name, capture in CAPTURES.items() if name.startswith("ml_")}
PREDICT = {name: capture for name, capture in BACKEND.items() if route(capture) == "predict"}
WEBHOOKS = {name: capture for name, capture in CAPTURES.items() if name.startswith("wh_") or route(capture) == "webhook"}


def test_every_capture_is_replayed() -> None:
    answered = {"predict", "setup", "versions", "health"}
    assert len(CAPTURES) >= 20
    assert CAPTURES.keys() == {name for name, capture in BACKEND.items() if route(capture) in answered} | WEBHOOKS.keys()
    assert PREDICT


@pytest.mark.parametrize("name", PREDICT)
def test_predict(backend: Backend, name: str) -> None:
    """With our label config and images; the rest of the body is what Label Studio sent."""
    body = json.loads(json.dumps(PREDICT[name]["body"]))
    body["label_config"] = examples.TEMPLATE
    digits = [number % 10 for number in range(len(body["tasks"]))]
    for digit, task in zip(digits, body["tasks"], strict=True):
        task["data"]["image"] = backend.put_image(f"{name}-{task['id']}.png", examples.png(digit))
    status, answer = backend.ask("POST", "predict", body)
    assert status == 200
    assert answer["model_version"] == "digits v1"
    assert [result["result"][0]["value"]["choices"] for result in answer["results"]] == [[str(digit)] for digit in digits]
    for result in answer["results"]:
        assert (result["result"][0]["from_name"], result["result"][0]["to_name"]) == ("digit", "image")
        assert result["result"][0]["type"] == "choices"
        assert result["model_version"] == "digits v1"
        assert 0 <= result["score"] <= 1


@pytest.mark.parametrize("name", PREDICT)
def test_predict_as_it_came_with_images_from_elsewhere(backend: Backend, name: str) -> None:
    status, answer = backend.ask("POST", "predict", PREDICT[name]["body"])
    assert status == 200
    assert len(answer["results"]) == len(PREDICT[name]["body"]["tasks"])
    assert all(result.keys() == {"error"} for result in answer["results"])
    assert backend.label_studio.requests == [], "nobody else's address is asked"


@pytest.mark.parametrize("name", [name for name, capture in BACKEND.items() if route(capture) == "setup"])
def test_setup(backend: Backend, name: str) -> None:
    assert backend.ask("POST", "setup", BACKEND[name]["body"]) == (200, {"model_version": "digits v1"})
    body = {**BACKEND[name]["body"], "schema": examples.TEMPLATE}
    assert backend.ask("POST", "setup", body) == (200, {"model_version": "digits v1"})


@pytest.mark.parametrize("name", [name for name, capture in BACKEND.items() if route(capture) == "versions"])
def test_versions(backend: Backend, name: str) -> None:
    assert BACKEND[name]["method"] == "GET"
    status, answer = backend.ask("GET", "versions", BACKEND[name]["body"])
    assert (status, answer["versions"]) == (200, ["digits v1"])


@pytest.mark.parametrize("name", [name for name, capture in BACKEND.items() if route(capture) == "health"])
def test_health_asks_for_nothing_that_a_constant_answer_lacks(name: str) -> None:
    """The mock integration itself is tested with the stacks."""
    assert (BACKEND[name]["method"], BACKEND[name]["query"], BACKEND[name]["body"]) == ("GET", "", None)


class Reconciler:
    """Writes down what it is asked to reconcile."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, bool]] = []
        self.answered: list[str] = []

    def has_answered(self, model: str, request: str) -> bool:
        return request in self.answered

    def answer(self, model: str, request: str, outcome: Outcome) -> None:
        self.answered.append(request)

    def reconcile(self, model: str, *, asked: bool = False) -> Outcome:
        self.asked.append((model, asked))
        return Outcome(None, "nothing to do")


def through_the_front_door(model: str, body: dict[str, Any]) -> dict[str, Any]:
    """What the webhook route puts into the queue: the model of the path and the action of the body, nothing else."""
    return {"model": model, "action": body["action"]}


@pytest.mark.parametrize("name", WEBHOOKS)
def test_a_webhook_makes_its_model_reconciled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    handler = examples.load_handler("retrain")
    reconciler = Reconciler()
    monkeypatch.setattr(handler, "reconciler", lambda: reconciler)
    body = WEBHOOKS[name]["body"]
    message = through_the_front_door("digits", body)
    answer = handler.handler(examples.sqs_event(message), examples.LambdaContext())
    assert answer == {"batchItemFailures": []}
    assert reconciler.asked == [("digits", body["action"] == ASKED)]
    assert reconciler.answered == (["m0"] if body["action"] == ASKED else [])
    assert len(json.dumps(message)) < 262_144, "a queue message holds 256 KB"


def test_start_training_is_among_the_webhooks() -> None:
    found = SimpleNamespace(**{capture["body"]["action"]: name for name, capture in WEBHOOKS.items()})
    assert found.START_TRAINING == "ml_train_START_TRAINING"
    assert found.ANNOTATION_CREATED
