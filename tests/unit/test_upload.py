"""Images on their way to S3: which files, what is refused, what lies there already, and the classes that come with them."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import boto3
import msgspec
import pytest
from PIL import Image
from rich.console import Console

from cli.image_sources import Source, gather
from cli.progress import Steps
from cli.upload import Report, Uploaded, annotate, run, show, upload
from labelloop.artifacts import Bucket, s3_uri
from labelloop.errors import ConfigError, LabelloopError, LabelStudioError, RequestError
from labelloop.label_studio.client import KnownTask
from labelloop.label_studio.payloads import AnnotatedTask, Annotation
from labelloop.ledger import Ledger
from labelloop.model_config import ModelConfig, ModelFolder
from tests import examples

PREFIX = "images/digits/"
QUIET = Console(quiet=True)


def of_type(problem_type: str, classes: list[str]) -> ModelConfig:
    return msgspec.structs.replace(examples.DIGITS, problem_type=cast(Any, problem_type), classes=classes)


PETS = of_type("classification", ["Cat", "Dog"])
TAGS = of_type("multilabel", ["red", "round", "small"])
BOXES = of_type("detection", ["Cat", "Dog"])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(*names: str) -> None:
    """Files whose content is their name."""
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)


def named(*given: str, config: ModelConfig = PETS, **options: Any) -> dict[str, str]:
    """What `gather` finds, with nothing refused: name → path."""
    sources = gather(given, config, **options)
    assert sources.refused == {}
    return {name: str(source.path) for name, source in sources.images.items()}


# Which files


def test_files_keep_their_path_inside_the_folder(here: Path) -> None:
    write("photos/a/1.png", "photos/b/1.png", "photos/2.png", "photos/.hidden.png", "photos/.git/3.png")
    assert named("photos") == {name: f"photos/{name}" for name in ("2.png", "a/1.png", "b/1.png")}
    assert named("photos/a/1.png") == {"1.png": "photos/a/1.png"}


def test_a_glob_keeps_the_path_below_its_first_wildcard(here: Path) -> None:
    write("photos/a/1.jpg", "photos/a/b/2.jpg", "photos/3.png", "photos/4.jpg", "photos/.hidden/5.jpg")
    assert sorted(named("photos/**/*.jpg")) == ["4.jpg", "a/1.jpg", "a/b/2.jpg"]
    assert named("photos/?.png") == {"3.png": "photos/3.png"}
    assert named(str(here / "photos" / "*" / "1.jpg")) == {"a/1.jpg": str(here / "photos/a/1.jpg")}


def test_a_file_whose_name_looks_like_a_glob_is_a_file(here: Path) -> None:
    write("a[1].png")
    assert named("a[1].png") == {"a[1].png": "a[1].png"}


def test_of_two_files_with_one_name_the_second_is_refused(here: Path) -> None:
    write("a/1.png", "b/1.png")
    sources = gather(["a/1.png", "b/1.png", "a/1.png", "./a/1.png"], PETS)
    assert sources.images == {"1.png": Source("1.png", Path("a/1.png"))}
    assert sources.refused == {"b/1.png": "a/1.png has the same name, 1.png; rename one, or give the folder above both"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "one of the paths is empty"),
        ("nowhere", "nowhere does not exist"),
        ("nowhere/1.png", "does not exist"),
        ("empty", "empty holds no files"),
        ("photos/*.tif", "matches no file"),
        ("photos/*", "only folders; give the folder"),
    ],
)
def test_what_names_no_file_is_an_error(here: Path, given: str, message: str) -> None:
    Path("empty").mkdir()
    write("photos/a/1.png")
    with pytest.raises(RequestError, match=message):
        gather(["photos", given], PETS)


def test_a_file_that_cannot_be_uploaded_is_refused_and_the_rest_is_not(here: Path) -> None:
    write("photos/good.png", "photos/what?.png", "photos/bell\a.png", "photos/More.ZIP")
    Path("photos/gone.png").symlink_to("nowhere.png")
    os.mkfifo("photos/pipe.png")
    long = "photos/" + "/".join(["a" * 200] * 6) + "/x.png"
    write(long)
    Path(os.fsdecode(b"photos/\xff.png")).write_bytes(b"")
    sources = gather(["photos"], PETS)
    assert list(sources.images) == ["good.png"]
    assert {
        Path(os.fsencode(path).decode(errors="replace")).name: reason.split(";")[0] for path, reason in sources.refused.items()
    } == {
        "what?.png": "Label Studio cannot show an image with a ? in its name",
        "bell\a.png": "its name has an empty or dotted part, or a control character",
        "gone.png": "does not exist",
        "pipe.png": "is no file",
        "More.ZIP": "is an archive",
        "x.png": f"its name is too long: S3 takes 1024 bytes, it would have {len(PREFIX) + len(long) - len('photos/')}",
        "�.png": "its name is not UTF-8",
    }


# Classes from folders


def test_the_folder_directly_above_a_file_is_its_class(here: Path) -> None:
    write("photos/2024/Cat/1.png", "photos/Dog/2.png", "Cat/3.png")
    sources = gather(["photos", "Cat"], PETS, labels_from_folders=True)
    assert {name: source.labels for name, source in sources.images.items()} == {
        "2024/Cat/1.png": ("Cat",),
        "Dog/2.png": ("Dog",),
        "3.png": ("Cat",),
    }
    assert {source.labels for source in gather(["photos"], PETS).images.values()} == {None}


def test_all_unknown_folders_are_named_with_what_was_perhaps_meant(here: Path) -> None:
    write("photos/Cats/1.png", "photos/dog/2.png", "photos/Zebra/3.png", "photos/4.png", "photos/Cat/5.png")
    with pytest.raises(RequestError) as caught:
        gather(["photos"], PETS, labels_from_folders=True)
    for said in ("'Cats' is no class, did you mean 'Cat'?", "'dog' is no class, did you mean 'Dog'?", "'Zebra' is no class of"):
        assert said in str(caught.value)
    assert "'photos' is no class" in str(caught.value)


@pytest.mark.parametrize(("config", "message"), [(TAGS, "give a CSV file"), (BOXES, "cannot say where")])
def test_folders_are_no_labels_of_other_problem_types(here: Path, config: ModelConfig, message: str) -> None:
    write("red/1.png")
    with pytest.raises(RequestError, match=message):
        gather(["red"], config, labels_from_folders=True)


# CSV files


def table(text: str, name: str = "sets/all.csv") -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)
    return name


def test_a_csv_names_images_beside_it_and_their_classes(here: Path) -> None:
    write("sets/a/1.png", "sets/2.png", "sets/3.png")
    sources = gather([table("label,by,image\nCat,me,a/1.png\n Dog ,me,2.png\n,me,3.png\n")], PETS)
    assert sources.refused == {}
    assert list(sources.images.values()) == [
        Source("a/1.png", Path("sets/a/1.png"), ("Cat",)),
        Source("2.png", Path("sets/2.png"), ("Dog",)),
        Source("3.png", Path("sets/3.png"), None),
    ]


def test_a_csv_without_classes_only_names_images(here: Path) -> None:
    write("sets/1.png")
    for config in (PETS, TAGS, BOXES):
        assert named(table("image\n1.png\n"), config=config) == {"1.png": "sets/1.png"}


def test_a_csv_whose_columns_are_no_label_is_noted(here: Path) -> None:
    write("sets/1.png")
    sources = gather([table("lable,image,by,\nCat,1.png,me,\n")], PETS)
    assert list(sources.images.values()) == [Source("1.png", Path("sets/1.png"), None)]
    assert sources.notes == ["sets/all.csv annotates nothing: beside 'image' it has no column 'label', but: lable, by"]
    for quiet in ("image,\n1.png,\n", "image,by,label\n1.png,me,\n"):
        assert gather([table(quiet)], PETS).notes == []


def test_several_classes_stand_in_one_cell(here: Path) -> None:
    write("sets/1.png", "sets/2.png", "sets/3.png")
    sources = gather([table("image,label\n1.png,red | small|red|\n2.png,\n3.png,|\n")], TAGS)
    assert [source.labels for source in sources.images.values()] == [("red", "small"), None, None]


def test_where_an_image_has_one_class_its_name_may_hold_what_separates_several(here: Path) -> None:
    write("sets/1.png")
    sources = gather([table("image,label\n1.png,up|down\n")], of_type("classification", ["up|down", "left|right"]))
    assert [source.labels for source in sources.images.values()] == [("up|down",)]


def test_a_row_of_more_cells_than_the_header_is_refused(here: Path) -> None:
    write("sets/1.png", "sets/2.png")
    sources = gather([table("image,label\n1.png,red,small\n2.png,red\n")], TAGS)
    assert list(sources.images) == ["2.png"]
    assert "put one with a comma in quotes; several classes go into one, separated by |" in sources.refused["sets/all.csv:2"]


def test_a_name_that_no_file_can_have_is_refused_and_the_rest_is_not(here: Path) -> None:
    write("sets/1.png")
    sources = gather([table("image\na\0b.png\n1.png\n")], PETS)
    assert list(sources.images) == ["1.png"]
    assert sources.refused.keys() == {"sets/all.csv:2"}


def test_rows_that_name_no_file_beside_the_csv_are_refused_and_the_rest_is_not(here: Path) -> None:
    write("sets/1.png", "other.png")
    given = table(f'image\n1.png\ngone.png\n../other.png\n{here}/other.png\n""\n')
    sources = gather([given], PETS)
    assert list(sources.images) == ["1.png"]
    assert sources.refused == {
        "sets/gone.png": "does not exist",
        "sets/all.csv:4": "../other.png lies outside the CSV file's folder; move it there, or the CSV file up",
        "sets/all.csv:5": f"{here}/other.png lies outside the CSV file's folder; move it there, or the CSV file up",
        "sets/all.csv:6": "the row names no image",
    }


def test_an_image_that_a_csv_names_twice_has_its_first_classes(here: Path) -> None:
    write("sets/1.png")
    sources = gather([table("image,label\n1.png,Cat\n1.png,Cat\n./1.png,Dog\n")], PETS)
    assert [source.labels for source in sources.images.values()] == [("Cat",)]
    assert sources.refused == {"sets/1.png": "is given twice, with different classes; the first ones count"}


@pytest.mark.parametrize(
    ("text", "config", "message"),
    [
        ("file,label\n1.png,Cat\n", PETS, r"all\.csv: has no column 'image' in its first line; it has: file, label"),
        ("image;label\n1.png;Cat\n", PETS, "it has: image;label .columns are separated by commas"),
        ("", PETS, "it is empty"),
        ("image\n", PETS, "no rows"),
        ("image,Label\n1.png,Cat\n", PETS, "has no column 'label', did you mean 'Label'"),
        ("image,labels\n1.png,Cat\n", PETS, "did you mean 'labels'"),
        ("image,label,label\n1.png,Cat,Dog\n", PETS, "has the column 'label' twice"),
        ('image\n"1.png\n', PETS, "is no CSV"),
        ("image,label\n1.png,Cats\n1.png,Bird\n", PETS, "label: line 2: 'Cats' is no class, did you mean 'Cat'.*line 3: 'Bird'"),
        ("image,label\n1.png,red|rond\n", TAGS, "line 2: 'rond' is no class, did you mean 'round'"),
        ("image,label\n1.png,Cat\n", BOXES, "a class alone cannot say where"),
    ],
)
def test_a_csv_that_cannot_be_meant_is_an_error(here: Path, text: str, config: ModelConfig, message: str) -> None:
    write("sets/1.png")
    with pytest.raises(ConfigError, match=message):
        gather([table(text)], config)


def test_a_csv_in_another_encoding_is_an_error(here: Path) -> None:
    table("")
    Path("sets/all.csv").write_bytes("image\nü.png\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="save it as CSV UTF-8"):
        gather(["sets/all.csv"], PETS)
    write("sets/ü.png")
    Path("sets/all.csv").write_bytes("image\nü.png\n".encode("utf-8-sig"))
    assert list(named("sets/all.csv")) == ["ü.png"]


# To S3


def send(bucket: Bucket, images: dict[str, bytes], **options: Any) -> Uploaded:
    heard: dict[str, str | None] = {}
    result = upload(bucket, PREFIX, [(name, data.__bytes__) for name, data in images.items()], heard.__setitem__, **options)
    assert heard == {name: result.refused.get(name) for name in images}
    return result


def versions(bucket: Bucket) -> int:
    """How often anything was written; the bucket keeps every version."""
    return len(boto3.client("s3").list_object_versions(Bucket=bucket.name).get("Versions", []))


@pytest.fixture
def kept(bucket: Bucket) -> Bucket:
    boto3.client("s3").put_bucket_versioning(Bucket=bucket.name, VersioningConfiguration={"Status": "Enabled"})
    return bucket


def test_what_is_no_image_is_refused_and_the_rest_uploaded(bucket: Bucket) -> None:
    images = {"good.png": examples.png(3), "broken.png": examples.png(3)[:30], "text.png": b"not an image", "empty.png": b""}
    result = send(bucket, images)
    assert result.uploaded == ["good.png"]
    assert set(result.refused) == {"broken.png", "text.png", "empty.png"}
    assert all(result.refused.values())
    assert bucket.keys("images/") == ["images/digits/good.png"]


def test_a_file_that_cannot_be_read_is_refused(bucket: Bucket, tmp_path: Path) -> None:
    result = upload(bucket, PREFIX, [("gone.png", (tmp_path / "gone.png").read_bytes)], lambda *_: None)
    assert result.refused == {"gone.png": "cannot be read: No such file or directory"}


def test_a_second_run_uploads_nothing(kept: Bucket) -> None:
    images = {f"ü {number}/a+b#%.png": examples.png(number) for number in range(5)}
    assert sorted(send(kept, images).uploaded) == sorted(images)
    assert versions(kept) == 5
    result = send(kept, images)
    assert (result.uploaded, sorted(result.there), result.refused, result.copies) == ([], sorted(images), {}, {})
    assert versions(kept) == 5
    assert result.content == {name: examples.sha256(data) for name, data in images.items()}


def test_an_interrupted_run_goes_on_where_it_stopped(kept: Bucket) -> None:
    images = {f"{number}.png": examples.png(number % 10, salt=number) for number in range(40)}
    read = threading.Semaphore(20)

    def reader(data: bytes) -> Callable[[], bytes]:
        def until_interrupted() -> bytes:
            if not read.acquire(blocking=False):
                raise KeyboardInterrupt
            return data

        return until_interrupted

    with pytest.raises(KeyboardInterrupt):
        upload(kept, PREFIX, [(name, reader(data)) for name, data in images.items()], lambda *_: None)
    there = len(kept.keys(PREFIX))
    assert 0 < there <= 20
    result = send(kept, images)
    assert (len(result.there), len(result.uploaded), result.refused) == (there, 40 - there, {})
    assert versions(kept) == 40


def test_a_name_that_another_image_has_is_refused_and_its_image_stays(bucket: Bucket) -> None:
    send(bucket, {"1.png": examples.png(1)})
    result = send(bucket, {"1.png": examples.png(2), "2.png": examples.png(2)})
    assert result.uploaded == ["2.png"]
    assert "another image lies at" in result.refused["1.png"]
    assert "rename the file" in result.refused["1.png"]
    assert bucket.get(PREFIX + "1.png") == examples.png(1)


def test_files_of_equal_content_are_one_image(kept: Bucket) -> None:
    first = send(kept, {"a.png": examples.png(1), "b.png": examples.png(1), "c.png": examples.png(2)})
    (copy, original), *others = first.copies.items()
    assert others == []
    assert {copy, original} == {"a.png", "b.png"}
    assert sorted(first.uploaded) == sorted([original, "c.png"])
    again = send(kept, {"elsewhere/c.png": examples.png(2)})
    assert (again.uploaded, again.copies) == ([], {"elsewhere/c.png": "c.png"})
    assert again.content == {"elsewhere/c.png": examples.sha256(examples.png(2))}
    assert versions(kept) == 2


def test_an_image_that_came_in_parts_is_compared_by_its_content(bucket: Bucket) -> None:
    s3 = boto3.client("s3")
    data = examples.png(4)
    begun = s3.create_multipart_upload(Bucket=bucket.name, Key=PREFIX + "1.png")["UploadId"]
    place: Any = {"Bucket": bucket.name, "Key": PREFIX + "1.png", "UploadId": begun}
    part = s3.upload_part(**place, PartNumber=1, Body=data)
    s3.complete_multipart_upload(**place, MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]})
    assert "-" in str(bucket.entries(PREFIX)[PREFIX + "1.png"].e_tag)
    assert send(bucket, {"1.png": data}).there == ["1.png"]
    assert set(send(bucket, {"1.png": examples.png(5)}).refused) == {"1.png"}


def test_a_large_image_is_one_put_and_found_again(bucket: Bucket) -> None:
    """S3's tag is the content's MD5 only of what came in one part."""
    noise = examples.encoded(Image.frombytes("RGB", (1600, 1300), os.urandom(1600 * 1300 * 3)), "BMP")
    assert len(noise) > 5 * 2**20
    assert send(bucket, {"large.bmp": noise}).uploaded == ["large.bmp"]
    entry = bucket.entries(PREFIX)[PREFIX + "large.bmp"]
    assert entry.e_tag == f'"{hashlib.md5(noise, usedforsecurity=False).hexdigest()}"'
    assert send(bucket, {"large.bmp": noise}).there == ["large.bmp"]


def test_a_dry_run_says_the_same_and_writes_nothing(kept: Bucket) -> None:
    send(kept, {"1.png": examples.png(1)})
    images = {
        "1.png": examples.png(1),
        "2.png": examples.png(2),
        "3.png": examples.png(2),
        "broken.png": b"x",
        "4.png": examples.png(4),
    }
    result = send(kept, images, dry_run=True)
    [(copy, first)] = result.copies.items()
    assert {copy, first} == {"2.png", "3.png"}, "which of the two comes first is up to the threads"
    assert (sorted(result.uploaded), result.there, set(result.refused)) == ([first, "4.png"], ["1.png"], {"broken.png"})
    assert versions(kept) == 1


# Classes become annotations


@dataclass
class Tasks:
    """A Label Studio that lists tasks and takes annotations. `later` appear one a look; `forgets`: how often to count one."""

    tasks_: list[KnownTask] = field(default_factory=list)
    later: list[KnownTask] = field(default_factory=list)
    given: dict[int, Any] = field(default_factory=dict)
    forgets: dict[int, int] = field(default_factory=dict)

    def tasks_after(self, project: int, last: int, data_key: str, *, limit: int = 500) -> list[KnownTask]:
        if self.later:
            self.tasks_.append(self.later.pop(0))
        return [task for task in self.tasks_ if task.id > last][:limit]

    def tasks(self, project: int, data_key: str) -> list[KnownTask]:
        return list(self.tasks_)

    def annotate(self, task: int, result: list[dict[str, Any]], *, seconds: float) -> int:
        assert task not in self.given, "an annotation is doubled"
        self.given[task] = [label for region in result for label in region["value"]["choices"]]
        self._count(task)
        return -task

    def annotations_of(self, project: int, tasks: Sequence[int]) -> list[AnnotatedTask]:
        return [AnnotatedTask(id=task, data={}, annotations=[Annotation(id=-task)]) for task in tasks if task in self.given]

    def count_anew(self, annotation: int) -> None:
        assert -annotation in self.given
        self._count(-annotation)

    def unlabelled_ids(self, project: int, last: int) -> list[int]:
        return [task.id for task in self.tasks_ if task.id > last and not task.annotations][:2]

    def _count(self, task: int) -> None:
        if self.forgets.get(task, 0):
            self.forgets[task] -= 1
            return
        place = next(number for number, known in enumerate(self.tasks_) if known.id == task)
        self.tasks_[place] = dataclasses.replace(self.tasks_[place], annotations=1)


def task(number: int, content: str, annotations: int = 0) -> KnownTask:
    return KnownTask(number, f"s3://b/{content}", examples.sha256(content), (8, 8), annotations)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.upload._LOOK_SECONDS", 0.001)
    monkeypatch.setattr("cli.upload._SETTLED_SECONDS", 0.001)


def labelled(**labels: str) -> dict[str, tuple[str, ...]]:
    return {examples.sha256(content): (label,) for content, label in labels.items()}


DIGITS = examples.CONFIGS["digits"]


def test_tasks_are_annotated_as_they_appear(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, done = Tasks([task(1, "a"), task(2, "other")], later=[task(3, "b"), task(4, "c")]), []
    result = annotate(cast(Any, fake), 1, DIGITS, labelled(a="1", b="2", c="3"), lambda: done.append(1))
    assert fake.given == {1: ["1"], 3: ["2"], 4: ["3"]}
    assert (result.now, result.before, len(done)) == (3, 0, 3)


def test_an_annotation_that_label_studio_forgets_to_count_is_counted_again() -> None:
    fake = Tasks([task(number, str(number)) for number in range(1, 9)], forgets={2: 1, 7: 3})  # the last attempt
    result = annotate(cast(Any, fake), 1, DIGITS, labelled(**{"1": "1", "2": "2", "7": "3"}), lambda: None)
    assert (result.now, result.before) == (3, 0)
    assert [known.id for known in fake.tasks_ if known.annotations] == [1, 2, 7]


def test_annotations_that_are_never_counted_are_an_error_with_a_task() -> None:
    fake = Tasks([task(1, "1"), task(2, "2")], forgets={2: 99})
    with pytest.raises(LabelStudioError, match="no annotation of 1 task that was annotated, 2 among them"):
        annotate(cast(Any, fake), 1, DIGITS, labelled(**{"1": "1", "2": "2"}), lambda: None)


def test_what_has_an_annotation_is_left_alone_so_a_second_run_changes_nothing() -> None:
    fake = Tasks([task(1, "a"), task(2, "b", annotations=1)])
    labels = labelled(a="1", b="2")
    assert annotate(cast(Any, fake), 1, DIGITS, labels, lambda: None).now == 1
    result = annotate(cast(Any, fake), 1, DIGITS, labels, lambda: None)
    assert (result.now, result.before) == (0, 2)
    assert fake.given == {1: ["1"]}


def test_a_second_run_looks_after_what_an_interrupted_one_annotated() -> None:
    """Label Studio may forget to count an annotation at once, or, importing still, a moment after the second run's look."""

    class Interrupted(Tasks):
        def annotate(self, task: int, result: list[dict[str, Any]], *, seconds: float) -> int:
            if len(self.given) == 3:
                raise KeyboardInterrupt
            return super().annotate(task, result, seconds=seconds)

    @dataclass
    class Late(Tasks):
        """Whose import ends between two looks at the tasks, and writes what it had counted before."""

        late: list[int] = field(default_factory=lambda: [1])

        def unlabelled_ids(self, project: int, last: int) -> list[int]:
            if self.late:
                forgotten = self.late.pop()
                self.tasks_[forgotten - 1] = dataclasses.replace(self.tasks_[forgotten - 1], annotations=0)
            return super().unlabelled_ids(project, last)

    first = Interrupted([task(number, str(number)) for number in range(1, 6)], forgets={2: 1, 3: 2})
    labels = labelled(**{str(number): str(number) for number in range(1, 6)})
    with pytest.raises(KeyboardInterrupt):
        annotate(cast(Any, first), 1, DIGITS, labels, lambda: None)
    assert [known.id for known in first.tasks_ if known.annotations] == [1]
    second, done = Late(first.tasks_, given=first.given, forgets={3: 1}), []
    result = annotate(cast(Any, second), 1, DIGITS, labels, lambda: done.append(1))
    assert (result.now, result.before, len(done)) == (2, 3, 5)
    assert second.given == {number: [str(number)] for number in range(1, 6)}
    assert [known.id for known in second.tasks_ if known.annotations] == [1, 2, 3, 4, 5]


def test_a_task_that_appears_out_of_order_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.upload._AGAIN_SECONDS", 0.0)
    fake = Tasks([task(5, "x")], later=[task(6, "y"), task(2, "late")])
    assert annotate(cast(Any, fake), 1, DIGITS, labelled(late="4"), lambda: None).now == 1


def test_images_that_never_become_tasks_are_an_error_with_their_number() -> None:
    fake = Tasks([task(1, "a")])
    with pytest.raises(LabelStudioError, match=r"2 images have become no task.*run the same command again"):
        annotate(cast(Any, fake), 1, DIGITS, labelled(a="1", b="2", c="3"), lambda: None, stalled_s=0.05)
    assert fake.given == {1: ["1"]}


# The whole command, but for Label Studio


@dataclass
class Upload:
    """The command's run on real storage; `ingest` is played by `tasks_appear`."""

    bucket: Bucket
    ledger: Ledger
    label_studio: Tasks = field(default_factory=Tasks)
    folder: ModelFolder = DIGITS

    def __post_init__(self) -> None:
        self.ledger.set_project("digits", 1)

    def run(self, *given: str, dry_run: bool = False, restore_deleted: bool = False, **options: Any) -> Report:
        deployment = SimpleNamespace(images=self.bucket, ledger=self.ledger, label_studio=self.label_studio)
        sources = gather(given, self.folder.config, **options)
        what = {"dry_run": dry_run, "restore_deleted": restore_deleted}
        return run(cast(Any, deployment), self.folder, sources, QUIET, **what)

    def tasks_appear(self) -> None:
        """One task a content, as `ingest` makes them."""
        known = {known.sha256 for known in self.label_studio.tasks_}
        for key in self.bucket.keys(PREFIX):
            digest = examples.sha256(self.bucket.get(key) or b"")
            if digest not in known:
                known.add(digest)
                number = len(self.label_studio.tasks_) + 1
                self.label_studio.tasks_.append(KnownTask(number, s3_uri(self.bucket.name, key), digest, (8, 8), 0))
                self.ledger.images_done("digits", 1, {digest: s3_uri(self.bucket.name, key)})


@pytest.fixture
def command(kept: Bucket, ledger: Ledger, here: Path) -> Upload:
    return Upload(kept, ledger)


def picture(name: str, digit: int, salt: int = 0) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(examples.png(digit, salt=salt))


def test_sorted_images_become_annotations_once(command: Upload) -> None:
    for name, digit in (("set/1/a.png", 1), ("set/1/b.png", 2), ("set/2/c.png", 3), ("set/1/copy of a.png", 1)):
        picture(name, digit)
    Path("set/2/broken.png").write_bytes(b"x")
    dry = command.run("set", labels_from_folders=True, dry_run=True)
    assert (dry.dry_run, dry.uploaded, dry.annotated, len(dry.copies)) == (True, 3, 3, 1)
    assert command.bucket.keys(PREFIX) == []
    assert command.run("set").uploaded == 3
    command.tasks_appear()
    report = command.run("set", labels_from_folders=True)
    assert (report.uploaded, report.already_there, len(report.copies), report.annotated) == (0, 3, 1, 3)
    assert list(report.refused) == ["2/broken.png"]
    assert sorted(labels for (labels,) in command.label_studio.given.values()) == ["1", "1", "2"]
    again = command.run("set", labels_from_folders=True)
    assert (again.annotated, again.already_annotated, again.sent_again) == (0, 3, 0)
    assert versions(command.bucket) == 3


def test_the_report_has_what_may_not_have_been_meant(command: Upload) -> None:
    picture("set/a.png", 1)
    Path("set/all.csv").write_text("image,class\na.png,1\n")
    assert command.run("set/all.csv", dry_run=True).notes == [
        "set/all.csv annotates nothing: beside 'image' it has no column 'label', but: class"
    ]


def test_a_copy_with_another_class_is_refused(command: Upload) -> None:
    picture("set/1/a.png", 1)
    picture("set/2/a too.png", 1)
    command.run("set")
    command.tasks_appear()
    report = command.run("set", labels_from_folders=True)
    (reason,) = report.refused.values()
    assert "is a copy of 1/a.png, which has the class 1, this one 2" in reason
    assert command.label_studio.given == {1: ["1"]}


def test_images_without_a_task_are_sent_again(command: Upload, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after the project was deleted and made anew."""
    picture("set/a.png", 1)
    picture("set/b.png", 2)
    picture("set/c.png", 2)
    command.run("set")
    report = command.run("set")
    assert (report.sent_again, report.on_the_way) == (0, 2), "ingest may be at it"
    out = io.StringIO()
    show(report, Console(file=out, width=200))
    assert "2 have no task yet and may be on the way" in out.getvalue()
    monkeypatch.setattr("cli.upload._INGEST", timedelta(minutes=-1))
    assert command.run("set", dry_run=True).sent_again == 2
    assert versions(command.bucket) == 2
    report = command.run("set")
    assert (report.sent_again, report.on_the_way) == (2, 0)
    assert versions(command.bucket) == 4
    command.tasks_appear()
    assert command.run("set").sent_again == 0


def test_an_image_whose_task_was_deleted_stays_without_one_unless_asked_for(command: Upload) -> None:
    for name, digit in (("set/1/a.png", 1), ("set/2/b.png", 2)):
        picture(name, digit)
    command.run("set")
    command.tasks_appear()
    deleted = command.label_studio.tasks_.pop()
    content = deleted.sha256 or ""
    for dry_run in (True, False):
        report = command.run("set", labels_from_folders=True, dry_run=dry_run)
        assert (report.deleted, report.sent_again, report.annotated) == (1, 0, 1)
    assert command.run("set", restore_deleted=True, dry_run=True).sent_again == 1
    assert command.ledger.had_task("digits", 1, content)

    command.label_studio.later = [dataclasses.replace(deleted, id=9)]
    report = command.run("set", labels_from_folders=True, restore_deleted=True)
    assert (report.deleted, report.sent_again, report.annotated) == (0, 1, 1)
    assert versions(command.bucket) == 3
    assert not command.ledger.had_task("digits", 1, content), "so that `ingest` takes it for new"


def test_what_becomes_a_task_while_others_are_listed_was_not_deleted(command: Upload, monkeypatch: pytest.MonkeyPatch) -> None:
    picture("set/1/a.png", 1)
    command.run("set")
    listed = command.label_studio.tasks

    def late(project: int, data_key: str) -> list[KnownTask]:
        before = listed(project, data_key)
        command.tasks_appear()
        return before

    monkeypatch.setattr(command.label_studio, "tasks", late)
    report = command.run("set", labels_from_folders=True)
    assert (report.deleted, report.annotated) == (0, 1)


def test_without_a_project_nothing_is_uploaded(kept: Bucket, ledger: Ledger, here: Path) -> None:
    picture("a.png", 1)
    deployment = SimpleNamespace(images=kept, ledger=ledger, label_studio=Tasks())
    with pytest.raises(LabelloopError, match="setup-label-studio-project digits"):
        run(cast(Any, deployment), DIGITS, gather(["a.png"], DIGITS.config), QUIET, dry_run=False)
    assert versions(kept) == 0


def test_a_report_is_said_in_lines() -> None:
    out = io.StringIO()
    report = Report(
        dry_run=False,
        uploaded=1980,
        already_there=3,
        annotated=7,
        already_annotated=2,
        copies={"b.png": "a.png"},
        refused={"[red]x.png": "is broken: [bold]"},
        notes=["[b].csv annotates nothing"],
    )
    show(report, Console(file=out, width=200))
    assert out.getvalue().splitlines() == [
        "uploaded 1,980, already there 3, refused 1",
        "1 file is a copy of another: the task of the same content counts for both",
        "annotated 7, left alone 2 that have an annotation",
        "refused [red]x.png: is broken: [bold]",
        "note [b].csv annotates nothing",
    ]


# Progress


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_rate_and_time_left(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("cli.progress.time", SimpleNamespace(monotonic=lambda: clock[0]))
    out = io.StringIO()
    with Steps(Console(file=out, force_terminal=terminal, width=120), "uploading", 200) as steps:
        for _ in range(100):
            clock[0] += 0.1
            steps.advance()
    if terminal:
        assert "100/200" in out.getvalue()
        assert "uploading" in out.getvalue()
    else:
        assert out.getvalue().splitlines()[-1] == "  uploading: 100 of 200  (10 s, 10/s, 10 s left)"


def test_progress_reckons_the_rate_without_what_was_done_before(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("cli.progress.time", SimpleNamespace(monotonic=lambda: clock[0]))
    out = io.StringIO()
    with Steps(Console(file=out), "annotating", 500, before=100) as steps:
        clock[0] += 5
        steps.advance(100)
    assert out.getvalue().splitlines() == ["  annotating: 200 of 500  (5 s, 20/s, 15 s left)"]


def test_progress_counts_steps_of_several_threads() -> None:
    out = io.StringIO()
    with Steps(Console(file=out), "going", 4000) as steps:

        def go() -> None:
            for _ in range(1000):
                steps.advance()

        threads = [threading.Thread(target=go) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert out.getvalue().splitlines()[-1].startswith("  going: 4,000 of 4,000")
