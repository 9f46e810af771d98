"""The ML backend as Label Studio meets it: the official backend's behaviours, and odd requests.

What Label Studio does with each answer is in its own tests; here stands what it must never be given: a score that is no
number, `null` for a task, another number of results than tasks.
"""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from collections import Counter
from functools import partial
from threading import Event, Lock
from types import SimpleNamespace
from typing import Any

import boto3
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from labelloop import artifacts
from labelloop.errors import ModelError
from labelloop.predict import PART, POINTER_SECONDS
from tests import examples
from tests.contract.conftest import Backend
from tests.examples import brightness_model, png
from tests.recording_server import Answer, Request, serving


def task(image: Any, number: int = 1) -> dict[str, Any]:
    return {"id": number, "data": {"image": image}, "annotations": [], "predictions": []}


def choices(answer: Any) -> list[str | None]:
    """The chosen class of each result; None where there is none."""
    return [result["result"][0]["value"]["choices"][0] if result.get("result") else None for result in answer["results"]]


def fresh(events: list[dict[str, Any]]) -> Any:
    """The statuses that a process which has just started answers, and which of three packages it has imported then."""
    script = """
import importlib.util, json, sys, types
file, events = sys.argv[1], json.load(sys.stdin)
spec = importlib.util.spec_from_file_location("handler", file)
handler = importlib.util.module_from_spec(spec)
spec.loader.exec_module(handler)
context = types.SimpleNamespace(function_name="f", memory_limit_in_mb=1, invoked_function_arn="a", aws_request_id="r")
context.get_remaining_time_in_millis = lambda: 29_000
answers = [handler.handler(event, context)["statusCode"] for event in events]
print(json.dumps([answers, sorted({"onnxruntime", "numpy", "boto3"} & sys.modules.keys())]))
"""
    command = [sys.executable, "-c", script, str(examples.REPOSITORY / "functions" / "predict" / "handler.py")]
    done = subprocess.run(command, input=json.dumps(events), capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# Setup


def test_setup_names_the_version_that_serves(backend: Backend) -> None:
    assert backend.setup() == (200, {"model_version": "digits v1"})


@pytest.mark.parametrize("extra", [None, {}, {"a": 1}, "text", [1, 2], 7])
def test_setup_takes_any_extra_parameters(backend: Backend, extra: Any) -> None:
    assert backend.setup(extra_params=extra)[0] == 200


@pytest.mark.parametrize("body", [{}, {"project": None, "schema": None}, {"project": 5}, {"unknown": 1}, {"access_token": ""}])
def test_setup_needs_nothing_that_label_studio_may_leave_out(backend: Backend, body: Any) -> None:
    assert backend.ask("POST", "setup", body) == (200, {"model_version": "digits v1"})


def test_setup_loads_no_model(backend: Backend) -> None:
    backend.artifacts.put(artifacts.onnx_key("digits", 1), b"this is no model")
    assert backend.setup()[0] == 200


def test_setup_and_versions_import_neither_onnxruntime_nor_numpy_nor_boto3(backend: Backend) -> None:
    """Seen from a fresh process, as a cold Lambda is one. Health needs no function at all."""
    events = [examples.api_event("POST", "digits", "setup", "{}"), examples.api_event("GET", "digits", "versions", None)]
    assert fresh(events) == [[200, 200], []]


# Predict


def test_every_task_gets_its_result_in_order(backend: Backend) -> None:
    digits = [3, 1, 4, 1, 5, 9, 2, 6]
    tasks = [task(backend.put_image(f"{place}.png", png(digit)), 100 + place) for place, digit in enumerate(digits)]
    status, answer = backend.predict(*tasks)
    assert status == 200
    assert answer.keys() == {"results", "model_version"}
    assert choices(answer) == [str(digit) for digit in digits]
    first = answer["results"][0]
    assert first.keys() == {"result", "score", "model_version"}
    (region,) = first["result"]
    assert 0 < region.pop("score") <= 1
    assert region == {"from_name": "digit", "to_name": "image", "type": "choices", "value": {"choices": ["3"]}}
    assert first["model_version"] == answer["model_version"] == backend.setup()[1]["model_version"]


def test_many_tasks_are_one_answer(backend: Backend) -> None:
    addresses = [backend.put_image(f"{digit}.png", png(digit)) for digit in range(10)]
    status, answer = backend.predict(*(task(addresses[number % 10], number) for number in range(200)))
    assert status == 200
    assert choices(answer) == [str(number % 10) for number in range(200)]


def test_scores_are_numbers_between_nought_and_one(backend: Backend) -> None:
    tasks = [task(backend.put_image(f"{grey}.png", png(0, salt=grey))) for grey in range(0, 256, 16)]
    _, answer = backend.predict(*tasks)
    for result in answer["results"]:
        assert type(result["score"]) is float
        assert 0 <= result["score"] <= 1


@pytest.mark.parametrize("name", ["with space.png", "50%.png", "a#b.png", "a?b.png", "a+b.png", "ü-雪.png", "sub/folder.png"])
def test_images_with_odd_names_are_found(backend: Backend, name: str) -> None:
    _, answer = backend.predict(task(backend.put_image(name, png(7))))
    assert choices(answer) == ["7"]


@pytest.mark.parametrize(
    "changes",
    [
        {"params": None},
        {"params": {}},
        {"params": {"login": None, "password": None, "context": None}},
        {"params": {"context": {"result": [{"type": "keypointlabels"}]}}},
        {"params": [1]},
        {"project": "999999.123"},
        {"project": None},
        {"project": 7},
        {"label_config": None},
        {"label_config": "<View/>"},
        {"label_config": "no xml"},
        {"unknown": {"nested": [1]}},
    ],
    ids=str,
)
def test_the_rest_of_the_body_may_be_anything(backend: Backend, changes: dict[str, Any]) -> None:
    address = backend.put_image("a.png", png(4))
    status, answer = backend.predict(task(address), **changes)
    assert status == 200
    assert choices(answer) == ["4"]


def test_only_tasks_are_needed(backend: Backend) -> None:
    address = backend.put_image("a.png", png(4))
    status, answer = backend.ask("POST", "predict", {"tasks": [{"data": {"image": address}}]})
    assert (status, choices(answer)) == (200, ["4"])


@pytest.mark.parametrize("body", [{"tasks": []}, {"tasks": None}, {}])
def test_no_tasks_are_no_results(backend: Backend, body: Any) -> None:
    assert backend.ask("POST", "predict", body) == (200, {"results": [], "model_version": "digits v1"})


BAD_BODIES: dict[str, str | None] = {
    "none": None,
    "empty": "",
    "no JSON": "{tasks: }",
    "cut off": '{"tasks": [{"id": 1',
    "a list": "[]",
    "a number": "3",
    "null": "null",
    "tasks that are none": '{"tasks": 3}',
    "tasks that are text": '{"tasks": ["a"]}',
    "deep": '{"tasks": [{"data": ' + "[" * 100_000 + "]" * 100_000 + "}]}",
    "half a character": '{"tasks": [{"id": "\\ud800"}]}',
}


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES.keys())
def test_a_body_that_cannot_be_read_is_a_clear_400(backend: Backend, body: str | None) -> None:
    status, answer = backend.ask("POST", "predict", body)
    assert status == 400
    assert answer.keys() == {"error"}
    assert "the body is no PredictRequest" in answer["error"]
    assert len(answer["error"]) < 500


def test_a_body_that_is_no_text_is_a_clear_400(backend: Backend) -> None:
    for content in (b'{"tasks": [{"id": "\xff"}]}', b"\xff\xfe", b"\x1f\x8b"):
        event = {**examples.api_event("POST", "digits", "predict", base64.b64encode(content).decode()), "isBase64Encoded": True}
        status, answer = backend.send(event)
        assert status == 400
        assert "the body is no PredictRequest" in answer["error"]


def test_a_binary_body_is_read(backend: Backend) -> None:
    body = json.dumps({"tasks": [task(backend.put_image("a.png", png(2)))]}).encode()
    event = {**examples.api_event("POST", "digits", "predict", base64.b64encode(body).decode()), "isBase64Encoded": True}
    status, answer = backend.send(event)
    assert (status, choices(answer)) == (200, ["2"])


ODD_TASKS: dict[str, tuple[Any, str]] = {
    "no data": ({"id": 1}, "no image under 'image'"),
    "null data": ({"id": 1, "data": None}, "no image under 'image'"),
    "data that is a list": ({"id": 1, "data": [1]}, "no image under 'image'"),
    "no image": ({"id": 1, "data": {"text": "x"}}, "no image under 'image'"),
    "a null image": (task(None), "no image under 'image'"),
    "an empty image": (task(""), "no image under 'image'"),
    "an image that is a list": (task(["a"]), "no image under 'image'"),
    "an empty task": ({}, "no image under 'image'"),
    "a missing image": (task("s3://{images}/images/digits/missing.png"), "does not exist"),
    "a broken image": (task("s3://{images}/images/digits/broken.png"), "is broken|cannot be read"),
    "a text": (task("s3://{images}/images/digits/notes.txt"), "not an image"),
    "an empty file": (task("s3://{images}/images/digits/empty.png"), "empty"),
    "another bucket": (task("s3://other/images/digits/a.png"), "lies outside"),
    "the artifacts": (task("s3://{artifacts}/champions/digits.json"), "lies outside"),
    "another model's image": (task("s3://{images}/images/faces/a.png"), "lies outside"),
    "a path upwards": (task("s3://{images}/images/digits/../faces/a.png"), "lies outside"),
    "what is no path upwards to S3": (task("s3://{images}/images/digits/%2e%2e/faces/a.png"), "does not exist"),
    "a prefix that looks alike": (task("s3://{images}/images/digits2/a.png"), "lies outside"),
    "an empty part": (task("s3://{images}/images/digits//a.png"), "lies outside"),
    "no key": (task("s3://{images}"), "no s3://"),
    "another host": (task("http://127.0.0.1:9/data/upload/1/a.png"), "neither"),
    "the internet": (task("https://example.com/a.png"), "neither"),
    "instance credentials": (task("http://169.254.169.254/latest/meta-data"), "neither"),
    "another host without a scheme": (task("//127.0.0.1:9/data/upload/1/a.png"), "neither"),
    "a host in disguise": (task("http://{host}@127.0.0.1:9/data/upload/1/a.png"), "neither"),
    "another page of Label Studio": (task("/api/users"), "neither"),
    "upwards in Label Studio": (task("/data/upload/../../api/users"), "neither"),
    "hidden upwards in Label Studio": (task("/data/upload/%2e%2e/%2E%2E/api/users"), "neither"),
    "a file of the machine": (task("file:///etc/passwd"), "neither"),
    "no address": (task("just text"), "neither"),
    "a broken address": (task("http://[not-an-address"), "no address"),
    "a broken s3 address": (task("s3://[x/images/digits/a.png"), "lies outside"),
    "a data address": (task("data:image/png;base64,AAAA"), "neither"),
    "an upload that is gone": (task("/data/upload/1/gone.png"), "404"),
    "upwards in a local file": (task("/data/local-files/?d=../../etc/passwd"), "neither"),
    "hidden upwards in a local file": (task("/data/local-files/?d=a%2f..%2f..%2fetc"), "neither"),
    "backslashes upwards": (task("/data/upload/..\\..\\api/users"), "neither"),
    "upwards, encoded twice": (task("/data/upload/%252e%252e/%252e%252e/api/users"), "neither"),
    "slashes encoded": (task("/data/upload/..%2f..%2fapi/users"), "neither"),
    "a user at another host": (task("http://{host}:pw@127.0.0.1:9/data/upload/1/a.png"), "neither"),
    "a user at Label Studio": (task("http://user@{host}/data/upload/1/a.png"), "neither"),
    "another port": (task("http://127.0.0.1:1/data/upload/1/a.png"), "neither"),
    "no port": (task("http://127.0.0.1/data/upload/1/a.png"), "neither"),
    "a port that is none": (task("http://127.0.0.1:99999999/data/upload/1/a.png"), "neither"),
    "Label Studio's name as a beginning": (task("http://{host}.example.com/data/upload/1/a.png"), "neither"),
    "Label Studio behind a backslash": (task("http://evil.example\\@{host}/data/upload/1/a.png"), "neither|no address"),
    "the loopback by another name": (task("http://localhost:9/data/upload/1/a.png"), "neither"),
    "the loopback of IPv6": (task("http://[::1]/data/upload/1/a.png"), "neither"),
    "the loopback in IPv6": (task("http://[::ffff:127.0.0.1]:9/data/upload/1/a.png"), "neither"),
    "the loopback as a number": (task("http://2130706433/data/upload/1/a.png"), "neither"),
    "a private address": (task("http://10.0.0.1/data/upload/1/a.png"), "neither"),
    "instance credentials in IPv6": (task("http://[fd00:ec2::254]/data/upload/1/a.png"), "neither"),
    "a scheme in capitals": (task("FILE:///etc/passwd"), "neither"),
    "a scheme without a host": (task("http:/data/upload/1/a.png"), "neither"),
    "many slashes": (task("////127.0.0.1:9/data/upload/1/a.png"), "neither"),
    "a slash and a backslash": (task("/\\127.0.0.1:9/data/upload/1/a.png"), "neither"),
    "ftp at Label Studio's host": (task("ftp://{host}/data/upload/1/a.png"), "neither"),
    "s3 in capitals": (task("S3://{images}/images/digits/a.png"), "neither"),
    "a user at the bucket": (task("s3://x@{images}/images/digits/a.png"), "lies outside"),
    "a path upwards to another bucket": (task("s3://{images}/images/digits/../../../other/a.png"), "lies outside"),
    "a step on the spot": (task("s3://{images}/images/digits/./a.png"), "lies outside"),
    "the folder of all models": (task("s3://{images}/images/a.png"), "lies outside"),
    "a key with a line break": (task("s3://{images}/images/digits/a\nb.png"), "lies outside"),
    "a key with a nought": (task("s3://{images}/images/digits/a\0.png"), "lies outside"),
    "a key longer than any": (task("s3://{images}/images/digits/" + "a" * 2_000), "does not exist"),
}


@pytest.mark.parametrize(("odd", "message"), ODD_TASKS.values(), ids=ODD_TASKS.keys())
def test_an_odd_task_gets_its_own_error_and_spoils_no_other(backend: Backend, odd: Any, message: str) -> None:
    good = [backend.put_image(f"{digit}.png", png(digit)) for digit in (1, 2)]
    backend.put_image("broken.png", png(5)[:45])
    backend.put_image("notes.txt", b"no image")
    backend.put_image("empty.png", b"")
    for key in ("images/faces/a.png", "images/digits2/a.png"):
        backend.images.put(key, png(9))
    text = json.dumps(odd).replace("{images}", backend.images.name).replace("{artifacts}", backend.artifacts.name)
    odd = json.loads(text.replace("{host}", backend.label_studio.url.removeprefix("http://")))
    status, answer = backend.predict(task(good[0], 1), odd, task(good[1], 2))
    assert status == 200
    assert choices(answer) == ["1", None, "2"]
    assert answer["results"][1].keys() == {"error"}
    assert re.search(message, answer["results"][1]["error"])


def test_only_odd_tasks_are_a_valid_answer_as_well(backend: Backend) -> None:
    status, answer = backend.predict({}, task(None), task("s3://other/x"))
    assert status == 200
    assert len(answer["results"]) == 3
    assert all(result and "result" not in result for result in answer["results"])


# Any JSON value whose objects look a little like tasks.
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(st.sampled_from(["id", "data", "image", "tasks", "params"]) | st.text(), children, max_size=3)
    ),
    max_leaves=6,
)
images = st.text() | st.sampled_from(["s3://", "http://", "//", "/data/upload/", "/data/local-files/?d=", "data:"]).flatmap(
    lambda start: st.text().map(lambda rest: start + rest)
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(json_values | images.map(task), max_size=4), json_values)
def test_whatever_comes_the_answer_is_valid(backend: Backend, tasks: list[Any], params: Any) -> None:
    status, answer = backend.predict(*tasks, params=params)
    if all(isinstance(one, dict) for one in tasks):
        assert status == 200
        assert len(answer["results"]) == len(tasks)
        assert all(isinstance(result, dict) and "result" not in result for result in answer["results"])
    else:
        assert (status, answer.keys()) == (400, {"error"})


# Images that Label Studio itself holds


def test_an_upload_is_fetched_with_the_servers_token(backend: Backend) -> None:
    backend.label_studio.answer = lambda request: Answer(body=png(6)) if request.path.startswith("/data/") else Answer(404)
    addresses = [
        "/data/upload/1/a.png",
        f"{backend.label_studio.url}/data/upload/1/b%20c.png",
        "/data/local-files/?d=photos/a.png",
    ]
    status, answer = backend.predict(*map(task, addresses))
    assert status == 200
    assert choices(answer) == ["6"] * 3
    assert sorted(backend.label_studio.paths) == [
        "GET /data/local-files/?d=photos/a.png",
        "GET /data/upload/1/a.png",
        "GET /data/upload/1/b%20c.png",
    ]
    assert {request.headers["authorization"] for request in backend.label_studio.requests} == {"Token 0123456789abcdef"}


def test_addresses_that_are_refused_are_asked_of_nobody(backend: Backend) -> None:
    host = backend.label_studio.url.removeprefix("http://")
    refused = [odd for odd, message in ODD_TASKS.values() if message.startswith("neither")]
    _, answer = backend.predict(*json.loads(json.dumps(refused).replace("{host}", host)))
    assert len(answer["results"]) == len(refused) > 30
    assert backend.label_studio.requests == []


def test_a_redirect_is_not_followed_and_takes_the_token_nowhere(backend: Backend) -> None:
    with serving(lambda _: Answer(body=png(6))) as elsewhere:
        for status in (301, 302, 303, 307, 308):
            for place in (elsewhere.url, elsewhere.url.removeprefix("http:"), backend.label_studio.url):
                moved = Answer(status, headers={"Location": f"{place}/data/upload/1/b.png"})
                backend.label_studio.answer = partial(lambda moved, _: moved, moved)
                _, answer = backend.predict(task("/data/upload/1/a.png"))
                assert str(status) in answer["results"][0]["error"]
        assert elsewhere.requests == []
    assert set(backend.label_studio.paths) == {"GET /data/upload/1/a.png"}


def test_an_address_cannot_make_the_token_travel_unencrypted(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Label Studio is asked at its configured address, here one of https that nobody answers, whatever the task says."""
    host = backend.label_studio.url.removeprefix("http://")
    monkeypatch.setenv("LABELLOOP_LABEL_STUDIO_URL", f"https://{host}")
    _, answer = backend.predict(task(f"http://{host}/data/upload/1/a.png"))
    assert answer["results"][0].keys() == {"error"}
    assert "authorization" not in json.dumps([request.headers for request in backend.label_studio.requests])
    assert backend.label_studio.requests == []


def test_a_control_character_in_an_address_changes_no_request(backend: Backend) -> None:
    backend.label_studio.answer = lambda _: Answer(body=png(6))
    backend.predict(*map(task, ["/data/upload/1/a\r\nX-Evil: 1.png", "/data/upload/1/a%0d%0aX-Evil: 1", "/data/upload/\0/a.png"]))
    assert len(backend.label_studio.requests) == 3
    for request in backend.label_studio.requests:
        assert "x-evil" not in request.headers
        assert request.path.startswith("/data/upload/")


def test_an_upload_that_is_too_large_is_not_read_to_its_end(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("labelloop.imaging.MAX_BYTES", 3_000_000)
    backend.label_studio.answer = lambda _: Answer(body=bytes(4_000_000))
    large = backend.put_image("large.png", bytes(4_000_000))
    _, answer = backend.predict(task("/data/upload/1/a.png"), task(large), task(backend.put_image("a.png", png(3))))
    assert choices(answer) == [None, None, "3"]
    assert all("bytes" in result["error"] for result in answer["results"][:2])


def test_large_images_wait_for_room_and_all_are_predicted(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("labelloop.predict._USUAL_BYTES", 10)
    monkeypatch.setattr("labelloop.predict._ROOM", 1_000)
    monkeypatch.setattr("labelloop.imaging.MAX_BYTES", 1_000)
    addresses = [backend.put_image(f"{digit}.png", png(digit)) for digit in range(10)]
    _, answer = backend.predict(*map(task, addresses * 5))
    assert choices(answer) == [str(digit) for digit in range(10)] * 5


def test_large_uploads_are_read_whole_one_after_the_other(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each file so much is read at first that all threads may hold it at once; what is larger waits for room."""
    monkeypatch.setattr("labelloop.predict._USUAL_BYTES", 10)
    monkeypatch.setattr("labelloop.predict._ROOM", 100)
    asked: Counter[str] = Counter()
    whole = Lock()
    met: list[str] = []

    def answer(request: Request) -> Answer:
        asked[request.path] += 1
        if asked[request.path] == 2:
            if not whole.acquire(blocking=False):
                met.append(request.path)
                return Answer(body=png(6))
            Event().wait(0.05)  # for another to come
            whole.release()
        return Answer(body=png(6))

    backend.label_studio.answer = answer
    _, answered = backend.predict(*(task(f"/data/upload/1/{number}.png") for number in range(6)))
    assert choices(answered) == ["6"] * 6
    assert met == []


def test_a_label_studio_that_fails_spoils_only_its_own_images(backend: Backend) -> None:
    backend.label_studio.answer = lambda _: Answer(500)
    _, answer = backend.predict(task("/data/upload/1/a.png"), task(backend.put_image("a.png", png(3))))
    assert choices(answer) == [None, "3"]
    assert "cannot be fetched" in answer["results"][0]["error"]


# Versions, promotions


def test_before_the_first_model_nothing_is_predicted_and_nothing_is_null(empty_backend: Backend) -> None:
    assert empty_backend.setup() == (200, {"model_version": "digits v0"})
    status, answer = empty_backend.ask("GET", "versions")
    assert (status, answer["versions"]) == (200, ["digits v0"])
    address = empty_backend.put_image("a.png", png(1))
    status, answer = empty_backend.predict(task(address), task(address))
    assert status == 200
    assert answer["model_version"] == "digits v0"
    assert len(answer["results"]) == 2
    assert all(isinstance(result, dict) and "result" not in result and "score" not in result for result in answer["results"])
    assert empty_backend.predict() == (200, {"results": [], "model_version": "digits v0"})


def frozen(clock: list[float]) -> Any:
    """The time of a sandbox that Lambda freezes between requests: its monotonic clock may stand still."""
    return SimpleNamespace(time=lambda: clock[0], monotonic=lambda: 5_000.0)


def test_a_promotion_and_a_rollback_are_served_within_seconds(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [5_000.0]
    monkeypatch.setattr("labelloop.predict.time", frozen(clock))
    address = backend.put_image("a.png", png(3))

    def serving() -> str:
        version = str(backend.setup()[1]["model_version"])
        _, answer = backend.predict(task(address))
        assert answer["model_version"] == answer["results"][0]["model_version"] == version
        return version

    assert serving() == "digits v1"
    backend.promote(2, brightness_model(sharpness=0.02))
    clock[0] += POINTER_SECONDS - 0.1
    assert serving() == "digits v1", "the pointer is not read at every request"
    clock[0] += 0.2
    assert serving() == "digits v2"
    backend.promote(1, brightness_model())
    clock[0] += POINTER_SECONDS
    assert serving() == "digits v1"
    assert POINTER_SECONDS <= 5


def test_a_class_that_the_config_no_longer_has_is_not_shown(backend: Backend) -> None:
    """Label Studio's editor shows nothing of it, and would submit it. Nor is the version sure, or auto-accept would take it."""
    backend.promote(2, brightness_model(classes=[*"012", "three", *"456789"]))
    _, answer = backend.predict(*(task(backend.put_image(f"{digit}.png", png(digit))) for digit in (3, 4)))
    gone, known = answer["results"]
    assert (gone["result"], known["result"][0]["value"]) == ([], {"choices": ["4"]})
    assert gone["score"] == 0 < known["score"]


def test_the_first_model_is_served_without_a_restart(empty_backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [5_000.0]
    monkeypatch.setattr("labelloop.predict.time", frozen(clock))
    assert empty_backend.setup()[1] == {"model_version": "digits v0"}
    empty_backend.promote(1, brightness_model())
    clock[0] += POINTER_SECONDS
    assert empty_backend.setup()[1] == {"model_version": "digits v1"}
    assert choices(empty_backend.predict(task(empty_backend.put_image("a.png", png(3))))[1]) == ["3"]


@pytest.mark.parametrize(
    ("onnx", "message"),
    [
        (b"this is no model", "cannot be loaded"),
        (brightness_model("faces"), "is a model of faces"),
        (brightness_model(card=False), "metadata"),
    ],
)
def test_a_champion_that_cannot_serve_is_an_error_and_no_traceback(backend: Backend, onnx: bytes, message: str) -> None:
    backend.promote(2, onnx)
    status, answer = backend.predict(task(backend.put_image("a.png", png(3))))
    assert status == 500
    assert message in answer["error"]
    assert backend.setup() == (200, {"model_version": "digits v2"})


def test_a_champion_whose_file_was_changed_is_not_served(backend: Backend) -> None:
    backend.artifacts.put(artifacts.onnx_key("digits", 1), brightness_model(sharpness=0.5))
    status, answer = backend.predict(task(backend.put_image("a.png", png(3))))
    assert status == 500
    assert "SHA-256 differs" in answer["error"]


def test_a_model_that_computes_no_number_gives_no_score(backend: Backend) -> None:
    """Label Studio cannot open a task whose score is no number."""
    backend.promote(2, brightness_model(sharpness=float("nan")))
    status, answer = backend.predict(task(backend.put_image("a.png", png(3))))
    assert status == 200
    assert answer["results"] == [{"error": "the model's output is not finite"}]


# Addresses


@pytest.mark.parametrize(("method", "route"), [("POST", "setup"), ("POST", "predict"), ("GET", "versions")])
@pytest.mark.parametrize("model", ["digit", "..", "", "a" * 500])
def test_an_unknown_model_is_404(backend: Backend, method: str, route: str, model: str) -> None:
    status, answer = backend.ask(method, route, "{}", model=model)
    assert status == 404
    assert answer.keys() == {"error"}
    assert str(examples.REPOSITORY) not in answer["error"]


def test_an_unknown_route_is_404(backend: Backend) -> None:
    assert backend.ask("POST", "train", "{}")[0] == 404


def test_storage_that_is_down_is_503(empty_backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    status, answer = empty_backend.setup()
    assert status == 503
    assert "cannot read" in answer["error"]


def test_a_fault_of_ours_is_a_500_that_names_its_request(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(backend.handler, "predictor", broken)
    status, answer = backend.setup()
    assert status == 500
    assert answer["request_id"] == examples.LambdaContext().aws_request_id
    assert "secret detail" not in answer["error"]


def test_images_that_there_is_no_time_for_are_not_begun_but_queued(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """API Gateway gives up after 29 seconds, of which a cold start may have taken most; the whole answer would be lost."""
    address = backend.put_image("a.png", png(3))
    monkeypatch.setattr(examples.LambdaContext, "get_remaining_time_in_millis", lambda _: 6_000)
    status, answer = backend.predict(task(address, 1), task(address, 2))
    assert status == 200
    assert all(result["error"].startswith("queued") for result in answer["results"])
    assert backend.queued() == [1, 2]


# More tasks than one invocation predicts


def test_parts_of_a_large_request_are_predicted_by_their_own_function_and_answered_as_one(backend: Backend) -> None:
    addresses = [backend.put_image(f"{digit}.png", png(digit)) for digit in range(10)]
    missing = task(addresses[0].replace("0.png", "missing.png"), 2 * PART)
    status, answer = backend.predict(*(task(addresses[number % 10], number) for number in range(2 * PART)), missing)
    assert status == 200
    assert choices(answer) == [*(str(number % 10) for number in range(2 * PART)), None]
    assert "does not exist" in answer["results"][-1]["error"]
    assert {result["model_version"] for result in answer["results"][:-1]} == {"digits v1"}
    assert sorted(len(part["tasks"]) for part in backend.parts.events) == [33, 34, 34]
    assert backend.queued() == []


def test_a_part_that_dies_is_queued_for_afterwards(backend: Backend) -> None:
    backend.parts.broken = True
    address = backend.put_image("a.png", png(3))
    status, answer = backend.predict(*(task(address, number) for number in range(1, PART + 2)))
    assert status == 200
    assert len(answer["results"]) == PART + 1
    assert all(result["error"].startswith("queued") for result in answer["results"])
    assert backend.queued() == list(range(1, PART + 2))


def test_an_upload_that_could_not_be_fetched_is_queued_and_one_that_is_gone_is_not(backend: Backend) -> None:
    backend.label_studio.answer = lambda request: Answer(500 if "away" in request.path else 404)
    address = backend.put_image("a.png", png(3))
    uploads = [task("/data/upload/1/away.png", 1), task("/data/upload/1/gone.png", 2)]
    _, answer = backend.predict(*uploads, *(task(address, number) for number in range(3, PART + 2)))
    assert choices(answer) == [None, None, *["3"] * (PART - 1)]
    assert "404" in answer["results"][1]["error"]
    assert backend.queued() == [1]


def test_a_queue_that_is_gone_makes_a_clear_503(backend: Backend) -> None:
    backend.parts.broken = True
    boto3.client("sqs").delete_queue(QueueUrl=backend.parts.queue)
    status, answer = backend.predict(*(task("s3://b/k", number) for number in range(PART + 1)))
    assert status == 503
    assert "queue" in answer["error"]


def test_a_part_that_no_model_can_predict_is_an_error_of_its_invocation(backend: Backend) -> None:
    """Lambda then counts it, and who sent it queues its tasks."""
    event = {"champion": msgspec.to_builtins(examples.champion(9, b"no such file")), "tasks": [task("s3://b/k")], "until": 2e10}
    with pytest.raises(ModelError, match="is missing"):
        examples.load_handler("predict_part").handler(event, examples.LambdaContext())


def test_a_small_request_imports_no_boto3(backend: Backend) -> None:
    """Seen from a fresh process, as a cold Lambda is one."""
    body = json.dumps({"tasks": [task(backend.put_image("a.png", png(4)))]})
    assert fresh([examples.api_event("POST", "digits", "predict", body)]) == [[200], ["numpy", "onnxruntime"]]
