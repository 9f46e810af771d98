"""Confidence that means what it says: of what a model is 90 % sure of, nine in ten should be right.

A single number, the temperature that logits are divided by, mends most of a network's overconfidence and changes no order of
the classes (Guo et al., On Calibration of Modern Neural Networks, 2017).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import msgspec
import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from scipy.stats import binomtest
from torchmetrics.functional.classification import binary_calibration_error

from labelloop import problem_types
from labelloop.records import Evaluation, Interval, ManifestRow, ModelCard, ProblemTypeName, Region
from labelloop.wording import counted
from training_jobs import paired, problem
from training_jobs.decisions import Flags
from training_jobs.paired import Floats

log = logging.getLogger(__name__)

_FEWEST = 20  # decisions
_HOTTEST = 10.0  # and its inverse the coldest
_LEAST = 1e-30  # a probability whose logarithm is taken
_BINS = 15
_REPORTED_BINS = 10  # fewer, so that each has an interval that says something
_QUANTILES = 101
_CONFIDENCE = 0.95  # that the promise of auto-accept is kept
_FIRST = 0.2  # of the images are tried first, or the least that could do: among more an error or two may be
_STEPS = 20  # from there to all of them


def temperature(
    kind: ProblemTypeName, rows: Sequence[ManifestRow], candidates: Sequence[Sequence[Region]], classes: Sequence[str]
) -> float:
    """The temperature that makes what annotators said likeliest, between a tenth and ten.

    `candidates`: at temperature 1, of `rows` that were not trained on. It is 1 where fewer than 20 decisions, or none that is
    right or none that is wrong, say nothing of how often a confident one is right: the likeliest temperature would be none
    or infinite.
    """
    decisions = problem.of(kind).decisions(rows, candidates, classes)
    wrong = decisions.probabilities.argmax(axis=1) != decisions.answers
    if len(wrong) < _FEWEST or wrong.all() or not wrong.any():
        return 1.0
    logarithms = np.log(decisions.probabilities.clip(min=_LEAST))

    def loss(log_temperature: float) -> float:
        tempered = log_softmax(logarithms / math.exp(log_temperature), axis=1)
        return -float(np.take_along_axis(tempered, decisions.answers[:, np.newaxis], axis=1).mean())

    bound = math.log(_HOTTEST)
    return math.exp(minimize_scalar(loss, bounds=(-bound, bound), method="bounded").x)


def calibration_error(
    kind: ProblemTypeName, rows: Sequence[ManifestRow], candidates: Sequence[Sequence[Region]], classes: Sequence[str]
) -> float | None:
    """Expected calibration error, 0 to 1, in 15 bins: how far from the truth what is shown is on average.

    Of classification: the likeliest class's probability; of multilabel: each class's; of detection: each box's score. None
    where a detector finds nothing.
    """
    decisions = problem.of(kind).decisions(rows, candidates, classes)
    if not len(decisions.true):
        return None
    shown, true = torch.from_numpy(decisions.shown), torch.from_numpy(decisions.true).int()
    return float(binary_calibration_error(shown, true, n_bins=_BINS))


class Bin(msgspec.Struct, frozen=True, kw_only=True):
    """Predictions with scores alike: how many, their mean score, and how often they are right, with a 95 % interval."""

    count: int
    score: float
    right: Interval


def reliability(report: Evaluation) -> list[Bin]:
    """Scores against truth in ten bins, those without a prediction left out, of what the report keeps of its holdout.

    Of classification: the likeliest class; of multilabel: the classes shown; of detection: each box, unsure ones too.
    """
    reported = problem.of(report.problem_type).reported
    bins: dict[int, list[tuple[float, bool]]] = {}
    for image in report.holdout:
        for score, right in reported(image.truth, image.challenger):
            bins.setdefault(min(int(score * _REPORTED_BINS), _REPORTED_BINS - 1), []).append((score, right))
    return [
        Bin(
            count=len(its),
            score=sum(score for score, _ in its) / len(its),
            right=paired.share(sum(right for _, right in its), len(its), 0.95),
        )
        for _, its in sorted(bins.items())
    ]


def certainties(kind: ProblemTypeName, candidates: Sequence[Sequence[Region]], card: ModelCard) -> list[float]:
    """How certain the card's model is as a rule: 101 quantiles, evenly spaced, least first; none without an image."""
    certainty = problem_types.of(kind).certainty
    if not candidates:
        return []
    every = [certainty(found, card) for found in candidates]
    quantiles: list[float] = np.quantile(every, np.linspace(0, 1, _QUANTILES)).tolist()
    return quantiles


def accept_from(
    rows: Sequence[ManifestRow], candidates: Sequence[Sequence[Region]], precision: float, card: ModelCard
) -> float | None:
    """The certainty from which on the final model's predictions are right in this share of the images (config.yaml's
    `auto_accept.precision`); None where none is.

    `candidates`: all that a model which never saw the image took into consideration. That is the final model, but for the train
    split an out-of-fold model, whose certainty means something else; so each image counts by the share of its own model's
    images that are as certain, and the answer is the final model's certainty at such a share. Out-of-fold models were trained
    on less: they are rather less precise there. What a model annotated itself has its share, but is no evidence.

    A share will do when the precision's one-sided lower confidence bound (Clopper and Pearson 1934) reaches the promise. They
    are tried from the strictest on until one fails, so that trying many costs no confidence (fixed sequence testing; Angelopoulos
    et al. 2021, Learn then Test).
    """
    problem_type = problem_types.of(card.problem_type)
    certainty = np.array([problem_type.certainty(found, card) for found in candidates])
    final = np.array([row.split != "train" for row in rows])
    shares = np.where(final, _shares(certainty, final), _shares(certainty, ~final))
    checked = [
        (share, problem_type.agrees(problem_type.chosen(found, card), row.regions))
        for share, row, found in zip(shares, rows, candidates, strict=True)
        if not row.by_model
    ]
    share = _precise_share(np.array([share for share, _ in checked]), np.array([right for _, right in checked]), precision)
    if share is None or not (final & (shares <= share)).any():
        return None
    threshold = float(certainty[final & (shares <= share)].min())
    log.info("predictions are accepted from a certainty of %.4f on: %.0f %% of the images", threshold, 100 * share)
    return threshold


def _shares(certainties: Floats, group: Flags) -> Floats:
    """For each certainty, which share of the group's is at least as high."""
    ordered = np.sort(certainties[group])
    return (len(ordered) - np.searchsorted(ordered, certainties)) / max(len(ordered), 1)


def _precise_share(shares: Floats, right: Flags, precision: float) -> float | None:
    """The largest share up to which predictions are surely precise enough; one that can be right by luck is none."""
    least = math.ceil(math.log(1 - _CONFIDENCE) / math.log(precision))
    if len(shares) < least:
        log.info(
            "%s that no model saw cannot show a precision of %.1f %%: it takes %d without an error; nothing is accepted",
            counted(len(shares), "image"),
            100 * precision,
            least,
        )
        return None
    ordered, found = np.sort(shares), None
    for count in np.linspace(max(least, math.ceil(_FIRST * len(shares))), len(shares), _STEPS).astype(int):
        accepted = shares <= ordered[count - 1]
        hits, images = int(right[accepted].sum()), int(accepted.sum())
        bound = binomtest(hits, images, alternative="greater").proportion_ci(_CONFIDENCE, method="exact").low
        log.info("the most certain %s: %d right, surely %.1f %%", counted(images, "image"), hits, 100 * bound)
        if bound < precision:
            break
        found = float(ordered[count - 1])
    if found is None:
        log.info("a precision of %.1f %% is not certain enough; nothing is accepted", 100 * precision)
    return found
