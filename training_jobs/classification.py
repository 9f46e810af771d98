"""What is particular to image classification: targets, loss, scores and their plot, and what its decisions say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

from labelloop import problem_types
from labelloop.model_config import ModelConfig
from labelloop.records import Interval, ManifestRow, ModelCard, Region, Scores
from training_jobs import paired
from training_jobs.decisions import Decisions, LabelQuality, mislabelled, named, probabilities_of
from training_jobs.heads import Logits
from training_jobs.paired import Difference

_ALIKE = 10  # examples of a class from which it needs no help


class Classification:
    exact = True

    def loss(self, rows: Sequence[ManifestRow], config: ModelConfig, augment: Callable[[Tensor], Tensor]) -> ClassificationLoss:
        return ClassificationLoss(rows, config, augment)

    def heads(self, network: nn.Module) -> Logits:
        return Logits(network)

    def kept(self, candidates: Sequence[Region], card: ModelCard) -> list[Region]:
        return problem_types.of("classification").chosen(candidates, card)

    def scores(
        self, rows: Sequence[ManifestRow], found: Sequence[Sequence[Region]], classes: Sequence[str], version: int
    ) -> Scores:
        """Accuracy, and the confusion matrix, in which a class that is none of `classes` has no column."""
        confusion = [[0] * len(classes) for _ in classes]
        for row, (guess,) in zip(rows, found, strict=True):
            if guess.label in classes:
                confusion[classes.index(row.regions[0].label)][classes.index(guess.label)] += 1
        shown = [sum(row.regions[0].label == name for row in rows) for name in classes]
        right = [confusion[number][number] for number in range(len(classes))]
        return Scores(
            metric="accuracy",
            value=sum(right) / len(rows),
            per_class={name: right[number] / shown[number] for number, name in enumerate(classes) if shown[number]},
            confusion=confusion,
            version=version,
        )

    def decisions(self, rows: Sequence[ManifestRow], candidates: Sequence[Sequence[Region]], classes: Sequence[str]) -> Decisions:
        """One an image, about its class. The likeliest one is shown."""
        probabilities = probabilities_of(candidates, classes)
        answers = np.array([classes.index(row.regions[0].label) for row in rows], dtype=np.int64)
        return Decisions(probabilities, answers, probabilities.max(axis=1), probabilities.argmax(axis=1) == answers)

    def reported(self, truth: Sequence[Region], found: Sequence[Region]) -> list[tuple[float, bool]]:
        return named(truth, found)

    def interval(
        self,
        truths: Sequence[Sequence[Region]],
        found: Sequence[Sequence[Region]],
        classes: Sequence[str],  # noqa: ARG002 - others' depends on it
        confidence: float,
    ) -> Interval:
        right = sum(guess[0].label == truth[0].label for truth, guess in zip(truths, found, strict=True))
        return paired.share(right, len(truths), confidence)

    def comparable(self, truth: Sequence[Region], shared: Sequence[str]) -> bool:
        return truth[0].label in shared

    def difference(
        self,
        truths: Sequence[Sequence[Region]],
        challenger: Sequence[Sequence[Region]],
        champion: Sequence[Sequence[Region]],
        classes: Sequence[str],  # noqa: ARG002 - others' depends on it
        confidence: float,
    ) -> Difference:
        """Of accuracy and of each class's recall."""
        of = [truth[0].label for truth in truths]
        ours, theirs = (
            np.array([guess[0].label == label for guess, label in zip(found, of, strict=True)])
            for found in (challenger, champion)
        )
        return paired.proportions(ours, theirs, of, confidence)

    def label_quality(self, rows: Sequence[ManifestRow], candidates: Sequence[Sequence[Region]], card: ModelCard) -> LabelQuality:
        """The probability of the annotated class (self-confidence)."""
        given = np.array([card.classes.index(row.regions[0].label) for row in rows])
        probabilities = probabilities_of(candidates, card.classes)
        return LabelQuality(probabilities[np.arange(len(given)), given], mislabelled(given, probabilities))

    def plot(self, result: Scores, classes: Sequence[str], title: str, folder: Path) -> list[Path]:
        """The confusion matrix, a row for each true class."""
        numbers, picture = folder / "confusion.json", folder / "confusion.png"
        numbers.write_bytes(msgspec.json.encode({"classes": classes, "confusion": result.confusion}))
        figure = Figure(figsize=(7, 6), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(result.confusion or [], cmap="Blues")
        axes.set(title=title, xlabel="predicted", ylabel="annotated")
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(len(classes)), classes)
        figure.colorbar(image, label="images")
        figure.savefig(picture)
        return [numbers, picture]


class ClassificationLoss:
    """Cross-entropy on logits shifted by how often each class was annotated (logit adjustment, Menon et al. 2021).

    Without it a class with one example among seventy is hardly ever predicted; what serves are the logits without the shift.
    From ten examples on classes are alike: the queue asks for what is hard, so how often a class was annotated says nothing of
    how often it comes, and shifting by it made models worse the more of its labels they had (benchmarks/labels.py).
    """

    def __init__(self, rows: Sequence[ManifestRow], config: ModelConfig, augment: Callable[[Tensor], Tensor]) -> None:
        self._targets = torch.tensor([config.classes.index(row.regions[0].label) for row in rows], dtype=torch.int64)
        counts = torch.bincount(self._targets, minlength=len(config.classes)).float().clamp(max=_ALIKE)
        # Half an example more keeps the logarithm of a class without any finite.
        self._shift = torch.log((counts + 0.5) / (counts + 0.5).sum())
        self._label_smoothing, self._augment = config.hyperparameters.label_smoothing, augment

    def __call__(self, network: nn.Module, images: Tensor, examples: Tensor) -> Tensor:
        logits = network(self._augment(images))
        targets = self._targets[examples].to(logits.device)
        return functional.cross_entropy(logits + self._shift.to(logits.device), targets, label_smoothing=self._label_smoothing)
