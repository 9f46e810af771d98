"""`labelloop train` where it cannot start; tests/loop/test_operations.py runs it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import msgspec
import pytest
from typer.testing import CliRunner

from cli.main import app
from labelloop.records import Erasure
from tests import examples
from tests.deployed import STAGE, Stage, deployed


@pytest.fixture
def stage(aws: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    with deployed(examples.CONFIGS["digits"], monkeypatch) as stage:
        yield stage


def test_before_the_first_snapshot_it_says_what_to_do(stage: Stage) -> None:
    done = CliRunner().invoke(app, ["train", "digits", "--stage", STAGE])
    assert done.exception is not None
    assert "it has no snapshot yet; annotate" in str(done.exception)


def test_a_function_that_cannot_be_looked_at_starts_nothing(stage: Stage) -> None:
    stage.train(100, 0.9)
    done = CliRunner().invoke(app, ["train", "digits", "--stage", STAGE, "--json"])
    assert done.exception is not None
    assert "retrain-of-dev cannot be looked at" in str(done.exception)
    assert json.loads(done.stdout or "null") is None


def test_nothing_is_trained_during_an_erasure_nor_a_snapshot_that_an_image_was_erased_from(stage: Stage) -> None:
    stage.train(100, 0.9)
    digests = {training.job.digest: "0" * 64 for training in stage.ledger.trainings("digits")}
    assert digests
    erasure = Erasure(model="digits", at="2026-01-01T00:00:00+00:00", by="a", reason="b", images=[])
    stage.ledger.record_erasure(erasure)
    done = CliRunner().invoke(app, ["train", "digits", "--stage", STAGE])
    assert "finish it first, for any image: labelloop erase digits" in str(done.exception)
    stage.ledger.record_erasure(msgspec.structs.replace(erasure, snapshots=digests, finished_at=erasure.at))
    done = CliRunner().invoke(app, ["train", "digits", "--stage", STAGE])
    assert "images of all its snapshots were erased" in str(done.exception)
