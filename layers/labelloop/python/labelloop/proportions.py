"""Two shares that were measured on the same images, compared: an interval and a test, without a library, as `promote` has none.

All bounds are one-sided: each holds with the given confidence by itself.
"""

from __future__ import annotations

import math
from statistics import NormalDist

from labelloop.records import Interval

_HALVINGS = 60  # of an interval no longer than 2, beyond what a float tells apart


def proportion(won: int, lost: int, images: int, confidence: float) -> Interval:
    """The difference of two paired proportions: the score interval of Tango (Statistics in Medicine 17, 1998, 891-908).

    `won`, `lost`: images that only the one, only the other has right. The interval is right for few of them, and has a
    width where there is none: ± z² / (images + z²).
    """
    z = quantile(confidence)
    return Interval(value=(won - lost) / images, low=_lower(won, lost, images, z), high=-_lower(lost, won, images, z))


def _lower(won: int, lost: int, images: int, z: float) -> float:
    """The least difference that the score test does not reject."""
    if z == 0:
        return (won - lost) / images
    if won == lost == 0:
        return -unseen(images, z)
    if lost == images:
        return -1.0

    def excess(difference: float) -> float:
        """The score less what it may be; the share of losses is the likeliest one at this difference."""
        a = 2 * images
        b = (2 * images - won + lost) * difference - won - lost
        c = -lost * difference * (1 - difference)
        losses = (math.sqrt(max(b * b - 4 * a * c, 0)) - b) / (2 * a)
        variance = images * (2 * losses + difference * (1 - difference))
        return won - lost - images * difference - z * math.sqrt(max(variance, 0))

    low, high = -1.0, (won - lost) / images
    for _ in range(_HALVINGS):  # it falls as the difference rises
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return low


def unseen(images: int, z: float) -> float:
    """The largest difference that would show in none of so many images (Tango's bound): z² / (images + z²)."""
    return z * z / (images + z * z)


def mcnemar(won: int, lost: int) -> float:
    """The p-value, two-sided, of McNemar's exact test: whether the two are equally often right.

    It is the stricter of the two: where it rejects at twice the level of a bound of `proportion`, that bound excludes 0, too.
    """
    differ = won + lost
    tail = sum(math.comb(differ, count) for count in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / (1 << differ))


def together(confidence: float, classes: int) -> float:
    """The confidence of each class's bounds with which all of them hold together (Bonferroni): chance finds some class."""
    return 1 - (1 - confidence) / max(classes, 1)


def quantile(confidence: float) -> float:
    """How many standard deviations a bound lies away that holds with this confidence."""
    return NormalDist().inv_cdf(confidence)
