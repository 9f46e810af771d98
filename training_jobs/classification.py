"""What is particular to image classification: targets, loss, prediction, scores and their plot."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from labelloop.inference import Model
from labelloop.records import ManifestRow, Scores
from training_jobs.dataset import Pixels

_RUNS_AT_ONCE = 4


class ClassificationLoss:
    """Cross-entropy on logits shifted by how often each class was annotated (logit adjustment, Menon et al. 2021).

    Without it a class with one example among seventy is hardly ever predicted; what serves are the logits without the shift.
    """

    def __init__(self, targets: Tensor, n_classes: int, label_smoothing: float) -> None:
        counts = torch.bincount(targets, minlength=n_classes).float()
        # Half an example more keeps the logarithm of a class without any finite.
        self._shift = torch.log((counts + 0.5) / (counts + 0.5).sum())
        self._label_smoothing = label_smoothing

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of a batch: logits `[N, classes]`, targets int64 `[N]`."""
        return functional.cross_entropy(logits + self._shift.to(logits.device), targets, label_smoothing=self._label_smoothing)


def accuracy(logits: Tensor, targets: Tensor) -> float:
    """Share of the images whose largest logit is their class's."""
    return float((logits.argmax(dim=1) == targets).double().mean())


def predict(model: Model, pixels: Pixels) -> list[str]:
    """The class that each image is taken for, one image a run, as serving does it."""
    with ThreadPoolExecutor(_RUNS_AT_ONCE) as runs:
        return [
            model.card.classes[int(best)]
            for best in runs.map(lambda image: np.argmax(model.logits(image[np.newaxis])[0]), pixels)
        ]


def scores(rows: Sequence[ManifestRow], predicted: Sequence[str], classes: Sequence[str], version: int) -> Scores:
    """Accuracy and confusion matrix. A prediction that is none of `classes` (an older model's) is wrong and in no column."""
    confusion = [[0] * len(classes) for _ in classes]
    for row, guess in zip(rows, predicted, strict=True):
        if guess in classes:
            confusion[classes.index(row.label)][classes.index(guess)] += 1
    right = sum(row.label == guess for row, guess in zip(rows, predicted, strict=True))
    return Scores(accuracy=right / len(rows), confusion=confusion, version=version)


def confusion_plot(result: Scores, classes: Sequence[str], title: str) -> Figure:
    """The confusion matrix, a row for each true class."""
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(result.confusion, cmap="Blues")
    axes.set(title=title, xlabel="predicted", ylabel="annotated")
    axes.set_xticks(range(len(classes)), classes, rotation=90)
    axes.set_yticks(range(len(classes)), classes)
    figure.colorbar(image, label="images")
    return figure
