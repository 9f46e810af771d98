"""Rolling back and promoting by hand: real storage and ledger, an MLflow and an event bus that write down what they are told."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from rich.console import Console

from cli import takeover
from cli.deployment import Deployment
from cli.takeover import Outcome, promote, rollback
from labelloop import artifacts
from labelloop.artifacts import Bucket
from labelloop.errors import ConflictError, ModelError, RegistryError, RequestError, ServiceError
from labelloop.ledger import Ledger
from labelloop.promotion import Promoter
from labelloop.registry import Registry
from tests import examples
from tests.recording_server import Answer, RecordingServer, serving


@dataclass
class EventBus:
    """boto3's client of EventBridge, as far as it is used."""

    entries: list[dict[str, Any]] = field(default_factory=list)
    failed: int = 0

    def put_events(self, *, Entries: list[dict[str, Any]]) -> dict[str, Any]:
        self.entries += Entries
        return {"FailedEntryCount": self.failed, "Entries": [{"ErrorMessage": "no such bus"}]}

    @property
    def announced(self) -> list[tuple[str, int]]:
        return [(entry["DetailType"], json.loads(entry["Detail"])["version"]) for entry in self.entries]


@dataclass
class Stage:
    """A deployed stage with three versions of `digits`, each promoted by the gate after the one before."""

    deployment: Deployment
    mlflow: RecordingServer
    events: EventBus = field(default_factory=EventBus)

    def train(self, version: int, accuracy: float, against: int | None) -> None:
        champion = examples.scores(against, accuracy - 0.02) if against else None
        onnx, job = f"onnx {version}".encode(), f"job-{version}"
        report = examples.evaluation(version, accuracy, champion=champion, job_name=job, onnx_file=onnx)
        archive = examples.model_archive(report, onnx)
        self.deployment.artifacts.put(artifacts.training_archive_key("digits", job), archive)
        registry = Registry(self.mlflow.url)
        Promoter(self.deployment.artifacts, self.deployment.ledger, registry, lambda _: None, log=print).decide("digits", job)

    def rollback(self, to: int | None = None, reason: str | None = None) -> Outcome:
        return rollback(self.deployment, "digits", to, reason, self.events)

    def promote(self, version: int, reason: str = "because") -> Outcome:
        return promote(self.deployment, "digits", version, reason, self.events)

    @property
    def serves(self) -> int:
        champion = self.deployment.champions.read("digits")
        assert champion is not None
        return champion.version

    @property
    def log(self) -> list[tuple[int, int | None, str]]:
        return [(one.version, one.before, one.by) for one in self.deployment.ledger.takeovers("digits")]

    def told(self, path: str) -> list[dict[str, str]]:
        return [request.json for request in self.mlflow.requests if request.path.endswith(path)]


@pytest.fixture
def empty(bucket: Bucket, ledger: Ledger) -> Iterator[Stage]:
    with serving() as mlflow:
        deployment = Deployment("dev")
        vars(deployment).update(artifacts=bucket, ledger=ledger, registry=Registry(mlflow.url), outputs={"EventBus": "bus"})
        yield Stage(deployment, mlflow)


@pytest.fixture
def stage(empty: Stage) -> Stage:
    for version, accuracy, against in ((1, 0.90, None), (2, 0.92, 1), (3, 0.94, 2)):
        empty.train(version, accuracy, against)
    assert empty.serves == 3
    empty.mlflow.requests.clear()
    return empty


def test_the_version_before_serves_again_and_everybody_is_told(stage: Stage) -> None:
    done = stage.rollback(reason="it confuses 3 and 8")
    assert (done.takeover.version, done.takeover.before, done.finished) == (2, 3, False)
    champion = stage.deployment.champions.read("digits")
    assert champion is not None
    assert (champion.version, champion.value, champion.by) == (2, 0.92, "rollback")
    assert stage.deployment.champions.onnx(champion) == b"onnx 2"
    assert stage.deployment.ledger.takeovers("digits")[-1] == done.takeover == champion.takeover
    assert stage.told("alias") == [{"name": "digits", "alias": "champion", "version": "2"}]
    tags = {tag["key"]: tag["value"] for tag in stage.told("set-tag") if tag["version"] == "2"}
    assert tags == {"takeover": "rollback", "takeover_reason": "it confuses 3 and 8"}
    assert stage.events.announced == [("ModelPromoted", 2)]
    assert stage.events.entries[0]["EventBusName"] == "bus"
    assert stage.events.entries[0]["Source"] == "labelloop"


def test_a_version_that_was_deleted_in_mlflow_can_serve_again(stage: Stage) -> None:
    stage.mlflow.answer = lambda _: Answer(404, {"error_code": "RESOURCE_DOES_NOT_EXIST"})
    done, text = stage.rollback(), io.StringIO()
    assert (stage.serves, done.registered, stage.events.announced) == (2, False, [("ModelPromoted", 2)])
    assert stage.deployment.ledger.takeovers("digits")[-1] == done.takeover
    takeover.show(done, Console(file=text, width=200))
    assert "MLflow has this version no more" in text.getvalue()


def test_rolling_back_again_goes_further_back_and_not_to_and_fro(stage: Stage) -> None:
    assert stage.rollback().takeover.version == 2
    assert stage.rollback().takeover.version == 1
    with pytest.raises(RequestError, match=r"nothing served before version 1 .*there are: 1, 2, 3"):
        stage.rollback()
    assert stage.log[-2:] == [(2, 3, "rollback"), (1, 2, "rollback")]


def test_a_version_can_be_named(stage: Stage) -> None:
    done = stage.rollback(to=1)
    assert (stage.serves, done.takeover.before, done.takeover.reason) == (1, 3, "rolled back from version 3")


def test_a_person_may_promote_what_the_gate_kept_and_take_it_back(stage: Stage) -> None:
    stage.promote(1, "class 7 matters most")
    assert stage.log[-1] == (1, 3, "promote")
    stage.rollback()
    assert stage.serves == 3


def test_later_challengers_have_to_beat_the_version_that_was_rolled_back_to(stage: Stage) -> None:
    stage.rollback()
    stage.train(4, 0.99, against=3)  # its job began before the rollback
    assert stage.serves == 2
    stage.train(5, 0.99, against=2)
    assert stage.serves == 5


@pytest.mark.parametrize("version", [4, 77])
def test_a_version_that_is_not_there_is_named_with_those_that_are(stage: Stage, version: int) -> None:
    with pytest.raises(ModelError, match=rf"no version {version} to serve; there are: 1, 2, 3"):
        stage.promote(version)
    assert stage.serves == 3


def test_the_version_that_serves_cannot_take_over(stage: Stage) -> None:
    with pytest.raises(RequestError, match="version 3 of digits serves already"):
        stage.promote(3)
    with pytest.raises(RequestError, match="version 3 of digits serves already"):
        stage.rollback(to=3)


def test_without_a_champion_there_is_nothing_to_take_over_from(empty: Stage) -> None:
    with pytest.raises(RequestError, match="no version of digits serves yet"):
        empty.rollback()


@pytest.mark.parametrize(("content", "said"), [(b"other", "its SHA-256 differs"), (None, "is missing")])
def test_a_damaged_model_never_serves(stage: Stage, content: bytes | None, said: str) -> None:
    if content is None:  # a report without a model
        report = examples.evaluation(9, 0.9)
        stage.deployment.artifacts.put(artifacts.evaluation_key("digits", 9), msgspec.json.encode(report))
    else:
        stage.deployment.artifacts.put(artifacts.onnx_key("digits", 1), content)
    with pytest.raises(ModelError, match=said):
        stage.promote(1 if content else 9)
    assert (stage.serves, stage.events.entries) == (3, [])


def registry_fails(stage: Stage, patch: pytest.MonkeyPatch) -> type[Exception]:
    patch.setattr(stage.mlflow, "answer", lambda _: Answer(500))
    return RegistryError


def bus_refuses(stage: Stage, patch: pytest.MonkeyPatch) -> type[Exception]:
    patch.setattr(stage.events, "failed", 1)
    return ServiceError


class Crash(Exception):
    pass


def crash(*_: object) -> None:
    raise Crash


def note_fails(stage: Stage, patch: pytest.MonkeyPatch) -> type[Exception]:
    patch.setattr(stage.deployment.ledger, "record_takeover", crash)
    return Crash


@pytest.mark.parametrize("breaks", [registry_fails, bus_refuses, note_fails])
@pytest.mark.parametrize("command", ["rollback", "rollback --to 2", "promote 2"])
def test_after_a_crash_the_same_command_finishes_and_goes_no_further(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, command: str, breaks: Any
) -> None:
    commands: dict[str, Callable[[], Outcome]] = {
        "rollback": stage.rollback,
        "rollback --to 2": lambda: stage.rollback(to=2),
        "promote 2": lambda: stage.promote(2),
    }
    run = commands[command]
    with monkeypatch.context() as patch:
        expected = breaks(stage, patch)
        with pytest.raises(expected):
            run()
    assert (stage.serves, len(stage.log)) == (2, 3)
    done = run()
    assert (stage.serves, done.finished) == (2, True)
    assert stage.log[3:] == [(2, 3, command.split()[0])]
    assert stage.told("alias")[-1]["version"] == "2"
    assert stage.events.announced[-1] == ("ModelPromoted", 2)


def test_another_command_after_a_crash_notes_both(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        expected = note_fails(stage, patch)
        with pytest.raises(expected):
            stage.rollback()
    stage.promote(1)
    assert stage.log[3:] == [(2, 3, "rollback"), (1, 2, "promote")]


def test_of_two_at_once_the_later_is_told(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    champions = stage.deployment.champions
    swap = champions.swap

    def late(champion: Any, *, tag: str | None) -> None:
        swap(msgspec.structs.replace(champion, version=1), tag=tag)
        swap(champion, tag=tag)

    monkeypatch.setattr(champions, "swap", late)
    with pytest.raises(ConflictError, match="labelloop status digits"):
        stage.rollback()
    assert (stage.serves, stage.events.entries) == (1, [])


def test_what_happened_is_said(stage: Stage) -> None:
    text = io.StringIO()
    takeover.show(stage.rollback(reason="[it] was worse"), Console(file=text, width=200))
    assert "version 2 of digits serves instead of version 3 (accuracy 92.0%, 100 annotations)" in text.getvalue()
    assert "reason: [it] was worse" in text.getvalue()
