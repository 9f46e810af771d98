"""Classification: exactly one class an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from labelloop.errors import AnnotationError
from labelloop.label_studio.label_config import Control, LabelConfig
from labelloop.label_studio.payloads import Annotation, DrawnRegion, Value
from labelloop.records import Metric, ModelCard, ProblemTypeName, Region

if TYPE_CHECKING:
    import numpy as np

Kind = Literal["choices", "rectanglelabels"]  # of a control tag's regions, and the key of their classes
_SHOWN = 40  # characters of a name that may be anything


def choices(allowed: tuple[str, ...], *, otherwise: str) -> Control:
    """A `<Choices>` tag with one of these values of `choice`."""
    return Control(tag="Choices", item="Choice", attribute="choice", allowed=allowed, default="single", otherwise=otherwise)


class Classification:
    name: ProblemTypeName = "classification"
    metric: Metric = "accuracy"
    outputs = ("logits",)
    control = choices(("single", "single-radio"), otherwise="takes several classes")

    def annotated(self, annotation: Annotation, label_config: LabelConfig) -> list[Region]:
        labels = chosen_labels(annotation, label_config)
        if len(labels) != 1:
            raise AnnotationError(f"{len(labels)} classes are chosen instead of one")
        return [Region(label=labels[0])]

    def result(self, regions: Sequence[Region], label_config: LabelConfig, size: tuple[int, int]) -> list[dict[str, Any]]:
        return choices_result(regions, label_config)

    def candidates(self, outputs: Sequence[np.ndarray[Any, Any]], card: ModelCard) -> list[Region]:
        """Every class with its softmax probability at the card's temperature."""
        import numpy as np

        (logits,) = outputs
        exponentials = np.exp((logits - logits.max()).astype(np.float64) / card.temperature)
        probabilities = exponentials / exponentials.sum()
        order = np.argsort(-probabilities, kind="stable")
        return [Region(label=card.classes[number], score=float(probabilities[number])) for number in order]

    def chosen(self, candidates: Sequence[Region], card: ModelCard) -> list[Region]:
        return list(candidates[:1])

    def certainty(self, candidates: Sequence[Region], card: ModelCard) -> float:
        """How much likelier the likeliest class is than the next (the margin)."""
        best, *others = (region.score or 0.0 for region in candidates)
        return best - max(others, default=0.0)

    def agrees(self, one: Sequence[Region], other: Sequence[Region]) -> bool:
        return [region.label for region in one] == [region.label for region in other]

    def prompted(self, context: Any, candidates: Sequence[Region]) -> None:
        return None


def chosen_labels(annotation: Annotation, label_config: LabelConfig) -> list[str]:
    """The choices of an annotation's control tag. Raises `AnnotationError` where they are no list of texts."""
    labels: list[str] = []
    for region in drawn(annotation, label_config, "choices"):
        labels += texts(region.value, "choices")
    return labels


def drawn(annotation: Annotation, label_config: LabelConfig, kind: Kind) -> list[DrawnRegion]:
    """The regions of an annotation's control tag.

    Raises `AnnotationError` where a tag of another name made one of them: it was renamed, and without what it says the image
    would be an example of nothing.
    """
    found = []
    for region in annotation.result or []:
        if region.type == kind:
            if region.from_name != label_config.from_name:
                its, ours = str(region.from_name)[:_SHOWN], label_config.from_name
                raise AnnotationError(f"it names the control tag {its!r}, labeling_template.xml {ours!r}")
            found.append(region)
    return found


def texts(value: Any, key: Kind) -> list[str]:
    """The list of texts under a key of a region's value; none where it is missing. Raises `AnnotationError`."""
    if value is None:
        return []
    if not isinstance(value, Value):
        raise AnnotationError("a region's value is no object")
    found = getattr(value, key) or []
    if isinstance(found, list):
        for text in found:
            if not isinstance(text, str):
                break
        else:
            return found
    raise AnnotationError(f"a region holds no list of texts under {key!r}")


def choices_result(regions: Sequence[Region], label_config: LabelConfig) -> list[dict[str, Any]]:
    """Classes as Label Studio's result, with the score of the least likely; none of them is an empty one."""
    if not regions:
        return []
    scores = [region.score for region in regions if region.score is not None]
    return [
        {
            "from_name": label_config.from_name,
            "to_name": label_config.to_name,
            "type": "choices",
            "value": {"choices": [region.label for region in regions]},
            **({"score": min(scores)} if scores else {}),
        }
    ]
