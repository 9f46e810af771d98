"""After the gate's decision the backend's title is the version that serves, and the tasks of a new one are predicted anew."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec
import pytest

from labelloop.artifacts import Bucket, Champions, evaluation_key
from labelloop.errors import LabelStudioError, NotSetUpError
from labelloop.ledger import Ledger
from labelloop.records import Promotion, Shadow, Suspect, TaskRange, VersionJudged
from labelloop.refresh import Refreshed, Refresher
from tests import examples
from tests.fake_label_studio import FakeLabelStudio


@dataclass
class LabelStudio(FakeLabelStudio):
    """Its tasks have ids from 1 on; the unlabelled ones are listed."""

    unlabelled: list[int] = field(default_factory=list)

    def unlabelled_ids(self, project: int, last: int) -> list[int]:
        self._begin("unlabelled_ids")
        return [task for task in self.unlabelled if task > last][:1000]


class Queue:
    def __init__(self) -> None:
        self.sent: list[TaskRange] = []

    def send(self, ranges: Iterable[TaskRange]) -> int:
        before = len(self.sent)
        self.sent += ranges
        return len(self.sent) - before


@pytest.fixture
def label_studio(monkeypatch: pytest.MonkeyPatch) -> LabelStudio:
    monkeypatch.setattr("labelloop.review.offer", lambda *_: 0)  # has tests of its own
    ours = {"id": 1, "project": 1, "url": "http://api/v1/digits", "title": "digits v0"}
    other = {"id": 2, "project": 1, "url": "http://elsewhere/sam", "title": "SAM"}
    return LabelStudio(backends_=[ours, other])


@pytest.fixture
def champions(bucket: Bucket) -> Champions:
    return Champions(bucket)


@pytest.fixture(autouse=True)
def project(ledger: Ledger) -> None:
    ledger.set_project("digits", 1)


def refreshed(champions: Champions, ledger: Ledger, label_studio: LabelStudio, version: int, queue: Queue) -> Refreshed:
    password_of = {"digits": "the password"}.get
    refresh = Refresher(examples.CONFIGS, champions, ledger, cast(Any, label_studio), cast(Any, queue), password_of)
    return refresh(VersionJudged(model="digits", version=version))


def test_a_version_in_shadow_has_them_predicted_too_and_its_title_is_the_champions(
    champions: Champions, ledger: Ledger, label_studio: LabelStudio
) -> None:
    first = examples.champion(1)
    champions.swap(first, tag=None)
    label_studio.unlabelled = [1, 2]
    begun = Promotion(
        model="digits",
        job_name="job-2",
        version=2,
        verdict="shadow",
        reason="better",
        metric="accuracy",
        value=0.9,
        holdout_images=20,
        n_annotations=200,
        decided_at="2026-01-01",
        shadow=Shadow(challenger=examples.champion(2), champion=first, rules=examples.DIGITS.gate),
    )
    assert refreshed(champions, ledger, label_studio, 2, Queue()) == Refreshed("digits v1", 0, 0)
    ledger.record_promotion(begun)
    assert refreshed(champions, ledger, label_studio, 2, Queue()) == Refreshed("digits v1", 1, 0)
    ledger.end_shadow(msgspec.structs.replace(begun, verdict="keep"))
    assert refreshed(champions, ledger, label_studio, 2, Queue()) == Refreshed("digits v1", 0, 0)


def run(champions: Champions, ledger: Ledger, label_studio: LabelStudio) -> str:
    return refreshed(champions, ledger, label_studio, 1, Queue()).title


def test_a_new_version_has_all_unlabelled_tasks_predicted(
    champions: Champions, ledger: Ledger, label_studio: LabelStudio
) -> None:
    champions.swap(examples.champion(3), tag=None)
    label_studio.unlabelled = [*range(1, 2500, 2)]
    queue = Queue()
    outcome = refreshed(champions, ledger, label_studio, 3, queue)
    assert (outcome.title, outcome.ranges) == ("digits v3", len(queue.sent))
    assert [task for one in queue.sent for task in label_studio.unlabelled if one.after < task <= one.upto] == [
        *range(1, 2500, 2)
    ]
    assert label_studio.asked.index("rename_backend") < label_studio.asked.index("unlabelled_ids")


def test_a_rollback_that_comes_while_the_title_is_written_is_not_undone(
    champions: Champions, ledger: Ledger, label_studio: LabelStudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("labelloop.refresh.time.sleep", lambda _: None)
    champions.swap(examples.champion(2), tag=None)
    rename = label_studio.rename_backend

    def slow(*given: Any) -> None:
        champion, tag = champions.read_tagged("digits")
        if champion and champion.version == 2:
            champions.swap(examples.champion(1), tag=tag)
        rename(*given)

    monkeypatch.setattr(label_studio, "rename_backend", slow)
    label_studio.unlabelled = [1]
    assert refreshed(champions, ledger, label_studio, 2, Queue()) == Refreshed("digits v1", 0, 0)
    assert label_studio.backends_[0]["title"] == "digits v1"


def test_nothing_is_predicted_twice_because_something_else_failed(
    champions: Champions, ledger: Ledger, label_studio: LabelStudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    def locked(*_: object) -> int:
        raise LabelStudioError("database is locked", status=500)

    monkeypatch.setattr("labelloop.review.offer", locked)
    champions.swap(examples.champion(3), tag=None)
    label_studio.unlabelled, queue = [1, 2], Queue()
    with pytest.raises(LabelStudioError):
        refreshed(champions, ledger, label_studio, 3, queue)
    assert queue.sent == []


@pytest.mark.parametrize("serves", [2, 3])
def test_what_a_versions_training_found_suspicious_is_offered_whether_it_serves_or_was_kept(
    champions: Champions, ledger: Ledger, label_studio: LabelStudio, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, serves: int
) -> None:
    offered: list[tuple[int, list[Suspect]]] = []

    def offer(folder: object, project: int, version: int, suspects: list[Suspect], *_: object) -> int:
        offered.append((version, suspects))
        return len(suspects)

    monkeypatch.setattr("labelloop.review.offer", offer)
    champions.swap(examples.champion(serves), tag=None)
    report = msgspec.structs.replace(examples.evaluation(3), suspects=[examples.suspect()])
    bucket.put(evaluation_key("digits", 3), msgspec.json.encode(report))
    assert refreshed(champions, ledger, label_studio, 3, Queue()).cases == 1
    assert offered == [(3, [examples.suspect()])]


@pytest.mark.parametrize("judged", [2, 4])
def test_a_version_that_does_not_serve_has_nothing_predicted(
    champions: Champions, ledger: Ledger, label_studio: LabelStudio, judged: int
) -> None:
    """It was kept from serving, or another one has followed, whose own event comes."""
    champions.swap(examples.champion(3), tag=None)
    label_studio.backends_[0]["title"] = "digits v3"
    label_studio.unlabelled = [1, 2]
    queue = Queue()
    assert refreshed(champions, ledger, label_studio, judged, queue).ranges == 0
    assert queue.sent == []
    assert "rename_backend" not in label_studio.asked


def test_the_backend_takes_the_name_of_the_version(champions: Champions, ledger: Ledger, label_studio: LabelStudio) -> None:
    champions.swap(examples.champion(3), tag=None)
    assert run(champions, ledger, label_studio) == "digits v3"
    assert [backend["title"] for backend in label_studio.backends_] == ["digits v3", "SAM"]
    assert label_studio.backends_[0]["basic_auth_pass"] == "the password", "else Label Studio could not sign in any more"


def test_a_second_event_changes_nothing(champions: Champions, ledger: Ledger, label_studio: LabelStudio) -> None:
    champions.swap(examples.champion(3), tag=None)
    run(champions, ledger, label_studio)
    run(champions, ledger, label_studio)
    assert label_studio.asked.count("rename_backend") == 1


def test_a_title_that_somebody_overwrites_is_written_again(
    champions: Champions, ledger: Ledger, label_studio: LabelStudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Label Studio saves a backend whole when it is looked at; whoever looked just before brings the old title back."""
    monkeypatch.setattr("time.sleep", [].append)
    champions.swap(examples.champion(3), tag=None)
    label_studio.titles_lost = 2
    assert run(champions, ledger, label_studio) == "digits v3"
    assert label_studio.asked.count("rename_backend") == 3
    label_studio.backends_[0]["title"] = "digits v0"
    label_studio.titles_lost = 100
    with pytest.raises(LabelStudioError, match="does not keep"):
        run(champions, ledger, label_studio)


def test_without_a_champion_it_is_version_nought(champions: Champions, ledger: Ledger, label_studio: LabelStudio) -> None:
    assert run(champions, ledger, label_studio) == "digits v0"
    assert "rename_backend" not in label_studio.asked


def test_a_trailing_slash_is_the_same_backend(champions: Champions, ledger: Ledger, label_studio: LabelStudio) -> None:
    label_studio.backends_[0]["url"] += "/"
    champions.swap(examples.champion(1), tag=None)
    run(champions, ledger, label_studio)
    assert label_studio.backends_[0]["title"] == "digits v1"


def test_a_project_without_our_backend_says_what_to_run(champions: Champions, ledger: Ledger, label_studio: LabelStudio) -> None:
    label_studio.backends_ = label_studio.backends_[1:]
    with pytest.raises(NotSetUpError, match="setup-label-studio-project digits"):
        run(champions, ledger, label_studio)


def test_a_label_studio_that_is_down_is_an_error(champions: Champions, ledger: Ledger, label_studio: LabelStudio) -> None:
    label_studio.down = {"all"}
    with pytest.raises(LabelStudioError):
        run(champions, ledger, label_studio)
