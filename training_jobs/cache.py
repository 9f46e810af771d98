"""What training jobs keep in S3 for the next: images decoded, and what a frozen network sees in them, by their files' SHA-256.

They lie in shards, each an `.npy` file beside a note (`records.Shard`) of what it holds. A shard is named by its images and never
changes; a later one counts more. Nothing depends on any of it: what is missing or damaged, by the note's SHA-256, is made
anew, and S3 may fail without the training.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import PIL
from botocore.exceptions import BotoCoreError
from obstore.auth.boto3 import Boto3CredentialProvider
from PIL import features

from labelloop import image_headers, imaging
from labelloop.artifacts import Bucket, parse_s3_uri
from labelloop.errors import StorageError
from labelloop.records import ModelCard, Shard

type Array = np.ndarray[Any, np.dtype[Any]]

_SHARD_BYTES = 64 * 2**20
_AT_ONCE = 4  # shards that are in memory
_LIBRARIES = ("libjpeg_turbo", "zlib", "webp", "libtiff")  # those that decode

log = logging.getLogger(__name__)


class Cache:
    """One array an image, all of one kind: `cache` is `s3://bucket/prefix/` of the model, `folder` stands for how they are made.

    `what` they are called in the log.
    """

    def __init__(self, cache: str, folder: str, what: str) -> None:
        bucket, prefix = parse_s3_uri(cache)
        self._bucket_name, self._prefix, self._what = bucket, f"{prefix}{folder}/", what

    @cached_property
    def _bucket(self) -> Bucket:
        try:
            return Bucket(self._bucket_name, credential_provider=Boto3CredentialProvider())
        except (ValueError, BotoCoreError) as error:
            raise StorageError(f"there are no credentials for s3://{self._bucket_name}: {error}") from error

    def fill(self, arrays: Array, hashes: Sequence[str]) -> list[int]:
        """Fill in what is kept, `[N, …]`, and return the numbers of the images of which nothing is."""
        numbers: dict[str, list[int]] = {}
        for number, sha256 in enumerate(hashes):
            numbers.setdefault(sha256, []).append(number)
        found: list[str] = []
        try:
            notes = dict(self._notes())
            places = {sha256: name for name, note in notes.items() for sha256 in note.images if sha256 in numbers}
            with ThreadPoolExecutor(_AT_ONCE) as readers:
                reading = [readers.submit(self._read, name, notes[name], numbers, arrays) for name in set(places.values())]
                for shard in reading:
                    found += shard.result()
        except StorageError as error:
            log.warning("%s of earlier trainings cannot be read: %s", self._what, error)
        return sorted(number for sha256 in numbers.keys() - set(found) for number in numbers[sha256])

    def keep(self, arrays: Array, hashes: Sequence[str], numbers: Sequence[int]) -> None:
        """Keep what was newly made of the images of these numbers for the next training."""
        each = max(1, _SHARD_BYTES // (arrays.itemsize * math.prod(arrays.shape[1:])))
        try:
            for start in range(0, len(numbers), each):
                some = numbers[start : start + each]
                self._write(arrays[some], [hashes[number] for number in some])
        except StorageError as error:
            log.warning("%s are not kept for the next training: %s", self._what, error)

    def _notes(self) -> Iterator[tuple[str, Shard]]:
        """The shards' names and notes, the oldest first."""
        entries = self._bucket.entries(self._prefix)
        for key in sorted((key for key in entries if key.endswith(".json")), key=lambda key: entries[key].last_modified):
            try:
                yield key.removesuffix(".json"), msgspec.json.decode(self._bucket.get(key) or b"", type=Shard)
            except ValueError as error:
                log.warning("%s cannot be read, what it is of is made anew: %s", key, error)

    def _read(self, name: str, note: Shard, numbers: Mapping[str, Sequence[int]], arrays: Array) -> list[str]:
        """Fill in what a shard holds of the images; their hashes. Nothing of a damaged one."""
        data = self._bucket.get(f"{name}.npy") or b""
        if hashlib.sha256(data).hexdigest() == note.sha256:
            with suppress(ValueError):
                found: Array = np.load(io.BytesIO(data), allow_pickle=False)
                if found.dtype == arrays.dtype and found.shape == (len(note.images), *arrays.shape[1:]):
                    for sha256, one in zip(note.images, found, strict=True):
                        arrays[numbers.get(sha256, [])] = one
                    return note.images
        log.warning("%s.npy is missing or damaged, what it held is made anew", name)
        return []

    def _write(self, arrays: Array, hashes: list[str]) -> None:
        """The note comes last: a shard without one is none."""
        file = io.BytesIO()
        np.save(file, arrays)
        data = file.getvalue()
        name = self._prefix + hashlib.sha256("\n".join(hashes).encode()).hexdigest()[:32]
        self._bucket.put(f"{name}.npy", data)
        note = Shard(images=hashes, sha256=hashlib.sha256(data).hexdigest())
        self._bucket.put(f"{name}.json", msgspec.json.encode(note))


def recipe(card: ModelCard) -> str:
    """Stands for all that pixels follow from but the image itself: the card, the code that decodes, the libraries under it."""
    what = [card.width, card.height, card.mode, card.oversampling, PIL.__version__, *map(features.version, _LIBRARIES)]
    code = b"".join(Path(str(module.__file__)).read_bytes() for module in (imaging, image_headers))
    return hashlib.sha256(msgspec.json.encode(what) + code).hexdigest()[:16]
