"""What the training job asks of a problem type: one file each, `classification`, `multilabel` and `detection`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from labelloop.model_config import ModelConfig
from labelloop.records import Interval, ManifestRow, ModelCard, ProblemTypeName, Region, Scores
from training_jobs.classification import Classification
from training_jobs.decisions import Decisions, LabelQuality
from training_jobs.detection import Detection
from training_jobs.heads import Heads
from training_jobs.multilabel import Multilabel
from training_jobs.paired import Difference

type Augment = Callable[..., Any]  # of model.py; classification and multilabel: batch → batch, detection: image, target → both


class Loss(Protocol):
    """The loss on the examples that it was made for."""

    def __call__(self, network: nn.Module, images: Tensor, examples: Tensor) -> Tensor:
        """Mean loss of a batch: images float32 `[N, channels, height, width]` between 0 and 1, and their numbers, int64 `[N]`."""
        ...


class Problem(Protocol):
    @property
    def exact(self) -> bool:
        """Whether to ask torch, on a GPU, for nothing but what repeats itself exactly."""
        ...

    def loss(self, rows: Sequence[ManifestRow], config: ModelConfig, augment: Augment) -> Loss:
        """The loss on the images of `rows`, in their order; it changes the images as `augment` says."""
        ...

    def heads(self, network: nn.Module) -> Heads:
        """The network with the outputs that serve. Raises `ConfigError` when they cannot be had from it."""
        ...

    def kept(self, candidates: Sequence[Region], card: ModelCard) -> list[Region]:
        """What scores are reckoned from, and the evaluation report keeps."""
        ...

    def scores(
        self, rows: Sequence[ManifestRow], found: Sequence[Sequence[Region]], classes: Sequence[str], version: int
    ) -> Scores:
        """The metric over images, from what annotators said of each and what was kept of the model's candidates.

        `rows` have regions, at least one of them. A label that is none of `classes` (an older model's) is wrong.
        """
        ...

    def decisions(self, rows: Sequence[ManifestRow], candidates: Sequence[Sequence[Region]], classes: Sequence[str]) -> Decisions:
        """What the model decided about images, from all that it took into consideration, and what came true."""
        ...

    def reported(self, truth: Sequence[Region], found: Sequence[Region]) -> list[tuple[float, bool]]:
        """The score of each thing that an evaluation report keeps of an image, and whether it is right."""
        ...

    def interval(
        self, truths: Sequence[Sequence[Region]], found: Sequence[Sequence[Region]], classes: Sequence[str], confidence: float
    ) -> Interval:
        """The metric with its interval, from what an evaluation report keeps of its images, of which there is at least one."""
        ...

    def comparable(self, truth: Sequence[Region], shared: Sequence[str]) -> bool:
        """Whether an image with this truth says something of models that know only the `shared` classes."""
        ...

    def difference(
        self,
        truths: Sequence[Sequence[Region]],
        challenger: Sequence[Sequence[Region]],
        champion: Sequence[Sequence[Region]],
        classes: Sequence[str],
        confidence: float,
    ) -> Difference:
        """How much more the challenger reaches than the champion, with intervals; image by image, all of these `classes`.

        What is kept of either's candidates may hold labels that are none of `classes`: they are wrong.
        """
        ...

    def label_quality(self, rows: Sequence[ManifestRow], candidates: Sequence[Sequence[Region]], card: ModelCard) -> LabelQuality:
        """How far each image's annotation is to be trusted, by all that a model which never saw the image took into
        consideration. There is at least one row."""
        ...

    def plot(self, result: Scores, classes: Sequence[str], title: str, folder: Path) -> list[Path]:
        """Files about the result, for MLflow: the numbers and a picture."""
        ...


_PROBLEMS: dict[ProblemTypeName, Problem] = {
    "classification": Classification(),
    "multilabel": Multilabel(),
    "detection": Detection(),
}


def of(name: ProblemTypeName) -> Problem:
    return _PROBLEMS[name]
