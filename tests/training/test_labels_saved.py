"""The labels that a queue saves, where it is known how many it does."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import msgspec
import numpy as np
import pytest

from labelloop.active_learning import Stream, stream_of
from labelloop.model_config import ModelConfig
from labelloop.records import LabelsSaved, ManifestRow, ProblemTypeName, Region
from tests.examples import DIGITS
from tests.training.models import config_of
from training_jobs.labels_saved import labels_saved

CONTROL, ACTIVE, HOLDOUT = 120, 480, 400
NAMES = DIGITS.classes[:6]

type Vectors = np.ndarray[Any, np.dtype[np.float32]]
type Labelled = tuple[Vectors, list[list[str]]]


@cache
def groups(stream: Stream, count: int) -> list[str]:
    made = (hashlib.sha256(str(number).encode()).hexdigest() for number in range(40 * count))
    return [group for group in made if stream_of(group, DIGITS) == stream][:count]


def images(count: int, random: np.random.Generator, *, useless: float) -> Labelled:
    """Embeddings of overlapping classes; a share of them is useless: nothing can be told or learnt from them."""
    centres = 0.8 * np.random.default_rng(5).normal(size=(len(NAMES), 16))
    classes = random.integers(len(NAMES), size=count)
    vectors = centres[classes] + random.normal(size=(count, 16))
    vectors[random.random(count) < useless] = 0
    return vectors.astype(np.float32), [[NAMES[number]] for number in classes]


def rows(labels: Sequence[Sequence[str]], stream: Stream, seen: int | None = 1) -> list[ManifestRow]:
    return [
        ManifestRow(
            image="",
            sha256="",
            group=group,
            regions=[Region(label=name) for name in names],
            split="test" if stream == "holdout" else "train",
            annotation="",
            task=0,
            seen=seen,
        )
        for names, group in zip(labels, groups(stream, len(labels)), strict=True)
    ]


def measured(control: Labelled, active: Labelled, holdout: Labelled, config: ModelConfig = DIGITS) -> LabelsSaved | None:
    return labels_saved(
        rows(control[1], "control") + rows(active[1], "active"),
        np.concatenate([control[0], active[0]]),
        rows(holdout[1], "holdout"),
        holdout[0],
        config,
    )


def simulated(useless_active: float, config: ModelConfig = DIGITS, seed: int = 0) -> LabelsSaved | None:
    random = np.random.default_rng(seed)
    control, active, holdout = (
        images(count, random, useless=useless) for count, useless in ((CONTROL, 0.5), (ACTIVE, useless_active), (HOLDOUT, 0.0))
    )
    return measured(control, active, holdout, config)


def test_labels_worth_two_random_ones_save_half() -> None:
    """Half of the images asked for at random are useless, none of the strategy's."""
    several = [simulated(0.0, seed=seed) for seed in range(4)]
    shares = [found.share for found in several if found]
    assert [found.control for found in several if found] == [CONTROL] * 4
    assert np.mean([share.value for share in shares]) == pytest.approx(0.5, abs=0.15)
    assert sum(share.low < 0.5 < share.high <= 7 / 8 for share in shares) >= 3
    assert sum(share.low > 0 for share in shares) >= 2


def test_labels_worth_as_much_as_random_ones_save_nothing() -> None:
    shares = [found.share for seed in range(4) if (found := simulated(0.5, seed=seed))]
    assert len(shares) == 4
    assert np.mean([share.value for share in shares]) == pytest.approx(0, abs=0.25)
    assert sum(share.low < 0 < share.high for share in shares) >= 3


def test_labels_worth_less_than_random_ones_are_told() -> None:
    """Of the strategy's images four in five are useless: two and a half of them are worth one at random."""
    found = simulated(0.8)
    assert found is not None
    assert -3 <= found.share.low < found.share.value < -0.3


def test_images_with_several_classes_are_measured() -> None:
    config = config_of("multilabel", classes=list(NAMES))

    def several(made: Labelled, random: np.random.Generator) -> Labelled:
        """With the class opposite in half of the images; those then lie between the two."""
        vectors, labels = made
        centres = 0.8 * np.random.default_rng(5).normal(size=(len(NAMES), 16))
        more = [NAMES[(NAMES.index(label) + 3) % len(NAMES)] if random.random() < 0.5 else None for [label] in labels]
        moved = [vector + (centres[NAMES.index(name)] if name else 0) for vector, name in zip(vectors, more, strict=True)]
        return np.array(moved, dtype=np.float32), [
            [*its, *([name] if name else [])] for its, name in zip(labels, more, strict=True)
        ]

    random = np.random.default_rng(0)
    control, active, holdout = (several(images(count, random, useless=0), random) for count in (CONTROL, ACTIVE, HOLDOUT))
    config = msgspec.structs.replace(config, splits=DIGITS.splits, queue=DIGITS.queue)
    found = measured(control, active, holdout, config)
    assert found is not None
    assert found.share.low < 0 < found.share.high


def test_the_same_labels_give_the_same_figures() -> None:
    assert simulated(0.0) == simulated(0.0)


@pytest.mark.parametrize(
    ("control", "active", "holdout"), [(19, 100, 100), (30, 29, 100), (30, 100, 19), (0, 100, 100), (100, 0, 100)]
)
def test_too_few_labels_tell_nothing(control: int, active: int, holdout: int) -> None:
    random = np.random.default_rng(0)
    made = [images(count, random, useless=0) for count in (control, active, holdout)]
    assert measured(made[0], made[1], made[2]) is None


def test_labels_that_no_person_gave_or_no_model_asked_for_do_not_count() -> None:
    random = np.random.default_rng(0)
    control, active, holdout = (images(count, random, useless=0) for count in (30, 100, 100))
    vectors = np.concatenate([control[0], active[0]])
    asked, tested = rows(active[1], "active"), rows(holdout[1], "holdout")
    early = rows(control[1], "control", seen=None)
    accepted = [msgspec.structs.replace(row, by_model=True) for row in rows(control[1], "control")]
    counted = rows(control[1], "control")
    assert labels_saved(early + asked, vectors, tested, holdout[0], DIGITS) is None
    assert labels_saved(accepted + asked, vectors, tested, holdout[0], DIGITS) is None
    assert labels_saved(counted + asked, vectors, tested, holdout[0], DIGITS) is not None


@pytest.mark.parametrize("one_class", ["control", "holdout"])
def test_one_class_tells_nothing(one_class: str) -> None:
    random = np.random.default_rng(0)
    given = {name: images(count, random, useless=0) for name, count in (("control", 30), ("active", 100), ("holdout", 100))}
    given[one_class] = given[one_class][0], [["1"]] * len(given[one_class][1])
    assert measured(given["control"], given["active"], given["holdout"]) is None


def test_boxes_are_not_measured() -> None:
    kind: ProblemTypeName = "detection"
    assert simulated(0.0, config_of(kind, classes=list(NAMES))) is None
