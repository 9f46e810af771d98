"""After a promotion the backend's title is the version that serves."""

from __future__ import annotations

from typing import Any, cast

import pytest

from labelloop.artifacts import Bucket, Champions
from labelloop.errors import LabelStudioError, NotSetUpError
from labelloop.ledger import Ledger
from labelloop.refresh import refresh
from tests import examples
from tests.fake_label_studio import FakeLabelStudio


@pytest.fixture
def label_studio() -> FakeLabelStudio:
    ours = {"id": 1, "project": 1, "url": "http://api/v1/digits", "title": "digits v0"}
    other = {"id": 2, "project": 1, "url": "http://elsewhere/sam", "title": "SAM"}
    return FakeLabelStudio(backends_=[ours, other])


@pytest.fixture
def champions(bucket: Bucket) -> Champions:
    return Champions(bucket)


@pytest.fixture(autouse=True)
def project(ledger: Ledger) -> None:
    ledger.set_project("digits", 1)


def run(champions: Champions, ledger: Ledger, label_studio: FakeLabelStudio) -> str:
    return refresh("digits", champions, ledger, cast(Any, label_studio), {"digits": "the password"}.get)


def test_the_backend_takes_the_name_of_the_version(champions: Champions, ledger: Ledger, label_studio: FakeLabelStudio) -> None:
    champions.swap(examples.champion(3), tag=None)
    assert run(champions, ledger, label_studio) == "digits v3"
    assert [backend["title"] for backend in label_studio.backends_] == ["digits v3", "SAM"]


def test_a_second_event_changes_nothing(champions: Champions, ledger: Ledger, label_studio: FakeLabelStudio) -> None:
    champions.swap(examples.champion(3), tag=None)
    run(champions, ledger, label_studio)
    run(champions, ledger, label_studio)
    assert label_studio.asked.count("rename_backend") == 1


def test_a_title_that_somebody_overwrites_is_written_again(
    champions: Champions, ledger: Ledger, label_studio: FakeLabelStudio, monkeypatch: pytest.MonkeyPatch
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


def test_without_a_champion_it_is_version_nought(champions: Champions, ledger: Ledger, label_studio: FakeLabelStudio) -> None:
    assert run(champions, ledger, label_studio) == "digits v0"
    assert "rename_backend" not in label_studio.asked


def test_a_trailing_slash_is_the_same_backend(champions: Champions, ledger: Ledger, label_studio: FakeLabelStudio) -> None:
    label_studio.backends_[0]["url"] += "/"
    champions.swap(examples.champion(1), tag=None)
    run(champions, ledger, label_studio)
    assert label_studio.backends_[0]["title"] == "digits v1"


def test_a_project_without_our_backend_says_what_to_run(
    champions: Champions, ledger: Ledger, label_studio: FakeLabelStudio
) -> None:
    label_studio.backends_ = label_studio.backends_[1:]
    with pytest.raises(NotSetUpError, match="setup-label-studio-project digits"):
        run(champions, ledger, label_studio)


def test_a_label_studio_that_is_down_is_an_error(champions: Champions, ledger: Ledger, label_studio: FakeLabelStudio) -> None:
    label_studio.down = {"all"}
    with pytest.raises(LabelStudioError):
        run(champions, ledger, label_studio)
