"""From an image in S3 to a task: validated, batched, exactly once whatever fails in between."""

from __future__ import annotations

import io
import itertools
import json
import random
import shutil
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
from PIL import Image

from cli.examples import digits
from labelloop import imaging
from labelloop.active_learning import stream_of
from labelloop.artifacts import Bucket, Champions, parse_s3_uri
from labelloop.errors import StorageError
from labelloop.ingest import Ingest, Outcome
from labelloop.ledger import Ledger
from labelloop.model_config import ModelConfigs
from labelloop.records import TaskRange
from tests import examples
from tests.examples import png, sha256
from tests.fake_label_studio import FakeLabelStudio


def created(key: str) -> dict[str, Any]:
    """EventBridge's event of an object's creation."""
    return {
        "version": "0",
        "source": "aws.s3",
        "detail-type": "Object Created",
        "detail": {"bucket": {"name": "images"}, "object": {"key": key, "size": 1}, "reason": "PutObject"},
    }


@dataclass
class Intake:
    """Ingest on real storage, before a Label Studio in memory."""

    bucket: Bucket
    ledger: Ledger
    label_studio: FakeLabelStudio = field(default_factory=FakeLabelStudio)
    configs: ModelConfigs = examples.CONFIGS
    prelabelled: list[TaskRange] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ledger.set_project("digits", 1)

    @property
    def champions(self) -> Champions:
        return Champions(self.bucket)

    @property
    def ingest(self) -> Ingest:
        """A fresh function."""
        label_studio = cast(Any, self.label_studio)
        return Ingest(self.configs, self.bucket, self.champions, self.ledger, label_studio, self.prelabelled.extend)

    def put(self, name: str, data: bytes) -> str:
        key = f"images/digits/{name}"
        self.bucket.put(key, data)
        return key

    def take(self, *keys: str) -> Outcome:
        """Deliver one event a key as one batch, in a fresh function."""
        return self.ingest((f"m{number}", json.dumps(created(key))) for number, key in enumerate(keys))

    @property
    def images(self) -> list[str]:
        """The image addresses of all tasks."""
        return [task["data"]["image"] for task in self.label_studio.tasks]


@pytest.fixture
def intake(bucket: Bucket, ledger: Ledger) -> Intake:
    return Intake(bucket, ledger)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The ledger's time, s; a claim is free again after 90."""
    time = [1_000_000.0]
    monkeypatch.setattr("labelloop.ledger.time", SimpleNamespace(time=lambda: time[0], sleep=lambda _: None))
    return time


def test_an_image_becomes_a_task_that_names_its_content(intake: Intake) -> None:
    data = png(3, size=(24, 18))
    key = intake.put("a.png", data)
    outcome = intake.take(key)
    assert outcome == Outcome(created=[key])
    [task] = intake.label_studio.tasks
    assert task["data"] == {"image": f"s3://{intake.bucket.name}/images/digits/a.png"}
    assert task["meta"] == {"sha256": sha256(data), "width": 24, "height": 18, "group": sha256(data)}


def test_a_batch_is_one_import(intake: Intake) -> None:
    keys = [intake.put(f"{digit}.png", png(digit)) for digit in range(10)]
    assert intake.take(*keys).created == keys
    assert intake.label_studio.asked == ["import_tasks"]
    assert len(intake.label_studio.tasks) == 10


@pytest.mark.parametrize("name", ["with space.png", "50%.png", "a#b.png", "a+b.png", "ü.png", "sub/folder/x.png"])
def test_odd_names_become_addresses_that_lead_back(intake: Intake, name: str) -> None:
    key = intake.put(name, png())
    assert intake.take(key).created == [key]
    assert parse_s3_uri(intake.images[0]) == (intake.bucket.name, key)


def test_an_event_that_comes_again_makes_no_second_task(intake: Intake) -> None:
    key = intake.put("a.png", png())
    intake.take(key)
    assert intake.take(key) == Outcome(known=[key])
    assert len(intake.images) == 1


def test_the_same_event_twice_in_a_batch_makes_one_task(intake: Intake) -> None:
    key = intake.put("a.png", png())
    assert intake.take(key, key) == Outcome(created=[key], known=[key])
    assert len(intake.images) == 1


def test_two_files_with_the_same_content_are_one_image(intake: Intake) -> None:
    one, other, late = (intake.put(name, png()) for name in ("a.png", "b.png", "c.png"))
    assert intake.take(one, other) == Outcome(created=[one], known=[other])
    assert intake.take(late) == Outcome(known=[late])
    assert len(intake.images) == 1


def test_what_nobody_foresaw_comes_again_with_the_traceback(intake: Intake, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(*_: object) -> list[int]:
        raise KeyError("task_ids")

    key = intake.put("1.png", png(1))
    monkeypatch.setattr(intake.label_studio, "import_tasks", answer)
    (reason,) = intake.take(key).again.values()
    assert "Traceback" in reason
    assert "KeyError: 'task_ids'" in reason


def test_a_broken_image_is_refused_and_the_others_become_tasks(intake: Intake) -> None:
    good, broken, text, empty, fine = (
        intake.put(name, data)
        for name, data in (
            ("good.png", png(1)),
            ("broken.png", png(2)[:40]),
            ("notes.txt", b"no image"),
            ("empty.png", b""),
            ("fine.jpg", examples.encoded(Image.new("RGB", (9, 9)), "JPEG")),
        )
    )
    outcome = intake.take(good, broken, text, empty, fine)
    assert outcome.created == [good, fine]
    assert outcome.again == {}
    assert outcome.refused.keys() == {broken, text, empty}
    assert "empty" in outcome.refused[empty]
    assert "not an image" in outcome.refused[text]


def test_an_image_that_is_too_large_is_refused_unread(intake: Intake, monkeypatch: pytest.MonkeyPatch) -> None:
    key = intake.put("large.bmp", examples.encoded(Image.new("L", (64, 64)), "BMP"))
    monkeypatch.setattr(imaging, "MAX_BYTES", 1_000)
    monkeypatch.setattr(imaging, "survey", lambda _: pytest.fail("it was read"))
    assert "at most" in intake.take(key).refused[key]


def test_what_is_gone_and_what_belongs_to_no_model_is_refused(intake: Intake) -> None:
    strays = ["images/digits/gone.png", "images/faces/a.png", "images/a.png", "other", ""]
    outcome = intake.take(*strays)
    assert outcome.refused.keys() == set(strays)
    assert (outcome.created, outcome.again) == ([], {})
    assert "no model 'faces'" in outcome.refused["images/faces/a.png"]


def test_the_marker_of_a_folder_is_no_image(intake: Intake) -> None:
    assert intake.take("images/digits/", "images/") == Outcome()


@pytest.mark.parametrize(
    "key", ["images/digits//a.png", "images/digits/../a.png", "images/digits/a\nb.png", "images/digits/a?.png"]
)
def test_a_key_that_cannot_be_read_is_refused_and_does_not_come_again(intake: Intake, key: str) -> None:
    outcome = intake.take(key, intake.put("a.png", png()))
    assert "another name" in outcome.refused[key]
    assert len(outcome.created) == 1


def test_events_of_other_forms_are_refused(intake: Intake) -> None:
    outcome = intake.ingest(
        [("m0", '{"Service": "Amazon S3", "Event": "s3:TestEvent"}'), ("m1", "{}"), ("m2", '{"detail": null}')]
    )
    assert list(outcome.refused) == [""]
    assert outcome.again == {}


POISON = ["", "no json", "[" * 100_000, '{"detail": "\\ud800"}', "\ud800", '{"detail": ']


@pytest.mark.parametrize("body", POISON, ids=lambda body: ascii(body)[:20])
def test_a_message_that_is_no_json_comes_again_alone(intake: Intake, body: str) -> None:
    key = intake.put("a.png", png())
    outcome = intake.ingest([("m0", body), ("m1", json.dumps(created(key)))])
    assert outcome.created == [key]
    assert outcome.again.keys() == {"m0"}
    assert "no event of S3" in outcome.again["m0"]
    assert outcome.unreadable == {"m0"}


ODD_EVENTS: list[Any] = [
    None, 3, "text", [], [{}], {"detail": [1]}, {"detail": {"object": {"key": 3}}}, {"Records": 5}, {"Records": {}},
    {"Records": [None]}, {"Records": [{"s3": {"object": "text"}}]},
]  # fmt: skip


@pytest.mark.parametrize("event", ODD_EVENTS, ids=str)
def test_an_event_of_wrong_types_is_refused_and_spoils_no_other(intake: Intake, event: Any) -> None:
    key = intake.put("a.png", png())
    outcome = intake.ingest([("m0", json.dumps(event)), ("m1", json.dumps(created(key)))])
    assert (outcome.created, outcome.again, list(outcome.refused)) == ([key], {}, [""])


def test_a_notification_of_the_older_form_is_read(intake: Intake) -> None:
    key = intake.put("with space.png", png())
    event = {"Records": [{"s3": {"object": {"key": "images/digits/with+space.png"}}}]}
    assert intake.ingest([("m0", json.dumps(event))]).created == [key]


def test_before_the_project_is_set_up_everything_comes_again(bucket: Bucket, ledger: Ledger) -> None:
    bucket.put("images/digits/a.png", png())
    ingest = Ingest(examples.CONFIGS, bucket, Champions(bucket), ledger, cast(Any, FakeLabelStudio()), lambda _: None)
    outcome = ingest([("m0", json.dumps(created("images/digits/a.png")))])
    assert "setup-label-studio-project" in outcome.again["m0"]


def test_while_label_studio_is_down_everything_comes_again_and_later_makes_one_task_each(
    intake: Intake, clock: list[float]
) -> None:
    keys = [intake.put(f"{digit}.png", png(digit)) for digit in range(3)]
    intake.label_studio.down = {"all"}
    outcome = intake.take(*keys)
    assert outcome.again.keys() == {"m0", "m1", "m2"}
    assert (outcome.created, outcome.known) == ([], [])
    intake.label_studio.down = set()
    assert intake.take(*keys).again.keys() == {"m0", "m1", "m2"}, "the claims are still held"
    clock[0] += 100
    assert intake.take(*keys).created == keys
    clock[0] += 100
    assert intake.take(*keys).known == keys
    assert sorted(intake.images) == sorted(f"s3://{intake.bucket.name}/{key}" for key in keys)


@pytest.mark.parametrize("crash", ["answer lost", "note lost"])
def test_a_crash_after_the_import_makes_no_second_task(
    intake: Intake, clock: list[float], monkeypatch: pytest.MonkeyPatch, crash: str
) -> None:
    keys = [intake.put(f"{digit}.png", png(digit)) for digit in range(3)]
    with monkeypatch.context() as patch:
        if crash == "answer lost":
            intake.label_studio.dies_after = {"import_tasks"}
        else:
            patch.setattr(intake.ledger, "images_done", fail)
        assert intake.take(*keys).again.keys() == {"m0", "m1", "m2"}
    intake.label_studio.dies_after = set()
    new = intake.put("new.png", png(9))
    clock[0] += 100
    outcome = intake.take(*keys, new)
    assert outcome == Outcome(created=[new], known=keys)
    assert len(intake.images) == 4


def fail(*_: Any) -> None:
    raise StorageError("the ledger does not answer")


def test_a_crash_after_the_import_makes_no_second_task_of_a_copy_either(
    intake: Intake, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy may come first the next time, and its address is another one."""
    one, copy = intake.put("a.png", png()), intake.put("b.png", png())
    with monkeypatch.context() as patch:
        patch.setattr(intake.ledger, "images_done", fail)
        intake.take(one)
    clock[0] += 100
    assert intake.take(copy, one) == Outcome(known=[copy, one])
    assert len(intake.images) == 1


def test_a_copy_comes_again_with_the_image_that_it_is_a_copy_of(intake: Intake, clock: list[float]) -> None:
    """Until there is a task the other file may be deleted."""
    one, copy = intake.put("a.png", png()), intake.put("b.png", png())
    intake.label_studio.down = {"all"}
    assert intake.take(one, copy).again.keys() == {"m0", "m1"}
    intake.label_studio.down = set()
    clock[0] += 100
    intake.bucket.put(one, b"no image")
    assert intake.take(one, copy).created == [copy]


def test_two_deliveries_at_once_make_one_task(intake: Intake, clock: list[float]) -> None:
    key = intake.put("a.png", png())
    intake.ledger.claim_image("digits", 1, sha256(png()), f"s3://{intake.bucket.name}/{key}")
    assert "under way" in intake.take(key).again["m0"]
    assert intake.images == []


def test_storage_that_fails_for_one_image_brings_only_that_one_again(intake: Intake, monkeypatch: pytest.MonkeyPatch) -> None:
    good, unlucky = intake.put("good.png", png(1)), intake.put("unlucky.png", png(2))
    get = intake.bucket.get

    def flaky(key: str, **limit: Any) -> bytes | None:
        if key == unlucky:
            raise StorageError("S3 does not answer")
        return get(key, **limit)

    monkeypatch.setattr(intake.bucket, "get", flaky)
    assert intake.take(unlucky, good) == Outcome(created=[good], again={"m0": "S3 does not answer"})


def test_one_models_broken_config_does_not_stop_the_others(intake: Intake, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("model_configs")
    (root / "digits").symlink_to(examples.REPOSITORY / "model_configs" / "digits")
    (root / "faces").mkdir()
    (root / "faces" / "config.yaml").write_text("name: other")
    intake.ledger.set_project("faces", 2)
    intake.configs = ModelConfigs(root)
    key = intake.put("a.png", png())
    outcome = intake.take("images/faces/a.png", key)
    assert outcome.created == [key]
    assert "faces" in outcome.again["m0"]


# Content groups


def picture(seed: int) -> Image.Image:
    """A grey picture of 96 × 96 pixels, of 36 fields; of each seed another one."""
    fields = Image.frombytes("L", (6, 6), random.Random(seed).randbytes(36))
    return fields.resize((96, 96), Image.Resampling.NEAREST)


def test_a_near_duplicate_gets_a_task_of_its_own_in_the_group_of_the_first(intake: Intake) -> None:
    original = examples.encoded(picture(1), "PNG")
    copy = examples.encoded(picture(1).resize((64, 64)), "JPEG", quality=60)
    other = examples.encoded(picture(2), "PNG")
    keys = [intake.put(name, data) for name, data in (("a.png", original), ("b.png", other))]
    assert intake.take(*keys).created == keys
    late = intake.put("copy.jpg", copy)
    assert intake.take(late).created == [late]
    assert [task["meta"]["group"] for task in intake.label_studio.tasks] == [sha256(original), sha256(other), sha256(original)]
    assert not any("resembles" in task["meta"] for task in intake.label_studio.tasks)


def test_a_crash_before_the_import_changes_no_group(intake: Intake, clock: list[float]) -> None:
    one, copy = examples.encoded(picture(1), "PNG"), examples.encoded(picture(1), "BMP")
    intake.label_studio.down = {"import_tasks"}
    assert intake.take(intake.put("a.png", one)).again
    intake.label_studio.down = set()
    clock[0] += 100
    intake.take(intake.put("copy.bmp", copy), "images/digits/a.png")
    assert {task["meta"]["group"] for task in intake.label_studio.tasks} == {sha256(one)}


# Places in the queue


def digits_of(stream: str, count: int) -> list[bytes]:
    """Scanned digits whose own groups are of a stream."""
    found = (digit.image for digit in digits.load() if stream_of(digit.sha256, examples.DIGITS) == stream)
    return list(itertools.islice(found, count))


def test_before_the_first_version_what_is_like_none_before_comes_first(intake: Intake) -> None:
    active = digits_of("active", 40)
    intake.take(*(intake.put(f"{number:02}.png", data) for number, data in enumerate(active)))
    pictures = (examples.encoded(picture(seed), "PNG") for seed in itertools.count())
    novel = next(data for data in pictures if stream_of(sha256(data), examples.DIGITS) == "active")
    copies = [examples.encoded(Image.open(io.BytesIO(data)), "WEBP", lossless=True) for data in active[:5]]
    intake.take(*(intake.put(f"x{number}", data) for number, data in enumerate([*copies, novel])))
    predictions = [task["predictions"] for task in intake.label_studio.tasks]
    assert all(p["model_version"] == "digits v0" and p["result"] == [] for [p] in predictions)
    *old, first, second, third, fourth, fifth, unlike = [p["score"] for [p] in predictions]
    assert all(0 <= score <= 1 for score in old)
    assert min(first, second, third, fourth, fifth) > 0.8
    assert unlike < 0.2
    assert intake.prelabelled == []


@pytest.mark.parametrize("stream", ["holdout", "control"])
def test_holdout_and_control_stand_where_chance_has_it(intake: Intake, stream: str) -> None:
    """A copy stands where its original does, though it is familiar."""
    [data] = digits_of(stream, 1)
    copy = examples.encoded(Image.open(io.BytesIO(data)), "WEBP", lossless=True)
    intake.take(intake.put("a.png", data), *(intake.put(f"{n}.png", d) for n, d in enumerate(digits_of("active", 10))))
    intake.take(intake.put("copy.webp", copy))
    scores = [task["predictions"][0]["score"] for task in intake.label_studio.tasks]
    assert scores[0] == scores[-1]


def test_with_the_random_strategy_every_task_stands_where_chance_has_it(
    intake: Intake, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("model_configs")
    shutil.copytree(examples.REPOSITORY / "model_configs/digits", root / "digits")
    file = root / "digits/config.yaml"
    file.write_text(file.read_text() + "\nqueue:\n  strategy: random\n")
    intake.configs = ModelConfigs(root)
    [data] = digits_of("active", 1)
    copy = examples.encoded(Image.open(io.BytesIO(data)), "WEBP", lossless=True)
    intake.take(intake.put("a.png", data))
    intake.take(intake.put("copy.webp", copy))
    one, other = (task["predictions"][0]["score"] for task in intake.label_studio.tasks)
    assert one == other


def test_once_there_is_a_version_the_new_tasks_are_predicted_by_it(intake: Intake) -> None:
    intake.take(intake.put("early.png", png(1)))
    intake.champions.swap(examples.champion(), tag=None)
    intake.take(*(intake.put(f"{digit}.png", png(digit)) for digit in range(2, 5)))
    assert ["predictions" in task for task in intake.label_studio.tasks] == [True, False, False, False]
    assert intake.prelabelled == [TaskRange(model="digits", after=1, upto=4)]


def test_a_version_that_came_while_tasks_were_made_predicts_them_too(intake: Intake, monkeypatch: pytest.MonkeyPatch) -> None:
    import_tasks = intake.label_studio.import_tasks

    def slow(project: int, tasks: list[dict[str, Any]]) -> list[int]:
        intake.champions.swap(examples.champion(), tag=None)
        return import_tasks(project, tasks)

    monkeypatch.setattr(intake.label_studio, "import_tasks", slow)
    intake.take(intake.put("a.png", png(1)))
    assert intake.prelabelled == [TaskRange(model="digits", after=0, upto=1)]


def test_tasks_whose_prediction_could_not_be_asked_for_are_predicted_with_the_next_try(
    intake: Intake, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    intake.champions.swap(examples.champion(), tag=None)
    key = intake.put("a.png", png(1))
    with monkeypatch.context() as patch:
        patch.setattr(intake, "prelabelled", SimpleNamespace(extend=fail))
        assert intake.take(key).again
    clock[0] += 100
    assert intake.take(key) == Outcome(known=[key])
    assert intake.prelabelled == [TaskRange(model="digits", after=0, upto=1)]
