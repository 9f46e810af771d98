"""The gate on simulated challengers whose true quality is known; benchmarks/gate.py asks the same of many more."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import gate


def generator() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("images", [50, 200])
def test_a_challenger_that_is_worse_by_more_than_the_margin_hardly_ever_takes_over(images: int) -> None:
    cell = gate.classified(2, 0.9, -0.04, 0.12, images, 200, generator())
    assert cell.worse
    assert cell.promoted < 0.05


@pytest.mark.parametrize(("champion", "discordance", "classes"), [(0.90, 0.1, 2), (0.95, 0.05, 10)])
def test_one_that_is_three_points_better_takes_over_on_400_images(champion: float, discordance: float, classes: int) -> None:
    assert gate.classified(classes, champion, 0.03, discordance, 400, 60, generator()).promoted >= 0.8


def test_a_small_holdout_decides_little() -> None:
    assert gate.classified(2, 0.9, 0.0, 0.1, 50, 100, generator()).undecided > 0.6


def test_f1_is_judged_alike() -> None:
    assert gate.measured("multilabel", 0.05, -0.05, 100, 20, generator()).promoted < 0.1
    assert gate.measured("multilabel", 0.15, 0.05, 200, 20, generator()).promoted > 0.7


@pytest.mark.slow
def test_average_precision_is_judged_alike() -> None:
    assert gate.measured("detection", 0.05, -0.05, 100, 20, generator()).promoted < 0.1
    assert gate.measured("detection", 0.15, 0.05, 200, 20, generator()).promoted > 0.7


def test_networks_that_learnt_flipped_labels_never_take_over() -> None:
    found = gate.flipped(1)
    assert found["promoted"] == 0
    assert found["challenger_accuracy"] < found["champion_accuracy"] - 0.02
