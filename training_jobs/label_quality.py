"""How far annotations are to be trusted, judged by what models which never saw them say of the images.

How many are wrong is reckoned by confident learning (Northcutt et al. 2021) in cleanlab, which is imported where it is used: it
brings pandas, and takes a second.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from labelloop import problem_types
from labelloop.records import ManifestRow, ModelCard, Region
from training_jobs.decisions import probabilities_of

type Floats = np.ndarray[Any, np.dtype[np.float64]]
type Integers = np.ndarray[Any, np.dtype[np.int64]]
type Flags = np.ndarray[Any, np.dtype[np.bool]]

_CONTRADICTED = 0.5  # score under which a detector contradicts


class LabelQuality(NamedTuple):
    """Of each image `[N]`: how likely its annotation is right, 0 to 1, and whether it counts as wrong."""

    scores: Floats
    wrong: Flags


def of_classes(rows: Sequence[ManifestRow], candidates: Sequence[Sequence[Region]], card: ModelCard) -> LabelQuality:
    """One class an image: the probability of the annotated one (self-confidence)."""
    given = np.array([card.classes.index(row.regions[0].label) for row in rows])
    probabilities = probabilities_of(candidates, card.classes)
    return LabelQuality(probabilities[np.arange(len(given)), given], _wrong(given, probabilities))


def of_sets(rows: Sequence[ManifestRow], candidates: Sequence[Sequence[Region]], card: ModelCard) -> LabelQuality:
    """Any number of classes an image: the probability of the least likely annotated decision; wrong where one of them is."""
    given = np.array([[any(region.label == name for region in row.regions) for name in card.classes] for row in rows])
    yes = probabilities_of(candidates, card.classes)
    decisions = [_wrong(has.astype(int), np.column_stack([1 - its, its])) for has, its in zip(given.T, yes.T, strict=True)]
    return LabelQuality(np.where(given, yes, 1 - yes).min(axis=1), np.any(decisions, axis=0))


def of_boxes(rows: Sequence[ManifestRow], candidates: Sequence[Sequence[Region]], card: ModelCard) -> LabelQuality:
    """Boxes that are missing, misplaced or of the wrong class: the least of ObjectLab's three scores (Tkachenko et al. 2023).

    ObjectLab takes boxes of a score of 0.95 for sure ones, which many detectors never give. Sure is here, as in confident
    learning, what scores as much as boxes do on average that find an annotated one. An annotated box that the model does not
    find is no contradiction.
    """
    from cleanlab.object_detection import rank

    labels = [_labels(row.regions, card) for row in rows]
    predictions = [_predictions(found, card) for found in candidates]
    sure = _usual_score(rows, candidates)
    scores = np.min(
        [
            rank.pool_box_scores_per_image(of_boxes)
            for of_boxes in (
                rank.compute_overlooked_box_scores(labels=labels, predictions=predictions, high_probability_threshold=sure),
                rank.compute_swap_box_scores(labels=labels, predictions=predictions, high_probability_threshold=sure),
                rank.compute_badloc_box_scores(labels=labels, predictions=predictions, low_probability_threshold=sure / 2),
            )
        ],
        axis=0,
    )
    return LabelQuality(scores, scores < _CONTRADICTED)


def _usual_score(rows: Sequence[ManifestRow], candidates: Sequence[Sequence[Region]]) -> float:
    """The mean score of the best candidates for the annotated boxes that have any; 1 where none has."""
    agrees = problem_types.of("detection").agrees
    best = [
        max((found.score or 0.0 for found in said if agrees([found], [region])), default=None)
        for row, said in zip(rows, candidates, strict=True)
        for region in row.regions
    ]
    return float(np.mean([score for score in best if score is not None] or [1.0]))


def _wrong(given: Integers, probabilities: Floats) -> Flags:
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


def _labels(regions: Sequence[Region], card: ModelCard) -> dict[str, Any]:
    """Annotated boxes as cleanlab takes them, in pixels, which it measures distances by."""
    classes = np.array([card.classes.index(region.label) for region in regions], dtype=np.int64)
    return {"bboxes": _pixels(regions, card), "labels": classes}


def _predictions(found: Sequence[Region], card: ModelCard) -> list[Floats]:
    """For each class its boxes and their scores, `[N, 5]`."""
    by_class = [[region for region in found if region.label == name] for name in card.classes]
    return [np.column_stack([_pixels(its, card), [region.score or 0.0 for region in its]]) for its in by_class]


def _pixels(regions: Sequence[Region], card: ModelCard) -> Floats:
    """`[N, 4]`"""
    corners = np.array([region.box for region in regions], dtype=np.float64).reshape(-1, 4)
    return corners * (card.width, card.height, card.width, card.height)
