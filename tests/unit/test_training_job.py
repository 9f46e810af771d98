"""What the time from the deciding annotation to the version that serves is made of."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from cli.training_job import turnaround, turnaround_in_words
from labelloop.records import Promotion, Timing

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
PHASES = {"read": 1.0, "fit": 20.0, "out-of-fold": 10.0, "record": 2.0}


def at(seconds: float) -> datetime:
    return NOON + timedelta(seconds=seconds)


def promotion(timing: Timing | None) -> Promotion:
    return Promotion(
        model="digits", job_name="job-1", version=1, verdict="promote", reason="", metric="accuracy", value=0.9,
        holdout_images=10, n_annotations=100, decided_at=at(55).isoformat(), timing=timing,
    )  # fmt: skip


# A spot machine that was lost at once: it starts and trains again.
STATES = [
    ("Starting", 3),
    ("Downloading", 5),
    ("Training", 7),
    ("Interrupted", 8),
    ("Training", 9),
    ("Uploading", 50),
    ("Completed", 52),
]
JOB = {
    "CreationTime": at(3),
    "TrainingEndTime": at(52),
    "SecondaryStatusTransitions": [{"Status": status, "StartTime": at(second)} for status, second in STATES],
}


def test_parts_are_in_order_and_add_up_to_the_whole() -> None:
    timing = Timing(seconds=PHASES, images_per_second=None, waiting=None, decoded=0)
    parts = turnaround(JOB, promotion(timing), annotated_at=NOON, served_at=at(58))
    assert parts == {
        "queue": 3.0,
        "machine and channels": 4.0,
        "start of the process": 10.0,
        **PHASES,
        "upload of the model": 2.0,
        "gate": 3.0,
        "Label Studio told": 3.0,
    }
    assert sum(parts.values()) == pytest.approx(58)
    words = turnaround_in_words(parts)
    assert words.startswith("58 s from the deciding annotation, 28 s of it beyond training: queue 3.0, machine")


def test_a_job_that_says_nothing_of_its_phases_is_one_part() -> None:
    parts = turnaround(JOB, promotion(None), annotated_at=NOON, served_at=at(58))
    assert parts["start of the process"] == 43.0
    assert sum(parts.values()) == pytest.approx(58)


def test_what_is_not_known_of_before_and_after_is_left_out() -> None:
    timing = Timing(seconds=PHASES, images_per_second=None, waiting=None, decoded=0)
    parts = turnaround(JOB, promotion(timing))
    assert (next(iter(parts)), list(parts)[-1]) == ("machine and channels", "gate")
    assert sum(parts.values()) == pytest.approx(55 - 3)
