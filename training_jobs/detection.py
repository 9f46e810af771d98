"""What is particular to detection: targets in pixels, the loss of torchvision's detectors, scores and their plot, and what
its decisions say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision
from torchvision import tv_tensors
from torchvision.transforms import v2

from labelloop import problem_types
from labelloop.model_config import ModelConfig
from labelloop.records import Interval, ManifestRow, ModelCard, Region, Scores
from training_jobs import heads, paired
from training_jobs.average_precision import AveragePrecision, matches
from training_jobs.decisions import Decisions, Integers, LabelQuality, yes_or_no
from training_jobs.multilabel import per_class_plot
from training_jobs.paired import Difference, Floats

_SMALLEST = 1.0  # pixels of a box's sides: what augmentation leaves less of is no example
_CONTRADICTED = 0.5  # score under which a detector contradicts


class Detection:
    # Asked to repeat itself on a GPU, torchvision pools regions by indexing instead of its kernel: Faster R-CNN then takes
    # ten times the memory and its time.
    exact = False

    def loss(self, rows: Sequence[ManifestRow], config: ModelConfig, augment: Callable[..., Any]) -> DetectionLoss:
        return DetectionLoss(rows, config, augment)

    def heads(self, network: nn.Module) -> heads.Heads:
        return heads.detector(network)

    def kept(self, candidates: Sequence[Region], card: ModelCard) -> list[Region]:  # noqa: ARG002 - others' depends on it
        """All of them: average precision looks at the order of the boxes down to the least sure."""
        return list(candidates)

    def scores(
        self, rows: Sequence[ManifestRow], found: Sequence[Sequence[Region]], classes: Sequence[str], version: int
    ) -> Scores:
        """COCO's average precision at an IoU of 0.5, over the 100 best boxes of an image; the mean over classes that have any."""
        strange = {region.label for regions in found for region in regions} - set(classes)
        names = [*classes, *sorted(strange)]
        metric = MeanAveragePrecision(
            box_format="xyxy",
            iou_type="bbox",
            iou_thresholds=[0.5],
            class_metrics=True,
            sync_on_compute=False,  # of several ranks the first alone measures
        )
        metric.update([_boxes(regions, names) for regions in found], [_boxes(row.regions, names) for row in rows])
        result = metric.compute()
        averages = zip(result["classes"].reshape(-1).tolist(), result["map_per_class"].reshape(-1).tolist(), strict=True)
        return Scores(
            metric="map_50",
            value=float(result["map"]),
            per_class={names[number]: average for number, average in averages if average >= 0},  # -1: no box of the class
            confusion=None,
            version=version,
        )

    def decisions(self, rows: Sequence[ManifestRow], candidates: Sequence[Sequence[Region]], classes: Sequence[str]) -> Decisions:
        """One a box, about whether it is right."""
        scores, right = [], []
        for row, regions in zip(rows, candidates, strict=True):
            decided = self.reported(row.regions, [region for region in regions if region.label in classes])
            scores += [score for score, _ in decided]
            right += [true for _, true in decided]
        return yes_or_no(np.array(scores, dtype=np.float64), np.array(right, dtype=bool))

    def reported(self, truth: Sequence[Region], found: Sequence[Region]) -> list[tuple[float, bool]]:
        """A box is right that has a true box of its class to itself, with an IoU of a half or more."""
        decided: list[tuple[float, bool]] = []
        for name in dict.fromkeys(region.label for region in found):
            best = sorted((region for region in found if region.label == name), key=lambda region: -(region.score or 0.0))
            hits = matches([region for region in truth if region.label == name], best)
            decided += [(region.score or 0.0, hit) for region, hit in zip(best, hits, strict=True)]
        return decided

    def interval(
        self,
        truths: Sequence[Sequence[Region]],
        found: Sequence[Sequence[Region]],
        classes: Sequence[str],
        confidence: float,
    ) -> Interval:
        return paired.resampled(AveragePrecision(truths, found, classes), len(truths), confidence)

    def comparable(self, truth: Sequence[Region], shared: Sequence[str]) -> bool:  # noqa: ARG002 - others' depends on it
        """Every image: a box where there is nothing is wrong."""
        return True

    def difference(
        self,
        truths: Sequence[Sequence[Region]],
        challenger: Sequence[Sequence[Region]],
        champion: Sequence[Sequence[Region]],
        classes: Sequence[str],
        confidence: float,
    ) -> Difference:
        """Of mAP@0.5, and of each class's average precision; boxes of other classes have no influence on it."""
        ours, theirs = AveragePrecision(truths, challenger, classes), AveragePrecision(truths, champion, classes)
        return paired.bootstrapped(ours, theirs, truths, classes, confidence)

    def label_quality(self, rows: Sequence[ManifestRow], candidates: Sequence[Sequence[Region]], card: ModelCard) -> LabelQuality:
        """Boxes that are missing, misplaced or of the wrong class: the least of ObjectLab's three scores (Tkachenko et al. 2023).

        ObjectLab takes boxes of a score of 0.95 for sure ones, which many detectors never give. Sure is here, as in confident
        learning, what scores as much as boxes do on average that find an annotated one. An annotated box that the model does
        not find is no contradiction.
        """
        sure = _usual_score(rows, candidates)
        pairs = [(row.regions, found) for row, found in zip(rows, candidates, strict=True)]
        least = min(_least_similarity(given, found, card) for given, found in pairs)
        scores = np.array([_objectlab(given, found, card, sure, least) for given, found in pairs])
        return LabelQuality(scores, scores < _CONTRADICTED)

    def plot(self, result: Scores, classes: Sequence[str], title: str, folder: Path) -> list[Path]:
        return per_class_plot(result, classes, title, folder)


class DetectionLoss:
    """The sum of the losses that a torchvision detector reckons itself."""

    def __init__(self, rows: Sequence[ManifestRow], config: ModelConfig, augment: Callable[..., Any]) -> None:
        self._size = (config.image.height, config.image.width)
        self._boxes = [_pixels(row.regions, self._size) for row in rows]
        self._labels = [_labels(row.regions, config.classes) for row in rows]
        self._augment = augment
        self._sound = v2.Compose([v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=_SMALLEST)])

    def __call__(self, network: nn.Module, images: Tensor, examples: Tensor) -> Tensor:
        pairs = [self._changed(image, number) for image, number in zip(images, examples.tolist(), strict=True)]
        losses = network([image for image, _ in pairs], [target for _, target in pairs])
        return torch.stack(list(losses.values())).sum()

    def _changed(self, image: Tensor, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """An example as augmentation makes it anew, with the boxes that are left in the image."""
        boxes = tv_tensors.BoundingBoxes(self._boxes[number].to(image.device, copy=True), format="XYXY", canvas_size=self._size)
        target = {"boxes": boxes, "labels": self._labels[number].to(image.device, copy=True)}
        changed, target = self._sound(*self._augment(tv_tensors.Image(image), target))
        return changed.as_subclass(Tensor), {name: value.as_subclass(Tensor) for name, value in target.items()}


def _pixels(regions: Sequence[Region], size: tuple[int, int]) -> Tensor:
    """Boxes float32 `[N, 4]` in pixels of the network's input."""
    height, width = size
    return _corners(regions) * torch.tensor([width, height, width, height])


def _corners(regions: Sequence[Region]) -> Tensor:
    """Boxes float32 `[N, 4]` as shares of the image."""
    return torch.tensor([region.box for region in regions], dtype=torch.float32).reshape(-1, 4)


def _labels(regions: Sequence[Region], names: Sequence[str]) -> Tensor:
    """int64 `[N]`, counted from 1: 0 is torchvision's background."""
    return torch.tensor([names.index(region.label) + 1 for region in regions], dtype=torch.int64)


def _boxes(regions: Sequence[Region], names: Sequence[str]) -> dict[str, Tensor]:
    """As torchmetrics takes an image's boxes; annotators' have no score, which it ignores."""
    return {
        "boxes": _corners(regions),
        "labels": torch.tensor([names.index(region.label) for region in regions], dtype=torch.int64),
        "scores": torch.tensor([region.score or 0.0 for region in regions], dtype=torch.float32),
    }


def _usual_score(rows: Sequence[ManifestRow], candidates: Sequence[Sequence[Region]]) -> float:
    """The mean score of the best candidates for the annotated boxes that have any; 1 where none has."""
    agrees = problem_types.of("detection").agrees
    best = [
        max((found.score or 0.0 for found in said if agrees([found], [region])), default=None)
        for row, said in zip(rows, candidates, strict=True)
        for region in row.regions
    ]
    return float(np.mean([score for score in best if score is not None] or [1.0]))


def _objectlab(given: Sequence[Region], found: Sequence[Region], card: ModelCard, sure: float, least: float) -> float:
    """The least of an image's scores; `least`: the least similarity in all images.

    Candidates that are less than `sure` have no say in two of the three, which go through all pairs of boxes one by one.
    """
    from cleanlab.object_detection import rank

    best = [region for region in found if (region.score or 0.0) >= sure]
    every, some = ([_compared(given, its, card) | {"min_possible_similarity": least}] for its in (found, best))
    of_boxes = (
        *rank.compute_overlooked_box_scores(auxiliary_inputs=some, high_probability_threshold=sure),
        *rank.compute_swap_box_scores(auxiliary_inputs=some, high_probability_threshold=sure),
        *rank.compute_badloc_box_scores(auxiliary_inputs=every, low_probability_threshold=sure / 2),
    )
    return float(rank.pool_box_scores_per_image(of_boxes).min())


def _least_similarity(given: Sequence[Region], found: Sequence[Region], card: ModelCard) -> float:
    similarity = _compared(given, found, card)["similarity_matrix"]
    return float(similarity.min(where=similarity > 0, initial=1.0))


def _compared(given: Sequence[Region], found: Sequence[Region], card: ModelCard) -> dict[str, Any]:
    """What cleanlab compares of an image, to the last bit as it would itself, box by box and six times over."""
    from cleanlab.internal.constants import ALPHA, EPSILON, EUC_FACTOR

    by_class = sorted(found, key=lambda region: card.classes.index(region.label))
    ours, theirs = _cleanlab_boxes(given, card), _cleanlab_boxes(by_class, card)
    sides = np.minimum(ours[:, np.newaxis, 2:], theirs[:, 2:]) - np.maximum(ours[:, np.newaxis, :2], theirs[:, :2])
    shared = sides.clip(min=0).prod(axis=2)
    areas, their_areas = ((boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (ours, theirs))
    iou = shared / np.maximum(areas[:, np.newaxis] + their_areas - shared, EPSILON)
    centres, their_centres = ((boxes[:, :2] + boxes[:, 2:]) / 2 for boxes in (ours, theirs))
    apart = centres[:, np.newaxis] - their_centres
    distance = 1 - np.exp(-np.sqrt(np.vecdot(apart, apart)) * EUC_FACTOR)
    return {
        "lab_labels": _numbers(given, card),
        "lab_bboxes": ours,
        "pred_labels": _numbers(by_class, card),
        "pred_label_probs": np.array([region.score or 0.0 for region in by_class], dtype=np.float64),
        "pred_bboxes": theirs,
        "iou_matrix": iou,
        "similarity_matrix": iou * ALPHA + (1 - ALPHA) * (1 - distance),
    }


def _numbers(regions: Sequence[Region], card: ModelCard) -> Integers:
    """Of the regions' classes."""
    return np.array([card.classes.index(region.label) for region in regions], dtype=np.int64)


def _cleanlab_boxes(regions: Sequence[Region], card: ModelCard) -> Floats:
    """Boxes float64 `[N, 4]` in pixels, which cleanlab measures distances by."""
    corners = np.array([region.box for region in regions], dtype=np.float64).reshape(-1, 4)
    return corners * (card.width, card.height, card.width, card.height)
