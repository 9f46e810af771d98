"""Upload images to a model's prefix of the images bucket; each one becomes a task by itself.

S3 itself is the record of what is done: the prefix is listed once, and an image that lies there already is not sent again. So an
upload that was interrupted at any moment goes on where it stopped when it is run again.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from labelloop import imaging
from labelloop.artifacts import Bucket, Entry
from labelloop.errors import ConflictError, ImageError

THREADS = 16
_INGEST = timedelta(minutes=15)  # an object older than that without a task has been lost on the way to Label Studio

Reader = Callable[[], bytes]


@dataclass
class Uploaded:
    """What became of each image, by name.

    `there`: lay there already. `copies`: the name of the image that has the same content, and the task. `content`: SHA-256 of
    each that was not refused.
    """

    uploaded: list[str] = field(default_factory=list)
    there: list[str] = field(default_factory=list)
    copies: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    content: dict[str, str] = field(default_factory=dict)


def upload(
    bucket: Bucket,
    prefix: str,
    images: Iterable[tuple[str, Reader]],
    done: Callable[[str, str | None], None],
    *,
    dry_run: bool = False,
) -> Uploaded:
    """Upload (name, reader) pairs under `prefix`, several at once. `done(name, refusal)` hears of each, refused or not.

    Refused are what is no image and a name that another image has in S3. A `dry_run` says the same and writes nothing.
    """
    run = _Upload(bucket, prefix, dry_run=dry_run)

    def one(image: tuple[str, Reader]) -> None:
        name, read = image
        try:
            run.take(name, read())
        except (ImageError, OSError) as error:
            run.refuse(name, _reason(error))
        done(name, run.result.refused.get(name))

    in_parallel(one, images, THREADS)
    return run.result


def send_again(bucket: Bucket, prefix: str, images: Mapping[str, Reader]) -> list[str]:
    """Write again those images, by name, that have lain under `prefix` for a while: S3 then tells `ingest` of them again.

    For images without a task: the project is new, or their event was lost. The names of those written.
    """
    entries = bucket.entries(prefix)
    before = datetime.now(UTC) - _INGEST
    old = [name for name in images if prefix + name in entries and entries[prefix + name].last_modified < before]
    in_parallel(lambda name: bucket.put(prefix + name, images[name]()), old, THREADS)
    return old


class _Upload:
    """One run: what lies in S3, what this run has sent, and what became of each image."""

    def __init__(self, bucket: Bucket, prefix: str, *, dry_run: bool) -> None:
        self.result = Uploaded()
        self._bucket, self._prefix, self._dry_run = bucket, prefix, dry_run
        listed = bucket.entries(prefix)
        self._there = {key.removeprefix(prefix): entry for key, entry in listed.items() if key.startswith(prefix)}
        self._by_md5 = {md5: name for name, entry in self._there.items() if (md5 := _md5_of(entry))}
        self._lock = threading.Lock()

    def refuse(self, name: str, reason: str) -> None:
        with self._lock:
            self.result.refused[name] = reason

    def take(self, name: str, data: bytes) -> None:
        """Upload one image unless its content is there. Raises `ImageError`."""
        imaging.inspect(data)
        md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
        with self._lock:
            entry = self._there.get(name)
            first = self._by_md5.setdefault(md5, name) if entry is None else name
        if entry is not None:
            self._demand_same(name, data, md5, entry)
            self._note(self.result.there, name, data)
        elif first != name:
            with self._lock:
                self.result.copies[name] = first
                self.result.content[name] = hashlib.sha256(data).hexdigest()
        else:
            if not self._dry_run:
                self._put(name, data)
            self._note(self.result.uploaded, name, data)

    def _put(self, name: str, data: bytes) -> None:
        """Write where nothing lies. S3 also says no where an earlier try of the same request did arrive."""
        key = self._prefix + name
        try:
            self._bucket.put_if(key, data, tag=None)
        except ConflictError:
            if self._bucket.get(key) != data:
                raise _other_image(self._bucket, key) from None

    def _demand_same(self, name: str, data: bytes, md5: str, entry: Entry) -> None:
        key = self._prefix + name
        known = _md5_of(entry)
        same = known == md5 if known else entry.size == len(data) and self._bucket.get(key) == data
        if not same:
            raise _other_image(self._bucket, key)

    def _note(self, names: list[str], name: str, data: bytes) -> None:
        with self._lock:
            names.append(name)
            self.result.content[name] = hashlib.sha256(data).hexdigest()


def in_parallel[T](do: Callable[[T], object], things: Iterable[T], threads: int) -> None:
    """Do all, several at once. An interruption or an error lets those under way end and begins no others."""
    pool = ThreadPoolExecutor(threads)
    try:
        for result in [pool.submit(do, thing) for thing in things]:
            result.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _other_image(bucket: Bucket, key: str) -> ImageError:
    return ImageError(
        f"another image lies at s3://{bucket.name}/{key}, and its annotations belong to that one; "
        "rename the file, or put it into a folder of another name and give the folder above"
    )


def _md5_of(entry: Entry) -> str | None:
    """The MD5 of an object's content; None where it came in several parts, or encrypted with a key of KMS."""
    tag = (entry.e_tag or "").strip('"')
    return tag if len(tag) == 32 and entry.size else None


def _reason(error: Exception) -> str:
    return f"cannot be read: {error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)
