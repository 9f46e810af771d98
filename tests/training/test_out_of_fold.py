"""Out-of-fold models: what they never saw, and jobs that are stopped in between."""

from __future__ import annotations

import logging
import os
import random
import signal
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from labelloop import imaging
from labelloop.model_config import ModelConfigs, ModelFolder
from labelloop.records import ManifestRow, ProblemTypeName, Region
from tests.training import models
from training_jobs import heads, out_of_fold
from training_jobs.dataset import Dataset, Examples
from training_jobs.job import STOPPED

CLASSES = ["heads", "tails"]
SIZE = 12
DIGEST = "0" * 64  # of no snapshot

# It learns by heart what it sees, and nothing of anything else.
_BY_HEART = """
from torch import nn


def build_model(config, weights):
    pixels = config.image.width * config.image.height
    return nn.Sequential(nn.Flatten(), nn.LayerNorm(pixels), nn.Linear(pixels, 64), nn.ReLU(), nn.Linear(64, len(config.classes)))


def augmentation(config):
    return nn.Identity()
"""


@pytest.fixture
def folder(tmp_path: Path) -> ModelFolder:
    return by_heart(tmp_path / "model_configs/tiny_classification")


def by_heart(place: Path, size: int = SIZE) -> ModelFolder:
    place.mkdir(parents=True)
    text = models.config_text("classification", classes=CLASSES, width=size, height=size, mode="L", epochs=9, batch_size=16)
    (place / "config.yaml").write_text(text)
    (place / "model.py").write_text(_BY_HEART)
    return ModelFolder(place)


@pytest.fixture(autouse=True)
def said_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="training_jobs")


def row(number: int, regions: list[Region], group: str | None = None) -> ManifestRow:
    return ManifestRow(
        image=f"s3://images/{number}.png",
        sha256=f"{number:064x}",
        group=group or f"{number:064x}",
        regions=regions,
        split="train",
        annotation=f"annotation-{number}",
        task=number,
    )


def dataset(train: Examples) -> Dataset:
    nothing = Examples([], train.pixels[:0])
    return Dataset(train=train, validation=nothing, test=nothing)


def noise(count: int, *, groups: Sequence[str | None] | None = None, pictures: int | None = None, size: int = SIZE) -> Examples:
    """Noise with a class by chance; with fewer `pictures` than images each comes several times, always with its class."""
    chance, generator = random.Random(0), np.random.default_rng(0)
    shown = [number % (pictures or count) for number in range(count)]
    pixels = generator.integers(0, 256, (count, size, size, 1), dtype=np.uint8)[shown]
    labels = [chance.choice(CLASSES) for _ in range(count)]
    return Examples(
        [
            row(number, [Region(label=labels[picture])], groups[number] if groups else None)
            for number, picture in enumerate(shown)
        ],
        pixels,
    )


def accuracy(found: Sequence[Sequence[Region]] | None, examples: Examples) -> float:
    assert found is not None
    return float(np.mean([said[0].label == row.regions[0].label for said, row in zip(found, examples.rows, strict=True)]))


def checkpoint(folder: Path, name: str) -> Path:
    """Where a job keeps its own."""
    (folder / name).mkdir()
    return folder / name / "checkpoint.pt"


def epochs(caplog: pytest.LogCaptureFixture) -> int:
    return sum("epoch " in message for message in caplog.messages)


def test_some_images_of_a_split_are_their_rows_own_and_no_copy_of_all() -> None:
    whole = noise(10)
    some = whole.part([7, 2, 5])
    again = some.part([2, 0])
    for part, numbers in ((some, [7, 2, 5]), (again, [5, 7])):
        assert part.rows == [whole.rows[number] for number in numbers]
        np.testing.assert_array_equal(part.pixels, whole.pixels[numbers])
        assert part.mapped is whole.mapped


def test_what_is_said_of_an_image_comes_from_models_that_saw_nothing_like_it(folder: ModelFolder, tmp_path: Path) -> None:
    """Classes that can only be known by heart: copies of an image give them away unless they share its content group."""
    apart = noise(160, pictures=80)
    together = noise(160, pictures=80, groups=[f"{number % 80:064x}" for number in range(160)])
    known = out_of_fold.candidates(folder, None, dataset(apart), folder.config.card(DIGEST), checkpoint(tmp_path, "apart"))
    unknown = out_of_fold.candidates(
        folder, None, dataset(together), folder.config.card(DIGEST), checkpoint(tmp_path, "together")
    )
    assert accuracy(known, apart) > 0.75  # three copies of four lie in another fold
    assert accuracy(unknown, together) < 0.65


def test_a_stopped_job_goes_on_where_it_was(folder: ModelFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    examples, card = noise(60), folder.config.card(DIGEST)
    whole = out_of_fold.candidates(folder, None, dataset(examples), card, checkpoint(tmp_path, "whole"))
    all_epochs = epochs(caplog)
    caplog.clear()

    def stop_in_the_second_fold(record: logging.LogRecord) -> bool:
        if "epoch 2 of" in record.getMessage() and any("model 2 of" in message for message in caplog.messages):
            os.kill(os.getpid(), signal.SIGTERM)
        return True

    logger = logging.getLogger("training_jobs.out_of_fold")
    logger.addFilter(stop_in_the_second_fold)
    try:
        with pytest.raises(SystemExit) as ended:
            out_of_fold.candidates(folder, None, dataset(examples), card, tmp_path / "checkpoint.pt")
    finally:
        logger.removeFilter(stop_in_the_second_fold)
    assert ended.value.code == STOPPED
    done = epochs(caplog)
    assert 0 < done < all_epochs

    caplog.clear()
    torch.manual_seed(7)  # whatever was random before
    resumed = out_of_fold.candidates(folder, None, dataset(examples), card, tmp_path / "checkpoint.pt")
    assert epochs(caplog) == all_epochs - done
    assert resumed == whole


def test_finished_folds_are_not_trained_again(folder: ModelFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    examples, card = noise(60), folder.config.card(DIGEST)
    (tmp_path / "checkpoint.pt").write_bytes(b"the job's own")
    first = out_of_fold.candidates(folder, None, dataset(examples), card, tmp_path / "checkpoint.pt")
    caplog.clear()
    assert out_of_fold.candidates(folder, None, dataset(examples), card, tmp_path / "checkpoint.pt") == first
    assert epochs(caplog) == 0
    assert (tmp_path / "checkpoint.pt").read_bytes() == b"the job's own"


def test_folds_take_images_into_memory_by_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "_AT_ONCE", 16)
    folder, few, many = by_heart(tmp_path / "tiny_classification", 128), noise(60, size=128), noise(800, size=128)
    out_of_fold.candidates(
        folder, None, dataset(few), folder.config.card(DIGEST), checkpoint(tmp_path, "few")
    )  # imports what it needs
    tracemalloc.start()
    try:
        found = out_of_fold.candidates(folder, None, dataset(many), folder.config.card(DIGEST), checkpoint(tmp_path, "many"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found
    assert peak < 0.24 * many.pixels.nbytes  # an image in four is a fold's own


@pytest.mark.parametrize("examples", [noise(39), noise(0), noise(200, groups=["a" * 64] * 200)])
def test_too_few_images_are_said_so(
    examples: Examples, folder: ModelFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also when they all look the same."""
    assert out_of_fold.candidates(folder, None, dataset(examples), folder.config.card(DIGEST), tmp_path / "checkpoint.pt") is None
    assert "too few" in caplog.text
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize("problem_type", ["multilabel", "detection"])
def test_every_problem_type_has_them(problem_type: ProblemTypeName, tmp_path: Path) -> None:
    configs = models.write_folder(tmp_path / "configs", problem_type, epochs=1)
    folder = _with_folds(configs, f"tiny_{problem_type}", 2)
    card, drawn = folder.config.card(DIGEST), models.rectangles(20, problem_type)
    images = [imaging.decode(example.image, width=card.width, height=card.height, mode=card.mode) for example in drawn]
    examples = Examples(
        [row(number, example.truth) for number, example in enumerate(drawn)], np.array([np.asarray(i) for i in images])
    )
    found = out_of_fold.candidates(folder, None, dataset(examples), card, tmp_path / "checkpoint.pt")
    assert found is not None
    assert len(found) == len(drawn)
    assert {region.label for said in found for region in said} <= set(models.COLOURS)
    if problem_type == "multilabel":
        assert all(len(said) == len(models.COLOURS) for said in found)


def _with_folds(configs: ModelConfigs, model: str, folds: int) -> ModelFolder:
    file = Path(str(configs[model].folder)) / "config.yaml"
    file.write_text(file.read_text() + f"review: {{folds: {folds}}}\n")
    return ModelFolder(file.parent)
