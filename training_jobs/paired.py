"""Intervals of the difference between two models that were measured on the same images, and of one model's own figure.

All bounds of a difference are one-sided: each holds with the given confidence by itself, those of the classes all together. Those
of a model's own figure hold with it both together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, bootstrap, norm, t

from labelloop.proportions import proportion, quantile, together, unseen
from labelloop.records import Interval, Region

type Floats = NDArray[np.float64]
type Figures = Callable[[Floats], Floats]
"""Weights of images `[B, images]` → figures `[B, 1 + classes]`: the metric, then each class's; NaN where nothing is weighed."""

_RESAMPLES = 2_000
_AT_ONCE = 100  # resamples; a detector's boxes are many
_SEED = 0


@dataclass(frozen=True)
class Difference:
    """What two models reach on the same images, and challenger minus champion, in all and in each class."""

    challenger: float
    champion: float
    total: Interval
    per_class: dict[str, Interval]


def proportions(challenger: NDArray[np.bool_], champion: NDArray[np.bool_], of: Sequence[str], confidence: float) -> Difference:
    """Of shares of images that are right: bool `[images]` each, and the class of every image."""
    names, classes = np.array(of), list(dict.fromkeys(of))

    def change(chosen: NDArray[np.bool_], confidence: float) -> Interval:
        won, lost = (challenger & ~champion)[chosen], (champion & ~challenger)[chosen]
        return proportion(int(won.sum()), int(lost.sum()), int(chosen.sum()), confidence)

    return Difference(
        challenger=float(challenger.mean()),
        champion=float(champion.mean()),
        total=change(np.full(len(names), fill_value=True), confidence),
        per_class={name: change(names == name, together(confidence, len(classes))) for name in classes},
    )


def fewest(margin: float, confidence: float) -> int | None:
    """From how many images on a difference that shows in none of them is surely less than the margin; None where never."""
    return math.floor(quantile(confidence) ** 2 * (1 / margin - 1)) + 1 if margin else None


def bootstrapped(
    challenger: Figures, champion: Figures, truths: Sequence[Sequence[Region]], classes: Sequence[str], confidence: float
) -> Difference:
    """Of any figures: a bootstrap over images, the two models on the same resample. The seed is fixed.

    `truths`: what annotators said of each image. A resample without a class says nothing of it: a difference of
    0. A bootstrap cannot see what none of the images shows, so its bounds are moved away from the estimate at least as far
    as Tango's are where no image differs.
    """
    images = len(truths)
    shown = [images, *(sum(any(region.label == name for region in truth) for truth in truths) for name in classes)]

    def difference(numbers: NDArray[np.int64], axis: int) -> Floats:  # noqa: ARG001 - the last one; scipy names it
        drawn = [np.bincount(some, minlength=images) for some in numbers.reshape(-1, numbers.shape[-1])]
        weights = np.stack(drawn).astype(np.float64)
        change = np.nan_to_num(challenger(weights) - champion(weights))
        return change.T.reshape(-1, *numbers.shape[:-1])

    if images == 1:  # all resamples are the same, and scipy asks for two
        found = difference(np.zeros((1, 1), np.int64), -1)
    else:
        found = bootstrap(
            (np.arange(images),),
            difference,
            n_resamples=_RESAMPLES,
            batch=_AT_ONCE,
            method="percentile",
            rng=np.random.default_rng(_SEED),
        ).bootstrap_distribution
    ours, theirs = (figures(np.ones((1, images)))[0] for figures in (challenger, champion))
    seen = [name for name, count in zip(classes, shown[1:], strict=True) if count]

    def bounds(value: float, resampled: Floats, count: int, confidence: float) -> Interval:
        z, aside = quantile(confidence), 1 - _expanded(confidence, images)
        low, high = np.quantile(resampled, (aside, 1 - aside))
        return Interval(
            value=value,
            low=max(-1.0, min(float(low), value - unseen(count, z))),
            high=min(1.0, max(float(high), value + unseen(count, z))),
        )

    levels = [confidence] + [together(confidence, len(seen))] * len(classes)
    intervals = [
        bounds(float(value), resampled, count, level)
        for value, resampled, count, level in zip(ours - theirs, found, shown, levels, strict=True)
        if count
    ]
    return Difference(
        challenger=float(ours[0]),
        champion=float(theirs[0]),
        total=intervals[0],
        per_class=dict(zip(seen, intervals[1:], strict=True)),
    )


def share(right: int, images: int, confidence: float) -> Interval:
    """How often a model is right: Wilson's score interval. Of no image nothing is known: 0 to 1."""
    if not images:
        return Interval(value=0.0, low=0.0, high=1.0)
    found = binomtest(right, images).proportion_ci(confidence, "wilson")
    return Interval(value=right / images, low=float(found.low), high=float(found.high))


def resampled(figures: Figures, images: int, confidence: float) -> Interval:
    """A model's own metric: a bootstrap over images, widened as `bootstrapped` widens it. The seed is fixed."""
    both = (1 + confidence) / 2
    random, even = np.random.default_rng(_SEED), np.full(images, 1 / images)
    drawn = [figures(random.multinomial(images, even, _AT_ONCE).astype(np.float64)) for _ in range(_RESAMPLES // _AT_ONCE)]
    value, aside, hidden = float(figures(np.ones((1, images)))[0, 0]), 1 - _expanded(both, images), unseen(images, quantile(both))
    low, high = np.nanquantile(np.concatenate(drawn)[:, 0], (aside, 1 - aside))
    return Interval(value=value, low=max(0.0, min(float(low), value - hidden)), high=min(1.0, max(float(high), value + hidden)))


def _expanded(confidence: float, images: int) -> float:
    """The share of a bootstrap's resamples below the bound that holds with `confidence`, for few images, too.

    Hesterberg's expanded percentile interval (The American Statistician 69, 2015, 371-386): Student's t instead of z, and the
    spread of a sample instead of its resamples'.
    """
    freedom = max(images - 1, 1)
    return float(norm.cdf(math.sqrt(images / freedom) * t.ppf(confidence, freedom)))


def needed(difference: Interval, images: int, margin: float, confidence: float) -> int | None:
    """With how many images the same difference, as changeable from image to image, would decide; None where it has.

    For a challenger trained on more annotations, which wins from `margin` below on. By the normal approximation the
    distance of the bounds falls with the square root of the images; it is never less than `unseen`.
    """
    value, low, high = difference.value, difference.low, difference.high
    if low > -margin or high < 0:
        return None
    z = quantile(confidence)
    ways = [(value + margin, value - low)] if value > -margin else []
    ways += [(-value, high - value)] if value < 0 else []
    if not ways:  # exactly at the margin of nothing
        return None
    enough = min(
        max(images * (spread / distance) ** 2 if spread > unseen(images, z) else 0, z * z * (1 / distance - 1))
        for distance, spread in ways
    )
    return max(images + 1, math.ceil(enough))
