"""Near duplicates: do copies of holdout images, uploaded later, stay out of training, and are distinct images kept apart?

    uv run python -m benchmarks.duplicates [--images N] [--known N] [--json FILE]

Every image of the examples is taken in as ingest does it, then copies of N holdout images in another process's place: encoded
anew, resized, cropped. What training would get of them comes from the real groups and the real snapshot. The holdout's share is
larger than in the examples' own configs, which have fewer than N images there. Distinct images are those of scikit-learn's
digits (8 × 8 pixels), of the digit detector (128 × 128) and of scikit-image's lfw_subset (25 × 25, faces and others).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.resources
import io
import json
import random
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from botocore.exceptions import ClientError
from PIL import Image

from cli.examples import digit_detector, digits
from labelloop import dataset, imaging, snapshot_index
from labelloop.duplicates import Fingerprint, Groups, Membership, fingerprint
from labelloop.label_studio.payloads import AnnotatedTask
from labelloop.ledger import Ledger
from labelloop.model_config import ModelConfigs, Splits
from labelloop.records import ManifestRow

SPLITS = Splits(test=0.4, validation=0.1)
BATCH = 100  # images that ingest takes at once

Copy = Callable[[Image.Image, random.Random], bytes]


class Table:
    """As much of a DynamoDB client as the log of groups needs."""

    def __init__(self) -> None:
        self._items: dict[str, dict[str, Any]] = {}

    def put_item(self, *, Item: dict[str, Any], **_: Any) -> None:
        record = Item["record"]["S"]
        if record in self._items:
            raise ClientError({"Error": {"Code": "ConditionalCheckFailedException"}}, "PutItem")
        self._items[record] = Item

    def query(self, *, ExpressionAttributeValues: dict[str, Any], **_: Any) -> dict[str, Any]:
        first, last = (ExpressionAttributeValues[name]["S"] for name in (":first", ":last"))
        return {"Items": [self._items[record] for record in sorted(self._items) if first <= record <= last]}


def encoded(image: Image.Image, image_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def as_jpeg(quality: int) -> Copy:
    return lambda image, _: encoded(image, "JPEG", quality=quality)


def as_webp(quality: int) -> Copy:
    return lambda image, _: encoded(image, "WEBP", quality=quality)


def resized(scale: float) -> Copy:
    return lambda image, _: encoded(_scaled(image, scale), "PNG")


def cropped(*shares: float) -> Copy:
    """Shares of the sides that left, top, right and bottom lose."""
    return lambda image, _: encoded(_crop(image, shares), "PNG")


def cropped_at_random(most: float) -> Copy:
    return lambda image, random_: encoded(_crop(image, [random_.uniform(0, most) for _ in range(4)]), "PNG")


def all_at_once(image: Image.Image, random_: random.Random) -> bytes:
    return encoded(_scaled(_crop(image, [random_.uniform(0, 0.03) for _ in range(4)]), 0.75), "JPEG", quality=60)


def _scaled(image: Image.Image, scale: float) -> Image.Image:
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def _crop(image: Image.Image, shares: list[float] | tuple[float, ...]) -> Image.Image:
    left, top, right, bottom = shares
    width, height = image.size
    return image.crop((round(width * left), round(height * top), round(width * (1 - right)), round(height * (1 - bottom))))


ENCODED: dict[str, Copy] = {
    "PNG, packed anew": lambda image, _: encoded(image, "PNG", compress_level=1),
    "JPEG 95": as_jpeg(95),
    "JPEG 75": as_jpeg(75),
    "JPEG 60": as_jpeg(60),
    "JPEG 50": as_jpeg(50),
    "WebP 80": as_webp(80),
    "WebP 50": as_webp(50),
    "150 %": resized(1.5),
    "125 %": resized(1.25),
    "75 %": resized(0.75),
    "50 %": resized(0.5),
}
CROPPED: dict[str, Copy] = {
    "1 % off each side": cropped(0.01, 0.01, 0.01, 0.01),
    "3 % off each side": cropped(0.03, 0.03, 0.03, 0.03),
    "5 % off each side": cropped(0.05, 0.05, 0.05, 0.05),
    "5 % off one side": cropped(0.05, 0, 0, 0),
    "5 % off two sides": cropped(0, 0, 0.05, 0.05),
    "up to 5 % off each side, at random": cropped_at_random(0.05),
    "up to 3 % off each side, 75 %, JPEG 60": all_at_once,
}


def faces() -> list[bytes]:
    """scikit-image's lfw_subset: 25 × 25 pixels, half of them faces."""
    with importlib.resources.files("skimage").joinpath("data/lfw_subset.npy").open("rb") as file:
        return [encoded(Image.fromarray((pixels * 255).astype("uint8")), "PNG") for pixels in np.load(file)]


def images_of(name: str) -> list[bytes]:
    match name:
        case "digits":
            return [example.image for example in digits.load()]
        case "digit_detector":
            return [example.image for example in digit_detector.load()]
        case _:
            return list(dict.fromkeys(faces()))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def taken_in(ledger: Ledger, images: list[bytes]) -> dict[str, Membership]:
    """The membership of each image, by SHA-256, as a function that starts anew gives them batch by batch."""
    groups, found = Groups(ledger), dict[str, Membership]()
    for start in range(0, len(images), BATCH):
        some = {sha256(data): fingerprint(imaging.survey(data)[1]) for data in images[start : start + BATCH]}
        found.update(groups.assign("model", 1, some))
    return found


def trained_on(members: Mapping[str, Membership]) -> dict[str, str]:
    """The split of each image that is in a snapshot, if a person annotates all of them."""
    folder = ModelConfigs.find()["digits"]
    config = msgspec.structs.replace(folder.config, splits=SPLITS)
    result = [{"from_name": "digit", "to_name": "image", "type": "choices", "value": {"choices": ["1"]}}]
    tasks = [
        {
            "id": number,
            "data": {"image": f"s3://images/{image}"},
            "meta": {"sha256": image, "group": membership.group, "resembles": membership.resembles},
            "annotations": [{"id": number, "unique_id": str(number), "result": result}],
        }
        for number, (image, membership) in enumerate(members.items())
    ]
    _, manifest = snapshot_index.freeze(msgspec.convert(tasks, list[AnnotatedTask]), config, folder.label_config)
    return {row.sha256: row.split for row in ManifestRow.read(manifest)}


def copies(name: str, kinds: Mapping[str, Copy], count: int) -> dict[str, dict[str, int]]:
    """What becomes of copies of `count` holdout images of a data set, by kind: `holdout`, `left out` or `training`."""
    ledger = Ledger("table", Table())
    originals = images_of(name)
    members = taken_in(ledger, originals)
    splits = trained_on(members)
    holdout = [data for data in originals if splits.get(sha256(data)) == "test"]
    chosen = random.Random(0).sample(holdout, min(count, len(holdout)))
    random_ = random.Random(1)
    made = {kind: [copy(Image.open(io.BytesIO(data)), random_) for data in chosen] for kind, copy in kinds.items()}
    later = taken_in(ledger, list({sha256(data): data for some in made.values() for data in some}.values()))
    after = trained_on({**members, **later})
    found: dict[str, dict[str, int]] = {}
    for kind, some in made.items():
        fates = Counter({None: "left out", "test": "holdout"}.get(after.get(sha256(data)), "training") for data in some)
        chance = Counter(dataset.split_of(sha256(data), SPLITS) for data in some)["test"]
        found[kind] = {
            "copies": len(some),
            **{fate: fates[fate] for fate in ("holdout", "left out", "training")},
            "by content alone": len(some) - chance,
        }
    return found


def merges(name: str) -> dict[str, int]:
    """How many of a data set's images, which are all distinct, share a group with an earlier one or resemble one."""
    members = taken_in(Ledger("table", Table()), images_of(name))
    merged = [image for image, membership in members.items() if membership.group != image or membership.resembles]
    return {"images": len(members), "merged": len(merged)}


def speed(known: int) -> dict[str, float]:
    """A new image's processor time among `known` ones, s, that of reading the log, and the memory of the index, MB.

    The known images are those of the digit detector mixed by two, so that many are similar.
    """
    table, random_ = Table(), np.random.default_rng(0)
    ledger = Ledger("table", table)
    base = [np.frombuffer(fingerprint(imaging.survey(data)[1]).cells, np.uint8) for data in images_of("digit_detector")]
    for sequence, entry in enumerate(_entries(base, known, random_), start=1):
        ledger.append_groups("model", 1, sequence, entry)
    groups = Groups(ledger)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    groups.assign("model", 1, {"first": _mixed(base, random_)})
    reading = time.process_time() - began
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    began, count = time.process_time(), 50
    groups.assign("model", 1, {str(number): _mixed(base, random_) for number in range(count)})
    each = (time.process_time() - began) / count
    return {"known": known, "new image s": round(each, 4), "reading s": round(reading, 1), "index MB": round(memory / 1024)}


def _mixed(base: list[np.ndarray[Any, np.dtype[np.uint8]]], random_: np.random.Generator) -> Fingerprint:
    """A mixture of two images."""
    one, other = (base[number].astype(float) for number in random_.integers(len(base), size=2))
    return Fingerprint(cells=((one + other) / 2).astype(np.uint8).tobytes(), small=False)


def _entries(base: list[np.ndarray[Any, np.dtype[np.uint8]]], known: int, random_: np.random.Generator) -> Iterator[bytes]:
    for start in range(0, known, BATCH):
        yield msgspec.json.encode(
            [
                {
                    "sha256": f"{number:064x}",
                    "group": f"{number:064x}",
                    "resembles": [],
                    "nearest": 0.5,
                    "fingerprint": _mixed(base, random_),
                }
                for number in range(start, start + BATCH)
            ]
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200, help="holdout images to copy (default: %(default)s)")
    parser.add_argument(
        "--known", type=int, default=100_000, help="images that new ones are compared with (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    merged = {name: merges(name) for name in ("digits", "digit_detector", "lfw_subset")}
    print("| distinct images | images | merged by mistake |\n|---|---|---|")
    for name, row in merged.items():
        print(f"| {name} | {row['images']} | {row['merged']} |")
    copied = {
        "digit_detector": copies("digit_detector", {**ENCODED, **CROPPED}, options.images),
        "digits": copies("digits", ENCODED, options.images),
    }
    for name, kinds in copied.items():
        print(f"\n| {name} | copies | in the holdout | left out | in training | in training without groups |\n{'|---' * 6}|")
        for kind, row in kinds.items():
            print(f"| {kind} | {' | '.join(map(str, row.values()))} |")
    measured = speed(options.known)
    print("\n" + ", ".join(f"{name}: {value}" for name, value in measured.items()))
    if options.json:
        options.json.write_text(json.dumps({"merges": merged, "copies": copied, "speed": measured}, indent=2))


if __name__ == "__main__":
    main()
