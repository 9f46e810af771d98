"""How often the promotion gate lets a challenger take over, by how much better or worse it truly is.

    uv run python -m benchmarks.gate [--tries N] [--flipped N] [--json FILE] [--plot FILE]

Simulated: challengers and champions of known quality say something of so many holdout images; the verdict comes from the same
`compare` and `judge` as in the loop, for a challenger that was trained on more annotations. Real: networks of one layer, trained
on scikit-learn's digits with 30 % of the labels flipped, against one that was trained on the true labels.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.optimize import brentq
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier

from labelloop.promotion import judge
from labelloop.records import (
    BoxRules,
    Evaluation,
    GateRules,
    HoldoutImage,
    ManifestRow,
    ModelCard,
    ProblemTypeName,
    Region,
    Scores,
    Verdict,
)
from training_jobs.average_precision import AveragePrecision
from training_jobs.comparison import compare
from training_jobs.multilabel import F1
from training_jobs.paired import Figures

RULES = GateRules(margin=0.02, class_floor=0.1, confidence=0.95)  # config.yaml's defaults
CLASSES = [f"class {number}" for number in range(5)]
TRIES: dict[ProblemTypeName, int] = {"classification": 1_000, "multilabel": 200, "detection": 100}  # of a cell of 400 images
SHOWN = (50, 100, 200, 400, 1000)  # holdout images
BETTER = 0.03
_FLIPPED = 0.3  # share of the labels
_MANY = 6_000  # images that tell a model's true quality

type Generator = np.random.Generator
type Regions = list[list[Region]]


@dataclass(frozen=True)
class Cell:
    """One kind of challenger: `difference` is what it would reach more than the champion on endless images."""

    kind: ProblemTypeName
    classes: int
    champion: float
    difference: float
    discordance: float | None  # share of images on which only one is right; classification
    images: int
    tries: int
    promoted: float
    kept: float
    undecided: float

    @property
    def worse(self) -> bool:
        """By more than the margin, of which the benchmark's smallest step is half a point."""
        return self.difference < -RULES.margin - 0.004


def decide(kind: ProblemTypeName, truths: Regions, challenger: Regions, champion: Regions, classes: list[str]) -> Verdict:
    """The gate's verdict about a challenger that was trained on more annotations."""
    rows = [_row(number, truth) for number, truth in enumerate(truths)]
    card = _card(kind, classes)
    comparison = compare(rows, challenger, champion, card, card, RULES)
    scores = [Scores(metric="accuracy", value=0, per_class={}, confusion=None, version=version) for version in (2, 1)]
    report = Evaluation(
        model="benchmark",
        problem_type=kind,
        job_name="",
        run_id="",
        dataset_digest="",
        n_annotations=200,
        n_train=0,
        n_validation=0,
        classes=classes,
        challenger=scores[0],
        champion=scores[1],
        holdout=[HoldoutImage(sha256="", truth=[], challenger=[])],
        onnx_sha256="",
        parity=0,
        gate=RULES,
        comparison=comparison,
        calibration_error=None,
        labels_saved=None,
        accept_from=None,
        suspects=[],
        champion_annotations=100,
    )
    return judge(report, 1)[0]


def _row(number: int, truth: list[Region]) -> ManifestRow:
    name = str(number)
    return ManifestRow(image=name, sha256=name, group=name, regions=truth, split="test", annotation=name, task=number)


def _card(kind: ProblemTypeName, classes: list[str]) -> ModelCard:
    boxes = BoxRules(score_threshold=0.3, iou_threshold=0.5, max_boxes=100) if kind == "detection" else None
    return ModelCard(
        model="benchmark",
        problem_type=kind,
        classes=classes,
        width=1,
        height=1,
        mode="L",
        oversampling=1,
        dataset_digest="",
        boxes=boxes,
    )


# Classification: images that only one of the two has right


def classification(tries: int, generator: Generator) -> Iterator[Cell]:
    """Worse and better challengers of two classes; with ten, which the floor looks at one by one, those that should win."""
    for champion in (0.90, 0.93, 0.95, 0.98):
        for difference in (-0.05, -0.03, -0.025, -0.02, -0.01, 0.0, 0.01, BETTER, 0.05):
            if champion + difference > 0.999:
                continue
            for discordance in discordances(champion, champion + difference):
                for images in SHOWN:
                    repeated = max(1, round(tries * 400 / images))
                    yield classified(2, champion, difference, discordance, images, repeated, generator)
                if difference == BETTER:
                    yield classified(10, champion, difference, discordance, 400, tries, generator)


def discordances(champion: float, challenger: float) -> list[float]:
    """With mistakes that are half the same, and with mistakes that have nothing to do with each other."""
    wrong, other = 1 - champion, 1 - challenger
    return sorted({round(wrong + other - min(wrong, other), 4), round(wrong + other - 2 * wrong * other, 4)})


def classified(
    classes: int, champion: float, difference: float, discordance: float, images: int, tries: int, generator: Generator
) -> Cell:
    """Classes of equally many images, in each of which as many differ as chance will have it."""
    chances = [(discordance + difference) / 2, (discordance - difference) / 2, 1 - discordance]
    drawn = generator.multinomial(images // classes, chances, size=(tries, classes))
    verdicts = [_of_counts(tuple(map(tuple, counts))) for counts in drawn.tolist()]
    return _cell("classification", classes, champion, difference, discordance, images, verdicts)


@cache
def _of_counts(counts: tuple[tuple[int, ...], ...]) -> Verdict:
    """The verdict goes by how many images of each class are won, lost and neither: equal counts are judged once.

    Whether both are right or both wrong on an image makes no difference; here they are right.
    """
    names = [f"class {number}" for number in range(len(counts))]
    truths, challenger, champion = [], [], []
    for number, (won, lost, neither) in enumerate(counts):
        truth, wrong = [Region(label=names[number])], [Region(label=names[number - 1])]
        truths += [truth] * (won + lost + neither)
        challenger += [truth] * won + [wrong] * lost + [truth] * neither
        champion += [wrong] * won + [truth] * lost + [truth] * neither
    return decide("classification", truths, challenger, champion, names)


# Multilabel and detection: what is hard for both models, half the time, and what only one of them gets wrong


def synthetic(kind: Literal["multilabel", "detection"], tries: int, generator: Generator) -> Iterator[Cell]:
    """Challengers of known difference to champions with few mistakes and with many."""
    for rate in (0.05, 0.15):
        for difference in (-0.05, -0.03, -0.025, 0.0, BETTER):
            for images in (50, 100, 200, 400):
                yield measured(kind, rate, difference, images, tries, generator)


def measured(
    kind: Literal["multilabel", "detection"], rate: float, difference: float, images: int, tries: int, generator: Generator
) -> Cell:
    """`rate`: the champion's, of mistakes; the challenger's is the one that reaches the difference on very many images."""
    champion = reached(kind, rate)
    challenger = _rate_for(kind, champion + difference)
    verdicts = [_drawn(kind, images, challenger, rate, generator) for _ in range(tries)]
    return _cell(kind, len(CLASSES), champion, difference, None, images, verdicts)


def _drawn(
    kind: Literal["multilabel", "detection"], images: int, challenger: float, champion: float, generator: Generator
) -> Verdict:
    truths, ours, theirs = _DRAWN[kind](generator, images, challenger, champion)
    return decide(kind, truths, ours, theirs, CLASSES)


def multilabel(generator: Generator, images: int, *rates: float) -> tuple[Regions, Regions, Regions]:
    """Three of ten decisions are yes; a model of each rate errs in its share of them."""
    truth = generator.random((images, len(CLASSES))) < 0.3
    ours, theirs = (truth ^ (hard < rate) for hard, rate in zip(_difficulties(generator, truth.shape), rates, strict=True))
    return _listed(truth), _listed(ours), _listed(theirs)


def detection(generator: Generator, images: int, *rates: float) -> tuple[Regions, Regions, Regions]:
    """Three boxes an image; a model of each rate misses its share, and finds as many, less surely, where there is nothing."""
    shape = (images, 3)
    labels = generator.integers(len(CLASSES), size=shape)
    truths = [[_box(place, CLASSES[label], None) for place, label in enumerate(row)] for row in labels]
    said = []
    for hard, rate in zip(_difficulties(generator, shape), rates, strict=True):
        invented = generator.random(shape) < rate
        sure, unsure = 0.4 + 0.6 * generator.random(shape), 0.05 + 0.75 * generator.random(shape)
        said.append(
            [
                [
                    *(_box(n, CLASSES[labels[image, n]], sure[image, n]) for n in range(3) if hard[image, n] >= rate),
                    *(_box(n + 3, CLASSES[labels[image, n]], unsure[image, n]) for n in range(3) if invented[image, n]),
                ]
                for image in range(images)
            ]
        )
    return truths, said[0], said[1]


_DRAWN = {"multilabel": multilabel, "detection": detection}
_FIGURES: dict[str, Callable[[Regions, Regions, list[str]], Figures]] = {"multilabel": F1, "detection": AveragePrecision}


def _difficulties(generator: Generator, shape: tuple[int, ...]) -> list[NDArray[np.float64]]:
    """Uniform in 0 to 1 for each of two models: half the time what is hard for both, half the time its own."""
    shared = generator.random(shape)
    return [np.where(generator.random(shape) < 0.5, shared, generator.random(shape)) for _ in range(2)]


def _listed(table: NDArray[np.bool_]) -> Regions:
    return [[Region(label=CLASSES[number], score=0.9) for number in np.flatnonzero(row)] for row in table]


def _box(place: int, label: str, score: float | None) -> Region:
    left, top = 0.3 * (place % 3), 0.5 * (place // 3)
    return Region(label=label, box=(left, top, left + 0.2, top + 0.3), score=None if score is None else float(score))


@cache
def reached(kind: Literal["multilabel", "detection"], rate: float) -> float:
    """The metric of a model that errs at this rate, on very many images."""
    truths, found, _ = _DRAWN[kind](np.random.default_rng(0), _MANY, rate, rate)
    return float(_FIGURES[kind](truths, found, CLASSES)(np.ones((1, len(truths))))[0, 0])


@cache
def _rate_for(kind: Literal["multilabel", "detection"], value: float) -> float:
    return float(brentq(lambda rate: reached(kind, rate) - value, 0.0005, 0.6, xtol=1e-4))


def _cell(
    kind: ProblemTypeName,
    classes: int,
    champion: float,
    difference: float,
    discordance: float | None,
    images: int,
    verdicts: list[Verdict],
) -> Cell:
    shares = {verdict: verdicts.count(verdict) / len(verdicts) for verdict in ("promote", "keep", "undecided")}
    return Cell(
        kind=kind,
        classes=classes,
        champion=round(champion, 4),
        difference=difference,
        discordance=discordance,
        images=images,
        tries=len(verdicts),
        promoted=shares["promote"],
        kept=shares["keep"],
        undecided=shares["undecided"],
    )


# Real: labels flipped on purpose


def flipped(tries: int) -> dict[str, Any]:
    """Verdicts about networks that were trained on the champion's digits and more, with so many of all labels flipped."""
    digits = load_digits()
    names = [str(name) for name in digits.target_names]
    verdicts, accuracies = [], []
    for seed in range(tries):
        generator = np.random.default_rng(seed)
        order = generator.permutation(len(digits.target))
        holdout, train, before = order[:400], order[400:1400], order[400:1200]
        labels = digits.target[train].copy()
        wrong = generator.random(len(train)) < _FLIPPED
        labels[wrong] = (labels[wrong] + generator.integers(1, 10, wrong.sum())) % 10
        challenger = _network(digits.data[train], labels, seed)
        champion = _network(digits.data[before], digits.target[before], seed)
        truth, new, old = digits.target[holdout], *(each.predict(digits.data[holdout]) for each in (challenger, champion))
        accuracies.append(((new == truth).mean(), (old == truth).mean()))
        truths, ours, theirs = (_named(labels, names) for labels in (truth, new, old))
        verdicts.append(decide("classification", truths, ours, theirs, names))
    means = np.mean(accuracies, axis=0)
    return {
        "tries": tries,
        "flipped": _FLIPPED,
        "promoted": verdicts.count("promote"),
        "kept": verdicts.count("keep"),
        "undecided": verdicts.count("undecided"),
        "challenger_accuracy": round(float(means[0]), 4),
        "champion_accuracy": round(float(means[1]), 4),
    }


def _network(pixels: NDArray[np.float64], labels: NDArray[np.int64], seed: int) -> MLPClassifier:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # it need not be the best
        return MLPClassifier((64,), max_iter=200, random_state=seed).fit(pixels / 16, labels)


def _named(labels: NDArray[np.int64], names: list[str]) -> Regions:
    return [[Region(label=names[label], score=0.9)] for label in labels]


def measure(tries: dict[ProblemTypeName, int], flips: int) -> dict[str, Any]:
    """All cells, and what the gate promises of them."""
    generator = np.random.default_rng(0)
    cells = [*classification(tries["classification"], generator)]
    cells += synthetic("multilabel", tries["multilabel"], generator)
    cells += synthetic("detection", tries["detection"], generator)
    return {
        "rules": {"margin": RULES.margin, "class_floor": RULES.class_floor, "confidence": RULES.confidence},
        "promoted_of_worse": {kind: _of_worse([cell for cell in cells if cell.kind == kind and cell.worse]) for kind in tries},
        "least_promoted_of_better": {
            kind: min(c.promoted for c in cells if (c.kind, c.difference, c.images) == (kind, BETTER, 400)) for kind in tries
        },
        "flipped": flipped(flips) if flips else None,
        "cells": [asdict(cell) for cell in cells],
    }


def _of_worse(cells: list[Cell]) -> dict[str, dict[str, float]]:
    """By true difference: the share promoted of all tries, and the largest of any cell, with the standard error of that one."""
    found = {}
    for difference in sorted({cell.difference for cell in cells}):
        some = [cell for cell in cells if cell.difference == difference]
        most = max(some, key=lambda cell: cell.promoted)
        found[f"{100 * difference:+.1f} points"] = {
            "all": round(sum(cell.promoted * cell.tries for cell in some) / sum(cell.tries for cell in some), 4),
            "most": round(most.promoted, 4),
            "most_error": round((most.promoted * (1 - most.promoted) / most.tries) ** 0.5, 4),
        }
    return found


def table(found: dict[str, Any]) -> str:
    """Markdown: shares promoted, of the discordance that promotes most of the worse and fewest of the better."""
    lines = ["| problem | truly, points | " + " | ".join(f"{n} images" for n in SHOWN) + " |", "|---" * (2 + len(SHOWN)) + "|"]
    for kind in TRIES:
        for difference in sorted({cell["difference"] for cell in found["cells"] if cell["kind"] == kind}):
            pick = min if difference > 0 else max
            shares = [
                [c["promoted"] for c in found["cells"] if (c["kind"], c["difference"], c["images"]) == (kind, difference, n)]
                for n in SHOWN
            ]
            figures = " | ".join(f"{pick(some):.1%}" if some else "" for some in shares)
            lines.append(f"| {kind} | {100 * difference:+.1f} | {figures} |")
    return "\n".join(lines)


def plot(found: dict[str, Any], file: Path) -> None:
    """Share promoted over the true difference, a line for each number of holdout images."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 3, sharey=True), TRIES, strict=True):
        for images, colour in zip(SHOWN[1:], ("#9fc5e8", "#4f94cd", "#1f5f99", "#0b2d4d"), strict=False):
            points: dict[float, list[float]] = {}
            for cell in found["cells"]:
                if (cell["kind"], cell["images"]) == (kind, images):
                    points.setdefault(100 * cell["difference"], []).append(100 * cell["promoted"])
            if points:
                across = sorted(points)
                axes.plot(across, [np.mean(points[at]) for at in across], "o-", ms=3.5, color=colour, label=f"{images} images")
        axes.axvline(-100 * RULES.margin, color="#a8322a", ls="--", lw=1)
        axes.axhline(5, color="#8a95a1", ls=":", lw=1)
        axes.set(title=kind, xlabel="challenger truly better by, points")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.axes[0].set_ylabel("promoted, %")
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=TRIES["classification"], help="of a cell of 400 images in classification")
    parser.add_argument("--flipped", type=int, default=50, help="networks trained on flipped labels")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--plot", type=Path, help="draw them into this file")
    asked = parser.parse_args()
    began = time.perf_counter()
    found = measure(
        {kind: max(1, tries * asked.tries // TRIES["classification"]) for kind, tries in TRIES.items()}, asked.flipped
    )
    print(table(found))
    print(json.dumps({name: value for name, value in found.items() if name != "cells"}, indent=2))
    print(f"{time.perf_counter() - began:.0f} s")
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")
    if asked.plot:
        plot(found, asked.plot)


if __name__ == "__main__":
    main()
