"""The images of a dataset snapshot as arrays: checked against the manifest, decoded as serving decodes them, once for all jobs.

They lie in a file that is mapped into memory, so that a snapshot may be larger than that.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
import numpy as np

from labelloop import artifacts, imaging, problem_types
from labelloop.errors import AnnotationError, ImageError, LabelloopError, StorageError
from labelloop.model_config import ModelConfig
from labelloop.records import METRIC_TITLES, ManifestRow, ModelCard, Split
from labelloop.wording import counted
from training_jobs.cache import Cache, recipe
from training_jobs.job import Phases, TrainingJob

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Numbers = np.ndarray[Any, np.dtype[np.int64]]

_READERS = 16  # the images channel fetches a file when it is opened; Pillow decodes without the interpreter's lock
_SPLITS: tuple[Split, ...] = ("train", "validation", "test")
_LISTED = 10  # problems named in full; the rest is counted


@dataclass(frozen=True)
class Examples:
    """The images of one split, ordered by content hash, or some of them.

    `mapped`: uint8 `[N, height, width, channels]`, those of the whole split, which stay mapped; `numbers` tell which of them
    belong to the rows, where not all do.
    """

    rows: list[ManifestRow]
    mapped: Pixels
    numbers: Numbers | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def pixels(self) -> Pixels:
        """The rows' own. Of some of a split a copy, for which memory may be too small."""
        return self.mapped if self.numbers is None else self.mapped[self.numbers]

    def part(self, numbers: Sequence[int]) -> Examples:
        """Some of these."""
        own = np.array(numbers, dtype=np.int64)
        return Examples(
            [self.rows[number] for number in numbers], self.mapped, own if self.numbers is None else self.numbers[own]
        )

    @property
    def measurable(self) -> bool:
        """Whether a model's score on them means anything: somebody found something in one of them."""
        return any(row.regions for row in self.rows)


@dataclass(frozen=True)
class Dataset:
    """A snapshot's images by split. `test` is the holdout. `decoded`: how many had to be decoded."""

    train: Examples
    validation: Examples
    test: Examples
    decoded: int = 0


def load(job: TrainingJob, config: ModelConfig, card: ModelCard, phases: Phases) -> Dataset:
    """Read manifest and images, decoded for the model that `card` describes.

    Raises `StorageError` when the manifest is not the job's, `AnnotationError` when it holds nothing to train on or nothing
    to measure with, `ImageError` with all images that are missing or broken or have changed since.
    """
    phases.begin("read")
    rows = sorted(_manifest(job), key=lambda row: row.sha256)  # tasks may stand class by class; samples of them should not
    _check(rows, config)
    parts = {split: [row for row in rows if row.split == split] for split in _SPLITS}
    images = decode([row for part in parts.values() for row in part], job, config, card, phases)
    found, start = {}, 0
    for split, part in parts.items():
        found[split] = Examples(part, images.pixels[start : start + len(part)])
        start += len(part)
    return Dataset(found["train"], found["validation"], found["test"], images.decoded)


@dataclass(frozen=True)
class Images:
    """`pixels` uint8 `[N, height, width, channels]`. `decoded`: how many of them had to be; the others were kept."""

    pixels: Pixels
    decoded: int


def decode(rows: Sequence[ManifestRow], job: TrainingJob, config: ModelConfig, card: ModelCard, phases: Phases) -> Images:
    """Images as `card`'s model takes them; those that no earlier job kept are decoded, and kept.

    Raises `ImageError` naming every bad one, `StorageError` without room for them.
    """
    pixels = _room((len(rows), card.height, card.width, 1 if card.mode == "L" else 3), job.folder)
    hashes = [row.sha256 for row in rows]
    phases.begin("read")
    cache = Cache(job.cache, f"decoded/{recipe(card)}", "decoded images") if job.cache else None
    missing = cache.fill(pixels, hashes) if cache else list(range(len(rows)))
    phases.begin("decode")

    def fill(number: int) -> str | None:
        row = rows[number]
        try:
            data = _read(row, job.images, config.images_prefix)
            image = imaging.decode(data, width=card.width, height=card.height, mode=card.mode, oversampling=card.oversampling)
        except ImageError as error:
            return f"{row.image} (task {row.task}) {error}"
        pixels[number] = np.asarray(image, dtype=np.uint8).reshape(pixels.shape[1:])
        return None

    with ThreadPoolExecutor(_READERS) as readers:
        _raise_all(
            ImageError,
            "of the snapshot's images cannot be used; put back what was annotated, or delete their tasks in Label Studio",
            [problem for problem in readers.map(fill, missing) if problem],
        )
    if cache and missing:
        cache.keep(pixels, hashes, missing)
    return Images(pixels, len(missing))


def _room(shape: tuple[int, ...], folder: Path) -> Pixels:
    """An array in a file of the job's disk, which goes with the array."""
    demand_room(math.prod(shape), folder, "decoded images take")  # a disk that is full later ends the process without a word
    with tempfile.TemporaryFile(dir=folder) as file:
        return np.asarray(np.memmap(file, dtype=np.uint8, mode="w+", shape=shape))


def demand_room(size: int, folder: Path, what: str) -> None:
    """Raises `StorageError` where so many bytes are not free. `what` takes them, in words: "decoded images take"."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise StorageError(
            f"{what} {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free in {folder}; raise training.volume_gb in config.yaml, "
            "or name a larger training.instance_type where the machine has a disk of its own"
        )


def _manifest(job: TrainingJob) -> list[ManifestRow]:
    try:
        data = job.manifest.read_bytes()
    except OSError as error:
        raise StorageError(f"the manifest cannot be read: {error}") from error
    if hashlib.sha256(data).hexdigest() != job.digest:
        raise StorageError(
            f"the manifest is not the snapshot {job.digest[:12]} that the job was started for: its SHA-256 differs"
        )
    try:
        return [msgspec.json.decode(line, type=ManifestRow) for line in data.splitlines() if line]
    except msgspec.MsgspecError as error:
        raise StorageError(f"the manifest is damaged: {error}") from error


def _check(rows: Sequence[ManifestRow], config: ModelConfig) -> None:
    named = [(row.image, region.label) for row in rows for region in row.regions]
    unknown = [f"{image} is {label!r}" for image, label in dict.fromkeys(named) if label not in config.classes]
    _raise_all(AnnotationError, "of the annotations cannot be used, as config.yaml has no such class", unknown)
    metric = METRIC_TITLES[problem_types.of(config.problem_type).metric]
    purposes: dict[Split, tuple[str, str]] = {
        "train": ("the train split", "nothing can be learnt"),
        "test": ("the holdout", f"{metric} cannot be measured"),
    }
    for split, (place, so) in purposes.items():
        regions = [row.regions for row in rows if row.split == split]
        if not regions:
            raise AnnotationError(f"none of {counted(len(rows), 'annotated image')} falls into {place}, so {so}; annotate more")
        if not any(regions):
            raise AnnotationError(
                f"nothing is annotated in {place} ({counted(len(regions), 'image')}), so {so}; annotate more that show a class"
            )


def _read(row: ManifestRow, images: Path, prefix: str) -> bytes:
    _, key = artifacts.parse_s3_uri(row.image)
    name = PurePosixPath(key.removeprefix(prefix))
    if not key.startswith(prefix) or name.is_absolute() or ".." in name.parts:
        raise ImageError(f"does not lie under {prefix}")
    try:
        data = (images / name).read_bytes()
    except FileNotFoundError:
        raise ImageError("is missing") from None
    except OSError as error:
        raise ImageError(f"cannot be read: {error}") from error
    if hashlib.sha256(data).hexdigest() != row.sha256:
        raise ImageError("has changed since it was annotated: its SHA-256 differs")
    return data


def _raise_all(kind: type[LabelloopError], what: str, problems: Sequence[str]) -> None:
    if problems:
        more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise kind(f"{len(problems)} {what}: {'; '.join(problems[:_LISTED])}{more}")
