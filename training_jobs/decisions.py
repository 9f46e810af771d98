"""What a model decides about images, as probabilities that can be held against what annotators said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from labelloop.records import ManifestRow, Region
from training_jobs.average_precision import matches

type Floats = NDArray[np.float64]


class Decisions(NamedTuple):
    """`probabilities` of the possible answers, float64 `[N, answers]`, and the `answers` that people gave, int64 `[N]`.

    `shown`: the probability by which a decision is judged, float64 `[N]`, and whether it came `true`, bool `[N]`.
    """

    probabilities: Floats
    answers: NDArray[np.int64]
    shown: Floats
    true: NDArray[np.bool_]


def of_classes(rows: Sequence[ManifestRow], candidates: Sequence[Sequence[Region]], classes: Sequence[str]) -> Decisions:
    """One an image, about its class. The likeliest one is shown."""
    probabilities = probabilities_of(candidates, classes)
    answers = np.array([classes.index(row.regions[0].label) for row in rows], dtype=np.int64)
    return Decisions(probabilities, answers, probabilities.max(axis=1), probabilities.argmax(axis=1) == answers)


def of_sets(rows: Sequence[ManifestRow], candidates: Sequence[Sequence[Region]], classes: Sequence[str]) -> Decisions:
    """One a class and image, about whether the image has it."""
    has = np.array([[any(region.label == name for region in row.regions) for name in classes] for row in rows], dtype=bool)
    return _of_two(probabilities_of(candidates, classes).ravel(), has.ravel())


def of_boxes(rows: Sequence[ManifestRow], candidates: Sequence[Sequence[Region]], classes: Sequence[str]) -> Decisions:
    """One a box, about whether it is right: whether it has a true box of its class to itself, with an IoU of a half or more."""
    scores, right = [], []
    for row, regions in zip(rows, candidates, strict=True):
        decided = boxed(row.regions, [region for region in regions if region.label in classes])
        scores += [score for score, _ in decided]
        right += [true for _, true in decided]
    return _of_two(np.array(scores, dtype=np.float64), np.array(right, dtype=bool))


def named(truth: Sequence[Region], found: Sequence[Region]) -> list[tuple[float, bool]]:
    """The score of each class that is said of an image, and whether it is right."""
    there = {region.label for region in truth}
    return [(region.score or 0.0, region.label in there) for region in found]


def boxed(truth: Sequence[Region], found: Sequence[Region]) -> list[tuple[float, bool]]:
    """The score of each box that is found in an image, and whether it is right; see `of_boxes`."""
    decided: list[tuple[float, bool]] = []
    for name in dict.fromkeys(region.label for region in found):
        best = sorted((region for region in found if region.label == name), key=lambda region: -(region.score or 0.0))
        hits = matches([region for region in truth if region.label == name], best)
        decided += [(region.score or 0.0, hit) for region, hit in zip(best, hits, strict=True)]
    return decided


def _of_two(probability: Floats, true: NDArray[np.bool_]) -> Decisions:
    return Decisions(np.column_stack([1 - probability, probability]), true.astype(np.int64), probability, true)


def probabilities_of(candidates: Sequence[Sequence[Region]], classes: Sequence[str]) -> Floats:
    """`[images, classes]`, of all candidates of each image."""
    scores = [{region.label: region.score or 0.0 for region in found} for found in candidates]
    return np.array([[its[name] for name in classes] for its in scores], dtype=np.float64).reshape(-1, len(classes))
