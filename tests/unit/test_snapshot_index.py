"""The index of annotated tasks: reading what is new makes the same snapshot as reading all, whatever was done in between."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labelloop import artifacts, snapshot_index
from labelloop.acceptance import Acceptance
from labelloop.dataset import row_of
from labelloop.errors import LabelStudioError, LateError, StorageError
from labelloop.label_studio.payloads import AnnotatedTask, Annotation, model_annotation_id
from labelloop.model_config import Splits
from labelloop.records import ManifestRow, Snapshot
from labelloop.snapshot_index import FORMAT, freeze, opened
from tests import examples
from tests.examples import DIGITS, LABELS, annotated_task, sha256
from tests.fake_aws import FakeBucket
from tests.fake_label_studio import FakeLabelStudio

PROJECT = 7
CHANGED = "2026-02-01T00:00:00Z"
FOLDER: Any = examples.CONFIGS["digits"]
KEY = artifacts.index_key("digits")


class Watched(FakeLabelStudio):
    """It writes down which tasks were read; `meanwhile` is called after each page."""

    def __init__(self, *tasks: AnnotatedTask) -> None:
        super().__init__(annotated=list(tasks))
        self.read: list[int] = []
        self.meanwhile: Callable[[], None] = lambda: None

    def annotated_tasks(self, project: int, **more: Any) -> Iterator[list[AnnotatedTask]]:
        assert project == PROJECT
        for page in super().annotated_tasks(project, **more):
            self.read += [task.id for task in page]
            yield page
            self.meanwhile()


class Model:
    """A model whose index lies in a bucket; `look` brings it up to date and freezes a snapshot."""

    def __init__(self, *tasks: AnnotatedTask, bucket: Any = None) -> None:
        self.label_studio, self.bucket, self.log = Watched(*tasks), bucket or FakeBucket(), list[str]()
        self.acceptance: Acceptance | None = None  # as the last look counted it

    def look(self, *, seconds: float = 60, folder: Any = FOLDER, project: int = PROJECT) -> tuple[Snapshot, bytes]:
        self.label_studio.read.clear()
        self.log.clear()
        with (
            tempfile.TemporaryDirectory() as scratch,
            opened(cast(Any, self.bucket), folder, project, Path(scratch), log=self._note) as index,
        ):
            index.catch_up(cast(Any, self.label_studio), seconds=seconds, log=self._note)
            self.acceptance = index.acceptance
            manifest = io.BytesIO()
            return index.freeze(manifest, "{digest}"), manifest.getvalue()

    def _note(self, message: str, **more: Any) -> None:
        self.log.append(f"{message}: {more.get('reason')}")

    @property
    def full(self) -> tuple[Snapshot, bytes]:
        return freeze(self.label_studio.annotated, DIGITS, LABELS, "{digest}")


def tasks(*numbers: int, **more: Any) -> list[AnnotatedTask]:
    return [annotated_task(number, str(number % 10), **more) for number in numbers]


# The same as reading all

TIMES = st.sampled_from(["2026-01-01T00:00:00.000000Z", "2026-01-02T00:00:00.000000Z", "2026-01-03T00:00:00Z"])
ANNOTATIONS = st.builds(
    lambda label, time, by_model, skipped: (label, time, by_model, skipped),
    st.sampled_from(["1", "2", "strange", None]),
    TIMES,
    st.booleans(),
    st.booleans(),
)
TASKS = st.tuples(st.sampled_from(["a", "b", "c", "d", "5", "8", ""]), st.lists(ANNOTATIONS, max_size=3))
CHANGES = st.dictionaries(st.integers(1, 9), st.none() | TASKS, max_size=6)  # by task; None: it is deleted


def made(number: int, content: str, annotations: list[tuple[str | None, str, bool, bool]]) -> AnnotatedTask:
    """A task that shows `content`; nothing is known of the image where that is empty."""
    found: list[Annotation] = []
    for place, (label, time, by_model, skipped) in enumerate(annotations):
        unique = model_annotation_id(PROJECT, sha256(content)) if by_model else f"{number}-{place}"
        task = annotated_task(10 * number + place, label, unique_id=unique, updated_at=time, was_cancelled=skipped)
        found.append(msgspec.structs.replace(task.annotations[0], created_at=time))
    task = annotated_task(number, content=content or "x", meta=None if content else {})
    return msgspec.structs.replace(task, annotations=found)


@settings(max_examples=150)
@given(st.lists(CHANGES, min_size=2, max_size=6))
def test_reading_what_is_new_gives_the_same_as_reading_all(batches: list[dict[int, Any]]) -> None:
    model, there = Model(), dict[int, AnnotatedTask]()
    for changes in batches:
        for number, change in changes.items():
            there.pop(number, None)
            if change is not None:
                there[number] = made(number, *change)
        model.label_studio.annotated = list(there.values())
        assert model.look() == model.full


@settings(max_examples=50)
@given(st.permutations(range(1, 10)), st.lists(st.integers(1, 9), min_size=1))
def test_a_reading_in_pieces_gives_the_same(order: list[int], contents: list[int]) -> None:
    model = Model(*(annotated_task(n, content=str(contents[n % len(contents)])) for n in order))
    for _ in range(3):
        with pytest.raises(LateError, match="the next look goes on"):
            model.look(seconds=-1)
    assert model.look() == model.full
    assert model.label_studio.read == [], "three pages of three"


def test_the_format_is_raised_when_rows_are_made_otherwise() -> None:
    """When this fails, raise FORMAT and write the new digest: else old indexes go on giving the old rows."""
    some = [
        *tasks(*range(1, 30)),
        *tasks(31, content="3", updated_at="2026-02-01T00:00:00Z"),
        made(40, "d", [("1", "2026-01-01T00:00:00Z", True, False)]),
    ]
    digest = freeze(some, DIGITS, LABELS)[0].digest
    assert (FORMAT, digest) == (5, "0fa691b041eb3ce572a340f7bb4f7c48d37f1c1223676f93b643c01e1f139de3")


# What is read


def test_copies_count_once_in_whatever_blocks_they_lie() -> None:
    later, latest = "2026-02-01T00:00:00Z", "2026-03-01T00:00:00Z"
    first = {*range(1, 700, 50)}
    copies = [*tasks(20, content="51", updated_at=later), *tasks(444, content="51", updated_at=latest)]
    snapshot, manifest = freeze([*tasks(*first), *copies, *tasks(650, content="101", updated_at=later)], DIGITS, LABELS)
    kept = [msgspec.json.decode(line, type=ManifestRow).task for line in manifest.splitlines()]
    assert kept == sorted(first - {51, 101} | {444, 650})
    assert (snapshot.n_annotations, snapshot.skipped) == (len(kept), {"another task shows the same image": 3})
    assert snapshot.n_train + snapshot.n_validation + snapshot.n_test == len(kept)


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.tuples(st.just("1"), TIMES, st.booleans(), st.just(False)).map(lambda one: [one]))
    )
)
def test_of_copies_the_one_that_was_annotated_last_counts_a_persons_before_the_models(some: list[tuple[str, Any]]) -> None:
    all_tasks = [made(50 * number, *task) for number, task in enumerate(some, 1)]
    best: dict[str, tuple[tuple[bool, str, str, int], int]] = {}
    for task in all_tasks:
        counts = task.latest
        row = row_of(task, counts, DIGITS, LABELS) if counts else "nobody has annotated it"
        if counts is None or isinstance(row, str):
            continue
        this = (not row.by_model, counts.updated_at, counts.unique_id, -task.id), task.id
        best[row.sha256] = max(best.get(row.sha256, this), this)
    _, manifest = freeze(all_tasks, DIGITS, LABELS)
    kept = [msgspec.json.decode(line, type=ManifestRow).task for line in manifest.splitlines()]
    assert kept == sorted(task for _, task in best.values())


def test_only_what_changed_is_read_again() -> None:
    model = Model(*tasks(*range(1, 21)))
    model.look()
    assert model.label_studio.read == list(range(1, 21))
    model.label_studio.annotated += tasks(21, 22)
    model.label_studio.annotated[4] = annotated_task(5, "9", updated_at="2026-02-01T00:00:00Z")
    assert model.look() == model.full
    assert set(model.label_studio.read) - {20} == {5, 21, 22}, "20 was the last change, it lies within the overlap"
    assert model.log == []


def seen(number: int, label: str, shown: str) -> AnnotatedTask:
    """A task whose annotator had a prediction of version 1 before them."""
    task: Any = msgspec.json.decode(msgspec.json.encode(annotated_task(number, label)))
    drawn = [{**region, "value": {"choices": [shown]}} for region in task["annotations"][0]["result"]]
    task["annotations"][0]["prediction"] = {"id": number, "model_version": "digits v1", "score": 0.5, "result": drawn}
    return msgspec.json.decode(msgspec.json.encode(task), type=AnnotatedTask)


def test_new_annotations_tell_how_often_a_prediction_was_kept() -> None:
    """Those that are read when all is read have been counted before, or had no prediction."""
    model = Model(seen(1, "1", "1"))
    model.look()
    assert model.acceptance == Acceptance(shown=0, kept=0)
    model.label_studio.annotated += [seen(number, "1", shown) for number, shown in ((32, "1"), (33, "2"), (34, "1"))]
    model.label_studio.annotated = [
        msgspec.structs.replace(task, annotations=[msgspec.structs.replace(task.annotations[0], updated_at=CHANGED)])
        if task.id > 30
        else task
        for task in model.label_studio.annotated
    ]
    model.look()
    assert model.acceptance == Acceptance(shown=3, kept=2), "the first lies within the overlap, and was read before"
    model.look()
    assert set(model.label_studio.read) == {34}
    assert model.acceptance == Acceptance(shown=0, kept=0), "the last lies within the overlap now"
    model.label_studio.annotated[-1] = seen(34, "2", "1")
    model.look()
    assert model.acceptance == Acceptance(shown=1, kept=0), "it was corrected"


def test_a_task_that_goes_and_one_that_loses_its_annotations_are_noticed_by_the_counts() -> None:
    model = Model(*tasks(*range(1, 9)))
    model.look()
    model.label_studio.annotated.pop(3)
    assert model.look() == model.full
    assert model.log == ["index built anew: the counts differ"]
    model.label_studio.annotated[0] = msgspec.structs.replace(model.label_studio.annotated[0], annotations=[])
    model.label_studio.annotated += tasks(9)
    assert model.look() == model.full
    assert model.log == ["index built anew: the counts differ"]


def test_what_is_annotated_while_all_is_read_is_not_lost() -> None:
    model = Model(*tasks(*range(1, 9)))

    def annotate() -> None:
        model.label_studio.meanwhile = lambda: None
        model.label_studio.annotated[0] = annotated_task(1, "9", updated_at="2026-02-01T00:00:00Z")
        model.label_studio.annotated += tasks(0x40)

    model.label_studio.meanwhile = annotate
    model.look()
    assert model.look() == model.full
    assert "built anew" not in " ".join(model.log)


def test_without_an_end_of_annotating_there_is_a_snapshot() -> None:
    model, numbers = Model(*tasks(1)), iter(range(2, 10_000))
    model.label_studio.meanwhile = lambda: model.label_studio.annotated.extend(tasks(next(numbers)))
    assert model.look()[0].n_annotations > 0
    model.label_studio.meanwhile = lambda: None
    assert model.look() == model.full


def test_constant_deletions_do_not_have_a_long_reading_begin_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(*tasks(*range(1, 13)))
    for _ in range(4):
        with pytest.raises(LateError, match="the next look goes on"):
            model.look(seconds=-1)
        model.label_studio.annotated.pop(0)
    assert model.look()[0].n_annotations == 12, "four have gone since they were read"
    for _ in range(2):
        model.label_studio.annotated.pop(0)
        model.look()
        assert model.log == ["counts differ, the index is taken as it is: None"]
        assert len(set(model.label_studio.read)) < 2
    monkeypatch.setattr(snapshot_index, "_REST_SECONDS", 0)
    assert model.look() == model.full
    assert model.log == ["index built anew: the counts differ"]


# What is kept


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda _: b"", "it is empty"),
        (lambda kept: kept[: len(kept) // 2], "it is damaged"),
        (lambda kept: kept[:5000] + b"x" + kept[5001:], "it is damaged"),
        (lambda _: b"x" * 10_000, "it is damaged"),
    ],
)
def test_a_damaged_index_is_built_anew(damage: Callable[[bytes], bytes], why: str) -> None:
    model = Model(*tasks(*range(1, 9)))
    model.look()
    model.bucket.objects[KEY] = damage(model.bucket.objects[KEY])
    assert model.look() == model.full
    assert model.log == [f"index built anew: {why}"]
    model.look()
    assert model.log == []


def test_an_index_of_another_format_configuration_or_project_is_built_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(*tasks(*range(1, 9)))
    model.look()
    other = "index built anew: it is of another format, configuration or project"
    config = msgspec.structs.replace(DIGITS, splits=Splits(test=0.5, validation=0.1, seed=1))
    folder: Any = type("Folder", (), {"config": config, "label_config": LABELS})
    found = model.look(folder=folder)
    assert model.log == [other]
    assert found == freeze(model.label_studio.annotated, config, LABELS, "{digest}")
    assert model.look() == model.full
    assert model.log == [other]
    monkeypatch.setattr(snapshot_index, "FORMAT", FORMAT + 1)
    model.look()
    assert model.log == [other]


def test_of_two_that_read_at_once_the_second_keeps_the_first_ones(tmp_path: Path) -> None:
    model, log = Model(*tasks(*range(1, 9))), list[str]()
    bucket: Any = model.bucket
    with opened(bucket, FOLDER, PROJECT, tmp_path, log=lambda message, **_: log.append(message)) as index:
        index.catch_up(cast(Any, model.label_studio), seconds=60, log=lambda *_, **__: None)
        model.look()
        kept = model.bucket.objects[KEY]
    assert model.bucket.objects[KEY] == kept
    assert log == ["index built anew", "index not kept"]


def fail(error: BaseException) -> None:
    raise error


def test_what_was_read_is_kept_when_the_look_fails_and_not_when_its_process_dies() -> None:
    model = Model(*tasks(*range(1, 9)))
    for error, kept in ((KeyboardInterrupt(), False), (StorageError("S3 does not answer"), True)):
        model.label_studio.meanwhile = partial(fail, error)
        with pytest.raises(type(error)):
            model.look()
        assert (KEY in model.bucket.objects) == kept


def test_a_label_studio_that_fails_between_pages_is_read_on_from_there() -> None:
    model = Model(*tasks(*range(1, 9)))
    model.label_studio.meanwhile = partial(fail, LabelStudioError("Label Studio does not answer"))
    with pytest.raises(LabelStudioError):
        model.look()
    model.label_studio.meanwhile = lambda: None
    assert model.look() == model.full
    assert model.label_studio.read == [4, 5, 6, 7, 8]


def test_a_disk_that_holds_no_index_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot_index, "_TABLES", snapshot_index._TABLES + "PRAGMA max_page_count=5;")
    with pytest.raises(StorageError, match="cannot be kept"):
        Model(*tasks(*range(1, 200))).look()


def test_the_index_lies_in_s3(bucket: Any) -> None:
    model = Model(*tasks(*range(1, 9)), bucket=bucket)
    model.look()
    assert bucket.keys("indexes") == [KEY]
    model.label_studio.annotated += tasks(9)
    assert model.look() == model.full
    assert model.log == []
    assert 1 not in model.label_studio.read
