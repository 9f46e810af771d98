"""Upload images to a model's prefix of the images bucket; each one becomes a task by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from labelloop import imaging
from labelloop.artifacts import Bucket
from labelloop.errors import ImageError

THREADS = 16


def image_files(paths: Iterable[Path]) -> Iterator[Path]:
    """The files of folders, recursively, and the files given; hidden ones aside."""
    for path in paths:
        if path.is_dir():
            yield from sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        else:
            yield path


def upload(
    bucket: Bucket, prefix: str, images: list[tuple[str, Callable[[], bytes]]], done: Callable[[str, str | None], None]
) -> None:
    """Upload (name, reader) pairs under `prefix`, several at once. `done(name, refusal)` hears of each, refused or not."""

    def one(image: tuple[str, Callable[[], bytes]]) -> None:
        name, read = image
        try:
            data = read()
            imaging.inspect(data)
        except (ImageError, OSError) as error:
            done(name, str(error))
            return
        bucket.put(prefix + name, data)
        done(name, None)

    with ThreadPoolExecutor(THREADS) as pool:
        for result in [pool.submit(one, image) for image in images]:
            result.result()
