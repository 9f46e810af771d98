"""How many labels the queue saves: measured while the loop runs, by its random control share.

A linear probe of the embeddings is trained on ever more labels of the control share, and on ever more that the strategy asked
for; both start from the labels that were there before any model asked for one. The two learning curves on the holdout are
one curve, moved along the number of labels: how far says what share of the labels the same accuracy takes. Between whole
curves that can be told from fewer labels than at their ends, where they hardly rise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits

from labelloop.active_learning import stream_of
from labelloop.model_config import ModelConfig
from labelloop.records import Interval, LabelsSaved, ManifestRow
from training_jobs.embeddings import Embeddings

type Floats = NDArray[np.float64]
type Numbers = NDArray[np.int64]

_FEWEST = 20  # labels of either kind, and holdout images
_DIMENSIONS = 32  # of the probe
_EXAMINED = 2_000  # embeddings that its directions are found from
_PENALTY = 1.0  # on the probe's weights, as if for one label more
_CONTROL_SIZES = np.geomspace(1 / 4, 1, 5)  # numbers of labels that are tried, as shares of the control labels
_ACTIVE_SIZES = np.geomspace(1 / 32, 4, 15)
_LEAST, _MOST = 1 / 8, 4.0  # active labels for a control label that are tried
_FACTORS = np.geomspace(_LEAST, _MOST, 200)
_RESAMPLES = 200
_DRAWS = 2  # of as many labels, in each resample
_SMOOTHER = 20  # times more draws for the estimate itself
_CONFIDENCE = 95  # percent
_SEED = 0


def labels_saved(
    rows: Sequence[ManifestRow], embeddings: Embeddings, holdout: Sequence[ManifestRow], seen: Embeddings, config: ModelConfig
) -> LabelsSaved | None:
    """The share of labels that the strategy saves against asking at random, with a 95 % interval; it may be negative.

    `rows` of the train split with their `embeddings`, `holdout` with its own (`seen`): float32 `[N, D]`. The interval is
    bootstrapped over the labels and the holdout's images. Shares outside -3 to 7/8 are not told apart from these.
    None where there is nothing to tell from: with less than 20 labels of either stream that a model asked for, or less of
    the strategy's than of the control's, or less than 20 holdout images; where control labels or holdout show one class
    only; and for detection, as an image's embedding does not stand for boxes.
    """
    if config.problem_type == "detection":
        return None
    asked = np.array([(row.seen or 0) >= 1 and not row.by_model for row in rows], dtype=bool)
    streams = np.array([stream_of(row.group, config) for row in rows])
    before = np.flatnonzero([not row.seen and not row.by_model for row in rows])
    control, active = np.flatnonzero(asked & (streams == "control")), np.flatnonzero(asked & (streams == "active"))
    truth, answers = _table(rows, config.classes), _table(holdout, config.classes)
    enough = _FEWEST <= len(control) <= len(active) and len(holdout) >= _FEWEST
    if not enough or not _varies(truth[control]) or not _varies(answers):
        return None
    with threadpool_limits(1):  # so small tasks are slower with several
        probe = _Probe(embeddings, truth, seen, answers, single=config.problem_type == "classification")
        return LabelsSaved(share=_share(probe, before, control, active), control=len(control))


def _share(probe: _Probe, before: Numbers, control: Numbers, active: Numbers) -> Interval:
    random = np.random.default_rng(_SEED)
    ours, theirs = (
        np.unique((sizes * len(control)).round().astype(int).clip(min=1)) for sizes in (_ACTIVE_SIZES, _CONTROL_SIZES)
    )
    ours = ours[ours <= len(active)]

    def factor(labels: tuple[Numbers, Numbers], images: Numbers, draws: int) -> float:
        curves = (_curve(probe, before, *its, images, draws, random) for its in zip(labels, (ours, theirs), strict=True))
        return _factor(ours, next(curves), theirs, next(curves))

    def resampled() -> float:
        labels = random.choice(active, len(active)), random.choice(control, len(control))
        images = random.integers(probe.images, size=probe.images)
        return factor(labels, np.bincount(images, minlength=probe.images), _DRAWS)

    estimate = factor((active, control), np.ones(probe.images, dtype=np.int64), _DRAWS * _SMOOTHER)
    spread = np.array([resampled() for _ in range(_RESAMPLES)])
    # A resample repeats labels, more of the control's than of the larger pool: only how it varies is taken from it.
    few, many = estimate * np.percentile(spread, [(100 - _CONFIDENCE) / 2, (100 + _CONFIDENCE) / 2]) / np.median(spread)
    return Interval(value=1 - estimate, low=1 - min(float(many), _MOST), high=1 - max(float(few), _LEAST))


def _curve(
    probe: _Probe,
    before: Numbers,
    labels: Numbers,
    sizes: Numbers,
    images: Numbers,
    draws: int,
    random: np.random.Generator,
) -> Floats:
    """What probes reach with so many of `labels`, on average over some draws of them."""

    def reached(size: int) -> float:
        drawn = (random.choice(labels, size, replace=False) for _ in range(draws))
        return float(np.mean([probe.score(np.concatenate([before, some]), images) for some in drawn]))

    return np.array([reached(size) for size in sizes])


def _factor(active_sizes: Numbers, active: Floats, control_sizes: Numbers, control: Floats) -> float:
    """How many active labels stand for a control label: where the active curve comes closest to the control's."""
    wanted = np.log(control_sizes) + np.log(_FACTORS)[:, np.newaxis]
    moved = np.interp(wanted, np.log(active_sizes), active)
    return float(_FACTORS[((moved - control) ** 2).sum(axis=1).argmin()])


class _Probe:
    """Least squares with a penalty, from an embedding to its classes. `single`: one class an image."""

    def __init__(self, embeddings: Embeddings, truth: Floats, seen: Embeddings, answers: Floats, *, single: bool) -> None:
        some = embeddings[np.random.default_rng(_SEED).permutation(len(embeddings))[:_EXAMINED]]
        directions = PCA(min(_DIMENSIONS, *some.shape), whiten=True, svd_solver="randomized", random_state=_SEED).fit(some)
        self._features, self._seen = (_with_constant(directions.transform(its)) for its in (embeddings, seen))
        self._truth, self._answers, self._single = truth, answers, single
        self.images = len(answers)

    def score(self, labels: Numbers, images: Numbers) -> float:
        """F1 over all decisions, which for single classes is accuracy, of a probe trained on `labels` (numbers of rows).

        `images`: how often each holdout image counts.
        """
        features = self._features[labels]
        penalty = _PENALTY * np.eye(features.shape[1])
        weights = np.linalg.solve(features.T @ features + penalty, features.T @ self._truth[labels])
        said = self._seen @ weights
        chosen = np.eye(said.shape[1])[said.argmax(axis=1)] if self._single else said >= 1 / 2
        hits = images @ (chosen * self._answers)
        return float(2 * hits.sum() / (images @ (chosen + self._answers)).sum())


def _with_constant(features: Floats) -> Floats:
    return np.column_stack([features, np.ones(len(features))]).astype(np.float64)


def _table(rows: Sequence[ManifestRow], classes: Sequence[str]) -> Floats:
    """`[rows, classes]`: 1 where the image has the class."""
    return np.array([[any(region.label == name for region in row.regions) for name in classes] for row in rows], dtype=np.float64)


def _varies(table: Floats) -> bool:
    return bool((table != table[0]).any())
