"""Drift is 1 on average where chance alone is between two samples, and larger where anything else is."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from labelloop.drift import ALARM, FEWEST, WINDOW, follow, place, reference
from labelloop.ledger import Ledger
from labelloop.records import Drift, DriftReference, Served

DIMENSIONS = 12
type Floats = Any  # float32 `[N, D]`


def images(random: np.random.Generator, count: int, shift: float = 0.0) -> Floats:
    """Embeddings of three kinds of images, moved by so many standard deviations."""
    kinds = np.random.default_rng(7).normal(scale=3, size=(3, DIMENSIONS))
    noise = random.normal(size=(count, DIMENSIONS)) * np.linspace(2, 0.5, DIMENSIONS)
    made: Floats = (kinds[random.integers(0, 3, count)] + noise + shift * np.linspace(2, 0.5, DIMENSIONS)).astype(np.float32)
    return made


def made(random: np.random.Generator, count: int = 200) -> DriftReference:
    found = reference(images(random, count), random.beta(5, 2, count).tolist())
    assert found is not None
    return found


def served(against: DriftReference, embeddings: Floats, certainties: Any, first: int = 1) -> list[Served]:
    return [
        Served(task=number, sha256=f"{number:064x}", certainty=float(certainty), place=place(against, embedding))
        for number, (embedding, certainty) in enumerate(zip(embeddings, certainties, strict=True), start=first)
    ]


@pytest.mark.parametrize(("held_out", "window"), [(60, 40), (100, 100), (1000, 100)])
def test_chance_alone_gives_1_on_average(held_out: int, window: int) -> None:
    random = np.random.default_rng(0)
    found = []
    for _ in range(200):
        against = made(random, held_out)
        found.append(follow(against, served(against, images(random, window), random.beta(5, 2, window)), None))
    assert np.mean([one.embedding or 0 for one in found]) == pytest.approx(1, abs=0.25)
    assert np.mean([one.confidence or 0 for one in found]) == pytest.approx(1, abs=0.15)
    assert max(one.embedding or 0 for one in found) < ALARM, "what raises the alarm"


@pytest.mark.parametrize(("shift", "certainty", "drifted"), [(1.0, (5, 2), "embedding"), (0.0, (2, 3), "confidence")])
def test_what_has_moved_shows(shift: float, certainty: tuple[float, float], drifted: str) -> None:
    random = np.random.default_rng(1)
    against = made(random)
    found = follow(against, served(against, images(random, WINDOW, shift), random.beta(*certainty, WINDOW)), None)
    figures = {"embedding": found.embedding or 0, "confidence": found.confidence or 0}
    assert figures.pop(drifted) > ALARM
    assert max(figures.values()) < ALARM


def test_the_references_own_images_have_mean_0_and_covariance_1() -> None:
    embeddings = images(np.random.default_rng(2), 300)
    against = reference(embeddings, [0.5] * 300)
    assert against is not None
    places = np.array([place(against, embedding) for embedding in embeddings])
    np.testing.assert_allclose(places.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(np.cov(places.T), np.eye(8), atol=1e-3)


def test_too_small_a_holdout_and_too_few_images_measure_nothing() -> None:
    random = np.random.default_rng(3)
    assert reference(images(random, 49), [0.5] * 49) is None
    assert reference(np.ones((60, 4), np.float32), [0.5] * 60) is None, "all images are the same to it"
    against = made(random)
    few = follow(against, served(against, images(random, FEWEST - 1), [0.5] * (FEWEST - 1)), None)
    assert (len(few.served), few.embedding, few.confidence) == (FEWEST - 1, None, None)


def test_a_model_that_is_always_as_sure_is_compared_with_that() -> None:
    random = np.random.default_rng(4)
    against = reference(images(random, 100), [1.0] * 100)
    assert against is not None
    assert (against.edges, against.counts) == ([1.0], [0, 100])
    same, unsure = (follow(against, served(against, images(random, 100), [sure] * 100), None) for sure in (1.0, 0.9))
    assert (same.confidence or 0) < 1 < ALARM < (unsure.confidence or 0)


def test_the_newest_images_count_each_once_in_whatever_order_they_come() -> None:
    random = np.random.default_rng(5)
    against = made(random)
    everything = served(against, images(random, WINDOW + 50), random.beta(5, 2, WINDOW + 50))
    found = follow(against, everything, None)
    assert [one.task for one in found.served] == list(range(51, WINDOW + 51))
    assert follow(against, everything[:80], found) == found, "older ones, and some again"
    parts = follow(against, everything[60:], follow(against, everything[:60], None))
    assert parts == found


def test_the_ledger_keeps_it_whoever_writes_meanwhile(ledger: Ledger) -> None:
    random = np.random.default_rng(6)
    against = made(random)
    everything = served(against, images(random, 60), random.beta(5, 2, 60))
    first = True

    def change(before: Drift | None) -> Drift:
        nonlocal first
        if first:  # somebody else is faster
            first = False
            ledger.change_drift("digits", 2, partial(follow, against, everything[30:]))
        return follow(against, everything[:30], before)

    assert ledger.drift("digits", 2) is None
    found = ledger.change_drift("digits", 2, change)
    assert found == ledger.drift("digits", 2) == follow(against, everything, None)
    assert ledger.drift("digits", 1) is None


def test_an_erased_image_is_gone_from_it(ledger: Ledger) -> None:
    random = np.random.default_rng(8)
    against = made(random)
    ledger.change_drift("digits", 2, partial(follow, against, served(against, images(random, 40), [0.5] * 40)))
    ledger.forget_images("digits", 1, [f"{3:064x}"])
    left = ledger.drift("digits", 2)
    assert left is not None
    assert [one.task for one in left.served] == [number for number in range(1, 41) if number != 3]
