"""Problem types: what differs between classification, multilabel and detection, training aside (see training_jobs).

Nothing here needs numpy until a model's outputs are read, so that functions without a model stay small.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from labelloop.label_studio.label_config import Control, LabelConfig
from labelloop.label_studio.payloads import Annotation
from labelloop.problem_types.classification import Classification
from labelloop.problem_types.detection import Detection
from labelloop.problem_types.multilabel import Multilabel
from labelloop.records import Metric, ModelCard, ProblemTypeName, Region

if TYPE_CHECKING:
    import numpy as np


class ProblemType(Protocol):
    """What an annotation, a model's output and a prediction mean.

    `outputs` names the ONNX file's outputs; `metric` is what versions are compared by.
    """

    @property
    def name(self) -> ProblemTypeName: ...
    @property
    def metric(self) -> Metric: ...
    @property
    def control(self) -> Control: ...
    @property
    def outputs(self) -> tuple[str, ...]: ...

    def annotated(self, annotation: Annotation, label_config: LabelConfig) -> list[Region]:
        """What the annotator said. Raises `AnnotationError` when that cannot be learnt from."""
        ...

    def result(self, regions: Sequence[Region], label_config: LabelConfig, size: tuple[int, int]) -> list[dict[str, Any]]:
        """Regions as the result of a prediction or an annotation; `size` is the upright image's width and height, pixels."""
        ...

    def candidates(self, outputs: Sequence[np.ndarray[Any, Any]], card: ModelCard) -> list[Region]:
        """All that the model takes into consideration for one image, best first, from its outputs without the batch axis."""
        ...

    def chosen(self, candidates: Sequence[Region], card: ModelCard) -> list[Region]:
        """The candidates that annotators are shown."""
        ...

    def certainty(self, candidates: Sequence[Region], card: ModelCard) -> float:
        """How sure the model is of what it chose, 0 to 1; uncertainty sampling hands out the lowest first."""
        ...

    def agrees(self, one: Sequence[Region], other: Sequence[Region]) -> bool:
        """Whether two say the same of an image, scores aside: the same classes; for boxes, an IoU of at least a half."""
        ...

    def prompted(self, context: Any, candidates: Sequence[Region]) -> list[Region] | None:
        """The best candidates where an annotator points (interactive mode); None where the type has no such tools."""
        ...


PROBLEM_TYPES: dict[ProblemTypeName, ProblemType] = {
    "classification": Classification(),
    "multilabel": Multilabel(),
    "detection": Detection(),
}


def of(name: ProblemTypeName) -> ProblemType:
    return PROBLEM_TYPES[name]
