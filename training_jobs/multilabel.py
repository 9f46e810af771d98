"""What is particular to images with any number of classes: targets, loss, scores and their plot, and what its decisions say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.functional.classification import binary_f1_score

from labelloop import problem_types
from labelloop.model_config import ModelConfig
from labelloop.records import METRIC_TITLES, Interval, ManifestRow, ModelCard, Region, Scores
from training_jobs import paired
from training_jobs.decisions import Decisions, LabelQuality, mislabelled, named, probabilities_of, yes_or_no
from training_jobs.heads import Logits
from training_jobs.paired import Difference, Floats


class Multilabel:
    exact = True

    def loss(self, rows: Sequence[ManifestRow], config: ModelConfig, augment: Callable[[Tensor], Tensor]) -> MultilabelLoss:
        return MultilabelLoss(rows, config, augment)

    def heads(self, network: nn.Module) -> Logits:
        return Logits(network)

    def kept(self, candidates: Sequence[Region], card: ModelCard) -> list[Region]:
        return problem_types.of("multilabel").chosen(candidates, card)

    def scores(
        self, rows: Sequence[ManifestRow], found: Sequence[Sequence[Region]], classes: Sequence[str], version: int
    ) -> Scores:
        """F1 over the decisions about all classes, and of each class that an image has."""
        strange = {region.label for regions in found for region in regions} - set(classes)
        names = [*classes, *sorted(strange)]
        truth, chosen = _table([row.regions for row in rows], names), _table(found, names)
        return Scores(
            metric="f1",
            value=float(binary_f1_score(chosen.flatten(), truth.flatten())),
            per_class={
                name: float(binary_f1_score(chosen[:, number], truth[:, number]))
                for number, name in enumerate(classes)
                if truth[:, number].any()
            },
            confusion=None,
            version=version,
        )

    def decisions(self, rows: Sequence[ManifestRow], candidates: Sequence[Sequence[Region]], classes: Sequence[str]) -> Decisions:
        """One a class and image, about whether the image has it."""
        has = np.array([[any(region.label == name for region in row.regions) for name in classes] for row in rows], dtype=bool)
        return yes_or_no(probabilities_of(candidates, classes).ravel(), has.ravel())

    def reported(self, truth: Sequence[Region], found: Sequence[Region]) -> list[tuple[float, bool]]:
        return named(truth, found)

    def interval(
        self,
        truths: Sequence[Sequence[Region]],
        found: Sequence[Sequence[Region]],
        classes: Sequence[str],
        confidence: float,
    ) -> Interval:
        return paired.resampled(F1(truths, found, classes), len(truths), confidence)

    def comparable(self, truth: Sequence[Region], shared: Sequence[str]) -> bool:  # noqa: ARG002 - others' depends on it
        """Every image: that a class is not there is a decision, too."""
        return True

    def difference(
        self,
        truths: Sequence[Sequence[Region]],
        challenger: Sequence[Sequence[Region]],
        champion: Sequence[Sequence[Region]],
        classes: Sequence[str],
        confidence: float,
    ) -> Difference:
        """Of F1 over all decisions, and of each class's."""
        ours, theirs = F1(truths, challenger, classes), F1(truths, champion, classes)
        return paired.bootstrapped(ours, theirs, truths, classes, confidence)

    def label_quality(self, rows: Sequence[ManifestRow], candidates: Sequence[Sequence[Region]], card: ModelCard) -> LabelQuality:
        """The probability of the least likely annotated decision about a class; wrong where one of them is."""
        given = np.array([[any(region.label == name for region in row.regions) for name in card.classes] for row in rows])
        yes = probabilities_of(candidates, card.classes)
        wrong = [mislabelled(has.astype(int), np.column_stack([1 - its, its])) for has, its in zip(given.T, yes.T, strict=True)]
        return LabelQuality(np.where(given, yes, 1 - yes).min(axis=1), np.any(wrong, axis=0))

    def plot(self, result: Scores, classes: Sequence[str], title: str, folder: Path) -> list[Path]:
        return per_class_plot(result, classes, title, folder)


class F1:
    """F1 of weighed images: over the decisions about all classes, then of each class that an image shows."""

    def __init__(self, truths: Sequence[Sequence[Region]], found: Sequence[Sequence[Region]], classes: Sequence[str]) -> None:
        strange = {region.label for regions in found for region in regions} - set(classes)
        names = [*classes, *sorted(strange)]
        truth, chosen = (_table(images, names).numpy().astype(np.float64) for images in (truths, found))
        self._hits, self._truth, self._chosen, self._classes = truth * chosen, truth, chosen, len(classes)

    def __call__(self, weights: Floats) -> Floats:
        hits, truth, chosen = (weights @ table for table in (self._hits, self._truth, self._chosen))
        with np.errstate(invalid="ignore"):
            total = 2 * hits.sum(axis=1) / (truth + chosen).sum(axis=1)
            each = np.where(truth > 0, 2 * hits / (truth + chosen), np.nan)
        return np.column_stack([total, each[:, : self._classes]])


class MultilabelLoss:
    """Binary cross-entropy of each class for itself."""

    def __init__(self, rows: Sequence[ManifestRow], config: ModelConfig, augment: Callable[[Tensor], Tensor]) -> None:
        smoothing = config.hyperparameters.label_smoothing
        targets = _table([row.regions for row in rows], config.classes).float()
        self._targets, self._augment = targets * (1 - smoothing) + smoothing / 2, augment

    def __call__(self, network: nn.Module, images: Tensor, examples: Tensor) -> Tensor:
        logits = network(self._augment(images))
        return functional.binary_cross_entropy_with_logits(logits, self._targets[examples].to(logits.device))


def per_class_plot(result: Scores, classes: Sequence[str], title: str, folder: Path) -> list[Path]:
    """A bar for each class; one that the holdout has not is left out."""
    numbers, picture = folder / "per_class.json", folder / "per_class.png"
    numbers.write_bytes(msgspec.json.encode({"metric": result.metric, "per_class": result.per_class}))
    shown = [name for name in classes if name in result.per_class]
    figure = Figure(figsize=(7, 1.5 + 0.3 * len(shown)), layout="constrained")
    axes = figure.subplots()
    axes.barh(shown, [result.per_class[name] for name in shown])
    axes.set(title=title, xlabel=METRIC_TITLES[result.metric], xlim=(0, 1))
    axes.invert_yaxis()
    figure.savefig(picture)
    return [numbers, picture]


def _table(images: Sequence[Sequence[Region]], names: Sequence[str]) -> Tensor:
    """int64 `[images, names]`: 1 where the image has the class."""
    table = torch.zeros(len(images), len(names), dtype=torch.int64)
    for number, regions in enumerate(images):
        for region in regions:
            table[number, names.index(region.label)] = 1
    return table
