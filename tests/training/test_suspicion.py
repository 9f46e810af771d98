"""Which annotations are looked at again, and from which certainty on predictions need no look."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence

import numpy as np
import pytest
from cleanlab.object_detection import rank

from labelloop import problem_types
from labelloop.records import Box, BoxRules, ManifestRow, ModelCard, ProblemTypeName, Region, Split
from training_jobs import problem
from training_jobs.calibration import accept_from
from training_jobs.paired import Floats
from training_jobs.suspicion import suspects

CLASSES = ["cat", "dog", "owl"]
PROMISE = 0.99


def card(problem_type: ProblemTypeName = "classification") -> ModelCard:
    return ModelCard(
        model="pets",
        problem_type=problem_type,
        classes=CLASSES,
        width=100,
        height=100,
        mode="RGB",
        oversampling=2.0,
        dataset_digest="0" * 64,
        boxes=BoxRules(score_threshold=0.4, iou_threshold=0.5, max_boxes=20) if problem_type == "detection" else None,
    )


def row(number: int, regions: Sequence[Region], *, split: Split = "train", by_model: bool = False) -> ManifestRow:
    return ManifestRow(
        image=f"s3://images/{number}.png",
        sha256=f"{number:064x}",
        group=f"{number:064x}",
        regions=list(regions),
        split=split,
        annotation=f"annotation-{number}",
        task=number,
        by_model=by_model,
    )


def labels(*names: str) -> list[Region]:
    return [Region(label=name) for name in names]


def sure(label: str, certainty: float) -> list[Region]:
    """What a classifier says that takes it for this class, so likely; the others share the rest."""
    rest = [Region(label=name, score=(1 - certainty) / (len(CLASSES) - 1)) for name in CLASSES if name != label]
    return [Region(label=label, score=certainty), *rest]


def certainty(found: Sequence[Region]) -> float:
    return problem_types.of("classification").certainty(found, card())


def decisions(*present: str, certainty: float = 0.9) -> list[Region]:
    scores = {name: certainty if name in present else 1 - certainty for name in CLASSES}
    return [Region(label=name, score=score) for name, score in sorted(scores.items(), key=lambda item: -item[1])]


FLIPPED = {7: 0.97, 20: 0.99, 41: 0.95}  # images, and how likely a model that never saw them thinks another class


class TestClassification:
    """60 images of three classes, of which a good model contradicts the annotation in three."""

    def rows(self, *, by_model: Sequence[int] = ()) -> list[ManifestRow]:
        return [
            row(number, labels(CLASSES[(number + (number in FLIPPED)) % 3]), by_model=number in by_model) for number in range(60)
        ]

    def said(self) -> list[list[Region]]:
        chance = random.Random(0)
        return [sure(CLASSES[number % 3], FLIPPED.get(number, chance.uniform(0.8, 0.99))) for number in range(60)]

    def test_the_worst_come_first(self) -> None:
        found = suspects(self.rows(), self.said(), card(), 50)
        assert [suspect.task for suspect in found] == [20, 7, 41]
        worst = found[0]
        assert (worst.annotation, worst.sha256) == ("annotation-20", f"{20:064x}")
        assert worst.given == labels(CLASSES[0])
        assert worst.suggested == [Region(label=CLASSES[2], score=0.99)]
        assert worst.quality == pytest.approx(0.005)

    def test_twice_the_limit_are_given(self) -> None:
        """So that some are left when those are taken out that people have settled."""
        assert [suspect.task for suspect in suspects(self.rows(), self.said(), card(), 1)] == [20, 7]
        assert suspects(self.rows(), self.said(), card(), 0) == []

    def test_what_a_model_annotated_is_looked_at_as_well(self) -> None:
        assert [suspect.task for suspect in suspects(self.rows(by_model=[20]), self.said(), card(), 50)] == [20, 7, 41]

    def test_without_contradiction_there_are_none(self) -> None:
        rows = [row(number, labels(CLASSES[number % 3])) for number in range(60)]
        said = [sure(CLASSES[number % 3], 0.6) for number in range(60)]
        assert suspects(rows, said, card(), 50) == []

    @pytest.mark.parametrize("count", [0, 1, 4])
    def test_few_images_of_one_class_are_no_trouble(self, count: int) -> None:
        rows = [row(number, labels("cat")) for number in range(count)]
        assert suspects(rows, [sure("cat", 0.9)] * count, card(), 50) == []

    def test_a_class_that_nobody_annotated_is_no_trouble(self) -> None:
        rows = [row(number, labels(CLASSES[number % 2])) for number in range(60)]
        said = [sure(CLASSES[(number + (number == 9)) % 2], 0.9) for number in range(60)]
        assert [suspect.task for suspect in suspects(rows, said, card(), 50)] == [9]


def test_multilabel_finds_missing_and_superfluous_classes() -> None:
    truth = [[name for bit, name in enumerate(CLASSES[:2]) if number >> bit & 1] for number in range(80)]
    annotated = [list(names) for names in truth]
    annotated[11].remove("cat")
    annotated[30].append("cat")
    rows = [row(number, labels(*names)) for number, names in enumerate(annotated)]
    said = [decisions(*names, certainty=0.98 if number == 30 else 0.9) for number, names in enumerate(truth)]
    found = suspects(rows, said, card("multilabel"), 50)
    assert [suspect.task for suspect in found] == [30, 11]
    assert [region.label for region in found[1].suggested] == truth[11]
    assert found[1].given == labels("dog")


LEFT: Box = (0.1, 0.1, 0.4, 0.4)
RIGHT: Box = (0.6, 0.6, 0.9, 0.9)
BESIDE: Box = (0.3, 0.3, 0.6, 0.6)


@pytest.mark.parametrize(
    "annotated",
    [
        pytest.param([Region(label="cat", box=LEFT)], id="a box is missing"),
        pytest.param([Region(label="cat", box=LEFT), Region(label="owl", box=RIGHT)], id="a class is wrong"),
        pytest.param([Region(label="cat", box=LEFT), Region(label="dog", box=BESIDE)], id="a box is elsewhere"),
        pytest.param([], id="nothing is annotated"),
    ],
)
def test_detection_finds_wrong_boxes(annotated: list[Region]) -> None:
    truth = [Region(label="cat", box=LEFT), Region(label="dog", box=RIGHT)]
    said = [
        Region(label="cat", box=LEFT, score=0.9),
        Region(label="dog", box=RIGHT, score=0.95),
        Region(label="owl", box=LEFT, score=0.1),
    ]
    rows = [row(number, annotated if number == 5 else truth) for number in range(30)]
    found = suspects(rows, [said] * 30, card("detection"), 50)
    assert [suspect.task for suspect in found] == [5]
    assert found[0].suggested == said[:2]


def test_boxes_are_compared_to_the_last_bit_as_cleanlab_does_it() -> None:
    """Some images have no annotated box or no candidate; some boxes have two classes; thin candidates are nobody's."""
    chance, best = random.Random(0), []
    rows, said = [], []
    for number in range(60):
        truth, found = [], []
        for _ in range(number % 5):
            left, top, side = chance.uniform(0, 0.7), chance.uniform(0, 0.7), chance.uniform(0.1, 0.3)
            label, other = chance.sample(CLASSES, 2)
            truth.append(Region(label=label, box=(left, top, left + side, top + side)))
            if chance.random() < 0.8:
                best.append(chance.uniform(0.2, 1))
                found.append(Region(label=label, box=(left + side / 9, top, left + side, top + side), score=best[-1]))
            elif chance.random() < 0.5:
                truth.append(Region(label=other, box=truth[-1].box))
        for _ in range(number % 3):
            left, top = chance.uniform(0, 0.9), chance.uniform(0, 0.2)
            thin = (left, top, left + 0.01, top + 0.8)
            found.append(Region(label=chance.choice(CLASSES), box=thin, score=chance.uniform(0.1, 1)))
        rows.append(row(number, truth))
        said.append(found)
    sure = float(np.mean(best))
    said[0].append(Region(label="owl", box=LEFT, score=sure))

    def corners(regions: Sequence[Region]) -> Floats:
        return np.array([region.box for region in regions], dtype=np.float64).reshape(-1, 4) * 100

    labels = [
        {"bboxes": corners(its.regions), "labels": np.array([CLASSES.index(region.label) for region in its.regions], dtype=int)}
        for its in rows
    ]
    by_class = [[[region for region in found if region.label == name] for name in CLASSES] for found in said]
    predictions = [
        [np.column_stack([corners(its), [region.score or 0.0 for region in its]]) for its in classes] for classes in by_class
    ]
    given = {"labels": labels, "predictions": predictions}
    of_boxes = (
        rank.compute_overlooked_box_scores(**given, high_probability_threshold=sure),
        rank.compute_swap_box_scores(**given, high_probability_threshold=sure),
        rank.compute_badloc_box_scores(**given, low_probability_threshold=sure / 2),
    )
    expected = np.array([rank.pool_box_scores_per_image(scores) for scores in of_boxes])
    assert (expected < 0.9).any(axis=1).all()
    quality = problem.of("detection").label_quality(rows, said, card("detection"))
    assert quality.scores.tolist() == expected.min(axis=0).tolist()


class TestAcceptFrom:
    @staticmethod
    def judged(
        count: int, *, wrong: Sequence[int] = (), split: Split = "test", low: float = 0.5, by_model: bool = False, start: int = 0
    ) -> tuple[list[ManifestRow], list[list[Region]]]:
        """Images from the most certain down to `low`; those at the places in `wrong` are taken for something else."""
        certainties = [1 - (1 - low) * (place + 1) / count for place in range(count)]
        rows = [
            row(start + place, labels("dog" if place in wrong else "cat"), split=split, by_model=by_model)
            for place in range(count)
        ]
        return rows, [sure("cat", certainty) for certainty in certainties]

    def test_the_certain_ones_are_accepted_as_far_as_they_are_right(self) -> None:
        rows, said = self.judged(1000, wrong=range(600, 1000, 2))
        threshold = accept_from(rows, said, PROMISE, card())
        assert threshold is not None
        accepted = [place for place, found in enumerate(said) if certainty(found) >= threshold]
        assert 500 <= len(accepted) <= 606  # at most a hundredth of them wrong
        assert threshold == certainty(said[accepted[-1]])

    def test_everything_is_accepted_where_everything_is_right(self) -> None:
        rows, said = self.judged(400)
        assert accept_from(rows, said, PROMISE, card()) == certainty(said[-1])

    @pytest.mark.parametrize(("count", "enough"), [(298, False), (299, True)])
    def test_a_high_promise_takes_many_images(self, count: int, enough: bool, caplog: pytest.LogCaptureFixture) -> None:
        """0.99 to the 299th power is less than a twentieth: chance has no longer a say."""
        caplog.set_level(logging.INFO, logger="training_jobs")
        rows, said = self.judged(count)
        assert (accept_from(rows, said, PROMISE, card()) is not None) == enough
        assert ("it takes 299" in caplog.text) != enough

    def test_errors_among_the_most_certain_forbid_it(self) -> None:
        rows, said = self.judged(1000, wrong=range(0, 1000, 25))
        assert accept_from(rows, said, PROMISE, card()) is None
        assert accept_from(rows, said, 0.9, card()) == certainty(said[-1])

    def test_what_a_model_annotated_itself_proves_nothing(self) -> None:
        rows, said = self.judged(200)
        more_rows, more_said = self.judged(800, split="train", by_model=True, start=200)
        assert accept_from([*rows, *more_rows], [*said, *more_said], PROMISE, card()) is None

    def test_the_threshold_is_the_final_models(self) -> None:
        """Out-of-fold models are less certain of everything, and their errors begin in the middle of theirs."""
        theirs, they_said = self.judged(700, wrong=range(420, 700, 2), split="train", low=0.4)
        ours, we_said = self.judged(300, wrong=range(180, 300, 2), split="validation", low=0.8, start=700)
        threshold = accept_from([*theirs, *ours], [*they_said, *we_said], PROMISE, card())
        assert threshold is not None
        assert certainty(sure("cat", 0.87)) < threshold < certainty(sure("cat", 0.92))

    def test_the_promise_is_kept_in_nineteen_of_twenty_tries(self) -> None:
        """Models that are right as often as they are certain."""
        broken = 0
        for seed in range(60):
            chance = random.Random(seed)
            likely = [1 - 0.3 * chance.random() ** 4 for _ in range(500)]
            said = [sure("cat", share) for share in likely]
            rows = [
                row(number, labels("cat" if chance.random() < share else "dog"), split="test")
                for number, share in enumerate(likely)
            ]
            threshold = accept_from(rows, said, PROMISE, card())
            accepted = [
                share
                for share, found in zip(likely, said, strict=True)
                if threshold is not None and certainty(found) >= threshold
            ]
            broken += bool(accepted) and sum(accepted) / len(accepted) < PROMISE
        assert broken <= 6  # of 60; three are to be expected at most


def test_a_box_that_the_model_does_not_find_is_no_contradiction() -> None:
    annotated = [Region(label="cat", box=LEFT), Region(label="dog", box=RIGHT)]
    rows = [row(number, annotated) for number in range(30)]
    for said in ([], [Region(label="cat", box=LEFT, score=0.9)]):
        assert suspects(rows, [said] * 30, card("detection"), 50) == []
