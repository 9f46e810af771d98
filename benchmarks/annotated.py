"""Annotated images for benchmarks, some of them wrong on purpose, and what models that never saw an image say of it."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import yaml

from benchmarks.labels import Images
from labelloop.dataset import split_of
from labelloop.model_config import ModelConfigs, ModelFolder
from labelloop.records import ManifestRow, ModelCard, Region, Split
from training_jobs import calibration, network, out_of_fold, problem
from training_jobs.dataset import Dataset, Examples, Pixels
from training_jobs.fit import candidates, fit, make_repeatable
from training_jobs.heads import Heads


@dataclass(frozen=True)
class Annotated:
    """A snapshot of a data set's images. `flipped`: SHA-256s of those that were annotated wrong on purpose.

    `waiting`: the numbers of the images that nobody has annotated yet.
    """

    dataset: Dataset
    flipped: set[str]
    waiting: list[int]


@dataclass(frozen=True)
class Unseen:
    """What the training job knows after training: rows, and what models that never saw them say of each.

    Seconds that the training itself and that the out-of-fold models took.
    """

    rows: list[ManifestRow]
    candidates: list[list[Region]]
    card: ModelCard
    heads: Heads
    training_s: float
    out_of_fold_s: float


def model_folder(data: Images, root: Path) -> ModelFolder:
    """A model for these images with the digits' network and hyperparameters."""
    source, folder = ModelConfigs.find()["digits"], root / "digits"
    folder.mkdir()
    config = yaml.safe_load((source.folder / "config.yaml").read_text())
    config["classes"] = data.classes
    config["image"] |= {"height": data.pixels.shape[1], "width": data.pixels.shape[2]}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "model.py").write_bytes((source.folder / "model.py").read_bytes())
    return ModelFolder(folder)


def annotate(data: Images, folder: ModelFolder, *, count: int, wrong: float, seed: int) -> Annotated:
    """`count` images drawn by chance, and annotated; a share `wrong` of them with another class."""
    chance = random.Random(seed)
    drawn = sorted(chance.sample(range(len(data.labels)), min(count, len(data.labels))))
    flips = set(chance.sample(drawn, round(wrong * len(drawn))))
    rows = [
        _row(data, number, chance.choice([name for name in data.classes if name != data.labels[number]]), folder)
        if number in flips
        else _row(data, number, data.labels[number], folder)
        for number in drawn
    ]

    def of(split: Split) -> Examples:
        numbers = [number for number, row in zip(drawn, rows, strict=True) if row.split == split]
        return Examples([row for row in rows if row.split == split], data.pixels[numbers])

    return Annotated(
        dataset=Dataset(train=of("train"), validation=of("validation"), test=of("test")),
        flipped={_content(data, number) for number in flips},
        waiting=sorted(set(range(len(data.labels))) - set(drawn)),
    )


def look(folder: ModelFolder, data: Dataset, scratch: Path) -> Unseen:
    """Train as the job does: the model itself, and its out-of-fold models."""
    config = folder.config
    card = config.card("")
    began = time.monotonic()
    make_repeatable(config.hyperparameters.seed, exact=True)
    fresh, augment = network.build(folder, None)
    trained = fit(fresh, data, config, card, augment, scratch / "checkpoint.pt", lambda _: None)
    heads = problem.of(config.problem_type).heads(trained)
    found = list(candidates(heads, data.validation.pixels, card))
    temperature = calibration.temperature(config.problem_type, data.validation.rows, found, config.classes)
    card = msgspec.structs.replace(card, temperature=temperature)
    final = [said for examples in (data.validation, data.test) for said in candidates(heads, examples.pixels, card)]
    between = time.monotonic()
    others = out_of_fold.candidates(folder, None, data, card, scratch / "checkpoint.pt")
    if others is None:
        raise ValueError(f"{len(data.train)} images are too few for out-of-fold models")
    return Unseen(
        rows=[*data.train.rows, *data.validation.rows, *data.test.rows],
        candidates=[*others, *final],
        card=card,
        heads=heads,
        training_s=between - began,
        out_of_fold_s=time.monotonic() - between,
    )


def said_of(unseen: Unseen, pixels: Pixels) -> list[list[Region]]:
    """What the final model takes into consideration for other images."""
    return list(candidates(unseen.heads, pixels, unseen.card))


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows, of which the first holds the titles, as Markdown."""
    head, *rest = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *rest])


def _row(data: Images, number: int, label: str, folder: ModelFolder) -> ManifestRow:
    content = _content(data, number)
    return ManifestRow(
        image="",
        sha256=content,
        group=content,
        regions=[Region(label=label)],
        split=split_of(content, folder.config.splits),
        annotation=str(number),
        task=number,
    )


def _content(data: Images, number: int) -> str:
    return hashlib.sha256(np.ascontiguousarray(data.pixels[number]).tobytes()).hexdigest()
