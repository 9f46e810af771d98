"""How far the images that come now are from those that a version was measured on.

Compared are random images of the holdout on both sides: those annotated when the version was trained, and the newest that
it predicts. Both figures are scaled by what they are on average when nothing but chance is between the two samples, which is 1.

- embedding: Hotelling's two-sample T² on the main axes of the holdout's embeddings, a Mahalanobis distance of the means
- confidence: the population stability index of the certainty, over fifths of the holdout
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from labelloop.records import Drift, DriftReference, Served

WINDOW = 100  # images of the holdout that are compared
FEWEST = 30  # from which on they are
ALARM = 5.0  # times what chance gives; chance alone gives that to one window in 2,000
_FEWEST_HELD_OUT = 50
_AXES = 8
_BINS = 5
_FLAT = 1e-4  # of the largest spread: what is smaller is rounding
_DIGITS = 5  # that a place is kept with

type Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]  # numpy.typing is not in the functions' layer


def reference(embeddings: Floats, certainties: Sequence[float]) -> DriftReference | None:
    """What later images are compared with, from the embeddings `[N, D]` and certainties of holdout images; None of too few."""
    images = len(embeddings)
    if images < _FEWEST_HELD_OUT:
        return None
    mean = embeddings.mean(axis=0, dtype=np.float64)
    _, spreads, axes = np.linalg.svd(embeddings - mean, full_matrices=False)
    used = [number for number, spread in enumerate(spreads[:_AXES]) if spread > _FLAT * spreads[0]]
    if not used:
        return None
    whitening = (axes[used].T / spreads[used] * np.sqrt(images - 1)).astype(np.float32)
    edges = np.unique(np.quantile(certainties, np.arange(1, _BINS) / _BINS))
    return DriftReference(
        images=images,
        axes=whitening.tobytes(),
        centre=(mean @ whitening).astype(np.float32).tobytes(),
        edges=edges.tolist(),
        counts=[int(count) for count in _counts(edges, certainties)],
    )


def place(reference: DriftReference, embedding: Floats) -> list[float]:
    """Where an embedding `[D]` lies on the reference's axes."""
    axes = np.frombuffer(reference.axes, dtype=np.float32).reshape(len(embedding), -1)
    laid: list[float] = (embedding @ axes - np.frombuffer(reference.centre, dtype=np.float32)).round(_DIGITS).tolist()
    return laid


def follow(reference: DriftReference, served: Sequence[Served], before: Drift | None) -> Drift:
    """The newest images with these among them, and how far they are from the reference. Repeating it changes nothing."""
    known = {one.task: one for one in [*(before.served if before else []), *served]}
    newest = [known[task] for task in sorted(known)[-WINDOW:]]
    if len(newest) < FEWEST:
        return Drift(served=newest)
    return Drift(served=newest, embedding=_of_embeddings(reference, newest), confidence=_of_confidence(reference, newest))


def _of_embeddings(reference: DriftReference, served: Sequence[Served]) -> float:
    """T² over its mean: the axes are measured on as many images as the reference has, the mean on both samples."""
    places = np.array([one.place for one in served])
    mean, axes, held_out = places.mean(axis=0), places.shape[1], reference.images
    expected = axes * (held_out - 1) / (held_out - axes - 2)
    return float(_worth(len(served), held_out) * (mean @ mean) / expected)


def _of_confidence(reference: DriftReference, served: Sequence[Served]) -> float | None:
    """The index over its mean; half an image is added to each bin, for none is impossible. None where all are as certain."""
    bins = len(reference.counts)
    if bins < 2:
        return None
    there, here = np.array(reference.counts), _counts(np.array(reference.edges), [one.certainty for one in served])
    p, q = ((counts + 0.5) / (counts.sum() + bins / 2) for counts in (there, here))
    index = ((p - q) * np.log(p / q)).sum()
    return float(_worth(len(served), reference.images) * index / (bins - 1))


def _worth(one: int, other: int) -> float:
    """The size of a sample whose mean is as uncertain as the difference of the means of these two."""
    return one * other / (one + other)


def _counts(edges: Floats, certainties: Sequence[float]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.bincount(np.searchsorted(edges, certainties, side="right"), minlength=len(edges) + 1)
