"""What a training job keeps for the next: the images that it decoded, and how far they are trusted."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest

from cli.examples import Example, digits
from labelloop.artifacts import Bucket
from labelloop.records import ManifestRow, ModelCard, Timing
from tests.examples import DIGITS, model_card
from tests.training.opt_ml import OptMl, manifest_rows
from training_jobs import dataset
from training_jobs.dataset import Dataset
from training_jobs.job import Phases, TrainingJob

CARD = model_card()


@dataclass
class Trainings:
    """Jobs of one model, one after the other, each on a machine of its own."""

    folder: Path
    bucket: Bucket
    jobs: int = 0

    def load(self, rows: list[ManifestRow], images: list[Example], card: ModelCard = CARD, bucket: str = "") -> Dataset:
        """What the next job trains on; `images` is all that it could read."""
        self.jobs += 1
        place = OptMl(self.folder / str(self.jobs)).lay_out(images, rows, job_name=f"job-{self.jobs}")
        cache = f"s3://{bucket or self.bucket.name}/cache/digits/"
        return dataset.load(TrainingJob.read(place.folder, cache), DIGITS, card, Phases())

    def keys(self, ending: str) -> list[str]:
        return [key for key in self.bucket.keys("cache/digits/decoded/") if key.endswith(ending)]


@pytest.fixture
def trainings(tmp_path: Path, new_bucket: Callable[[], Bucket]) -> Trainings:
    return Trainings(tmp_path, new_bucket())


@pytest.fixture(scope="module")
def images() -> list[Example]:
    return random.Random(0).sample(digits.load(), 40)


@pytest.fixture(scope="module")
def rows(images: list[Example]) -> list[ManifestRow]:
    return manifest_rows(images)


def same(one: Dataset, other: Dataset) -> bool:
    pairs = [(one.train, other.train), (one.validation, other.validation), (one.test, other.test)]
    return all(a.rows == b.rows and np.array_equal(a.pixels, b.pixels) for a, b in pairs)


def test_only_new_images_are_read_and_decoded(trainings: Trainings, images: list[Example], rows: list[ManifestRow]) -> None:
    few = manifest_rows(images[:30])
    assert trainings.load(few, images[:30]).decoded == 30
    again = trainings.load(rows, images[30:])  # the others are not even there
    assert again.decoded == 10
    whole = trainings.load(rows, [])
    assert whole.decoded == 0
    assert same(whole, again)
    assert same(whole, trainings.load(rows, images, bucket="no-such-bucket"))


def test_a_copy_of_an_image_is_kept_once(trainings: Trainings, images: list[Example]) -> None:
    (row, *others) = manifest_rows(images[:20])
    twice = [row, msgspec.structs.replace(row, task=99), *others]
    assert same(trainings.load(twice, images[:20]), trainings.load(twice, []))


@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "note", "no list"])
def test_what_is_damaged_is_decoded_anew_and_kept_anew(
    damage: str, trainings: Trainings, images: list[Example], rows: list[ManifestRow], caplog: pytest.LogCaptureFixture
) -> None:
    sound = trainings.load(rows, images)
    ((shard,), (note,)) = (trainings.keys(".npy"), trainings.keys(".json"))
    content = trainings.bucket.get(shard) or b""
    match damage:
        case "cut":
            trainings.bucket.put(shard, content[:-1])
        case "changed":
            trainings.bucket.put(shard, content[:-1] + bytes([content[-1] ^ 1]))
        case "missing":
            trainings.bucket.put(shard, b"")
        case "note":
            trainings.bucket.put(note, b"{")
        case "no list":
            trainings.bucket.put(note, b'{"images": 3, "sha256": ""}')
    healed = trainings.load(rows, images)
    assert healed.decoded == len(rows)
    assert "made anew" in caplog.text
    assert same(healed, sound)
    assert trainings.load(rows, []).decoded == 0


@pytest.mark.parametrize("change", [{"width": 10}, {"mode": "RGB"}, {"oversampling": 3.0}])
def test_images_decoded_otherwise_are_others(
    change: dict[str, object], trainings: Trainings, images: list[Example], rows: list[ManifestRow]
) -> None:
    trainings.load(rows, images)
    other = msgspec.structs.replace(CARD, **change)
    assert trainings.load(rows, images, other).decoded == len(rows)
    assert trainings.load(rows, []).decoded == trainings.load(rows, [], other).decoded == 0


def test_a_training_goes_on_without_them(
    trainings: Trainings, images: list[Example], rows: list[ManifestRow], caplog: pytest.LogCaptureFixture
) -> None:
    assert trainings.load(rows, images, bucket="no-such-bucket").decoded == len(rows)
    assert "cannot be read" in caplog.text
    assert "are not kept" in caplog.text


def test_phases_add_up_and_go_on() -> None:
    phases = Phases()
    for name in ("read", "decode", "read", "fit"):
        phases.begin(name)
    phases.steps(100, 2.0, 0.5)
    phases.steps(100, 2.0, 0.0)
    timing = phases.timing(3)
    assert isinstance(timing, Timing)
    assert list(timing.seconds) == ["read", "decode", "fit"]
    assert (timing.images_per_second, timing.waiting, timing.decoded) == (50.0, 0.125, 3)
    assert Phases().timing(0) == Timing(seconds={}, images_per_second=None, waiting=None, decoded=0)
