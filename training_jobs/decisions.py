"""What a model decides about images, as probabilities that are held against what annotators said: to judge the model, and them.

How many annotations are wrong is reckoned by confident learning (Northcutt et al. 2021) in cleanlab, which is imported where it
is used: it brings pandas, and takes a second.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from labelloop.records import Region
from training_jobs.paired import Floats

type Integers = NDArray[np.int64]
type Flags = NDArray[np.bool]


class Decisions(NamedTuple):
    """`probabilities` of the possible answers, float64 `[N, answers]`, and the `answers` that people gave, int64 `[N]`.

    `shown`: the probability by which a decision is judged, float64 `[N]`, and whether it came `true`, bool `[N]`.
    """

    probabilities: Floats
    answers: Integers
    shown: Floats
    true: Flags


class LabelQuality(NamedTuple):
    """Of each image `[N]`: how likely its annotation is right, 0 to 1, and whether it counts as wrong."""

    scores: Floats
    wrong: Flags


def named(truth: Sequence[Region], found: Sequence[Region]) -> list[tuple[float, bool]]:
    """The score of each class that is said of an image, and whether it is right."""
    there = {region.label for region in truth}
    return [(region.score or 0.0, region.label in there) for region in found]


def yes_or_no(probability: Floats, true: Flags) -> Decisions:
    """Decisions between two answers, from the probability of yes, which is shown, and whether yes is true: both `[N]`."""
    return Decisions(np.column_stack([1 - probability, probability]), true.astype(np.int64), probability, true)


def probabilities_of(candidates: Sequence[Sequence[Region]], classes: Sequence[str]) -> Floats:
    """`[images, classes]`, of all candidates of each image."""
    scores = [{region.label: region.score or 0.0 for region in found} for found in candidates]
    return np.array([[its[name] for name in classes] for its in scores], dtype=np.float64).reshape(-1, len(classes))


def mislabelled(given: Integers, probabilities: Floats) -> Flags:
    """The annotations of least self-confidence, as many as confident learning reckons to be wrong.

    `given` `[N]` are numbers of classes, `probabilities` `[N, classes]`. Of cleanlab's filters this one goes with the ranking,
    and was the most precise: see docs/benchmarks.md.
    """
    from cleanlab.filter import find_label_issues

    if len(np.unique(given)) < 2:  # it compares classes with each other
        return np.zeros(len(given), dtype=np.bool)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # few images of a class: that is how annotating starts
        wrong: Flags = find_label_issues(given, probabilities, filter_by="low_self_confidence", n_jobs=1)
    return wrong
