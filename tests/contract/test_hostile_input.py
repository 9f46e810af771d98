"""Fuzzed images, requests and messages, through the functions as they are deployed.

A caller always gets a status and JSON, and 5xx only where a service failed; a message fails alone or not at all. The quick runs
repeat the same inputs; with `-m slow` there are more than 100,000.
"""

from __future__ import annotations

import base64
import itertools
import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from copy import deepcopy
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from labelloop.artifacts import Bucket, Champions, s3_uri
from labelloop.ingest import Ingest
from labelloop.ledger import Ledger
from labelloop.retrain import Outcome
from tests import examples
from tests.contract.conftest import Backend
from tests.contract.test_captures import PREDICT, WEBHOOKS
from tests.examples import LambdaContext, encoded, sqs_event

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")

LAMBDA_BYTES = 6 * 2**20  # of an answer
ODD_TEXTS = [
    "", " ", "\0", "\ud800", "‮", "a" * 10_000, "💥" * 500, "../../etc/passwd", "${jndi:ldap://x}", "%s%n%x", "<script>", "';--",
    "\r\nSet-Cookie: a=b", "null", "NaN", "__proto__", "s3://", "http://169.254.169.254/", "//evil/data/upload/1/a.png",
    "/data/upload/%2e%2e/x", "file:///etc/passwd", "http://[", "s3://{bucket}/images/spots/none.png",
]  # fmt: skip
ODD_VALUES: list[Any] = [
    None, True, 0, -1, 2**63, 2**64, -(2**63) - 1, 10**400, 1e308, -1e-320, [], {}, [[]], [None] * 1000, {"": {"": ""}},
    {"image": {"image": 1}}, *ODD_TEXTS,
]  # fmt: skip


# Images


def seeds() -> list[bytes]:
    """A small file of every format and mode."""
    picture = Image.new("RGB", (40, 30), "red")
    ImageDraw.Draw(picture).rectangle((20, 0, 40, 15), "green")
    ImageDraw.Draw(picture).ellipse((5, 12, 30, 29), "blue")
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    profile = bytes(200)
    grey = picture.convert("L")
    transparent = picture.convert("RGBA")
    transparent.putalpha(grey)

    def frames() -> dict[str, Any]:  # Pillow notes its options on them
        return {"save_all": True, "append_images": [picture.rotate(90), picture.rotate(180)]}

    return [
        *(encoded(picture.convert(mode), "PNG") for mode in ("1", "L", "P", "RGB")),
        encoded(transparent, "PNG", exif=exif, icc_profile=profile),
        encoded(grey.convert("I;16"), "PNG"),
        encoded(transparent.convert("LA"), "PNG"),
        encoded(picture.quantize(4), "PNG", transparency=1),
        encoded(picture, "PNG", **frames()),
        *(encoded(picture.convert(mode), "JPEG", exif=exif) for mode in ("L", "RGB", "CMYK")),
        encoded(picture, "JPEG", progressive=True, icc_profile=profile),
        encoded(picture, "JPEG", quality=30, subsampling=0, restart_marker_blocks=1),
        encoded(picture, "MPO", **frames()),
        encoded(picture, "GIF"),
        encoded(picture.quantize(4), "GIF", transparency=1, comment=b"a" * 300, **frames()),
        *(encoded(picture.convert(mode), "BMP") for mode in ("1", "L", "P", "RGB", "RGBA")),
        encoded(picture, "WEBP"),
        encoded(transparent, "WEBP", lossless=True, exif=exif),
        encoded(picture, "WEBP", **frames()),
        *(encoded(picture.convert(mode), "TIFF") for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB")),
        *(encoded(grey.convert(mode), "TIFF") for mode in ("F", "I", "I;16")),
        *(
            encoded(picture, "TIFF", compression=name)
            for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd", "lzma")
        ),
        encoded(picture.convert("1"), "TIFF", compression="group4"),
        encoded(picture, "TIFF", exif=exif, **frames()),
    ]


INTERESTING = [0, 1, 2, 0x7F, 0x80, 0xFF, 0xD8, 0xD9, 0xDA, 0xC2, 0x2C, 0x3B, 0x21]
NUMBERS = [0, 1, 0xFF, 0x100, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]


def fuzzed_images(number: int, *, seed: int) -> Iterator[bytes]:
    """Damaged files: flipped bits, edited headers, numbers in odd places, cuts, repeats, and parts of one file inside another."""
    dice, corpus = random.Random(seed), seeds()
    changes = (_flip, _edit_header, _put_number, _cut, _repeat, _splice)
    for turn in range(number):
        data = bytearray(corpus[turn % len(corpus)])
        for _ in range(dice.choice((1, 1, 2, 4))):
            dice.choice(changes)(data, dice, corpus)
        yield _with_true_checksums(data) if data[:4] == b"\x89PNG" and dice.random() < 0.7 else bytes(data)


def _flip(data: bytearray, dice: random.Random, corpus: list[bytes]) -> None:
    for _ in range(dice.randint(1, 8)):
        if data:
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)


def _edit_header(data: bytearray, dice: random.Random, corpus: list[bytes]) -> None:
    if data:
        data[dice.randrange(min(64, len(data)))] = dice.choice(INTERESTING)


def _put_number(data: bytearray, dice: random.Random, corpus: list[bytes]) -> None:
    form = dice.choice(("<H", ">H", "<I", ">I"))
    place = dice.randrange(len(data) + 1)
    mask = 2 ** (8 * struct.calcsize(form)) - 1
    data[place : place + struct.calcsize(form)] = struct.pack(form, dice.choice(NUMBERS) & mask)


def _cut(data: bytearray, dice: random.Random, corpus: list[bytes]) -> None:
    del data[dice.randrange(len(data) + 1) :]


def _repeat(data: bytearray, dice: random.Random, corpus: list[bytes]) -> None:
    start = dice.randrange(len(data) + 1)
    data[start:start] = data[start : start + dice.randint(1, 64)] * dice.choice((1, 2, 50))


def _splice(data: bytearray, dice: random.Random, corpus: list[bytes]) -> None:
    other = dice.choice(corpus)
    start, place = dice.randrange(len(other)), dice.randrange(len(data) + 1)
    data[place:place] = other[start : start + dice.randint(1, 200)]


def _with_true_checksums(data: bytearray) -> bytes:
    """A PNG whose chunks are believed, up to the first that runs over the end."""
    place = 8
    while place + 12 <= len(data):
        end = place + 8 + int.from_bytes(data[place : place + 4])
        if end + 4 > len(data):
            break
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[place + 4 : end]))
        place = end + 4
    return bytes(data)


@pytest.fixture
def hostile(detector: Backend, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """A detector and a classifier serve; images come from `memory`, so that the emulator's speed is not the test's."""
    detector.promote(1, examples.brightness_model())
    read = Bucket.get_tagged

    def get_tagged(self: Bucket, key: str, **limit: Any) -> Any:
        if self.name == detector.images.name:
            return (memory[key], None) if key in memory else None
        return read(self, key, **limit)

    memory: dict[str, bytes] = {}
    monkeypatch.setattr(Bucket, "get_tagged", get_tagged)
    monkeypatch.setattr(detector, "memory", memory, raising=False)
    monkeypatch.setattr(detector.handler.log, "warning", lambda *_, **__: None)
    return detector


def try_images(backend: Backend, images: Iterator[bytes]) -> int:
    """Have both models predict the images, a hundred a request; how many got a prediction."""
    memory: dict[str, bytes] = vars(backend)["memory"]
    predicted = 0
    for some in itertools.batched(images, 100, strict=False):
        for model in ("digits", "spots"):
            memory.clear()
            memory.update({f"images/{model}/{place}.png": data for place, data in enumerate(some)})
            tasks = [{"id": place, "data": {"image": s3_uri(backend.images.name, key)}} for place, key in enumerate(memory)]
            status, answer = backend.ask("POST", "predict", {"tasks": tasks}, model=model)
            assert status == 200
            assert len(answer["results"]) == len(some)
            for result in answer["results"]:
                if "result" in result:
                    assert 0 <= result["score"] <= 1
                else:
                    assert result.keys() == {"error"}
                    assert len(result["error"]) < 500
            predicted += sum("result" in result for result in answer["results"])
    return predicted


def test_fuzzed_images_are_predictions_or_errors(hostile: Backend) -> None:
    assert try_images(hostile, fuzzed_images(2_000, seed=1)) > 100, "some survive their damage"


def test_the_seeds_are_good_images(hostile: Backend) -> None:
    """But for a mode that no model takes."""
    assert try_images(hostile, iter(seeds())) >= 2 * len(seeds()) - 2


@pytest.mark.slow
def test_eighty_thousand_fuzzed_images_are_predictions_or_errors(hostile: Backend) -> None:
    assert try_images(hostile, fuzzed_images(80_000, seed=2)) > 4_000


# Requests


json_values = st.recursive(
    st.sampled_from(ODD_VALUES) | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(
            st.sampled_from(["id", "data", "image", "meta", "group", "result", "value", "type"]), children, max_size=3
        )
    ),
    max_leaves=5,
)
SPOTS = "s3://{bucket}/images/spots"


def pointed(label: str) -> dict[str, Any]:
    """The context of a click with a class."""
    return {"result": [{"type": "keypointlabels", "value": {"x": 10, "y": 10, "width": 1, "keypointlabels": [label]}}]}


BODIES: list[Any] = [
    *(capture["body"] for capture in PREDICT.values()),
    {"tasks": [{"id": 1, "data": {"image": f"{SPOTS}/a.png"}}], "params": {"context": pointed("spot")}},
    {"tasks": [{"id": 1, "data": {"image": "/data/upload/1/a.png"}, "meta": {"group": "a" * 64}}], "params": None},
    {"project": "1.2", "schema": examples.TEMPLATE, "hostname": "http://ls", "extra_params": None},
]
edits = st.lists(st.tuples(st.integers(0, 10**6), json_values), max_size=3)
cuts = st.none() | st.tuples(st.floats(0, 1), st.sampled_from(["", "[" * 5_000, "\\ud800", "1e999", "\0", "}]}", '"']))
oddities = st.fixed_dictionaries(
    {},
    optional={
        "headers": st.none() | st.dictionaries(st.text(max_size=10), st.text(max_size=10), max_size=2),
        "queryStringParameters": st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2),
        "pathParameters": (st.sampled_from(ODD_TEXTS) | st.text(max_size=40)).map(lambda model: {"model": model}),
        "body": st.none() | st.sampled_from(ODD_TEXTS),
        "isBase64Encoded": st.just(True),
    },
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a JSON value: its parent, and the key or number in it."""
    for key, child in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield value, key
        yield from places(child)


def edited(body: Any, changes: list[tuple[int, Any]]) -> Any:
    """A body with other values in some of its places."""
    whole = [json.loads(json.dumps(body))]
    for place, value in changes:
        found = list(itertools.islice(places(whole), 2_000))
        parent, key = found[place % len(found)]
        parent[key] = deepcopy(value)
    return whole[0]


def cut(text: str, change: tuple[float, str] | None) -> str:
    return text if change is None else text[: int(change[0] * len(text))] + change[1]


def request_is_answered(backend: Backend, event: dict[str, Any]) -> None:
    answer = backend.handler.handler(event, LambdaContext())
    assert len(json.dumps(answer)) < LAMBDA_BYTES
    assert "Traceback" not in answer["body"]
    assert answer["statusCode"] in (200, 400, 404), answer
    assert isinstance(json.loads(answer["body"]), dict)


def fuzz_requests(backend: Backend, number: int) -> int:
    vars(backend)["memory"]["images/spots/a.png"] = examples.png(7)
    tried = 0

    @settings(
        max_examples=number, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(
        st.sampled_from(BODIES), edits, cuts, st.sampled_from(["predict", "predict", "predict", "setup", "versions"]), oddities
    )
    def fuzz(body: Any, changes: Any, change: Any, route: str, odd: dict[str, Any]) -> None:
        nonlocal tried
        tried += 1
        text = cut(json.dumps(edited(body, changes)).replace("{bucket}", backend.images.name), change)
        event = {**examples.api_event("POST", "spots", route, text), **odd}
        if event["isBase64Encoded"] and event["body"]:
            event["body"] = base64.b64encode(event["body"].encode(errors="surrogatepass")).decode()
        request_is_answered(backend, event)

    fuzz()
    return tried


def test_fuzzed_requests_are_answered(hostile: Backend) -> None:
    assert fuzz_requests(hostile, 300) >= 250


@pytest.mark.slow
def test_thousands_of_fuzzed_requests_are_answered(hostile: Backend) -> None:
    assert fuzz_requests(hostile, 15_000) >= 14_000


LARGE: dict[str, Callable[[], str]] = {
    "ten megabytes of text": lambda: json.dumps({"tasks": [{"data": {"image": "a" * 10_000_000}}]}),
    "ten megabytes of lists": lambda: '{"tasks": [{"data": [' + "[]," * 3_300_000 + "[]]}]}",
    "five megabytes of address": lambda: json.dumps({"tasks": [{"data": {"image": 'é"' * 600_000}}]}),
    "five megabytes of key": lambda: json.dumps(
        {"tasks": [{"data": {"image": "s3://{bucket}/images/spots/" + "a" * 5_000_000}}]}
    ),
    "two million tasks": lambda: '{"tasks": [' + "{}," * 1_900_000 + "{}]}",
    "all the tasks that are taken": lambda: '{"tasks": [' + "{}," * 4_999 + "{}]}",
    "five megabytes of class": lambda: json.dumps(
        {
            "tasks": [{"data": {"image": f"{SPOTS}/a.png"}}],
            "params": {"context": pointed("c" * 5_000_000)},
        }
    ),
    "a task whose id is a deep list": lambda: '{"tasks": [{"id": ' + "[" * 900 + "]" * 900 + "}]}",
    "an endless number": lambda: '{"tasks": [{"id": ' + "9" * 1_000_000 + "}]}",
    "a key a million times": lambda: '{"tasks": [{' + ",".join('"data": null' for _ in range(400_000)) + "}]}",
}


@pytest.mark.parametrize("body", LARGE.values(), ids=LARGE.keys())
def test_large_and_deep_bodies_are_answered_in_few_words(hostile: Backend, body: Callable[[], str]) -> None:
    vars(hostile)["memory"]["images/spots/a.png"] = examples.png(7)
    text = body().replace("{bucket}", hostile.images.name)
    request_is_answered(hostile, examples.api_event("POST", "spots", "predict", text))


# Messages


GOOD: dict[str, dict[str, Any]] = {
    "ingest": {"detail": {"bucket": {"name": "images"}, "object": {"key": "images/digits/good.png", "size": 1}}},
    "retrain": {"model": "digits", "action": "ANNOTATION_CREATED"},
    "promote": {"model": "digits", "job_name": "good"},
    "refresh": {"model": "digits", "version": 77},
    "prelabel": {"model": "digits", "after": 77, "upto": 78},
}


class Worker:
    """In place of what a function does with a message: writes down the good ones."""

    def __init__(self) -> None:
        self.good = 0

    def reconcile(self, model: str, *, asked: bool = False) -> Outcome:
        self.good += model == "digits"
        return Outcome(None, "nothing to do")

    def decide(self, model: str, job_name: str) -> None:
        self.good += job_name == "good"

    def __call__(self, message: Any) -> Any:
        self.good += 77 in (getattr(message, "version", 0), getattr(message, "after", 0))
        return SimpleNamespace(unsettled=0, drift=None)


@pytest.fixture
def functions(bucket: Bucket, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[ModuleType, Worker]]:
    """Each queue's function with its worker."""
    found = {name: (examples.load_handler(name), Worker()) for name in GOOD}
    for name, attribute in (
        ("retrain", "reconciler"),
        ("promote", "promoter"),
        ("refresh", "refresher"),
        ("prelabel", "prelabeller"),
    ):
        handler, worker = found[name]
        monkeypatch.setattr(handler, attribute, lambda worker=worker: worker)
    handler, worker = found["ingest"]
    ledger.set_project("digits", 1)

    def get(key: str, *, limit: int) -> None:
        worker.good += key == "images/digits/good.png"

    images: Any = SimpleNamespace(name="images", get=get)
    ingest = Ingest(examples.CONFIGS, images, Champions(bucket), ledger, SimpleNamespace(), lambda _: None)  # type: ignore[arg-type]
    monkeypatch.setattr(handler, "ingest", lambda: ingest)
    return found


MESSAGES: list[Any] = [*GOOD.values(), *(capture["body"] for capture in WEBHOOKS.values()), [], "text", None]


def fuzz_messages(functions: dict[str, tuple[ModuleType, Worker]], number: int) -> int:
    tried = 0

    @settings(
        max_examples=number, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(
        st.sampled_from(sorted(GOOD)),
        st.lists(st.tuples(st.sampled_from(MESSAGES), edits, cuts), min_size=1, max_size=9),
        st.dictionaries(st.sampled_from(["attributes", "messageAttributes", "extra", "eventSourceARN"]), json_values, max_size=2),
    )
    def fuzz(function: str, messages: Any, odd: dict[str, Any]) -> None:
        nonlocal tried
        handler, worker = functions[function]
        bodies = [cut(json.dumps(edited(body, changes)), change) for body, changes, change in messages]
        tried += len(bodies)
        event = sqs_event(*bodies, GOOD[function])
        for record in event["Records"][:-1]:
            record.update({name: value for name, value in odd.items() if name != "eventSourceARN"})
        worker.good = 0
        answer = handler.handler(event, LambdaContext())
        failed = {entry["itemIdentifier"] for entry in answer["batchItemFailures"]}
        assert answer.keys() == {"batchItemFailures"}
        assert failed <= {f"m{place}" for place in range(len(bodies))}, "the good message is not among them"
        assert worker.good, "the good message was worked off"

    fuzz()
    return tried


def test_a_fuzzed_message_fails_alone(functions: dict[str, tuple[ModuleType, Worker]]) -> None:
    assert fuzz_messages(functions, 60) > 60


@pytest.mark.slow
def test_thousands_of_fuzzed_messages_fail_alone(functions: dict[str, tuple[ModuleType, Worker]]) -> None:
    assert fuzz_messages(functions, 3_000) > 6_000


@settings(max_examples=150, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.none() | st.dictionaries(st.sampled_from(["Authorization", "authorization", "Host"]), st.text(max_size=50), max_size=2)
    | st.binary(max_size=40).map(lambda content: {"Authorization": "Basic " + base64.b64encode(content).decode()})
)  # fmt: skip
def test_fuzzed_credentials_open_nothing(monkeypatch: pytest.MonkeyPatch, headers: Any) -> None:
    handler = examples.load_handler("authorize")
    monkeypatch.setattr(handler, "backend_passwords", lambda *_: ("right",))
    monkeypatch.setenv("LABELLOOP_BACKEND_SECRET_PREFIX", "labelloop/test/")
    monkeypatch.setenv("POWERTOOLS_METRICS_NAMESPACE", "labelloop-test")
    event = {"type": "REQUEST", "methodArn": "arn:aws:execute-api:us-east-1:0:abc/v1/POST/digits/predict", "headers": headers}
    try:
        policy = handler.handler(event, LambdaContext())
    except Exception as error:  # noqa: BLE001 - API Gateway's word for 401 has no class of its own
        assert str(error) == "Unauthorized"  # noqa: PT017
    else:
        assert policy["policyDocument"]["Statement"][0]["Effect"] == "Deny"
