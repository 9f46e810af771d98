"""From which certainty on predictions are as precise as config.yaml's `auto_accept.precision` promises."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import binomtest

from labelloop import problem_types
from labelloop.records import ManifestRow, ModelCard, Region

log = logging.getLogger(__name__)

type Floats = np.ndarray[Any, np.dtype[np.float64]]
type Flags = np.ndarray[Any, np.dtype[np.bool]]

_CONFIDENCE = 0.95  # that the promise is kept
_FIRST = 0.2  # of the images are tried first, or the least that could do: among more an error or two may be
_STEPS = 20  # from there to all of them


def accept_from(
    rows: Sequence[ManifestRow], candidates: Sequence[Sequence[Region]], precision: float, card: ModelCard
) -> float | None:
    """The certainty from which on the final model's predictions are right in this share of the images; None where none is.

    `candidates`: all that a model which never saw the image took into consideration. That is the final model, but for the train
    split an out-of-fold model, whose certainty means something else; so each image counts by the share of its own model's
    images that are as certain, and the answer is the final model's certainty at such a share. Out-of-fold models were trained
    on less: they are rather less precise there. What a model annotated itself has its share, but is no evidence.

    A share will do when the precision's one-sided lower confidence bound (Clopper and Pearson 1934) reaches the promise. They
    are tried from the strictest on until one fails, so that trying many costs no confidence (fixed sequence testing; Angelopoulos
    et al. 2021, Learn then Test).
    """
    problem_type = problem_types.of(card.problem_type)
    certainties = np.array([problem_type.certainty(found, card) for found in candidates])
    final = np.array([row.split != "train" for row in rows])
    shares = np.where(final, _shares(certainties, final), _shares(certainties, ~final))
    checked = [
        (share, problem_type.agrees(problem_type.chosen(found, card), row.regions))
        for share, row, found in zip(shares, rows, candidates, strict=True)
        if not row.by_model
    ]
    share = _precise_share(np.array([share for share, _ in checked]), np.array([right for _, right in checked]), precision)
    if share is None or not (final & (shares <= share)).any():
        return None
    threshold = float(certainties[final & (shares <= share)].min())
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
            "%d images that no model saw cannot show a precision of %.1f %%: it takes %d without an error; nothing is accepted",
            len(shares),
            100 * precision,
            least,
        )
        return None
    ordered, found = np.sort(shares), None
    for count in np.linspace(max(least, math.ceil(_FIRST * len(shares))), len(shares), _STEPS).astype(int):
        accepted = shares <= ordered[count - 1]
        hits, images = int(right[accepted].sum()), int(accepted.sum())
        bound = binomtest(hits, images, alternative="greater").proportion_ci(_CONFIDENCE, method="exact").low
        log.info("the most certain %d images: %d are right, surely %.1f %%", images, hits, 100 * bound)
        if bound < precision:
            break
        found = float(ordered[count - 1])
    if found is None:
        log.info("a precision of %.1f %% is not certain enough; nothing is accepted", 100 * precision)
    return found
