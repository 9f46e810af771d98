"""Content groups: what looks the same shares one, what differs does not, and once given it stays."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import islice

import msgspec
import pytest
from PIL import Image

from cli.examples import digit_detector, digits
from labelloop import imaging
from labelloop.dataset import split_of
from labelloop.duplicates import Assignment, Fingerprint, Groups, Membership, alike, fingerprint, forget_looks
from labelloop.errors import ConflictError, StorageError
from labelloop.ledger import Ledger
from labelloop.records import ManifestRow
from labelloop.snapshot_index import freeze
from tests import examples
from tests.examples import DIGITS, LABELS, annotated_task, encoded, png, sha256


@cache
def scenes() -> list[Image.Image]:
    """Images of 128 × 128 pixels on ten backgrounds; each is distinct."""
    return [Image.fromarray(scene.image) for scene in islice(digit_detector.scenes(), 60)]


@cache
def scans() -> list[bytes]:
    """PNGs of 8 × 8 pixels."""
    return [digit.image for digit in digits.load()[:150]]


def print_of(data: bytes) -> Fingerprint:
    return fingerprint(imaging.survey(data)[1])


def crop(image: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    """Cut shares of the sides off."""
    width, height = image.size
    return image.crop((round(width * left), round(height * top), round(width * (1 - right)), round(height * (1 - bottom))))


def scaled(image: Image.Image, scale: float) -> Image.Image:
    return image.resize((round(image.width * scale), round(image.height * scale)))


COPIES: dict[str, Callable[[Image.Image], bytes]] = {
    "encoded without loss": lambda image: encoded(image, "WEBP", lossless=True),
    "JPEG 50": lambda image: encoded(image, "JPEG", quality=50),
    "WebP 50": lambda image: encoded(image, "WEBP", quality=50),
    "grey": lambda image: encoded(image.convert("L"), "PNG"),
    "darker": lambda image: encoded(image.point(lambda value: value * 0.7), "PNG"),
    "half the size": lambda image: encoded(scaled(image, 0.5), "PNG"),
    "150 %": lambda image: encoded(scaled(image, 1.5), "PNG"),
    "stretched": lambda image: encoded(image.resize((160, 100)), "PNG"),
    "1 % off each side": lambda image: encoded(crop(image, 0.01, 0.01, 0.01, 0.01), "PNG"),
    "5 % off each side": lambda image: encoded(crop(image, 0.05, 0.05, 0.05, 0.05), "PNG"),
    "5 % off a corner": lambda image: encoded(crop(image, 0.05, 0.05, 0, 0), "PNG"),
    "5 % off the other": lambda image: encoded(crop(image, 0, 0, 0.05, 0.05), "PNG"),
    "3 % off one side, 75 %, JPEG 60": lambda image: encoded(scaled(crop(image, 0, 0.03, 0, 0), 0.75), "JPEG", quality=60),
}


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_looks_like_its_original(kind: str) -> None:
    for image in scenes()[::4]:
        original, copy = print_of(encoded(image, "PNG")), print_of(COPIES[kind](image))
        assert alike(original, copy)
        assert alike(copy, original)


def test_a_rotation_that_exif_undoes_is_none() -> None:
    image = scenes()[0]
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(image.rotate(90), "JPEG", quality=90, exif=exif)
    assert alike(print_of(encoded(image, "PNG")), print_of(turned))


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        lambda image: image.rotate(90),
        lambda image: crop(image, 0.2, 0.2, 0.2, 0.2),
    ],
    ids=["mirrored", "turned", "cropped by far"],
)
def test_what_is_changed_too_much_is_another_image(change: Callable[[Image.Image], Image.Image]) -> None:
    for image in scenes()[:10]:
        assert not alike(fingerprint(image), fingerprint(change(image)))


def groups_of(ledger: Ledger, images: list[bytes], groups: Groups | None = None) -> dict[str, Membership]:
    return (groups or Groups(ledger)).assign("digits", 1, {sha256(data): print_of(data) for data in images})


def test_distinct_images_are_groups_of_their_own(ledger: Ledger) -> None:
    images = [*(encoded(image, "PNG") for image in scenes()), *scans()]
    found = groups_of(ledger, images)
    assert [found[sha256(data)].group for data in images] == [sha256(data) for data in images]
    assert not any(membership.resembles for membership in found.values())


def test_images_of_one_brightness_look_like_nothing(ledger: Ledger) -> None:
    images = [png(digit, salt=salt) for digit in (3, 7) for salt in (0, 9)]
    found = groups_of(ledger, images)
    assert [found[sha256(data)].group for data in images] == [sha256(data) for data in images]
    assert not alike(print_of(images[0]), print_of(images[0]))


def test_tiny_images_are_recognised_in_another_encoding_and_larger(ledger: Ledger) -> None:
    some = scans()[:40]
    groups_of(ledger, scans())
    changes: list[Callable[[Image.Image], bytes]] = [
        lambda image: encoded(image, "JPEG", quality=75),
        lambda image: encoded(image, "WEBP", quality=80),
        lambda image: encoded(image.resize((12, 12), Image.Resampling.BICUBIC), "PNG"),
    ]
    for change in changes:
        copies = {sha256(change(Image.open(io.BytesIO(data)))): data for data in some}
        found = groups_of(ledger, [change(Image.open(io.BytesIO(data))) for data in some])
        assert {copy: found[copy].group for copy in copies} == {copy: sha256(data) for copy, data in copies.items()}


def test_copies_of_holdout_images_that_come_later_never_train(ledger: Ledger) -> None:
    originals = [encoded(image, "PNG") for image in scenes()]
    members = groups_of(ledger, originals)
    holdout = [data for data in originals if split_of(sha256(data), DIGITS.splits) == "test"]
    assert len(holdout) >= 8
    copies = [copy(Image.open(io.BytesIO(data))) for copy in COPIES.values() for data in holdout]
    members |= groups_of(ledger, copies)
    tasks = [
        annotated_task(
            number,
            meta={"sha256": sha256(data), "group": members[sha256(data)].group, "resembles": members[sha256(data)].resembles},
        )
        for number, data in enumerate([*originals, *copies])
    ]
    snapshot, manifest = freeze(tasks, DIGITS, LABELS)
    splits = {row.sha256: row.split for row in ManifestRow.read(manifest)}
    assert {splits.get(sha256(data)) for data in copies} == {"test"}
    assert {splits[sha256(data)] for data in originals} == {"train", "validation", "test"}
    assert sum(split_of(sha256(data), DIGITS.splits) == "train" for data in copies) > len(copies) / 2, "by content they would"
    assert snapshot.skipped == {}


def test_an_image_that_resembles_two_groups_joins_the_nearer_and_names_the_other(ledger: Ledger) -> None:
    one = scenes()[1].convert("L")
    first, second, between = (encoded(crop(one, share, 0, 0, 0), "PNG") for share in (0, 0.14, 0.07))
    apart = groups_of(ledger, [first, second])
    assert apart[sha256(second)].group == sha256(second), "too much is cropped away to be recognised"
    membership = groups_of(ledger, [between])[sha256(between)]
    assert {membership.group, *membership.resembles} == {sha256(first), sha256(second)}
    copy = groups_of(ledger, [encoded(crop(one, 0.01, 0, 0, 0), "PNG")]).popitem()[1]
    assert (copy.group, copy.resembles) == (sha256(first), [])


def test_an_image_keeps_its_group_whoever_asks_and_whatever_came_since(ledger: Ledger) -> None:
    image = scenes()[0]
    original, copy = encoded(image, "PNG"), encoded(image, "JPEG", quality=70)
    before = groups_of(ledger, [copy])
    assert before[sha256(copy)].group == sha256(copy)
    after = groups_of(ledger, [original, copy])
    assert after[sha256(copy)].group == after[sha256(original)].group == sha256(copy)
    assert groups_of(ledger, [png(1), original])[sha256(original)].group == sha256(copy)


def test_within_one_batch_copies_share_a_group(ledger: Ledger) -> None:
    image = scenes()[3]
    found = groups_of(ledger, [encoded(image, "PNG"), encoded(image, "JPEG", quality=80), encoded(image, "BMP")])
    assert {membership.group for membership in found.values()} == {sha256(encoded(image, "PNG"))}


def test_projects_and_models_have_groups_of_their_own(ledger: Ledger) -> None:
    image = scenes()[0]
    prints = [{sha256(data): print_of(data)} for data in (encoded(image, "PNG"), encoded(image, "BMP"))]
    groups = Groups(ledger)
    groups.assign("digits", 1, prints[0])
    for model, project in (("digits", 11), ("digits", 2), ("faces", 1)):
        [(own, membership)] = groups.assign(model, project, prints[1]).items()
        assert membership.group == own


def test_the_images_of_many_projects_do_not_stay_in_memory(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = (encoded(scene, "PNG") for scene in scenes()[:3])
    reads: list[tuple[str, int]] = []
    groups_after = ledger.groups_after

    def noted(model: str, project: int, after: int) -> list[tuple[int, bytes]]:
        reads.append((model, after))
        return groups_after(model, project, after)

    monkeypatch.setattr(ledger, "groups_after", noted)
    groups = Groups(ledger, remembered=1)

    def ask(model: str, image: bytes) -> str:
        return groups.assign(model, 1, {sha256(image): print_of(image)})[sha256(image)].group

    assert [ask(model, first) for model in ("one", "two", "one")] == [sha256(first)] * 3
    assert reads == [("one", 0), ("two", 0)]  # one image of another project may stay
    ask("one", second)
    ask("two", second)  # two images of "one" are too many to stay
    ask("one", third)
    assert reads[2:] == [("one", 1), ("two", 1), ("one", 0)]
    copy = encoded(scaled(scenes()[0], 0.5), "PNG")
    assert ask("one", copy) == sha256(first)


def test_functions_at_once_agree(ledger: Ledger) -> None:
    """Each has copies of the same images; whoever is first founds the group, and the others join it."""
    kinds = [COPIES["JPEG 50"], COPIES["WebP 50"], COPIES["half the size"], COPIES["encoded without loss"]]
    batches = [[kind(image) for image in scenes()[:6]] for kind in kinds]
    instances = [Groups(ledger) for _ in kinds]

    def work(number: int) -> None:
        for data in batches[number]:
            groups_of(ledger, [data], instances[number])

    with ThreadPoolExecutor(len(kinds)) as pool:
        list(pool.map(work, range(len(kinds))))
    everything = [data for batch in batches for data in batch]
    seen = [groups_of(ledger, everything, instance) for instance in (*instances, Groups(ledger))]
    groups = [{image: membership.group for image, membership in members.items()} for members in seen]
    assert all(one == groups[0] for one in groups)
    for copies in zip(*batches, strict=True):
        assert len({groups[0][sha256(data)] for data in copies}) == 1
    assert len(set(groups[0].values())) == 6


def test_what_could_not_be_written_is_decided_anew(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, image = Groups(ledger), scenes()[0]

    def broken(*_: object) -> None:
        raise StorageError("the ledger does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "append_groups", broken)
        with pytest.raises(StorageError):
            groups_of(ledger, [encoded(image, "PNG")], groups)
    copy = encoded(image, "BMP")
    groups_of(ledger, [copy])
    found = groups_of(ledger, [encoded(image, "PNG")], groups)
    assert found[sha256(encoded(image, "PNG"))].group == sha256(copy)


def test_a_large_batch_fits_into_the_ledger(ledger: Ledger) -> None:
    """DynamoDB takes no item beyond 400 KB."""
    random_ = random.Random(0)
    images = {sha256(str(number)): Fingerprint(cells=random_.randbytes(256), small=True) for number in range(1_200)}
    found = Groups(ledger).assign("digits", 1, images)
    assert {image: membership.group for image, membership in found.items()} == {image: image for image in images}
    entries = ledger.groups_after("digits", 1, 0)
    assert [sequence for sequence, _ in entries] == list(range(1, len(entries) + 1))
    assert len(entries) > 1
    assert max(len(body) for _, body in entries) < 350_000


def test_familiar_images_are_those_that_earlier_ones_stand_for(ledger: Ledger) -> None:
    groups_of(ledger, scans())
    copies = [examples.encoded(Image.open(io.BytesIO(data)), "BMP") for data in scans()[:3]]
    novel = encoded(scenes()[0].resize((8, 8)), "PNG")
    found = groups_of(ledger, [*copies, novel])
    assert min(found[sha256(copy)].familiar for copy in copies) > 0.9
    assert found[sha256(novel)].familiar < 0.1
    assert all(0 <= membership.familiar <= 1 for membership in groups_of(ledger, scans()).values())


# After an erasure


def test_erased_looks_are_gone_and_the_group_stays_for_whoever_comes_again(ledger: Ledger) -> None:
    first, second, other = (encoded(scene, "PNG") for scene in scenes()[:3])
    hashes = [sha256(data) for data in (first, second, other)]
    Groups(ledger).assign("digits", 1, dict(zip(hashes, map(print_of, (first, second, other)), strict=True)))
    copy, later_copy = (COPIES[kind](scenes()[0]) for kind in ("JPEG 50", "WebP 50"))

    assert forget_looks(ledger, "digits", 1, [hashes[0]]) == 1
    assert forget_looks(ledger, "digits", 1, [hashes[0]]) == 0
    ((_, body),) = ledger.groups_after("digits", 1, 0)
    kept = msgspec.json.decode(body, type=list[Assignment])
    assert [one.sha256 for one in kept] == hashes
    assert [one.fingerprint.cells for one in kept] == [b"", print_of(second).cells, print_of(other).cells]

    afresh = Groups(ledger)
    assert afresh.assign("digits", 1, {sha256(copy): print_of(copy)})[sha256(copy)].group == sha256(copy)
    again = Groups(ledger).assign("digits", 1, {hashes[0]: print_of(first)})[hashes[0]]
    assert again.group == hashes[0]
    looks = print_of(later_copy)
    joined = Groups(ledger).assign("digits", 1, {sha256(later_copy): looks})[sha256(later_copy)]
    assert hashes[0] in (joined.group, *joined.resembles)
    assert forget_looks(ledger, "digits", 1, [hashes[0]]) == 1


def test_a_log_that_changes_meanwhile_is_not_overwritten(ledger: Ledger) -> None:
    looks = print_of(encoded(scenes()[0], "PNG"))
    Groups(ledger).assign("digits", 1, {"a" * 64: looks})
    ((sequence, body),) = ledger.groups_after("digits", 1, 0)
    ledger.rewrite_groups("digits", 1, sequence, body, b"[]")
    with pytest.raises(ConflictError):
        ledger.rewrite_groups("digits", 1, sequence, body, body)
