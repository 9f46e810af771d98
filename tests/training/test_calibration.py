"""Temperature, calibration error and the spread of certainty, against models whose confidence is known."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from labelloop import problem_types
from labelloop.records import BoxRules, Evaluation, HoldoutImage, ManifestRow, ModelCard, ProblemTypeName, Region
from tests.examples import evaluation, model_card
from training_jobs import calibration

CLASSES = ["a", "b", "c"]
CHOICES: list[ProblemTypeName] = ["classification", "multilabel"]
BOX = (0.1, 0.1, 0.5, 0.5)
ELSEWHERE = (0.6, 0.6, 0.9, 0.9)

type Logits = np.ndarray[Any, np.dtype[np.float64]]


def card(kind: ProblemTypeName, temperature: float = 1.0) -> ModelCard:
    rules = BoxRules(score_threshold=0.3, iou_threshold=0.5, max_boxes=10) if kind == "detection" else None
    return msgspec.structs.replace(model_card(), problem_type=kind, classes=CLASSES, boxes=rules, temperature=temperature)


def row(*regions: Region) -> ManifestRow:
    return ManifestRow(image="", sha256="", group="", regions=list(regions), split="validation", annotation="", task=0)


def drawn(kind: ProblemTypeName, count: int) -> tuple[list[ManifestRow], Logits]:
    """Images whose truth is drawn from the probabilities that honest logits say."""
    random = np.random.default_rng(0)
    logits = 2 * random.normal(size=(count, len(CLASSES)))
    if kind == "classification":
        noise = random.gumbel(size=logits.shape)
        return [row(Region(label=CLASSES[best])) for best in (logits + noise).argmax(axis=1)], logits
    has = random.random(logits.shape) < 1 / (1 + np.exp(-logits))
    return [row(*(Region(label=name) for name, it in zip(CLASSES, its, strict=True) if it)) for its in has], logits


def said(kind: ProblemTypeName, logits: Logits, temperature: float = 1.0) -> list[list[Region]]:
    return [problem_types.of(kind).candidates([np.asarray(its, np.float32)], card(kind, temperature)) for its in logits]


def boxes(count: int, overconfidence: float) -> tuple[list[ManifestRow], list[list[Region]]]:
    """A box an image, right as often as its score says once the logit is divided by `overconfidence`."""
    random = np.random.default_rng(0)
    honest = random.uniform(-2.5, 2.5, count)
    right = random.random(count) < 1 / (1 + np.exp(-honest))
    scores = 1 / (1 + np.exp(-honest * overconfidence))
    rows = [row(Region(label="a", box=BOX if it else ELSEWHERE)) for it in right]
    return rows, [[Region(label="a", box=BOX, score=float(score))] for score in scores]


def report(kind: ProblemTypeName, rows: list[ManifestRow], found: list[list[Region]]) -> Evaluation:
    holdout = [HoldoutImage(sha256="0" * 64, truth=row.regions, challenger=its) for row, its in zip(rows, found, strict=True)]
    return msgspec.structs.replace(evaluation(), problem_type=kind, classes=CLASSES, holdout=holdout)


@pytest.mark.parametrize("kind", ["classification", "multilabel", "detection"])
@pytest.mark.parametrize("overconfidence", [1, 4])
def test_reliability_holds_scores_against_the_truth(kind: ProblemTypeName, overconfidence: float) -> None:
    if kind == "detection":
        rows, found = boxes(4000, overconfidence)
    else:
        rows, logits = drawn(kind, 4000)
        chosen = problem_types.of(kind).chosen
        found = [list(chosen(its, card(kind))) for its in said(kind, overconfidence * logits)]
    bins = calibration.reliability(report(kind, rows, found))
    assert sum(its.count for its in bins) == sum(map(len, found))
    assert [its.score for its in bins] == sorted(its.score for its in bins)
    outside = [its for its in bins if not its.right.low <= its.score <= its.right.high]
    assert (len(outside) <= len(bins) // 4) if overconfidence == 1 else (len(outside) > len(bins) // 2)


def test_reliability_of_no_prediction_is_empty() -> None:
    assert calibration.reliability(report("detection", [row(Region(label="a", box=BOX))], [[]])) == []


@pytest.mark.parametrize("kind", CHOICES)
@pytest.mark.parametrize("overconfidence", [0.5, 1, 3])
def test_the_temperature_undoes_overconfidence(kind: ProblemTypeName, overconfidence: float) -> None:
    rows, logits = drawn(kind, 3000)
    found = said(kind, overconfidence * logits)
    temperature = calibration.temperature(kind, rows, found, CLASSES)
    assert temperature == pytest.approx(overconfidence, rel=0.1)
    mended = said(kind, overconfidence * logits, temperature)
    before, after = (calibration.calibration_error(kind, rows, its, CLASSES) for its in (found, mended))
    assert before is not None
    assert after is not None
    assert after < 0.03
    if overconfidence != 1:
        assert after < before / 2


def test_a_detectors_scores_are_held_against_its_boxes() -> None:
    rows, found = boxes(3000, overconfidence=2)
    assert calibration.temperature("detection", rows, found, CLASSES) == pytest.approx(2, rel=0.1)
    error = calibration.calibration_error("detection", rows, found, CLASSES)
    assert error is not None
    assert error > 0.05


def test_a_true_box_counts_once_and_for_its_class_only() -> None:
    truth = row(Region(label="a", box=BOX))
    found = [
        Region(label="a", box=BOX, score=1.0),
        Region(label="a", box=BOX, score=0.0),  # the same again: wrong, as it says itself
        Region(label="b", box=BOX, score=0.0),
        Region(label="a", box=ELSEWHERE, score=0.0),
    ]
    assert calibration.calibration_error("detection", [truth], [found], CLASSES) == 0


@pytest.mark.parametrize("kind", CHOICES)
def test_without_enough_or_without_mistakes_nothing_is_changed(kind: ProblemTypeName) -> None:
    rows, logits = drawn(kind, 200)
    few = 19 if kind == "classification" else 6
    assert calibration.temperature(kind, rows[:few], said(kind, 5 * logits[:few]), CLASSES) == 1
    chosen = [row(*problem_types.of(kind).chosen(found, card(kind))) for found in said(kind, logits)]
    assert calibration.temperature(kind, chosen, said(kind, logits), CLASSES) == 1
    assert calibration.temperature(kind, [], [], CLASSES) == 1


def test_a_detector_that_finds_nothing_cannot_be_measured() -> None:
    assert calibration.temperature("detection", [row()] * 30, [[]] * 30, CLASSES) == 1
    assert calibration.calibration_error("detection", [row()], [[]], CLASSES) is None


def test_certainties_are_quantiles() -> None:
    logits = np.log(np.array([[0.5 + n / 2000, 0.5 - n / 2000, 1e-9] for n in range(1000)]))
    found = calibration.certainties("classification", said("classification", logits), card("classification"))
    assert len(found) == 101
    assert found == pytest.approx(np.linspace(0, 0.999, 101), abs=1e-4)
    assert calibration.certainties("classification", [], card("classification")) == []


@pytest.mark.parametrize("kind", [*CHOICES, "detection"])
def test_temperature_one_changes_no_digit_and_none_changes_an_order(kind: ProblemTypeName) -> None:
    random = np.random.default_rng(0)
    scores = random.random((40, 3)).astype(np.float32)
    corners = random.random((40, 1, 4)).astype(np.float32)
    outputs = [np.sort(corners, axis=2), scores] if kind == "detection" else [5 * scores[0]]
    plain, cool, hot = (problem_types.of(kind).candidates(outputs, card(kind, t)) for t in (1.0, 0.5, 3.0))
    assert [region.label for region in plain] == [region.label for region in cool] == [region.label for region in hot]
    assert [region.box for region in plain] == [region.box for region in cool] == [region.box for region in hot]
    for found in (plain, cool, hot):
        shown = [region.score or 0.0 for region in found]
        assert shown == sorted(shown, reverse=True)
    if kind == "detection":
        assert {region.score for region in plain} <= {float(score) for score in scores.ravel()}
        assert [region.score for region in hot] == pytest.approx(
            [1 / (1 + ((1 - region.score) / region.score) ** (1 / 3)) for region in plain if region.score]
        )
