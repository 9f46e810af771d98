"""Multilabel: any number of classes an image, also none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from labelloop.errors import AnnotationError
from labelloop.label_studio.label_config import LabelConfig
from labelloop.label_studio.payloads import Annotation
from labelloop.problem_types.classification import choices, choices_result, chosen_labels
from labelloop.records import Metric, ModelCard, ProblemTypeName, Region

if TYPE_CHECKING:
    import numpy as np

THRESHOLD = 0.5  # probability from which a class is chosen


class Multilabel:
    name: ProblemTypeName = "multilabel"
    metric: Metric = "f1"
    outputs = ("logits",)
    control = choices(("multiple",), otherwise="takes one class only")

    def annotated(self, annotation: Annotation, label_config: LabelConfig) -> list[Region]:
        labels = chosen_labels(annotation, label_config)
        if len(set(labels)) != len(labels):
            raise AnnotationError("a class is chosen twice")
        return [Region(label=label) for label in sorted(labels)]

    def result(self, regions: Sequence[Region], label_config: LabelConfig, size: tuple[int, int]) -> list[dict[str, Any]]:
        return choices_result(regions, label_config)

    def candidates(self, outputs: Sequence[np.ndarray[Any, Any]], card: ModelCard) -> list[Region]:
        """Every class with its sigmoid probability at the card's temperature."""
        import numpy as np

        (logits,) = outputs
        probabilities = 0.5 * (1 + np.tanh(0.5 * logits.astype(np.float64) / card.temperature))  # no overflow at any logit
        order = np.argsort(-probabilities, kind="stable")
        return [Region(label=card.classes[number], score=float(probabilities[number])) for number in order]

    def chosen(self, candidates: Sequence[Region], card: ModelCard) -> list[Region]:
        return [region for region in candidates if (region.score or 0.0) >= THRESHOLD]

    def certainty(self, candidates: Sequence[Region], card: ModelCard) -> float:
        """The probability of the decision that the model is least sure of, at least a half."""
        return min(max(region.score or 0.0, 1 - (region.score or 0.0)) for region in candidates)

    def agrees(self, one: Sequence[Region], other: Sequence[Region]) -> bool:
        return {region.label for region in one} == {region.label for region in other}

    def prompted(self, context: Any, candidates: Sequence[Region]) -> None:
        return None
