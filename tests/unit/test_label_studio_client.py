"""Label Studio's client, against a server that writes down what it is asked."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from labelloop.errors import LabelStudioError, NotSetUpError, TooLargeError
from labelloop.label_studio.client import KnownTask, LabelStudioClient, StoredPrediction, Tally, Webhook
from labelloop.label_studio.payloads import Prediction
from tests.recording_server import Answer, RecordingServer, Request, serving

PERSONAL = "eyJh.eyJi.c2ln"  # three parts: a JWT

BACKEND_ACCESS = {"project": 4, "url": "http://api/digits", "auth_method": "BASIC_AUTH", "basic_auth_user": "digits"}
BACKEND = {"id": 9, "title": "digits v1", "state": "CO", **BACKEND_ACCESS}


@pytest.fixture
def server() -> Iterator[RecordingServer]:
    with serving() as running:
        yield running


@pytest.fixture
def client(server: RecordingServer) -> LabelStudioClient:
    return LabelStudioClient(server.url + "/", "0123456789abcdef")


def query(request: Request) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(urlsplit(request.path).query).items()}


def view(request: Request) -> Any:
    """The view that a request asks for, as Label Studio reads it: with the percent signs decoded once more."""
    return json.loads(unquote(query(request)["query"]))


def test_a_legacy_token_is_sent_as_it_is(server: RecordingServer, client: LabelStudioClient) -> None:
    server.answer = lambda _: Answer(body={"id": 1, "tasks": [], "total": 42, "total_annotations": 43, "task_number": 60})
    assert client.tally(1).tasks == 42
    assert client.counts(1) == {"tasks": 60, "annotated": 42}
    assert {request.headers["authorization"] for request in server.requests} == {"Token 0123456789abcdef"}
    assert [request.path.partition("?")[0] for request in server.requests] == ["/api/tasks", "/api/projects/1", "/api/tasks"]


def test_open_tasks_with_a_versions_prediction_are_counted(server: RecordingServer, client: LabelStudioClient) -> None:
    server.answer = lambda _: Answer(body={"tasks": [], "total": 17, "total_annotations": 0})
    assert client.count_predicted(1, "digits v2") == 17
    (request,) = server.requests
    assert query(request)["page_size"] == "1"
    assert [(its["filter"], its["operator"], its["value"]) for its in view(request)["filters"]["items"]] == [
        ("filter:tasks:predictions_model_versions", "contains", ["digits v2"]),
        ("filter:tasks:total_annotations", "equal", 0),
    ]


def test_a_personal_token_is_exchanged_and_its_access_token_reused_until_it_is_old(
    server: RecordingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(request: Request) -> Answer:
        if request.path == "/api/token/refresh/":
            assert request.json == {"refresh": PERSONAL}
            return Answer(body={"access": f"access-{len(refreshes())}"})
        return Answer(body={"tasks": [], "total": 1, "total_annotations": 1})

    def refreshes() -> list[Request]:
        return [request for request in server.requests if request.path == "/api/token/refresh/"]

    server.answer = answer
    clock = [1_000.0]
    monkeypatch.setattr("labelloop.label_studio.client.time", SimpleNamespace(time=lambda: clock[0], monotonic=lambda: 0.0))
    client = LabelStudioClient(server.url, PERSONAL)
    for seconds, token in ((0, "access-1"), (200, "access-1"), (100, "access-2")):
        clock[0] += seconds
        client.tally(1)
        assert server.requests[-1].headers["authorization"] == f"Bearer {token}"
    assert len(refreshes()) == 2


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Answer(401, {"detail": "Token is invalid"}), r"refused the personal access token \(401\)"),
        (Answer(200, {}), "gave no access token"),
        (Answer(200, []), "gave no access token"),
        (Answer(200, b"<html>"), "gave no access token"),
        (Answer(307, b"", {"Location": "/elsewhere"}), r"refused the personal access token \(307\)"),
    ],
)
def test_a_personal_token_that_is_refused_is_an_error(server: RecordingServer, answer: Answer, message: str) -> None:
    server.answer = lambda _: answer
    with pytest.raises(LabelStudioError, match=message):
        LabelStudioClient(server.url, PERSONAL).tally(1)
    assert server.paths == ["POST /api/token/refresh/"]


CALLS: dict[str, Callable[[LabelStudioClient], Any]] = {
    "counts": lambda client: client.counts(1),
    "count_predicted": lambda client: client.count_predicted(1, "digits v2"),
    "tally": lambda client: client.tally(1),
    "annotated_tasks": lambda client: list(client.annotated_tasks(1)),
    "annotations_of": lambda client: client.annotations_of(1, [1]),
    "count_anew": lambda client: client.count_anew(7),
    "annotate_once": lambda client: client.annotate_once(1, [], "unique"),
    "predicted_by": lambda client: client.predicted_by(1, "digits review"),
    "find_images": lambda client: client.find_images(1, ["s3://b/k"], "image"),
    "unlabelled_ids": lambda client: client.unlabelled_ids(1, 0),
    "unlabelled_tasks": lambda client: client.unlabelled_tasks(1, 0, 9),
    "tasks_with_ids": lambda client: client.tasks_with_ids(1, [1]),
    "add_prediction": lambda client: client.add_prediction(1, 2, Prediction([], 0.5, "digits v1"), None),
    "prediction": lambda client: client.prediction(1),
    "tabs": lambda client: client.tabs(1),
    "tasks_after": lambda client: client.tasks_after(1, 0, "image"),
    "tasks": lambda client: list(client.tasks(1, "image")),
    "signed_in_as": lambda client: client.signed_in_as(),
    "annotate": lambda client: client.annotate(1, [], seconds=1.0),
    "import_tasks": lambda client: client.import_tasks(1, [{"data": {}}]),
    "backends": lambda client: client.backends(1),
    "rename_backend": lambda client: client.rename_backend(BACKEND, "t", "p"),
    "download": lambda client: client.download("/data/upload/1/a.png", limit=100),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_no_redirect_takes_the_token_elsewhere(
    server: RecordingServer, client: LabelStudioClient, call: Callable[[LabelStudioClient], Any], status: int
) -> None:
    with serving() as elsewhere:
        server.answer = lambda _: Answer(status, b"", {"Location": elsewhere.url + "/api"})
        with pytest.raises(LabelStudioError) as caught:
            call(client)
        assert caught.value.status == status
        assert elsewhere.requests == []
        assert len(server.requests) == 1


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize(("status", "body"), [(500, b"Traceback"), (401, b"{}"), (404, b"{}")])
def test_a_refusal_is_an_error_with_its_status(
    server: RecordingServer, client: LabelStudioClient, call: Callable[[LabelStudioClient], Any], status: int, body: bytes
) -> None:
    server.answer = lambda _: Answer(status, body)
    gone = NotSetUpError if status == 404 else LabelStudioError  # of what asks about a project
    with pytest.raises((LabelStudioError, gone), match=str(status)) as caught:
        call(client)
    assert not isinstance(caught.value, LabelStudioError) or caught.value.status == status
    assert len(server.requests) == 1, "nothing is repeated that would be refused again"


@pytest.mark.parametrize(
    "ask",
    [
        lambda client: client.counts(7),
        lambda client: client.model_version(7),
        lambda client: client.tally(7),
        lambda client: next(client.tasks(7, "image")),
    ],
    ids=["counts", "model_version", "tally", "tasks"],
)
def test_a_project_that_was_deleted_is_an_error_that_says_what_to_do(
    server: RecordingServer, client: LabelStudioClient, ask: Callable[[LabelStudioClient], object]
) -> None:
    server.answer = lambda _: Answer(404, {"detail": "No Project matches the given query."})
    with pytest.raises(NotSetUpError, match=r"no project 7 any more.*; labelloop setup-label-studio-project"):
        ask(client)


@pytest.mark.parametrize("call", [call for name, call in CALLS.items() if name != "download"])
def test_an_answer_that_is_no_json_is_an_error(
    server: RecordingServer, client: LabelStudioClient, call: Callable[[LabelStudioClient], Any]
) -> None:
    for body in (b"<html>", b'{"a": "\xff"}'):
        server.answer = lambda _, body=body: Answer(body=body)  # type: ignore[misc]
        with pytest.raises(LabelStudioError):
            call(client)


@pytest.mark.parametrize("token", ["0123456789abcdef", PERSONAL])
def test_a_server_that_is_not_there_is_an_error(token: str) -> None:
    with serving() as gone:
        url = gone.url
    with pytest.raises(LabelStudioError, match="does not answer"):
        LabelStudioClient(url, token).tally(1)


def test_a_reading_request_is_repeated_when_the_server_is_overloaded(server: RecordingServer, client: LabelStudioClient) -> None:
    server.answer = lambda _: (
        Answer(503) if len(server.requests) < 2 else Answer(body={"tasks": [], "total": 5, "total_annotations": 5})
    )
    assert client.tally(1).tasks == 5


def test_a_server_that_asks_for_an_hour_s_patience_is_asked_again_soon(
    server: RecordingServer, client: LabelStudioClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No function runs that long; what it works on is in a queue, which waits better."""
    waited: list[float] = []
    monkeypatch.setattr("urllib3.util.retry.time", SimpleNamespace(sleep=waited.append))
    server.answer = lambda _: Answer(503, headers={"Retry-After": "3600"})
    with pytest.raises(LabelStudioError, match="503"):
        client.tally(1)
    assert len(server.requests) == 3
    assert 0 < sum(waited) < 10


def test_an_import_is_never_repeated_by_itself(server: RecordingServer, client: LabelStudioClient) -> None:
    """Label Studio may have made the tasks before it failed; only `ingest` knows how to find out."""
    server.answer = lambda _: Answer(503)
    with pytest.raises(LabelStudioError):
        client.import_tasks(1, [{"data": {"image": "s3://b/k"}}])
    assert len(server.requests) == 1


def exported(number: int) -> dict[str, Any]:
    annotation = {"id": 1, "unique_id": "u", "result": [], "was_cancelled": False, "updated_at": "2026-01-01T00:00:00Z", "new": 1}
    meta = {"sha256": "a" * 64}
    return {"id": number, "data": {"image": "s3://b/k"}, "meta": meta, "annotations": [annotation], "predictions": []}


def test_annotated_tasks_are_listed_by_id_and_exported_by_the_page(
    server: RecordingServer, client: LabelStudioClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("labelloop.label_studio.client._PAGE", 2)

    def answer(request: Request) -> Answer:
        asked = parse_qs(urlsplit(request.path).query)
        if "/export" in request.path:
            return Answer(body=[exported(int(number)) for number in reversed(asked["ids[]"]) if number != "9"])
        (after,) = [item["value"] for item in view(request)["filters"]["items"] if item["filter"] == "filter:tasks:id"]
        listed = [{"id": number} for number in (5, 7, 8, 9) if number > after][: int(asked["page_size"][0])]
        return Answer(body={"tasks": listed, "total": 4, "total_annotations": 4})

    server.answer = answer
    since = datetime(2026, 1, 1, 13, 0, 0, 5, tzinfo=timezone(timedelta(hours=1)))
    pages = list(client.annotated_tasks(3, since=since, after=4))
    assert [[task.id for task in page] for page in pages] == [[5, 7], [8]], "9 has lost its annotations in between"
    assert (pages[0][0].content[0], pages[0][0].annotations[0].unique_id) == ("a" * 64, "u")
    filters = [item for request in server.requests if "/export" not in request.path for item in view(request)["filters"]["items"]]
    times = [item["value"] for item in filters if item["filter"] == "filter:tasks:updated_at"]
    assert times == ["2026-01-01T12:00:00.000005Z"] * 3, "the only form that Label Studio takes"
    list(client.annotated_tasks(3))
    assert "updated_at" not in server.requests[-1].path
    monkeypatch.setattr("labelloop.label_studio.client._TASKS", 1)
    assert [[task.id for task in page] for page in client.annotated_tasks(3)] == [[5], [7], [8]], "a page is one export's answer"


def test_the_tally_counts_ground_truth_too(server: RecordingServer, client: LabelStudioClient) -> None:
    newest = {"id": 8, "updated_at": "2026-01-01T00:00:00Z"}
    server.answer = lambda _: Answer(body={"tasks": [newest], "total": 4, "total_annotations": 6, "total_predictions": 9})
    assert client.tally(3) == Tally(4, 6, "2026-01-01T00:00:00Z")
    (request,) = server.requests
    assert (query(request)["page_size"], view(request)["ordering"]) == ("1", ["-tasks:updated_at"])
    assert [item["filter"] for item in view(request)["filters"]["items"]] == ["filter:tasks:total_annotations"]
    server.answer = lambda _: Answer(body={"tasks": [], "total": 0, "total_annotations": 0})
    assert client.tally(3) == Tally(0, 0, None)


def test_images_are_looked_up_in_requests_that_a_web_server_takes(server: RecordingServer, client: LabelStudioClient) -> None:
    addresses = [f"s3://labelloop-production-images/images/digits/{'folder%20name/' * 10}{number}.png" for number in range(25)]
    known = {addresses[3], addresses[24]}

    def answer(request: Request) -> Answer:
        asked = [item["value"] for item in view(request)["filters"]["items"]]
        return Answer(body={"tasks": [{"id": 1, "data": {"image": a}} for a in asked if a in known], "total": 0})

    server.answer = answer
    assert client.find_images(1, addresses, "image") == dict.fromkeys(known, 1)
    assert max(len(request.path) for request in server.requests) < 8_000
    assert query(server.requests[0])["resolve_uri"] == "false", "addresses as they were stored, not the browser's"
    filters = view(server.requests[0])["filters"]
    assert filters["conjunction"] == "or"
    assert filters["items"][0] == {
        "filter": "filter:tasks:data.image",
        "operator": "equal",
        "type": "String",
        "value": addresses[0],
    }


def test_all_images_are_listed_by_id_as_they_are_stored(server: RecordingServer, client: LabelStudioClient) -> None:
    counts = {"total_annotations": 0, "cancelled_annotations": 0}
    tasks = [{"id": number, "data": {"image": f"s3://b/{number}"}, **counts} for number in (3, 5, 8, 13, 21)]

    def answer(request: Request) -> Answer:
        asked = query(request)
        assert asked["resolve_uri"] == "false"
        assert view(request)["ordering"] == ["tasks:id"]
        [after] = view(request)["filters"]["items"]
        assert (after["filter"], after["operator"], asked.get("page", "1")) == ("filter:tasks:id", "greater", "1")
        return Answer(body={"tasks": [task for task in tasks if int(str(task["id"])) > after["value"]][:2]})

    server.answer = answer
    found = {task.image: task.id for task in client.tasks(1, "image")}
    assert found == {f"s3://b/{number}": number for number in (3, 5, 8, 13, 21)}
    assert len(server.requests) == 4


def test_tasks_are_listed_by_id_with_what_ingest_noted(server: RecordingServer, client: LabelStudioClient) -> None:
    noted = {"sha256": "a" * 64, "width": 30, "height": 20}
    tasks = [
        {"id": 3, "data": {"image": "s3://b/3"}, "meta": noted, "total_annotations": 1, "cancelled_annotations": 2},
        {"id": 5, "data": {"image": "s3://b/5"}, "meta": None, "total_annotations": 0, "cancelled_annotations": 0},
        {"id": 8, "data": {}, "meta": {}, "total_annotations": 0, "cancelled_annotations": 1},
    ]

    def answer(request: Request) -> Answer:
        asked = query(request)
        assert {"meta", "total_annotations", "cancelled_annotations"} <= set(asked["include"].split(","))
        assert asked["resolve_uri"] == "false"
        [after] = view(request)["filters"]["items"]
        return Answer(body={"tasks": [task for task in tasks if int(str(task["id"])) > after["value"]][:2]})

    server.answer = answer
    assert client.tasks_after(1, 3, "image", limit=2) == [
        KnownTask(5, "s3://b/5", None, (0, 0), 0),
        KnownTask(8, "", None, (0, 0), 1),
    ]
    assert query(server.requests[0])["page_size"] == "2"
    found = list(client.tasks(1, "image"))
    assert [task.id for task in found] == [3, 5, 8]
    assert found[0] == KnownTask(3, "s3://b/3", "a" * 64, (30, 20), 3)


def test_a_browser_is_sent_to_a_presigned_address(server: RecordingServer, client: LabelStudioClient) -> None:
    server.answer = lambda _: Answer(303, b"", {"Location": "http://s3/presigned"})
    assert client.presigned_address("tasks/5", "s3://b/ü.png") == "http://s3/presigned"
    (request,) = server.requests
    assert request.path.startswith("/tasks/5/resolve/?")
    assert base64.urlsafe_b64decode(query(request)["fileuri"]).decode() == "s3://b/ü.png"
    assert request.headers["authorization"].startswith("Token ")


@pytest.mark.parametrize("answer", [Answer(404), Answer(303, b""), Answer(200, b"the image itself")])
def test_an_image_that_no_storage_covers_is_an_error(server: RecordingServer, client: LabelStudioClient, answer: Answer) -> None:
    server.answer = lambda _: answer
    with pytest.raises(LabelStudioError):
        client.presigned_address("projects/1", "s3://elsewhere/a.png")


def test_an_annotation_is_submitted(server: RecordingServer, client: LabelStudioClient) -> None:
    server.answer = lambda _: Answer(201, {"id": 77})
    result = [{"from_name": "digit", "to_name": "image", "type": "choices", "value": {"choices": ["1"]}}]
    assert client.annotate(4, result, seconds=1.5) == 77
    assert server.paths == ["POST /api/tasks/4/annotations"]
    assert server.requests[0].json == {"result": result, "lead_time": 1.5}


def test_no_images_are_no_request(server: RecordingServer, client: LabelStudioClient) -> None:
    assert client.find_images(1, [], "image") == {}
    assert server.requests == []


def test_tasks_are_imported_with_their_ids_in_order(server: RecordingServer, client: LabelStudioClient) -> None:
    server.answer = lambda _: Answer(201, {"task_count": 2, "task_ids": [11, 12]})
    tasks = [{"data": {"image": "s3://b/ü"}}, {"data": {"image": "s3://b/2"}}]
    assert client.import_tasks(4, iter(tasks)) == [11, 12]
    assert server.paths == ["POST /api/projects/4/import?return_task_ids=true"]
    assert server.requests[0].json == tasks
    assert server.requests[0].headers["content-type"] == "application/json"


def test_predictions_that_label_studio_lost_follow_the_tasks(server: RecordingServer, client: LabelStudioClient) -> None:
    """It takes them from the request before it tries to write, and so has none when it tries again."""
    server.answer = lambda _: Answer(201, {"task_ids": [11, 12], "prediction_count": 0})
    predictions = [{"model_version": "digits v0", "score": score, "result": []} for score in (0.1, 0.2)]
    client.import_tasks(4, [{"data": {}, "predictions": [prediction]} for prediction in predictions])
    assert server.paths[1:] == ["POST /api/projects/4/import/predictions"]
    assert server.requests[-1].json == [
        {"task": task, **prediction} for task, prediction in zip((11, 12), predictions, strict=True)
    ]


def test_a_backend_is_renamed_with_what_label_studio_demands(server: RecordingServer, client: LabelStudioClient) -> None:
    client.rename_backend(BACKEND, "digits v2", "the password")
    assert server.paths == ["PATCH /api/ml/9"]
    assert server.requests[0].json == {**BACKEND_ACCESS, "basic_auth_pass": "the password", "title": "digits v2"}


def test_a_file_is_downloaded_up_to_its_limit(server: RecordingServer, client: LabelStudioClient) -> None:
    server.answer = lambda _: Answer(body=b"x" * 100)
    assert client.download("/data/upload/1/a.png", limit=100) == b"x" * 100
    with pytest.raises(TooLargeError, match="more than 50 bytes") as too_large:
        client.download("/data/upload/1/a.png", limit=50)
    assert too_large.value.size == 100
    server.answer = lambda _: Answer(201, body={"id": 7})
    assert client.annotate(1, [], seconds=1) == 7, (
        "a POST, which is not sent twice, gets no connection with the file's rest in it"
    )
    assert len(server.requests) == 3


def test_a_download_that_breaks_off_is_an_error(server: RecordingServer, client: LabelStudioClient) -> None:
    server.answer = lambda _: Answer(body=b"x" * 10, headers={"Content-Length": "1000"})
    with pytest.raises(LabelStudioError, match="broke off"):
        client.download("/data/upload/1/a.png", limit=2_000)


def test_what_is_missing_of_a_project_is_not_taken_for_the_project(server: RecordingServer, client: LabelStudioClient) -> None:
    server.answer = lambda _: Answer(404, {"detail": "no such prediction"})
    with pytest.raises(LabelStudioError, match="no such prediction"):
        client.prediction(5)


def test_saving_an_annotation_as_it_is_has_its_task_counted(server: RecordingServer, client: LabelStudioClient) -> None:
    server.answer = lambda _: Answer(body={"id": 7})
    client.count_anew(7)
    (request,) = server.requests
    assert (request.method, request.path, request.body) == ("PATCH", "/api/annotations/7/", b"{}")


def test_annotations_of_many_tasks_are_asked_for_in_addresses_of_bearable_length(
    server: RecordingServer, client: LabelStudioClient
) -> None:
    def answer(request: Request) -> Answer:
        ids = [int(value) for value in parse_qs(urlsplit(request.path).query)["ids[]"]]
        return Answer(body=[{"id": number, "data": {}, "annotations": []} for number in ids if number % 2])

    server.answer = answer
    found = client.annotations_of(1, range(1, 502))
    assert [task.id for task in found] == list(range(1, 502, 2))
    assert len(server.requests) > 1
    assert max(len(request.path) for request in server.requests) < 8_000
    server.requests.clear()
    assert client.annotations_of(1, []) == []
    assert server.requests == [], "without tasks Label Studio would export all"


def test_an_annotation_that_is_there_already_is_not_made(server: RecordingServer, client: LabelStudioClient) -> None:
    server.answer = lambda _: Answer(201, {"id": 1})
    assert client.annotate_once(7, [], "unique")
    assert server.requests[-1].json["unique_id"] == "unique"
    server.answer = lambda _: Answer(409, {"detail": "Annotation with this unique id already exists"})
    assert not client.annotate_once(7, [], "unique")


STORED = {"id": 5, "task": 7, "model_version": "digits v1", "score": 0.4, "cluster": 2, "created_at": "c", "updated_at": "u"}


def test_unlabelled_tasks_come_with_their_predictions_the_oldest_first(
    server: RecordingServer, client: LabelStudioClient
) -> None:
    predictions = [{**STORED, "id": 6, "cluster": None, "model_version": None}, STORED]
    task = {"id": 7, "data": {"image": "s3://b/k"}, "meta": {"group": "g"}, "predictions": predictions}
    server.answer = lambda _: Answer(body={"tasks": [task]})
    (found,) = client.unlabelled_tasks(4, 3, 9)
    assert (found.task.id, found.task.data, found.task.group) == (7, {"image": "s3://b/k"}, "g")
    assert [(stored.id, stored.made_by, stored.cluster) for stored in found.predictions] == [(5, "digits v1", 2), (6, "", None)]
    items = {(item["filter"], item["operator"]): item["value"] for item in view(server.requests[0])["filters"]["items"]}
    assert items == {
        ("filter:tasks:id", "greater"): 3,
        ("filter:tasks:id", "less_or_equal"): 9,
        ("filter:tasks:draft_exists", "equal"): False,
        ("filter:tasks:total_annotations", "equal"): 0,
        ("filter:tasks:cancelled_annotations", "equal"): 0,
    }
    assert query(server.requests[0])["resolve_uri"] == "false"


def test_tasks_with_ids_say_whether_somebody_has_begun_them(server: RecordingServer, client: LabelStudioClient) -> None:
    counts = [(0, 0, False), (1, 0, False), (0, 1, False), (0, 0, True)]
    tasks = [
        {
            "id": number,
            "data": {"image": "s3://b/k"},
            "predictions": [{**STORED, "task": number}],
            "total_annotations": annotated,
            "cancelled_annotations": skipped,
            "draft_exists": drafted,
        }
        for number, (annotated, skipped, drafted) in enumerate(counts)
    ]
    server.answer = lambda _: Answer(body={"tasks": tasks})
    found = client.tasks_with_ids(4, [0, 1, 2, 3, 9])
    assert [(task.task.id, task.begun, len(task.predictions)) for task in found] == [
        (0, False, 1),
        (1, True, 1),
        (2, True, 1),
        (3, True, 1),
    ]
    assert view(server.requests[0])["selectedItems"] == {"all": False, "included": [0, 1, 2, 3, 9]}
    assert query(server.requests[0])["page_size"] == "5"
    assert client.tasks_with_ids(4, []) == []
    assert len(server.requests) == 1, "without ids Label Studio would list all"


def test_a_prediction_keeps_its_cluster(server: RecordingServer, client: LabelStudioClient) -> None:
    server.answer = lambda request: Answer(204, b"") if request.method == "DELETE" else Answer(201, {})
    prediction = Prediction(result=[{"value": {}}], score=0.25, model_version="digits v2")
    client.add_prediction(4, 7, prediction, 3)
    stored = StoredPrediction(5, 7, "digits v1", 0.4, "c", "u", 2)
    client.change_prediction(4, stored, prediction, None)
    client.delete_prediction(5)
    assert server.paths == ["POST /api/predictions/", "PATCH /api/predictions/5/", "DELETE /api/predictions/5/"]
    body = {"project": 4, "task": 7, "result": [{"value": {}}], "score": 0.25, "model_version": "digits v2"}
    assert [request.json for request in server.requests[:2]] == [{**body, "cluster": 3}, {**body, "cluster": None}]


def test_one_prediction_is_read_by_its_id(server: RecordingServer, client: LabelStudioClient) -> None:
    server.answer = lambda _: Answer(body=STORED)
    assert client.prediction(5) == StoredPrediction(5, 7, "digits v1", 0.4, "c", "u", 2)
    assert server.paths == ["GET /api/predictions/5/"]


def test_tabs_are_known_by_their_titles(server: RecordingServer, client: LabelStudioClient) -> None:
    server.answer = lambda _: Answer(body=[{"id": 1, "data": {"title": "Default"}}, {"id": 2, "data": None}])
    assert client.tabs(4) == {"Default": 1, "": 2}
    client.add_tab(4, {"title": "Queue"})
    assert server.requests[1].json == {"project": 4, "data": {"title": "Queue"}}


def test_a_webhook_is_switched_on_with_the_actions_that_it_has(server: RecordingServer, client: LabelStudioClient) -> None:
    """Label Studio clears the actions of a webhook that is changed without them."""
    hook = {"id": 3, "url": "http://api/digits/webhook", "is_active": False, "actions": ["ANNOTATION_CREATED"], "headers": {}}
    server.answer = lambda request: Answer(body=[hook] if request.method == "GET" else {})
    (found,) = client.webhooks(4)
    assert found == Webhook(3, "http://api/digits/webhook", is_active=False, actions=["ANNOTATION_CREATED"])
    client.switch_on(found)
    assert server.paths == ["GET /api/webhooks/?project=4", "PATCH /api/webhooks/3/"]
    assert server.requests[1].json == {"is_active": True, "actions": ["ANNOTATION_CREATED"]}


@pytest.mark.parametrize(
    ("answers", "asked", "fails"),
    [
        ([204], 1, False),
        ([404], 1, False),
        ([500, 500, 204], 3, False),
        ([500, 404], 2, False),
        ([500] * 5, 5, True),
        ([403], 1, True),
    ],
)
def test_a_task_is_deleted_though_the_database_is_locked(
    answers: list[int], asked: int, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("labelloop.label_studio.client._LOCKED_SECONDS", (0, 0, 0, 0))
    waiting = iter(answers)
    with serving(lambda _: Answer(next(waiting), b"")) as server:
        client = LabelStudioClient(server.url, "0123456789abcdef")
        if fails:
            with pytest.raises(LabelStudioError):
                client.delete_task(5)
        else:
            client.delete_task(5)
        assert server.paths == ["DELETE /api/tasks/5/"] * asked
