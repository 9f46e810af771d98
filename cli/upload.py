"""Upload images to a model's prefix of the images bucket; each one becomes a task by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from labelloop import imaging
from labelloop.artifacts import Bucket
from labelloop.errors import ImageError

THREADS = 16


def image_files(paths: Iterable[Path]) -> tuple[dict[str, Path], dict[str, str]]:
    """The files given and those of the folders given, hidden ones aside, by the name they get in S3; and the refused ones.

    A file of a folder keeps its path inside it. Of two files that would get the same name the second is refused.
    """
    named: dict[str, Path] = {}
    refused: dict[str, str] = {}
    for given in paths:
        inside = sorted(p for p in given.rglob("*") if p.is_file() and not p.name.startswith(".")) if given.is_dir() else [given]
        for path in inside:
            name = path.relative_to(given).as_posix() if given.is_dir() else path.name
            if named.setdefault(name, path) != path:
                refused[str(path)] = f"{named[name]} has the same name, {name}"
    return named, refused


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
