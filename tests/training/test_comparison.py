"""Challenger against champion: McNemar and Tango where images are right or wrong, a paired bootstrap for F1 and mAP."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import pytest
from scipy.stats import t
from torchmetrics.detection import MeanAveragePrecision

from labelloop import proportions
from labelloop.records import BoxRules, Comparison, GateRules, ManifestRow, ModelCard, ProblemTypeName, Region
from tests import examples
from training_jobs import paired, problem
from training_jobs.average_precision import AveragePrecision
from training_jobs.comparison import compare
from training_jobs.detection import _boxes

RULES = GateRules(margin=0.02, class_floor=0.1, confidence=0.95)
ABC = ["a", "b", "c"]


def rows(truths: Sequence[Sequence[Region]]) -> list[ManifestRow]:
    return [
        ManifestRow(
            image=f"s3://images/{n}",
            sha256=f"{n:064x}",
            group=f"{n:064x}",
            regions=list(truth),
            split="test",
            annotation=str(n),
            task=n,
        )
        for n, truth in enumerate(truths)
    ]


def card(classes: list[str], kind: ProblemTypeName = "classification") -> ModelCard:
    boxes = BoxRules(score_threshold=0.3, iou_threshold=0.5, max_boxes=100) if kind == "detection" else None
    return msgspec.structs.replace(examples.model_card(), problem_type=kind, classes=classes, boxes=boxes)


def labels(words: str) -> list[list[Region]]:
    """One image a word; each letter is a class: `a bc -` are an image of a, one of b and c, one of nothing."""
    return [[Region(label=letter, score=0.9) for letter in word if letter != "-"] for word in words.split()]


def compared(
    truth: str,
    challenger: str,
    champion: str,
    *,
    kind: ProblemTypeName = "classification",
    ours: str = "abc",
    theirs: str = "abc",
) -> Comparison | None:
    found = labels(challenger), labels(champion)
    return compare(rows(labels(truth)), *found, card(list(ours), kind), card(list(theirs), kind), RULES)


def decided(*args: str, **kinds: str) -> Comparison:
    found = compared(*args, **kinds)  # type: ignore[arg-type]
    assert found is not None
    return found


def score(won: int, lost: int, images: int, difference: float) -> float:
    """The score statistic at a hypothetical difference, its nuisance parameter found by trying: not as the code does it."""
    least, most = max(0.0, -difference), (1 - difference) / 2
    losses = np.linspace(least, most, 400_001)[1:-1]
    same = 1 - 2 * losses - difference
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = [(won, losses + difference), (lost, losses), (images - won - lost, same)]
        likelihood = sum((count * np.log(share) for count, share in terms if count), start=np.zeros_like(losses))
    q = float(losses[np.nanargmax(likelihood)])
    return (won - lost - images * difference) / float(np.sqrt(images * (2 * q + difference * (1 - difference))))


@pytest.mark.parametrize(("won", "lost", "images"), [(1, 0, 44), (12, 3, 50), (3, 12, 400), (40, 1, 60), (5, 5, 20)])
def test_the_interval_is_where_the_score_test_begins_to_reject(won: int, lost: int, images: int) -> None:
    found = proportions.proportion(won, lost, images, 0.95)
    assert found.value == (won - lost) / images
    assert score(won, lost, images, found.low) == pytest.approx(1.645, abs=2e-3)
    assert score(won, lost, images, found.high) == pytest.approx(-1.645, abs=2e-3)


def test_where_no_image_differs_there_is_still_an_interval() -> None:
    found = proportions.proportion(0, 0, 133, 0.95)
    assert [found.low, found.high] == pytest.approx([-2.7055 / 135.7055, 2.7055 / 135.7055], rel=1e-4)
    for won, lost in ((30, 0), (0, 30)):
        all_differ = proportions.proportion(won, lost, 30, 0.95)
        assert -1 <= all_differ.low <= all_differ.value <= all_differ.high <= 1


def test_accuracy_is_compared_image_by_image() -> None:
    found = decided("a a a a b b c c", "a a b a b b c a", "a b a b b b c a")
    assert (found.images, found.challenger, found.champion) == (8, 6 / 8, 5 / 8)
    assert (found.won, found.lost) == (2, 1)
    assert found.difference == proportions.proportion(2, 1, 8, 0.95)
    assert found.p_value == 1.0
    together = 1 - 0.05 / 3  # the three bounds hold at once
    assert found.per_class == {
        "a": proportions.proportion(2, 1, 4, together),
        "b": proportions.proportion(0, 0, 2, together),
        "c": proportions.proportion(0, 0, 2, together),
    }


def test_mcnemars_test_looks_at_the_images_that_differ() -> None:
    found = decided("a " * 20, "a " * 20, "b " * 8 + "a " * 12)
    assert found.p_value == pytest.approx(2 * 0.5**8)
    assert decided("a a", "a a", "a a").p_value == 1.0


@pytest.mark.parametrize(("ours", "theirs", "shared"), [("abc", "ab", ["a", "b"]), ("ab", "abc", ["a", "b"])])
def test_a_class_that_only_one_knows_is_left_aside(ours: str, theirs: str, shared: list[str]) -> None:
    """Where the challenger has a new class, its images say nothing of the champion; where one is gone, none shows it."""
    truth = "a a b b c" if "c" in ours else "a a b b b"
    found = decided(truth, "a c b b b", "a a c b b", ours=ours, theirs=theirs)
    images = truth.split().count("a") + truth.split().count("b")
    assert (found.classes, found.images) == (shared, images)
    assert (found.won, found.lost) == (1, 1), "a guess of the other class is wrong"


@pytest.mark.parametrize(("truth", "ours", "theirs"), [("a b", "ab", "cd"), ("c c", "abc", "ab")])
@pytest.mark.parametrize("kind", ["classification", "multilabel", "detection"])
def test_without_a_class_or_an_image_in_common_there_is_no_comparison(
    kind: ProblemTypeName, truth: str, ours: str, theirs: str
) -> None:
    assert compared(truth, truth, "a a", kind=kind, ours=ours, theirs=theirs) is None


@pytest.mark.parametrize(
    ("won", "lost", "images", "needed"),
    [
        (0, 0, 20, 133),
        (0, 0, 133, None),
        (9, 0, 100, None),
        (0, 9, 100, None),
        (5, 5, 100, 677),
        (2, 4, 100, 403),
        (10, 11, 300, 700),  # sooner surely within the margin than surely worse
    ],
)
def test_how_many_images_would_decide(won: int, lost: int, images: int, needed: int | None) -> None:
    found = paired.needed(proportions.proportion(won, lost, images, 0.95), images, margin=0.02, confidence=0.95)
    assert found == (None if needed is None else pytest.approx(needed, rel=0.35))
    if needed is not None and won != 2:
        assert found is not None
        more = proportions.proportion(round(won * found / images), round(lost * found / images), found, 0.95)
        assert paired.needed(more, found, margin=0.02, confidence=0.95) is None


def test_f1_of_all_images_is_that_of_the_report() -> None:
    generator = np.random.default_rng(0)
    truths, ours, theirs = (
        [[Region(label=name) for name in ABC if generator.random() < share] for _ in range(60)] for share in (0.4, 0.5, 0.3)
    )
    found = compare(rows(truths), ours, theirs, card(ABC, "multilabel"), card(ABC, "multilabel"), RULES)
    assert found is not None
    scores = [problem.of("multilabel").scores(rows(truths), guess, ABC, version=1) for guess in (ours, theirs)]
    assert [found.challenger, found.champion] == pytest.approx([each.value for each in scores])
    assert found.difference.value == pytest.approx(scores[0].value - scores[1].value)
    for name in ABC:
        change = found.per_class[name]
        assert change.value == pytest.approx(scores[0].per_class[name] - scores[1].per_class[name])
        assert change.low < change.value < change.high
    assert found.p_value is None


def test_a_multilabel_guess_of_a_new_class_is_wrong_unless_the_annotator_made_it_too() -> None:
    right = decided("ac b", "ac b", "a b", kind="multilabel", ours="abc", theirs="ab")
    assert (right.challenger, right.champion) == (1, 1)
    wrong = decided("a b", "ac b", "a b", kind="multilabel", ours="abc", theirs="ab")
    assert [wrong.challenger, wrong.champion] == pytest.approx([4 / 5, 1])
    assert wrong.lost == 1


def boxes(generator: np.random.Generator, count: int) -> list[Region]:
    found = []
    for _ in range(count):
        left, top = generator.random(2) * 0.6
        width, height = 0.1 + generator.random(2) * 0.3
        label, score = str(generator.choice(ABC)), float(generator.random())
        found.append(Region(label=label, box=(left, top, left + width, top + height), score=score))
    return found


def near(generator: np.random.Generator, regions: Sequence[Region]) -> list[Region]:
    """As a model finds them: some missed, moved or taken for another class; and some of its own."""
    found = []
    for region in regions:
        if region.box and generator.random() < 0.8:
            moved = [corner + float(generator.normal(0, 0.03)) for corner in region.box]
            label = str(generator.choice(ABC)) if generator.random() < 0.1 else region.label
            box = (moved[0], moved[1], max(moved[2], moved[0] + 0.01), max(moved[3], moved[1] + 0.01))
            found.append(Region(label=label, box=box, score=float(generator.random())))
    return found + boxes(generator, int(generator.integers(0, 4)))


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_is_torchmetrics_on_any_resample(seed: int) -> None:
    generator = np.random.default_rng(seed)
    truths = [boxes(generator, int(generator.integers(0, 5))) for _ in range(25)]
    found = [near(generator, truth) for truth in truths]
    figures = AveragePrecision(truths, found, ABC)
    weights = np.stack([np.ones(25), generator.multinomial(25, np.ones(25) / 25)]).astype(np.float64)
    for weight, (mean, *each) in zip(weights, figures(weights), strict=True):
        drawn = [number for number, times in enumerate(weight) for _ in range(int(times))]
        metric = MeanAveragePrecision(iou_thresholds=[0.5], class_metrics=True)
        metric.update([_boxes(found[n], ABC) for n in drawn], [_boxes(truths[n], ABC) for n in drawn])
        expected = metric.compute()
        assert mean == pytest.approx(float(expected["map"]), abs=1e-6)
        assert each == pytest.approx(expected["map_per_class"].tolist(), abs=1e-6)


def test_of_an_images_boxes_of_a_class_the_hundred_best_count() -> None:
    """As in COCO's evaluation: what comes after them is not found."""
    right = Region(label="a", box=(0.1, 0.1, 0.5, 0.5), score=0.1)
    wrong = Region(label="a", box=(0.6, 0.6, 0.7, 0.7), score=0.9)
    means = [AveragePrecision([[right]], [[wrong] * before + [right]], ["a"])(np.ones((1, 1)))[0, 0] for before in (99, 100)]
    assert means == [pytest.approx(0.01), 0]


def test_a_class_that_a_resample_does_not_show_does_not_count() -> None:
    truth = [boxes(np.random.default_rng(1), 1), []]
    weights = np.array([[1.0, 1], [0, 1]])
    figures = AveragePrecision(truth, [truth[0], truth[0]], [truth[0][0].label, "z"])(weights)
    assert figures[0].tolist() == [1.0, 1.0, pytest.approx(np.nan, nan_ok=True)]
    assert np.isnan(figures[1]).all()


def test_detectors_are_compared_by_their_average_precision() -> None:
    generator = np.random.default_rng(3)
    truths = [boxes(generator, 3) for _ in range(40)]
    ours, theirs = truths, [near(generator, truth) for truth in truths]
    found = compare(rows(truths), ours, theirs, card(ABC, "detection"), card(ABC, "detection"), RULES)
    assert found is not None
    reported = problem.of("detection").scores(rows(truths), theirs, ABC, version=1)
    assert [found.challenger, found.champion] == pytest.approx([1, reported.value], abs=1e-6)
    assert found.difference.low > 0
    assert set(found.per_class) == set(ABC)
    assert found.needed is None


def test_no_number_of_images_decides_between_equals_without_a_margin() -> None:
    assert paired.needed(proportions.proportion(2, 2, 50, 0.95), 50, margin=0, confidence=0.95) is None


def test_the_interval_of_a_models_own_metric_is_that_of_a_mean_where_it_is_one() -> None:
    """By Student's t; the metric is the first of the figures."""
    right = np.tile([0.0, 1.0], 50)
    found = paired.resampled(lambda weights: np.column_stack([weights @ right / 100, np.ones(len(weights))]), 100, 0.95)
    apart = t.ppf(0.975, 99) * right.std(ddof=1) / 10
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5 - apart, 0.5 + apart), abs=0.015)


@pytest.mark.parametrize("kind", ["multilabel", "detection"])
def test_a_bootstrap_does_not_believe_that_what_it_has_not_seen_cannot_be(kind: ProblemTypeName) -> None:
    truths = [[Region(label="a", box=(0.1, 0.1, 0.5, 0.5), score=0.9)]] * 30
    found = compare(rows(truths), truths, truths, card(ABC, kind), card(ABC, kind), RULES)
    assert found is not None
    assert found.difference == found.per_class["a"] == proportions.proportion(0, 0, 30, 0.95)
    assert found.needed == 133


def test_comparing_again_gives_the_same() -> None:
    generator = np.random.default_rng(3)
    truths = [boxes(generator, 3) for _ in range(20)]
    guesses = [near(generator, truth) for truth in truths]
    cards = card(ABC, "detection"), card(ABC, "detection")
    one, other = (compare(rows(truths), truths, guesses, *cards, RULES) for _ in range(2))
    assert one == other


@pytest.mark.parametrize("kind", ["multilabel", "classification"])
def test_a_single_image_tells_next_to_nothing(kind: ProblemTypeName) -> None:
    found = compared("a", "a", "b", kind=kind)
    assert found is not None
    assert found.difference.value == 1
    assert found.difference.low < 0.3


def test_the_interval_of_an_accuracy_is_wilsons() -> None:
    """Newcombe (Statistics in Medicine 17, 1998, 857-872), method 3: 81 of 263, 15 of 148, 0 of 20."""
    for right, images, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        found = paired.share(right, images, 0.95)
        assert (found.value, found.low, found.high) == pytest.approx((right / images, low, high), abs=5e-5)
    assert paired.share(0, 0, 0.95).high - paired.share(0, 0, 0.95).low == 1  # of nothing, nothing is known


@pytest.mark.parametrize("kind", ["classification", "multilabel", "detection"])
def test_the_interval_of_a_models_own_figure_holds_as_often_as_it_says(kind: ProblemTypeName) -> None:
    """Many small holdouts of one model, whose true figure a large one tells."""
    measure = problem.of(kind)

    def holdout(seed: int, images: int) -> tuple[list[list[Region]], list[list[Region]]]:
        random = np.random.default_rng(seed)
        truths, found = [], []
        for _ in range(images):
            box = (0.1, 0.1, 0.5, 0.5) if kind == "detection" else None
            label, wrong = random.choice(ABC, 2, replace=False)
            guess = label if random.random() < 0.8 else wrong
            truths.append([Region(label=str(label), box=box)])
            found.append([Region(label=str(guess), box=box, score=float(random.random()))])
        return truths, found

    large = holdout(0, 2000)
    true = measure.scores(rows(large[0]), large[1], ABC, 1).value
    intervals = [measure.interval(*holdout(seed, 60), ABC, 0.95) for seed in range(1, 41)]
    hold = sum(its.low <= true <= its.high for its in intervals)
    assert hold >= 35  # of 40; 38 are expected
    assert all(0 <= its.low < its.value < its.high <= 1 for its in intervals)
    narrow = measure.interval(*holdout(1, 600), ABC, 0.95)
    assert narrow.high - narrow.low < 0.12


@pytest.mark.parametrize("kind", ["classification", "multilabel", "detection"])
def test_a_model_that_made_no_mistake_yet_may_make_some(kind: ProblemTypeName) -> None:
    box = (0.1, 0.1, 0.5, 0.5) if kind == "detection" else None
    for images in (1, 10):
        truths = [[Region(label="a", box=box, score=0.9)]] * images
        found = problem.of(kind).interval(truths, truths, ABC, 0.95)
        assert [found.value, found.high] == pytest.approx([1, 1])
        assert found.low < 1 - 2 / (images + 4)
