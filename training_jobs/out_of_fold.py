"""What models say of training images that they never saw: K-fold cross-validation over the train split.

A fold's model is trained as the job's own, on the images of all other folds, but for so few epochs that all folds together take
the steps of one training: with two folds all epochs on half of the images, with four a third of them on three quarters. A
classifier tells wrong labels with little training (docs/benchmarks.md); a detector that starts from nothing wants few folds.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import msgspec

from labelloop.model_config import ModelConfig, ModelFolder
from labelloop.records import ManifestRow, ModelCard, Region
from labelloop.wording import counted
from training_jobs import network, probe, problem
from training_jobs.dataset import Dataset, Examples
from training_jobs.embeddings import Embeddings
from training_jobs.fit import Epoch, fit, make_repeatable
from training_jobs.fit import candidates as candidates_of
from training_jobs.probe import Seen

log = logging.getLogger(__name__)

_IMAGES_A_FOLD = 10  # with fewer, the other folds leave too little to learn from


def candidates(
    folder: ModelFolder, weights: Path | None, data: Dataset, card: ModelCard, checkpoint: Path, seen: Seen | None = None
) -> list[list[Region]] | None:
    """All that a model which never saw it takes into consideration for each image of the train split, in the rows' order.

    None where there are too few images. `weights` is what the job's own network started from; `card` says how outputs are
    read; `seen` is what a linear probe goes by, where the job's own began with one. Each fold keeps a checkpoint beside
    `checkpoint`, so that a restarted job trains what was not trained yet. Repeatable as `fit` is, whatever torch's random
    numbers were before.
    """
    count, train = folder.config.review.folds, data.train
    folds = [fold_of(row.group, count) for row in train.rows]
    if not _possible(train.rows, folds, count):
        log.info("%s: too few for %d out-of-fold models, none is trained", counted(len(train), "training image"), count)
        return None
    found: list[list[Region]] = [[]] * len(train)
    for fold in range(count):
        own = [number for number, its in enumerate(folds) if its == fold]
        others = [number for number, its in enumerate(folds) if its != fold]
        given = counted(len(others), "image")
        log.info("out-of-fold model %d of %d: %s to train on, %d to examine", fold + 1, count, given, len(own))
        file = checkpoint.with_stem(f"fold-{fold + 1}-of-{count}")
        features = seen.features[others] if seen else None
        said = _examined(train.part(own), folder, weights, train.part(others), features, card, file)
        for number, regions in zip(own, said, strict=True):
            found[number] = regions
    return found


def fold_of(group: str, count: int) -> int:
    """The fold of a content group: near duplicates are in the same one, and stay there when the data grows."""
    return int.from_bytes(hashlib.sha256(f"fold:{group}".encode()).digest()[:8]) % count


def shortened(config: ModelConfig) -> ModelConfig:
    """The config of a fold's training."""
    epochs = math.ceil(config.hyperparameters.epochs / (config.review.folds - 1))
    return msgspec.structs.replace(config, hyperparameters=msgspec.structs.replace(config.hyperparameters, epochs=epochs))


def _possible(rows: Sequence[ManifestRow], folds: Sequence[int], count: int) -> bool:
    """Whether there are enough images, and each fold's model has something to learn from."""
    annotated = {fold for row, fold in zip(rows, folds, strict=True) if row.regions}
    return len(rows) >= _IMAGES_A_FOLD * count and set(folds) == set(range(count)) and len(annotated) > 1


def _examined(
    own: Examples,
    folder: ModelFolder,
    weights: Path | None,
    others: Examples,
    features: Embeddings | None,
    card: ModelCard,
    checkpoint: Path,
) -> list[list[Region]]:
    """What a model trained on `others` says of `own`."""
    config, kind = shortened(folder.config), problem.of(folder.config.problem_type)
    make_repeatable(config.hyperparameters.seed, exact=kind.exact)
    fresh, augment = network.build(folder, weights)
    if features is not None:
        probe.start(fresh, folder, others, features)
    nothing = Examples([], others.mapped[:0])
    trained = fit(fresh, Dataset(others, nothing, nothing), config, card, augment, checkpoint, _note)
    return list(candidates_of(kind.heads(trained), own.mapped, card, own.numbers))


def _note(epoch: Epoch) -> None:
    if epoch.notable:
        log.info("  epoch %d of %d: loss %.3f  (%.1f s)", epoch.number, epoch.of, epoch.loss, epoch.seconds)
