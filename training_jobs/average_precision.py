"""Average precision at an IoU of 0.5 of weighed images, as COCO's evaluation defines it: fast enough for a bootstrap.

Which boxes hit is the same in every resample of the images, so it is found out once; a resample is a cumulative sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from labelloop.problem_types.detection import iou
from labelloop.records import Region
from training_jobs.paired import Floats

_IOU = 0.5
_BOXES = 100  # the best of a class in an image
_RECALLS = np.array(torch.linspace(0, 1, 101).tolist())  # at which precision is read, to the last bit torchmetrics'


@dataclass(frozen=True)
class _Found:
    """The boxes of a class from all images, the best first, and the class's true boxes in each image."""

    image: NDArray[np.int64]
    hit: NDArray[np.bool_]
    truth: NDArray[np.int64]


class AveragePrecision:
    """The mean over the classes that an image shows, then of each class."""

    def __init__(self, truths: Sequence[Sequence[Region]], found: Sequence[Sequence[Region]], classes: Sequence[str]) -> None:
        self._classes = [_matched(truths, found, name) for name in classes]

    def __call__(self, weights: Floats) -> Floats:
        each = np.column_stack([_average_precision(one, weights) for one in self._classes])
        seen = ~np.isnan(each)
        with np.errstate(invalid="ignore"):
            mean = np.where(seen, each, 0).sum(axis=1) / seen.sum(axis=1)
        return np.column_stack([mean, each])


def _matched(truths: Sequence[Sequence[Region]], found: Sequence[Sequence[Region]], name: str) -> _Found:
    scores, images, hits = [], [], []
    for number, (truth, regions) in enumerate(zip(truths, found, strict=True)):
        best = sorted((r for r in regions if r.label == name), key=lambda region: -(region.score or 0.0))[:_BOXES]
        scores += [region.score or 0.0 for region in best]
        images += [number] * len(best)
        hits += matches([region for region in truth if region.label == name], best)
    order = np.argsort(-np.array(scores, dtype=np.float32), kind="stable")
    truth_counts = np.array([sum(region.label == name for region in truth) for truth in truths])
    hit = np.array(hits, dtype=bool)[order]
    last = int(hit.nonzero()[0][-1]) + 1 if hit.any() else 0  # what comes after the last hit raises no recall
    return _Found(image=np.array(images, dtype=np.int64)[order][:last], hit=hit[:last], truth=truth_counts)


def matches(truth: list[Region], found: list[Region]) -> list[bool]:
    """Whether each box, the best first, has a true box to itself: of those still free the one that it overlaps most."""
    free, hits = list(truth), []
    for region in found:
        overlaps = [iou(region.box, other.box) if region.box and other.box else 0.0 for other in free]
        best = max(range(len(free)), key=lambda number: overlaps[number], default=None)
        hit = best is not None and overlaps[best] >= _IOU
        if best is not None and hit:
            free.pop(best)
        hits.append(hit)
    return hits


def _average_precision(found: _Found, weights: Floats) -> Floats:
    """float64 `[B]` for weights `[B, images]`; NaN where no true box is weighed."""
    truth = weights @ found.truth
    drawn = weights[:, found.image]
    hits, boxes = np.cumsum(drawn * found.hit, axis=1), np.cumsum(drawn, axis=1)
    precision = np.divide(hits, boxes, out=np.zeros_like(hits), where=boxes > 0)
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    least = np.ceil(_RECALLS * truth[:, np.newaxis])  # hits that reach each recall; exact, as these have 24 bits
    read = np.take_along_axis(np.pad(best, ((0, 0), (0, 1))), _first_with(hits, least), axis=1)
    return np.where(truth > 0, read.sum(axis=1) / len(_RECALLS), np.nan)


def _first_with(hits: Floats, least: Floats) -> NDArray[np.int64]:
    """Where each row of rising `hits` `[B, boxes]` first has so many, `[B, recalls]`; its end where it never has."""
    rows, boxes = hits.shape
    step = np.arange(rows)[:, np.newaxis] * (least.max() + hits.max(initial=0) + 1)  # sets the rows, end to end, apart
    places: NDArray[np.int64] = np.searchsorted((hits + step).ravel(), (least + step).ravel()).reshape(least.shape)
    places -= boxes * np.arange(rows)[:, np.newaxis]
    return places
