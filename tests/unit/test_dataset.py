"""Dataset snapshots: which annotation counts, which split an image is in, and what the digest covers."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labelloop import dataset, snapshot_index
from labelloop.dataset import split_of
from labelloop.label_studio.client import tasks_exported
from labelloop.label_studio.payloads import AnnotatedTask, Annotation, model_annotation_id
from labelloop.model_config import Splits
from labelloop.records import ManifestRow, Region, Snapshot, Split
from tests import examples
from tests.examples import DIGITS, LABELS, annotated_task, sha256

SPLITS = Splits(test=0.2, validation=0.1, seed=0)
URI = "s3://artifacts/snapshots/digits/{digest}/manifest.jsonl"


def rows(*tasks: AnnotatedTask) -> tuple[list[ManifestRow], dict[str, int]]:
    snapshot, manifest = frozen(*tasks)
    return ManifestRow.read(manifest), snapshot.skipped


def frozen(*tasks: AnnotatedTask) -> tuple[Snapshot, bytes]:
    return snapshot_index.freeze(tasks, DIGITS, LABELS, URI)


# These must never change: an image that moves from the holdout into the training data spoils every later comparison.
KNOWN = {"0": "train", "1": "validation", "2": "train", "3": "train", "5": "test", "8": "test", "9": "test", "10": "train"}


def test_known_images_stay_in_their_splits_for_ever() -> None:
    assert {content: split_of(sha256(content), SPLITS) for content in KNOWN} == KNOWN


# So must these: a position decides about split and stream, and where the queue has a task.
POSITIONS = {
    ("0", "0"): 0.8253798761666051,
    ("0", "1"): 0.9097835041588914,
    ("queue control", "0"): 0.06319940761032389,
    ("queue control", "1"): 0.3146236024367776,
    ("queue cluster", "0"): 0.4904264927088304,
    ("queue cluster", "1"): 0.7105039697692945,
    ("queue score", "0"): 0.929345186428736,
    ("queue score", "1"): 0.5544000812265512,
    ("audit", "0"): 0.28275831196203677,
    ("audit", "1"): 0.5074673027297604,
    ("start", "0"): 0.8918695335170657,
    ("start", "1"): 0.1312649590329434,
}


def test_known_groups_have_their_positions_for_ever() -> None:
    assert {(purpose, group): dataset.position(purpose, sha256(group)) for purpose, group in POSITIONS} == POSITIONS


def test_shares_are_kept() -> None:
    count = 5_000
    found = Counter(split_of(sha256(str(number)), SPLITS) for number in range(count))
    # Five standard deviations of a binomial count: a fair hash fails once in a million changes of the seed.
    shares: dict[Split, float] = {"test": 0.2, "validation": 0.1, "train": 0.7}
    for split, share in shares.items():
        assert abs(found[split] - count * share) < 5 * (count * share * (1 - share)) ** 0.5, split


def test_another_seed_splits_otherwise() -> None:
    hashes = [sha256(str(number)) for number in range(500)]
    other = Splits(test=0.2, validation=0.1, seed=1)
    moved = sum(split_of(h, SPLITS) != split_of(h, other) for h in hashes)
    assert 100 < moved < 400  # two independent draws differ in 46 of 100


def test_other_shares_move_only_images_across_their_border() -> None:
    hashes = [sha256(str(number)) for number in range(2_000)]
    wider = Splits(test=0.3, validation=0.1)
    for h in hashes:
        before, after = split_of(h, SPLITS), split_of(h, wider)
        assert before == after or (before, after) == ("train", "test")


@given(st.lists(st.integers(0, 200), unique=True, max_size=40), st.lists(st.integers(201, 400), unique=True, max_size=40))
def test_adding_tasks_never_moves_an_image(first: list[int], more: list[int]) -> None:
    before = {row.sha256: row.split for row in rows(*map(annotated_task, first))[0]}
    after = {row.sha256: row.split for row in rows(*map(annotated_task, more), *map(annotated_task, first))[0]}
    assert before.items() <= after.items()


def test_the_latest_annotation_wins() -> None:
    annotations = [
        {"id": 1, "unique_id": "a", "updated_at": "2026-01-01T00:00:00Z", "result": result("1")},
        {"id": 2, "unique_id": "b", "updated_at": "2026-01-03T00:00:00Z", "result": result("2")},
        {"id": 3, "unique_id": "c", "updated_at": "2026-01-02T00:00:00Z", "result": result("3")},
        {"id": 4, "unique_id": "d", "updated_at": "2026-01-04T00:00:00Z", "result": result("4"), "was_cancelled": True},
    ]
    task = msgspec.convert(
        {"id": 9, "data": {"image": "s3://b/k"}, "meta": {"sha256": "f" * 64}, "annotations": annotations}, AnnotatedTask
    )
    [row], skipped = rows(task)
    assert (row.regions, row.annotation, row.task, skipped) == ([Region(label="2")], "b", 9, {})


def result(label: str) -> list[dict[str, object]]:
    return [{"from_name": "digit", "to_name": "image", "type": "choices", "value": {"choices": [label]}}]


def test_tasks_with_the_same_content_are_one_image_with_the_label_given_last() -> None:
    early = annotated_task(1, "1", content="same", updated_at="2026-01-01T00:00:00Z")
    late = annotated_task(2, "2", content="same", updated_at="2026-01-02T00:00:00Z")
    for tasks in ((early, late), (late, early)):
        [row], skipped = rows(*tasks)
        assert row.regions == [Region(label="2")]
        assert skipped == {"another task shows the same image": 1}


def test_of_two_at_the_same_time_the_order_of_tasks_does_not_decide() -> None:
    one, other = annotated_task(1, "1", content="same"), annotated_task(2, "2", content="same")
    assert rows(one, other)[0] == rows(other, one)[0]


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        (annotated_task(1, ["1", "2"]), "2 classes are chosen instead of one"),
        (annotated_task(1, "ten"), "the class 'ten' is not in config.yaml"),
        (annotated_task(1, meta={}), "not made by labelloop"),
        (annotated_task(1, meta={"sha256": "short"}), "not made by labelloop"),
        (msgspec.structs.replace(annotated_task(1), meta=None), "not made by labelloop"),
        (msgspec.structs.replace(annotated_task(1), data={"text": "x"}), "no image under 'image'"),
        (msgspec.structs.replace(annotated_task(1), data={"image": None}), "no image under 'image'"),
    ],
)
def test_what_cannot_be_trained_on_is_left_out_with_its_reason(task: AnnotatedTask, reason: str) -> None:
    kept, skipped = rows(task, annotated_task(2))
    assert [row.task for row in kept] == [2]
    [(found, count)] = skipped.items()
    assert reason in found
    assert count == 1


def test_an_annotation_of_another_control_tag_is_no_label() -> None:
    task = annotated_task(1)
    other = [msgspec.structs.replace((task.annotations[0].result or [])[0], from_name="quality")]
    changed = msgspec.structs.replace(task, annotations=[msgspec.structs.replace(task.annotations[0], result=other)])
    assert rows(changed) == ([], {"it names the control tag 'quality', labeling_template.xml 'digit'": 1})


def test_a_skipped_task_is_no_annotation() -> None:
    assert rows(annotated_task(1, was_cancelled=True)) == ([], {})


def test_an_empty_annotation_takes_the_class_back() -> None:
    assert rows(annotated_task(2, None)) == ([], {"0 classes are chosen instead of one": 1})


def test_the_manifest_is_ordered_jsonl_that_reads_back() -> None:
    snapshot, manifest = frozen(*(annotated_task(number, str(number % 10)) for number in range(30)))
    lines = manifest.splitlines()
    assert manifest.endswith(b"\n")
    read = [msgspec.json.decode(line, type=ManifestRow) for line in lines]
    assert [row.task for row in read] == sorted(row.task for row in read)
    assert [row.sha256 for row in read] == [sha256(str(number)) for number in range(30)]
    assert snapshot.n_annotations == 30 == snapshot.n_train + snapshot.n_validation + snapshot.n_test
    assert Counter(row.split for row in read)["test"] == snapshot.n_test > 0
    assert snapshot.manifest == f"s3://artifacts/snapshots/digits/{snapshot.digest}/manifest.jsonl"


def test_no_tasks_make_an_empty_snapshot() -> None:
    snapshot, manifest = frozen()
    assert (snapshot.n_annotations, manifest) == (0, b"")


@given(st.permutations(range(12)))
def test_the_digest_is_the_manifests_and_does_not_depend_on_the_tasks_order(order: list[int]) -> None:
    plain, manifest = frozen(*(annotated_task(number, content=str(number)) for number in range(12)))
    other = frozen(*(annotated_task(number, content=str(number)) for number in order))[0]
    assert plain.digest == other.digest == hashlib.sha256(manifest).hexdigest()


def test_the_digest_depends_on_labels_and_images() -> None:
    digests = {
        frozen(annotated_task(1, "1", content="a"))[0].digest,
        frozen(annotated_task(1, "2", content="a"))[0].digest,
        frozen(annotated_task(1, "1", content="b"))[0].digest,
        frozen(annotated_task(1, "1", content="a", image="s3://images/elsewhere.png"))[0].digest,
        frozen(annotated_task(1, "1", content="a"), annotated_task(2, "1", content="c"))[0].digest,
    }
    assert len(digests) == 5
    assert all(len(digest) == 64 for digest in digests)


def test_rows_say_what_training_needs() -> None:
    [row], _ = rows(annotated_task(5, "7", content="a"))
    assert row == ManifestRow(
        image="s3://images/images/digits/a.png",
        sha256=sha256("a"),
        group=sha256("a"),
        regions=[Region(label="7")],
        split=split_of(sha256("a"), examples.DIGITS.splits),
        annotation="annotation-5",
        task=5,
    )


# Images of the digits' config by the split of their content, in abundance.
BY_SPLIT: dict[Split, list[str]] = {"train": [], "validation": [], "test": []}
for _number in range(60):
    BY_SPLIT[split_of(sha256(str(_number)), DIGITS.splits)].append(str(_number))


def looking_like(group: str, *others: str, content: str = "copy", number: int = 1) -> AnnotatedTask:
    """A task whose image joined the group of one image and resembles those of others; contents stand for them."""
    meta = {"sha256": sha256(content), "group": sha256(group), "resembles": [sha256(other) for other in others]}
    return annotated_task(number, "7", content=content, meta=meta)


@pytest.mark.parametrize("split", BY_SPLIT)
def test_an_image_is_in_the_split_of_the_image_that_it_looks_like(split: Split) -> None:
    like = BY_SPLIT[split][0]
    for content in BY_SPLIT["train"][1], BY_SPLIT["validation"][1], BY_SPLIT["test"][1]:
        [row], skipped = rows(looking_like(like, content=content))
        assert (row.split, row.group, row.sha256, skipped) == (split, sha256(like), sha256(content), {})


@pytest.mark.parametrize(
    ("group", "others", "kept"),
    [
        ("train", ["test"], False),
        ("test", ["train"], False),
        ("validation", ["train", "test"], False),
        ("train", ["train", "validation"], True),
        ("test", ["test"], True),
    ],
)
def test_an_image_between_the_holdout_and_another_split_is_left_out(group: Split, others: list[Split], kept: bool) -> None:
    task = looking_like(BY_SPLIT[group][0], *(BY_SPLIT[other][1] for other in others))
    found, skipped = rows(task, annotated_task(2))
    assert len(found) == (2 if kept else 1)
    assert skipped == ({} if kept else {"the image resembles images of the holdout and of another split": 1})


@pytest.mark.parametrize(
    ("prediction", "seen"),
    [
        ({"model_version": "digits v3", "score": 0.5, "result": []}, 3),
        ({"model_version": "digits v0", "score": 0.5, "result": []}, 0),
        ({"model_version": "another model", "score": 0.5, "result": []}, None),
        ({}, None),
        (None, None),
        ("elsewhere", None),
        (10**30, None),
        ([{"model_version": "digits v3"}], None),
        ({"model_version": ["digits v3"], "result": {}}, None),
    ],
)
def test_a_row_says_which_versions_prediction_the_annotator_saw(prediction: object, seen: int | None) -> None:
    task = annotated_task(1)
    exported = msgspec.json.decode(msgspec.json.encode({"id": 1, "prediction": prediction}), type=Annotation)
    annotation = msgspec.structs.replace(task.annotations[0], prediction=exported.prediction)
    [row], _ = rows(msgspec.structs.replace(task, annotations=[annotation]))
    assert row.seen == seen


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["choices", "rectanglelabels", "x", "model_version", "result"]), inner, max_size=4)
    ),
    max_leaves=6,
)


@settings(max_examples=200)
@given(JSON, JSON, JSON, JSON)
def test_whatever_an_export_holds_its_task_is_a_row_or_left_out(value: Any, prediction: Any, known: Any, kind: Any) -> None:
    """One such task must not stop the reading of all."""
    region = {"from_name": "digit", "type": "choices", "value": value, "image_rotation": known}
    annotation = {"id": 1, "unique_id": "u", "result": [region, {**region, "type": kind}], "prediction": prediction}
    meta = {"sha256": "a" * 64, "group": known, "resembles": known, "width": known, "height": kind}
    exported = [{"id": 1, "data": {"image": known}, "meta": meta, "annotations": [annotation]}]
    kept, skipped = rows(*tasks_exported(json.dumps(exported).encode()))
    assert len(kept) + sum(skipped.values()) == 1


def accepted(content: str, project: int = 1) -> AnnotatedTask:
    """A task whose annotation auto-accept has made."""
    task = annotated_task(1, content=content, unique_id=model_annotation_id(project, sha256(content)))
    annotation = msgspec.structs.replace(task.annotations[0], created_at=task.annotations[0].updated_at)
    return msgspec.structs.replace(task, annotations=[annotation])


def test_what_a_model_annotated_is_marked_and_never_in_the_holdout() -> None:
    [row], skipped = rows(accepted(BY_SPLIT["train"][0]))
    assert (row.by_model, row.split, skipped) == (True, "train", {})
    assert rows(accepted(BY_SPLIT["test"][0])) == ([], {"the image is of the holdout, and no person has annotated it": 1})
    [row], _ = rows(annotated_task(1, content=BY_SPLIT["test"][0]))
    assert not row.by_model


@pytest.mark.parametrize(("images", "points"), [(300, 0.0358), (400, 0.0310), (10_000, 0.0062), (0, 1.0)])
def test_more_holdout_images_tell_finer_differences_apart(images: int, points: float) -> None:
    assert dataset.resolution(images) == pytest.approx(points, abs=5e-5)
