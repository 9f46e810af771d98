"""Detection: any number of upright boxes an image, each of one class.

Label Studio measures regions in percent of the image; here boxes are shares of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from labelloop.errors import AnnotationError, RequestError
from labelloop.label_studio.label_config import Control, LabelConfig
from labelloop.label_studio.payloads import Annotation, DrawnRegion
from labelloop.problem_types.classification import Kind, drawn, texts
from labelloop.records import Box, BoxRules, Metric, ModelCard, ProblemTypeName, Region

if TYPE_CHECKING:
    import numpy as np

FLOOR = 0.05  # score under which a box is not considered, as in COCO's evaluations
_UPRIGHT = 0.01  # degrees
_FAR = 1e9  # percent, or degrees: more is no number that an editor makes
_SAME = 0.5  # IoU from which two boxes are one thing, as in the metric
_KIND: Kind = "rectanglelabels"


class Detection:
    name: ProblemTypeName = "detection"
    metric: Metric = "map_50"
    outputs = ("boxes", "scores")
    control = Control(
        tag="RectangleLabels",
        item="Label",
        attribute="canRotate",
        allowed=("false",),
        default="true",
        otherwise="lets annotators turn rectangles, which cannot be learnt from",
    )

    def annotated(self, annotation: Annotation, label_config: LabelConfig) -> list[Region]:
        """The rectangles; an image without any is an example of nothing. Raises `AnnotationError` on a turned one."""
        return [_rectangle(region) for region in drawn(annotation, label_config, _KIND)]

    def result(self, regions: Sequence[Region], label_config: LabelConfig, size: tuple[int, int]) -> list[dict[str, Any]]:
        width, height = size
        return [
            {
                "from_name": label_config.from_name,
                "to_name": label_config.to_name,
                "type": _KIND,
                "original_width": width,
                "original_height": height,
                "image_rotation": 0,
                "value": {**_percent(region.box), "rotation": 0, _KIND: [region.label]},
                **({} if region.score is None else {"score": region.score}),
            }
            for region in regions
            if region.box is not None
        ]

    def candidates(self, outputs: Sequence[np.ndarray[Any, Any]], card: ModelCard) -> list[Region]:
        """The boxes of some score after non-maximum suppression among those of each class.

        `outputs`: boxes `[A, K, 4]`, K = 1 or the number of classes, and scores `[A, classes]`. The card's temperature changes
        what the scores of the boxes found say, not which boxes are found.
        """
        import numpy as np

        boxes, scores = outputs
        anchors, classes = np.nonzero(scores >= FLOOR)
        chosen = np.clip(boxes[anchors, classes if boxes.shape[1] > 1 else 0], 0.0, 1.0)
        has_area = (chosen[:, 2:] > chosen[:, :2]).all(axis=1)
        anchors, classes, chosen = anchors[has_area], classes[has_area], chosen[has_area]
        found = scores[anchors, classes]
        shown = _tempered(found, card.temperature)
        return [
            Region(label=card.classes[classes[n]], box=_as_box(chosen[n]), score=float(shown[n]))
            for n in suppress(chosen, found, classes, _rules(card))
        ]

    def chosen(self, candidates: Sequence[Region], card: ModelCard) -> list[Region]:
        return [region for region in candidates if (region.score or 0.0) >= _rules(card).score_threshold]

    def certainty(self, candidates: Sequence[Region], card: ModelCard) -> float:
        """The least certain of all decisions: that a box is shown (its score), or that one is not (one minus its score)."""
        threshold = _rules(card).score_threshold
        scores = [region.score or 0.0 for region in candidates]
        return min((score if score >= threshold else 1 - score for score in scores), default=1 - FLOOR)

    def agrees(self, one: Sequence[Region], other: Sequence[Region]) -> bool:
        """Whether each box has a partner in the other: of its class, with an IoU of at least a half."""
        return len(one) == len(other) and _all_find_a_partner([[_are_partners(a, b) for b in other] for a in one])

    def prompted(self, context: Any, candidates: Sequence[Region]) -> list[Region]:
        """The best candidate under the newest rectangle or keypoint, with the class that the annotator has picked.

        A rectangle gets the candidate of the largest IoU times score, a keypoint the best that holds it; those of the picked
        class go first. Raises `RequestError` when the context holds neither.
        """
        label, where = _prompt(context)
        ranked = [(_fit(where, region), region) for region in candidates if region.box is not None]
        hits = [(region.label == label, fit, region) for fit, region in ranked if fit > 0]
        if not hits:
            return []
        best = max(hits, key=lambda hit: hit[:2])[2]
        return [Region(label=label or best.label, box=best.box, score=best.score)]


def suppress(
    boxes: np.ndarray[Any, Any], scores: np.ndarray[Any, Any], classes: np.ndarray[Any, Any], rules: BoxRules
) -> list[int]:
    """Greedy non-maximum suppression among the boxes `[N, 4]` of each class; the numbers of those kept, best first.

    As torchvision.ops.batched_nms: a box goes when it overlaps a better one of its class by more than the threshold.
    """
    import numpy as np

    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    waiting = np.argsort(-scores, kind="stable")
    kept: list[int] = []
    while len(waiting) and len(kept) < rules.max_boxes:
        best, waiting = int(waiting[0]), waiting[1:]
        kept.append(best)
        corner = np.minimum(boxes[waiting, 2:], boxes[best, 2:]) - np.maximum(boxes[waiting, :2], boxes[best, :2])
        shared = np.clip(corner, 0, None).prod(axis=1)
        overlap = shared / (areas[waiting] + areas[best] - shared)
        waiting = waiting[(overlap <= rules.iou_threshold) | (classes[waiting] != classes[best])]
    return kept


def iou(one: Box, other: Box) -> float:
    """Intersection over union of two boxes."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / (_area(one) + _area(other) - width * height)


def _are_partners(one: Region, other: Region) -> bool:
    if one.label != other.label or one.box is None or other.box is None:
        return False
    return iou(one.box, other.box) >= _SAME


def _all_find_a_partner(suits: list[list[bool]]) -> bool:
    """Whether every row can have a column of its own that suits it (bipartite matching by augmenting paths)."""
    taken: dict[int, int] = {}  # column → row

    def finds(row: int, tried: set[int]) -> bool:
        for column, suitable in enumerate(suits[row]):
            if suitable and column not in tried:
                tried.add(column)
                if column not in taken or finds(taken[column], tried):
                    taken[column] = row
                    return True
        return False

    return all(finds(row, set()) for row in range(len(suits)))


def _tempered(scores: np.ndarray[Any, Any], temperature: float) -> np.ndarray[Any, Any]:
    """Scores between 0 and 1 with their logits divided by the temperature; at 1 they stay to the last digit."""
    if temperature == 1:
        return scores
    exact = scores.astype("float64")
    right, wrong = exact ** (1 / temperature), (1 - exact) ** (1 / temperature)
    tempered: np.ndarray[Any, Any] = right / (right + wrong)
    return tempered


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _rules(card: ModelCard) -> BoxRules:
    if card.boxes is None:
        raise ValueError(f"the card of {card.model} has no box rules, though it is a detector's")
    return card.boxes


def _as_box(corners: np.ndarray[Any, Any]) -> Box:
    left, top, right, bottom = (float(corner) for corner in corners)
    return left, top, right, bottom


def _percent(box: Box) -> dict[str, float]:
    left, top, right, bottom = (100 * corner for corner in box)
    return {"x": left, "y": top, "width": right - left, "height": bottom - top}


def _rectangle(region: DrawnRegion) -> Region:
    value: Any = region.value
    labels = texts(value, _KIND)
    if len(labels) != 1:
        raise AnnotationError(f"a rectangle has {len(labels)} classes instead of one")
    turned = _number(value.rotation) % 360
    if turned > _UPRIGHT and 360 - turned > _UPRIGHT:
        raise AnnotationError('a rectangle is turned; draw it upright (the label config can forbid it: canRotate="false")')
    if region.image_rotation and _number(region.image_rotation) % 360:
        raise AnnotationError("the image was turned in the editor; draw rectangles on the upright image")
    return Region(label=labels[0], box=_box(value.x, value.y, value.width, value.height))


def _box(x: Any, y: Any, width: Any, height: Any) -> Box:
    """A rectangle in percent as shares, cut at the image's border."""
    left, top = _number(x) / 100, _number(y) / 100
    right, bottom = left + _number(width) / 100, top + _number(height) / 100
    if left < 0.0 or top < 0.0 or right > 1.0 or bottom > 1.0:
        left, top, right, bottom = (min(max(edge, 0.0), 1.0) for edge in (left, top, right, bottom))
    if right <= left or bottom <= top:
        raise AnnotationError("a rectangle has no area inside the image")
    return left, top, right, bottom


def _number(value: Any) -> float:
    kind = type(value)
    if (kind is float or kind is int) and -_FAR < value < _FAR:
        return value  # type: ignore[no-any-return]
    raise AnnotationError(f"a rectangle holds {kind.__name__} where a number should be")


def _prompt(context: Any) -> tuple[str | None, Box]:
    """The class picked and the place pointed at, the newest of a context's regions; a keypoint is a box without area."""
    regions = context.get("result") if isinstance(context, dict) else None
    for region in reversed(regions if isinstance(regions, list) else []):
        value = region.get("value") if isinstance(region, dict) else None
        if not isinstance(value, dict):
            continue
        labels = value.get(_KIND) or value.get("keypointlabels") or []
        label = labels[0] if isinstance(labels, list) and labels and isinstance(labels[0], str) else None
        try:
            if str(region.get("type")).startswith("keypoint"):
                x, y = (_number(value.get(key)) / 100 for key in ("x", "y"))
                return label, (x, y, x, y)
            if str(region.get("type")).startswith("rectangle"):
                return label, _box(*(value.get(key) for key in ("x", "y", "width", "height")))
        except AnnotationError as error:
            raise RequestError(f"the interactive tool's region cannot be used: {error}") from error
    raise RequestError("the context holds no rectangle and no keypoint")


def _fit(where: Box, region: Region) -> float:
    """How well a candidate suits a prompt: IoU times score with a rectangle; its score where it holds a keypoint."""
    box, score = region.box, region.score or 0.0
    if box is None:
        return 0.0
    if _area(where):
        return iou(where, box) * score
    x, y = where[:2]
    return score if box[0] <= x <= box[2] and box[1] <= y <= box[3] else 0.0
