"""Images on their way to S3: their names, and what is refused."""

from __future__ import annotations

from pathlib import Path

from cli.upload import image_files, upload
from labelloop.artifacts import Bucket
from tests import examples


def test_files_keep_their_path_inside_the_folder(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/1.png", "2.png", ".hidden.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    named, refused = image_files([tmp_path])
    assert named == {name: tmp_path / name for name in ("2.png", "a/1.png", "b/1.png")}
    assert refused == {}


def test_of_two_files_with_one_name_the_second_is_refused(tmp_path: Path) -> None:
    first, second = tmp_path / "a" / "1.png", tmp_path / "b" / "1.png"
    for path in (first, second):
        path.parent.mkdir()
        path.write_bytes(b"x")
    named, refused = image_files([first, second, first])
    assert named == {"1.png": first}
    assert refused == {str(second): f"{first} has the same name, 1.png"}


def test_what_is_no_image_is_refused_and_the_rest_uploaded(bucket: Bucket) -> None:
    heard: dict[str, str | None] = {}
    images = {"good.png": examples.png(3), "broken.png": examples.png(3)[:30], "text.png": b"not an image"}
    upload(bucket, "images/digits/", [(name, data.__bytes__) for name, data in images.items()], heard.__setitem__)
    assert heard["good.png"] is None
    assert heard["broken.png"]
    assert heard["text.png"]
    assert bucket.keys("images/") == ["images/digits/good.png"]
