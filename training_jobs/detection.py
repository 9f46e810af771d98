"""What is particular to detection: targets in pixels, the loss of torchvision's detectors, scores and their plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision
from torchvision import tv_tensors
from torchvision.transforms import v2

from labelloop.model_config import ModelConfig
from labelloop.records import Interval, ManifestRow, ModelCard, Region, Scores
from training_jobs import decisions, heads, label_quality, paired
from training_jobs.average_precision import AveragePrecision
from training_jobs.decisions import Decisions
from training_jobs.label_quality import LabelQuality
from training_jobs.multilabel import per_class_plot
from training_jobs.paired import Difference

_SMALLEST = 1.0  # pixels of a box's sides: what augmentation leaves less of is no example


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
        return decisions.of_boxes(rows, candidates, classes)

    def reported(self, truth: Sequence[Region], found: Sequence[Region]) -> list[tuple[float, bool]]:
        return decisions.boxed(truth, found)

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
        return label_quality.of_boxes(rows, candidates, card)

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
