"""What annotations, outputs and predictions mean, for each problem type."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import batched_nms

from labelloop import problem_types
from labelloop.errors import AnnotationError, RequestError
from labelloop.label_studio.label_config import LabelConfig
from labelloop.label_studio.payloads import Annotation
from labelloop.problem_types.detection import FLOOR, iou, suppress
from labelloop.records import BoxRules, ModelCard, ProblemTypeName, Region

CLASSES = ["cat", "dog", "cow"]
LABELS = LabelConfig(from_name="what", to_name="image", data_key="image", labels=tuple(CLASSES))
RULES = BoxRules(score_threshold=0.3, iou_threshold=0.5, max_boxes=5)


def card(problem_type: ProblemTypeName) -> ModelCard:
    return ModelCard(
        model="pets",
        problem_type=problem_type,
        classes=CLASSES,
        width=10,
        height=10,
        mode="RGB",
        oversampling=2.0,
        dataset_digest="0" * 64,
        boxes=RULES if problem_type == "detection" else None,
    )


def annotation_of(*regions: dict[str, Any]) -> Annotation:
    return msgspec.convert({"id": 1, "result": regions}, Annotation)


def choices(*labels: str) -> Annotation:
    result = [{"from_name": "what", "to_name": "image", "type": "choices", "value": {"choices": list(labels)}}]
    return annotation_of(*result if labels else [])


def rectangle(x: Any = 10, y: Any = 20, width: Any = 30, height: Any = 40, label: str = "cat", **more: Any) -> dict[str, Any]:
    value = {"x": x, "y": y, "width": width, "height": height, "rotation": 0, "rectanglelabels": [label], **more}
    return {"from_name": "what", "to_name": "image", "type": "rectanglelabels", "value": value}


def said(problem_type: ProblemTypeName, annotation: Annotation) -> list[Region]:
    return problem_types.of(problem_type).annotated(annotation, LABELS)


def test_classification_wants_exactly_one_class() -> None:
    assert said("classification", choices("dog")) == [Region(label="dog")]
    for wrong in (choices(), choices("cat", "dog")):
        with pytest.raises(AnnotationError, match="instead of one"):
            said("classification", wrong)


def test_multilabel_takes_any_number_of_classes_in_any_order() -> None:
    assert said("multilabel", choices("dog", "cat")) == said("multilabel", choices("cat", "dog"))
    assert said("multilabel", choices()) == []
    with pytest.raises(AnnotationError, match="twice"):
        said("multilabel", choices("cat", "cat"))


def test_a_rectangle_in_percent_becomes_a_box_in_shares() -> None:
    [region] = said("detection", annotation_of(rectangle()))
    assert region.label == "cat"
    assert region.box == pytest.approx((0.1, 0.2, 0.4, 0.6))
    assert said("detection", annotation_of()) == []


def test_a_rectangle_is_cut_at_the_images_border() -> None:
    [region] = said("detection", annotation_of(rectangle(x=-5, width=200)))
    assert region.box == pytest.approx((0, 0.2, 1, 0.6))


@pytest.mark.parametrize(
    ("region", "reason"),
    [
        (rectangle(rotation=30), "a rectangle is turned"),
        (rectangle(rotation=-2), "a rectangle is turned"),
        ({**rectangle(), "image_rotation": 90}, "the image was turned"),
        (rectangle(width=0), "no area"),
        (rectangle(x=120), "no area"),
        (rectangle(x="10"), "where a number should be"),
        (rectangle(x=None), "where a number should be"),
        (rectangle(x=float("nan")), "where a number should be"),
        (rectangle(height=True), "where a number should be"),
        (rectangle(rectanglelabels=[]), "0 classes"),
        (rectangle(rectanglelabels=["cat", "dog"]), "2 classes"),
    ],
)
def test_a_rectangle_that_cannot_be_learnt_from_says_why(region: dict[str, Any], reason: str) -> None:
    with pytest.raises(AnnotationError, match=reason):
        said("detection", annotation_of(rectangle(), region))


@pytest.mark.parametrize(("name", "region"), [("multilabel", choices("cat").result), ("detection", [rectangle()])])
def test_what_a_renamed_control_tag_said_is_not_nothing(name: ProblemTypeName, region: Any) -> None:
    """Annotations of before the renaming would be learnt from as examples of nothing."""
    renamed = LABELS._replace(from_name="animal")
    annotation = annotation_of(*msgspec.to_builtins(region))
    assert said(name, annotation)
    with pytest.raises(AnnotationError, match=r"names the control tag 'what', labeling_template\.xml 'animal'"):
        problem_types.of(name).annotated(annotation, renamed)


def test_a_rectangle_of_which_no_turn_is_told_is_upright() -> None:
    """As annotations are that somebody imports."""
    imported = rectangle()
    del imported["value"]["rotation"]
    assert said("detection", annotation_of(imported)) == said("detection", annotation_of(rectangle()))


def test_a_full_turn_is_upright_and_other_tags_do_not_count() -> None:
    keypoint = {"from_name": "point", "type": "keypointlabels", "value": {"x": 1, "y": 1, "keypointlabels": ["cat"]}}
    assert len(said("detection", annotation_of(rectangle(rotation=360), keypoint))) == 1


shares = st.floats(0, 1)


@given(st.lists(st.tuples(shares, shares, shares, shares, st.sampled_from(CLASSES)), max_size=5))
def test_a_detectors_result_reads_back_as_the_same_boxes(drawn: list[tuple[float, float, float, float, str]]) -> None:
    regions = [
        Region(label=label, box=(min(a, c), min(b, d), max(a, c), max(b, d)))
        for a, b, c, d, label in drawn
        if abs(a - c) > 1e-3 and abs(b - d) > 1e-3
    ]
    result = problem_types.of("detection").result(regions, LABELS, (640, 480))
    found = said("detection", annotation_of(*result))
    assert [region.label for region in found] == [region.label for region in regions]
    for one, other in zip(found, regions, strict=True):
        assert one.box == pytest.approx(other.box, abs=1e-9)


@pytest.mark.parametrize("problem_type", ["classification", "multilabel"])
def test_a_choice_result_reads_back(problem_type: ProblemTypeName) -> None:
    result = problem_types.of(problem_type).result([Region(label="cow")], LABELS, (8, 8))
    assert said(problem_type, annotation_of(*result)) == [Region(label="cow")]


def test_classification_shows_the_likeliest_class() -> None:
    kind = problem_types.of("classification")
    found = kind.candidates([np.array([0.0, 2.0, 1.0], dtype=np.float32)], card("classification"))
    assert [region.label for region in found] == ["dog", "cow", "cat"]
    assert sum(region.score or 0 for region in found) == pytest.approx(1)
    assert kind.chosen(found, card("classification")) == found[:1]
    assert kind.certainty(found, card("classification")) == pytest.approx((found[0].score or 0) - (found[1].score or 0))


def test_the_margin_tells_a_close_second_from_many_small_others() -> None:
    kind = problem_types.of("classification")
    close, clear = ([Region(label="cat", score=0.4), Region(label="dog", score=other)] for other in (0.39, 0.1))
    assert kind.certainty(close, card("classification")) < kind.certainty(clear, card("classification"))
    assert kind.certainty([Region(label="cat", score=1.0)], card("classification")) == 1  # there is only one class


def test_probabilities_stand_huge_and_equal_logits() -> None:
    huge = np.array([1e4, 0, -1e4], dtype=np.float32)
    one_hot = problem_types.of("classification").candidates([huge], card("classification"))
    assert [region.score for region in one_hot] == [1, 0, 0]
    sure = problem_types.of("multilabel").candidates([huge], card("multilabel"))
    assert [region.score for region in sure] == [1, 0.5, 0]
    even = problem_types.of("classification").candidates([np.zeros(3, dtype=np.float32)], card("classification"))
    assert [region.score for region in even] == pytest.approx([1 / 3] * 3)


def test_multilabel_shows_every_class_that_is_likelier_than_not() -> None:
    kind = problem_types.of("multilabel")
    found = kind.candidates([np.array([3.0, -3.0, 0.1], dtype=np.float32)], card("multilabel"))
    assert [region.label for region in kind.chosen(found, card("multilabel"))] == ["cat", "cow"]
    assert kind.certainty(found, card("multilabel")) == pytest.approx(1 / (1 + np.exp(-0.1)))
    nothing = kind.candidates([np.full(3, -9, dtype=np.float32)], card("multilabel"))
    assert kind.chosen(nothing, card("multilabel")) == []
    assert kind.result([], LABELS, (8, 8)) == []


def outputs(*found: tuple[tuple[float, float, float, float], list[float]]) -> list[np.ndarray[Any, Any]]:
    boxes = np.array([[box] for box, _ in found], dtype=np.float32).reshape(-1, 1, 4)
    return [boxes, np.array([scores for _, scores in found], dtype=np.float32).reshape(-1, 3)]


def test_a_detector_keeps_the_best_of_overlapping_boxes_of_a_class() -> None:
    kind = problem_types.of("detection")
    found = kind.candidates(
        outputs(
            ((0.1, 0.1, 0.5, 0.5), [0.6, 0.0, 0.0]),
            ((0.1, 0.1, 0.5, 0.52), [0.9, 0.0, 0.0]),  # the same cat
            ((0.1, 0.1, 0.5, 0.5), [0.0, 0.7, 0.0]),  # a dog in the same place
            ((0.6, 0.6, 1.4, 0.9), [0.2, 0.0, 0.0]),  # unsure, beyond the border
            ((0.3, 0.3, 0.3, 0.9), [0.8, 0.0, 0.0]),  # no area
            ((0.0, 0.0, 0.1, 0.1), [FLOOR / 2, 0.0, 0.0]),
        ),
        card("detection"),
    )
    assert [(region.label, round(region.score or 0, 3)) for region in found] == [("cat", 0.9), ("dog", 0.7), ("cat", 0.2)]
    assert found[2].box == pytest.approx((0.6, 0.6, 1.0, 0.9))
    assert [region.label for region in kind.chosen(found, card("detection"))] == ["cat", "dog"]
    assert kind.certainty(found, card("detection")) == pytest.approx(0.7)


def test_boxes_of_each_class_are_taken_by_class() -> None:
    boxes = np.array([[[0, 0, 0.1, 0.1], [0.5, 0.5, 0.6, 0.6], [0, 0, 1, 1]]], dtype=np.float32)
    scores = np.array([[0.9, 0.8, 0.0]], dtype=np.float32)
    found = problem_types.of("detection").candidates([boxes, scores], card("detection"))
    assert [region.label for region in found] == ["cat", "dog"]
    assert found[1].box == pytest.approx((0.5, 0.5, 0.6, 0.6))


def test_a_detector_that_finds_nothing_is_certain_of_it() -> None:
    kind = problem_types.of("detection")
    found = kind.candidates(outputs(((0, 0, 1, 1), [0.0, 0.0, 0.0])), card("detection"))
    assert found == []
    assert kind.certainty([], card("detection")) > 0.9


@given(st.integers(0, 2**32 - 1), st.integers(0, 60), st.floats(0.1, 0.9))
def test_suppression_keeps_what_torchvision_keeps(seed: int, count: int, threshold: float) -> None:
    random = np.random.default_rng(seed)
    corners = random.random((count, 2, 2)).astype(np.float32)
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1) + 0.01], axis=1).reshape(-1, 4)
    scores, classes = random.random(count).astype(np.float32), random.integers(0, 3, count)
    rules = BoxRules(score_threshold=0.3, iou_threshold=threshold, max_boxes=1000)
    expected = batched_nms(torch.from_numpy(boxes), torch.from_numpy(scores), torch.from_numpy(classes), threshold)
    assert suppress(boxes, scores, classes, rules) == expected.tolist()


def test_no_more_boxes_than_asked_for() -> None:
    boxes = np.array([[n / 10, 0, n / 10 + 0.05, 1] for n in range(9)], dtype=np.float32)
    kept = suppress(boxes, np.linspace(0.1, 0.9, 9), np.zeros(9), RULES)
    assert kept == [8, 7, 6, 5, 4]


def test_intersection_over_union() -> None:
    assert iou((0, 0, 1, 1), (0, 0, 1, 1)) == 1
    assert iou((0, 0, 0.5, 1), (0.5, 0, 1, 1)) == 0
    assert iou((0, 0, 0.5, 1), (0.25, 0, 0.75, 1)) == pytest.approx(1 / 3)


FOUND = [
    Region(label="cat", box=(0.1, 0.1, 0.5, 0.5), score=0.9),
    Region(label="dog", box=(0.2, 0.2, 0.3, 0.3), score=0.2),
    Region(label="cow", box=(0.6, 0.6, 0.9, 0.9), score=0.4),
]


def prompted(*regions: dict[str, Any]) -> list[Region] | None:
    return problem_types.of("detection").prompted({"result": list(regions)}, FOUND)


def keypoint(x: float, y: float, *labels: str) -> dict[str, Any]:
    return {"type": "keypointlabels", "value": {"x": x, "y": y, "width": 0.5, "keypointlabels": list(labels)}}


def test_a_click_gives_the_best_box_under_it() -> None:
    assert prompted(keypoint(25, 25)) == [FOUND[0]]
    assert prompted(keypoint(70, 70, "cow")) == [FOUND[2]]
    assert prompted(keypoint(99, 1)) == []


def test_the_class_that_the_annotator_picked_goes_first_and_stays() -> None:
    assert prompted(keypoint(25, 25, "dog")) == [FOUND[1]]
    assert prompted(keypoint(70, 70, "cat")) == [Region(label="cat", box=FOUND[2].box, score=0.4)]


def test_a_rough_rectangle_gives_the_box_that_fits_it_best() -> None:
    assert prompted(rectangle(x=55, y=58, width=40, height=35, rectanglelabels=["cow"])) == [FOUND[2]]
    assert prompted(keypoint(25, 25), rectangle(x=62, y=62, width=30, height=30)) == [
        Region(label="cat", box=FOUND[2].box, score=0.4)
    ]


@pytest.mark.parametrize("context", [{}, {"result": []}, {"result": None}, {"result": [1]}, [], {"result": [{"type": "brush"}]}])
def test_a_context_without_a_place_is_refused(context: Any) -> None:
    with pytest.raises(RequestError, match="no rectangle and no keypoint"):
        problem_types.of("detection").prompted(context, FOUND)


def test_a_broken_prompt_says_why() -> None:
    with pytest.raises(RequestError, match="where a number should be"):
        prompted(rectangle(x="left"))


@pytest.mark.parametrize("problem_type", ["classification", "multilabel"])
def test_types_without_boxes_take_no_prompts(problem_type: ProblemTypeName) -> None:
    assert problem_types.of(problem_type).prompted({"result": [keypoint(1, 1)]}, FOUND) is None


def boxes(*corners: tuple[float, float, float, float], label: str = "cat") -> list[Region]:
    return [Region(label=label, box=corner, score=0.9) for corner in corners]


def agree(problem_type: ProblemTypeName, one: list[Region], other: list[Region]) -> bool:
    agrees = problem_types.of(problem_type).agrees(one, other)
    assert agrees == problem_types.of(problem_type).agrees(other, one)
    return agrees


@pytest.mark.parametrize("problem_type", ["classification", "multilabel", "detection"])
def test_scores_and_silence_are_agreed_upon(problem_type: ProblemTypeName) -> None:
    one = Region(label="cat", box=(0.1, 0.1, 0.5, 0.5), score=0.4)
    assert agree(problem_type, [one], [Region(label="cat", box=one.box)])
    assert agree(problem_type, [], [])
    assert not agree(problem_type, [one], [])
    assert not agree(problem_type, [one], [Region(label="dog", box=one.box)])


def test_several_classes_agree_in_any_order_when_all_are_there() -> None:
    cat, dog = Region(label="cat"), Region(label="dog")
    assert agree("multilabel", [cat, dog], [dog, cat])
    assert not agree("multilabel", [cat, dog], [cat])


def test_boxes_agree_one_to_one_from_an_iou_of_a_half() -> None:
    left, right = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
    assert agree("detection", boxes(left, right), boxes(right, left))
    assert agree("detection", boxes(left), boxes((0.0, 0.0, 0.5, 0.5)))
    assert not agree("detection", boxes(left), boxes((0.0, 0.0, 0.5, 0.49)))
    assert not agree("detection", boxes(left, right), boxes(left, left))
    assert not agree("detection", boxes(left), boxes(left, left))
    assert not agree("detection", boxes(left), boxes(left, label="dog"))


def test_boxes_find_their_partners_whichever_is_asked_first() -> None:
    """The first suits both, the second one only: taking the nearest at once would leave it without a partner."""
    wide, narrow = (0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.45, 1.0)
    short = (0.0, 0.0, 0.55, 1.0)
    assert min(iou(wide, short), iou(narrow, short)) > 0.5 > iou(narrow, wide)
    assert agree("detection", boxes(wide, narrow), boxes(short, wide))
    assert agree("detection", boxes(narrow, wide), boxes(wide, short))


odd_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([10**400, -(10**400)]),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(
            st.sampled_from(["x", "y", "width", "height", "rotation", "choices", "rectanglelabels", "keypointlabels"]),
            children,
        )
    ),
    max_leaves=8,
)
odd_regions = st.lists(
    st.fixed_dictionaries(
        {
            "from_name": st.sampled_from(["other", "what", "what"]),
            "type": st.sampled_from(["choices", "rectanglelabels", "keypointlabels"]) | odd_values,
            "value": odd_values,
        }
    ),
    max_size=3,
)


@pytest.mark.parametrize("name", ["classification", "multilabel", "detection"])
@settings(max_examples=200, derandomize=True)
@given(odd_regions)
def test_whatever_an_annotation_holds_it_is_learnt_from_or_refused(name: ProblemTypeName, regions: list[dict[str, Any]]) -> None:
    """One such annotation must not stop its model's training."""
    with contextlib.suppress(AnnotationError):
        problem_types.of(name).annotated(annotation_of(*regions), LABELS)
    with contextlib.suppress(RequestError):
        problem_types.of(name).prompted({"result": regions}, FOUND)
