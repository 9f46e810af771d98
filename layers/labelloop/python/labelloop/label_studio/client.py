"""Label Studio's REST API, as far as the functions need it.

urllib3 comes with the Lambda runtime; the label-studio-sdk, which the tools use, imports for seconds.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from itertools import batched
from typing import Any
from urllib.parse import urlencode

import msgspec
import urllib3

from labelloop.errors import LabelStudioError, NotSetUpError, TooLargeError
from labelloop.label_studio.payloads import AnnotatedTask, Prediction, PredictTask
from labelloop.settings import Settings

CONNECTED = "CO"  # state of a backend that Label Studio gets into
_TIMEOUT = urllib3.Timeout(connect=3, read=30)  # s
_EXPORT_TIMEOUT = urllib3.Timeout(connect=3, read=100)  # s; Label Studio writes a file first
# A POST is repeated only where the connection was never made: Label Studio's are not idempotent.
_RETRIES = urllib3.Retry(
    total=3,
    connect=3,
    read=2,
    status=2,
    backoff_factor=0.3,
    backoff_jitter=0.3,
    status_forcelist=(502, 503, 504),
    respect_retry_after_header=False,  # it may be longer than a function runs; its queue waits better
    raise_on_status=False,
)
# A listing otherwise shows images at an address of Label Studio's own, once a storage covers them.
_AS_STORED = {"include": "id,data", "resolve_uri": "false"}
_WITH_PREDICTIONS = {"include": "id,data,meta,predictions", "fields": "all", "resolve_uri": "false"}
_BEGUN = "total_annotations,cancelled_annotations,draft_exists"  # `drafts` are only those of the token's owner
_LOCKED_SECONDS = (0.5, 1, 2, 4)  # between tries of what a locked database made fail
_ACCESS_TOKEN_SECONDS = 240  # the server's live 300 s
_PAGE = 1000  # ids of tasks
_TIME = "%Y-%m-%dT%H:%M:%S.%fZ"  # the only form of a time that its filters take
_TASKS = 200  # ids in a URL
_MOST = 5000  # tasks of a listing that is not paged
_ADDRESSES = 10  # a filter of that many stays below the 8 KB that web servers take as a URL


@dataclass(frozen=True)
class KnownTask:
    """A task as Label Studio lists it. `annotations` counts skips too.

    `sha256` of the image, its content `group` and its upright `size` in pixels are what `ingest` noted; None and (0, 0) where
    it made no note.
    """

    id: int
    image: str
    sha256: str | None
    size: tuple[int, int]
    annotations: int
    group: str | None = None


@dataclass(frozen=True)
class Tally:
    """How many tasks are annotated, how many annotations they have without skips, and when one of these tasks last changed."""

    tasks: int
    annotations: int
    changed_at: str | None


class _Listed(msgspec.Struct):
    id: int
    updated_at: str = ""


class _Page(msgspec.Struct):
    """A page of the task listing; the totals are of all pages."""

    tasks: list[_Listed]
    total: int
    total_annotations: int


@dataclass(frozen=True)
class Webhook:
    """A webhook as Label Studio keeps it."""

    id: int
    url: str
    is_active: bool
    actions: list[str]


@dataclass(frozen=True)
class StoredPrediction:
    """A prediction as Label Studio keeps it. `made_by` is a version string where the loop made it."""

    id: int
    task: int
    made_by: str
    score: float | None
    created_at: str
    updated_at: str
    cluster: int | None


@dataclass(frozen=True)
class StoredTask:
    """A task and its predictions, the oldest first. `begun`: somebody has annotated or skipped it, or has a draft of it."""

    task: PredictTask
    predictions: list[StoredPrediction]
    begun: bool = False


class LabelStudioClient:
    """One Label Studio. `token` is a legacy token or a personal access token. Methods raise `LabelStudioError`; `NotSetUpError`
    where the project was deleted."""

    def __init__(self, url: str, token: str) -> None:
        self.url = url.rstrip("/")
        self._token = token
        self._is_personal = token.count(".") == 2  # a JWT
        self._access: tuple[str, float] | None = None
        self._http = urllib3.PoolManager(timeout=_TIMEOUT, retries=_RETRIES, maxsize=8)

    def tally(self, project: int) -> Tally:
        """What is annotated, as the task listing counts it: a project's own counters leave out ground truth, as imports are."""
        answer = self._annotated_page(project, [], ordering="-tasks:updated_at", limit=1, fields="id,updated_at")
        newest = next(iter(answer.tasks), None)
        return Tally(answer.total, answer.total_annotations, newest.updated_at if newest else None)

    def counts(self, project: int) -> dict[str, int]:
        """`tasks` and `annotated` of a project."""
        answer = self._json("GET", f"/api/projects/{project}?include=id,task_number", project=project)
        return {"tasks": int(answer["task_number"]), "annotated": self.tally(project).tasks}

    def count_predicted(self, project: int, version: str) -> int:
        """The tasks without an annotation that have a prediction of a version."""
        waiting = [("predictions_model_versions", "contains", "List", [version]), ("total_annotations", "equal", "Number", 0)]
        return self._page(project, waiting, ordering="tasks:id", limit=1, fields="id").total

    def model_version(self, project: int) -> str:
        """The version whose predictions the project shows and orders tasks by: the title of its backend."""
        answer = self._json("GET", f"/api/projects/{project}?include=id,model_version", project=project)
        return str(answer["model_version"])

    def annotated_tasks(self, project: int, *, since: datetime | None = None, after: int = 0) -> Iterator[list[AnnotatedTask]]:
        """The annotated tasks with their annotations, page by page, by id: all, or those changed later than `since`.

        Ids are above `after`; a page is what one export answers, 200 tasks. No answer grows with the project. A task that changes
        meanwhile may come as it was before.
        """
        changed = [] if since is None else [("updated_at", "greater", "Datetime", since.astimezone(UTC).strftime(_TIME))]
        while True:
            filters = [*changed, ("id", "greater", "Number", after)]
            listed = self._annotated_page(project, filters, ordering="tasks:id", limit=_PAGE, fields="id").tasks
            if not listed:
                return
            for some in batched(listed, _TASKS, strict=False):
                # The listing itself has annotations without their `unique_id` and the prediction that was seen.
                found = self.annotations_of(project, [task.id for task in some])
                if found:
                    yield sorted(found, key=lambda task: task.id)
            after = listed[-1].id

    def _annotated_page(
        self, project: int, filters: list[tuple[str, str, str, Any]], *, ordering: str, limit: int, fields: str
    ) -> _Page:
        annotated = ("total_annotations", "greater", "Number", 0)
        return self._page(project, [*filters, annotated], ordering=ordering, limit=limit, fields=fields)

    def _page(self, project: int, filters: list[tuple[str, str, str, Any]], *, ordering: str, limit: int, fields: str) -> _Page:
        items = [
            {"filter": f"filter:tasks:{column}", "operator": operator, "type": kind, "value": value}
            for column, operator, kind, value in filters
        ]
        query = {"filters": {"conjunction": "and", "items": items}, "ordering": [ordering]}
        parameters = {"project": project, "page_size": limit, "query": json.dumps(query), "include": fields}
        body = self._request("GET", f"/api/tasks?{urlencode(parameters)}", project=project)
        try:
            return msgspec.json.decode(body, type=_Page)
        except ValueError as error:  # no JSON, not UTF-8, or not of the type
            raise LabelStudioError(f"Label Studio listed what are no tasks: {error}") from error

    def annotations_of(self, project: int, tasks: Sequence[int]) -> list[AnnotatedTask]:
        """Those of the tasks that are annotated, with their annotations."""
        found: list[AnnotatedTask] = []
        for start in range(0, len(tasks), _TASKS):
            some = [("ids[]", task) for task in tasks[start : start + _TASKS]]
            path = f"/api/projects/{project}/export?{urlencode([('exportType', 'JSON'), *some])}"
            found += tasks_exported(self._request("GET", path, timeout=_EXPORT_TIMEOUT))
        return found

    def find_images(self, project: int, addresses: Sequence[str], data_key: str) -> dict[str, int]:
        """Which of the image addresses have a task already, and which."""
        found: dict[str, int] = {}
        for start in range(0, len(addresses), _ADDRESSES):
            some = addresses[start : start + _ADDRESSES]
            items = [{"filter": f"filter:tasks:data.{data_key}", "operator": "equal", "type": "String", "value": a} for a in some]
            query = {"filters": {"conjunction": "or", "items": items}, "ordering": ["tasks:id"]}
            # Label Studio decodes a view's percent signs once more than the URL's.
            view = json.dumps(query).replace("%", "%25")
            parameters = {"project": project, "page_size": 1000, "query": view, **_AS_STORED}
            answer = self._json("GET", f"/api/tasks?{urlencode(parameters)}", project=project)
            found.update((str(task["data"].get(data_key)), int(task["id"])) for task in answer["tasks"])
        return found

    def tasks_after(self, project: int, last: int, data_key: str, *, limit: int = 500) -> list[KnownTask]:
        """The next tasks of a project whose ids are greater than `last`, by id; none are left when the list is empty."""
        after = {"filter": "filter:tasks:id", "operator": "greater", "type": "Number", "value": last}
        query = {"filters": {"conjunction": "and", "items": [after]}, "ordering": ["tasks:id"]}
        fields = {**_AS_STORED, "include": "id,data,meta,total_annotations,cancelled_annotations"}
        parameters = {"project": project, "page_size": limit, "query": json.dumps(query), **fields}
        tasks = self._json("GET", f"/api/tasks?{urlencode(parameters)}", project=project)["tasks"]
        return [_known_task(task, data_key) for task in tasks]

    def tasks(self, project: int, data_key: str) -> Iterator[KnownTask]:
        """All tasks of a project, by id: page numbers would drift while tasks come in."""
        last = 0
        while page := self.tasks_after(project, last, data_key):
            yield from page
            last = page[-1].id

    def prediction(self, prediction: int) -> StoredPrediction:
        """One prediction; of one that there is not, Label Studio answers 404."""
        return _stored_prediction(self._json("GET", f"/api/predictions/{prediction}/"))

    def unlabelled_ids(self, project: int, last: int) -> list[int]:
        """The next tasks with neither annotation nor skip whose ids are greater than `last`, by id; at the end none."""
        answer = self._unlabelled(project, [("id", "greater", "Number", last)], _PAGE, {"include": "id"})
        return [int(task["id"]) for task in answer]

    def unlabelled_tasks(self, project: int, after: int, upto: int) -> list[StoredTask]:
        """Those with neither annotation, skip nor draft, with `after` < id <= `upto`, by id."""
        begun = ("draft_exists", "equal", "Boolean", False)
        ids = [("id", "greater", "Number", after), ("id", "less_or_equal", "Number", upto)]
        return [_stored_task(task) for task in self._unlabelled(project, [*ids, begun], max(upto - after, 1), _WITH_PREDICTIONS)]

    def tasks_with_ids(self, project: int, tasks: Sequence[int]) -> list[StoredTask]:
        """Those of the tasks that the project has, labelled or not, by id."""
        found: list[StoredTask] = []
        for start in range(0, len(tasks), _TASKS):
            some = list(tasks[start : start + _TASKS])
            query = {"selectedItems": {"all": False, "included": some}, "ordering": ["tasks:id"]}
            fields = {**_WITH_PREDICTIONS, "include": f"{_WITH_PREDICTIONS['include']},{_BEGUN}"}
            parameters = {"project": project, "page_size": len(some), "query": json.dumps(query), **fields}
            found += map(_stored_task, self._json("GET", f"/api/tasks?{urlencode(parameters)}", project=project)["tasks"])
        return found

    def _unlabelled(
        self, project: int, filters: list[tuple[str, str, str, Any]], limit: int, fields: dict[str, str]
    ) -> list[dict[str, Any]]:
        items = [
            {"filter": f"filter:tasks:{column}", "operator": operator, "type": kind, "value": value}
            for column, operator, kind, value in [
                *filters,
                ("total_annotations", "equal", "Number", 0),
                ("cancelled_annotations", "equal", "Number", 0),
            ]
        ]
        query = {"filters": {"conjunction": "and", "items": items}, "ordering": ["tasks:id"]}
        parameters = {"project": project, "page_size": limit, "query": json.dumps(query), **fields}
        return list(self._json("GET", f"/api/tasks?{urlencode(parameters)}", project=project)["tasks"])

    def add_prediction(self, project: int, task: int, prediction: Prediction, cluster: int | None) -> None:
        """Give a task a prediction. One by one: Label Studio's bulk import loses the cluster."""
        self._json("POST", "/api/predictions/", _prediction_body(project, task, prediction, cluster))

    def change_prediction(self, project: int, stored: StoredPrediction, prediction: Prediction, cluster: int | None) -> None:
        """Put another prediction in a stored one's place; an editor that shows the old one submits as before."""
        self._json("PATCH", f"/api/predictions/{stored.id}/", _prediction_body(project, stored.task, prediction, cluster))

    def delete_prediction(self, prediction: int) -> None:
        """Take a prediction away. Whoever has it open cannot submit any more: Label Studio demands that it exists."""
        self._request("DELETE", f"/api/predictions/{prediction}/")

    def predicted_by(self, project: int, version: str) -> dict[int, tuple[str, StoredPrediction]]:
        """The tasks with a prediction of a version: when each was last changed, and that prediction."""
        by = {"filter": "filter:tasks:predictions_model_versions", "operator": "contains", "type": "List", "value": [version]}
        query = {"filters": {"conjunction": "and", "items": [by]}, "ordering": ["tasks:id"]}
        fields = {"include": "id,updated_at,predictions", "fields": "all", "resolve_uri": "false"}
        parameters = {"project": project, "page_size": _MOST, "query": json.dumps(query), **fields}
        tasks = self._json("GET", f"/api/tasks?{urlencode(parameters)}", project=project)["tasks"]
        return {
            int(task["id"]): (str(task["updated_at"]), _stored_prediction(prediction))
            for task in tasks
            for prediction in task["predictions"]
            if prediction["model_version"] == version
        }

    def tabs(self, project: int) -> dict[str, int]:
        """The ids of the Data Manager's tabs, by title."""
        views = self._json("GET", f"/api/dm/views/?project={project}")
        return {str((view.get("data") or {}).get("title") or ""): int(view["id"]) for view in views}

    def add_tab(self, project: int, data: dict[str, Any]) -> None:
        """Add a tab to the Data Manager, to the right of the others. `data`: title, filters, ordering, as it stores them."""
        self._json("POST", "/api/dm/views/", {"project": project, "data": data})

    def change_tab(self, project: int, tab: int, data: dict[str, Any]) -> None:
        """Give a tab another content, in its place."""
        self._json("PATCH", f"/api/dm/views/{tab}/", {"project": project, "data": data})

    def delete_tab(self, tab: int) -> None:
        self._request("DELETE", f"/api/dm/views/{tab}/")

    def annotate(self, task: int, result: list[dict[str, Any]], *, seconds: float) -> int:
        """Submit an annotation that took `seconds`; its id."""
        answer = self._json("POST", f"/api/tasks/{task}/annotations", {"result": result, "lead_time": seconds})
        return int(answer["id"])

    def count_anew(self, annotation: int) -> None:
        """Have Label Studio count the annotations of one's task again, as it does whenever one of them is saved."""
        self._json("PATCH", f"/api/annotations/{annotation}/", {})

    def annotate_once(self, task: int, result: list[dict[str, Any]], unique_id: str) -> bool:
        """Give a task an annotation that took nobody any time; False where there is one with that `unique_id` already."""
        body = {"result": result, "lead_time": 0, "unique_id": unique_id, "last_action": "prediction"}
        try:
            self._json("POST", f"/api/tasks/{task}/annotations", body)
        except LabelStudioError as error:
            if error.status == HTTPStatus.CONFLICT:
                return False
            raise
        return True

    def import_tasks(self, project: int, tasks: Iterable[dict[str, Any]]) -> list[int]:
        """Create tasks, with the predictions that they bring; their ids, in order. All or none of the tasks.

        Label Studio loses the predictions when it has to try again, as on SQLite when somebody else writes: they follow then.
        """
        new = list(tasks)
        answer = self._json("POST", f"/api/projects/{project}/import?return_task_ids=true", new)
        ids = [int(task) for task in answer["task_ids"]]
        brought = [{"task": number, **its} for number, task in zip(ids, new, strict=True) for its in task.get("predictions", [])]
        if brought and answer["prediction_count"] == 0:
            self._json("POST", f"/api/projects/{project}/import/predictions", brought)
        return ids

    def delete_task(self, task: int) -> None:
        """Delete a task with its annotations, drafts and predictions. One that is gone is no error.

        On SQLite Label Studio answers 500 while somebody else writes; a deletion may be tried again.
        """
        for pause in (*_LOCKED_SECONDS, None):
            try:
                self._request("DELETE", f"/api/tasks/{task}/")
            except LabelStudioError as error:
                if error.status == HTTPStatus.NOT_FOUND:
                    return
                if error.status != HTTPStatus.INTERNAL_SERVER_ERROR or pause is None:
                    raise
                time.sleep(pause)
            else:
                return

    def backends(self, project: int) -> list[dict[str, Any]]:
        """The ML backends connected to a project. Label Studio checks each one's health meanwhile."""
        answer = self._json("GET", f"/api/ml?project={project}")
        return list(answer)

    def rename_backend(self, backend: dict[str, Any], title: str, password: str) -> None:
        """Give a backend a new title; `project.model_version`, which uncertainty sampling compares, moves along.

        Label Studio signs in to the backend with what the change holds, so the credentials have to come along.
        """
        change = {name: backend[name] for name in ("project", "url", "auth_method", "basic_auth_user")}
        self._json("PATCH", f"/api/ml/{backend['id']}", {**change, "basic_auth_pass": password, "title": title})

    def webhooks(self, project: int) -> list[Webhook]:
        answer = self._json("GET", f"/api/webhooks/?project={project}")
        return [Webhook(int(hook["id"]), str(hook["url"]), bool(hook["is_active"]), list(hook["actions"])) for hook in answer]

    def switch_on(self, webhook: Webhook) -> None:
        """Let a webhook be sent again. Its actions come along: a change without them clears them."""
        self._json("PATCH", f"/api/webhooks/{webhook.id}/", {"is_active": True, "actions": webhook.actions})

    def signed_in_as(self) -> str:
        """The e-mail address of the token's owner."""
        return str(self._json("GET", "/api/current-user/whoami")["email"])

    def presigned_address(self, place: str, address: str) -> str:
        """Where Label Studio sends a browser that shows the image at an `s3://` address.

        `place` is where it shows it: `tasks/5`, say, or `projects/1`.
        """
        encoded = base64.urlsafe_b64encode(address.encode()).decode()
        answer = self._send("GET", f"/{place}/resolve/?fileuri={encoded}", None, _TIMEOUT, may_redirect=True)
        location = answer.headers.get("Location")
        if answer.status != 303 or not location:
            raise LabelStudioError(f"Label Studio sends no browser to {address} ({answer.status})", status=answer.status)
        return location

    def download(self, path: str, *, limit: int) -> bytes:
        """A file that Label Studio itself holds (`/data/…`). Raises `TooLargeError` above `limit` bytes."""
        answer = self._send("GET", path, None, _TIMEOUT, preload=False)
        try:
            data: bytes = answer.read(limit + 1, decode_content=True)
        except urllib3.exceptions.HTTPError as error:
            raise LabelStudioError(f"Label Studio broke off {path}: {error}") from error
        finally:
            answer.close()  # the connection too, unless all was read: what is left would be in the way of the next request
            answer.release_conn()
        if len(data) > limit:
            said = answer.headers.get("Content-Length", "")
            size = max(int(said) if said.isdecimal() and len(said) < 20 else 0, len(data))
            raise TooLargeError(f"{path} has more than {limit:,} bytes; they are not read", size)
        return data

    def _json(self, method: str, path: str, body: Any = None, *, project: int | None = None) -> Any:
        content = self._request(method, path, body, project=project)
        try:
            return msgspec.json.decode(content)
        except ValueError as error:
            raise LabelStudioError(f"Label Studio answered {method} {path} with what is no JSON: {error}") from error

    def _request(
        self, method: str, path: str, body: Any = None, timeout: urllib3.Timeout = _TIMEOUT, *, project: int | None = None
    ) -> bytes:
        """What is answered. `project` is the one that is asked about, where a 404 means that it does not exist."""
        try:
            return bytes(self._send(method, path, body, timeout).data)
        except LabelStudioError as error:
            if project is None or error.status != HTTPStatus.NOT_FOUND:
                raise
            raise NotSetUpError(
                f"Label Studio has no project {project} any more (404); labelloop setup-label-studio-project MODEL makes another"
            ) from error

    def _send(
        self,
        method: str,
        path: str,
        body: Any,
        timeout: urllib3.Timeout,
        *,
        preload: bool = True,
        may_redirect: bool = False,
    ) -> urllib3.BaseHTTPResponse:
        try:
            answer = self._http.request(
                method,
                self.url + path,
                body=None if body is None else msgspec.json.encode(body),
                headers={"Authorization": self._authorization(), "Content-Type": "application/json"},
                timeout=timeout,
                redirect=False,  # the token goes nowhere else
                preload_content=preload,
            )
        except urllib3.exceptions.HTTPError as error:
            raise LabelStudioError(f"Label Studio at {self.url} does not answer: {error}") from error
        if answer.status >= (400 if may_redirect else 300):
            text = answer.data[:300].decode(errors="replace")
            raise LabelStudioError(f"Label Studio answered {method} {path} with {answer.status}: {text}", status=answer.status)
        return answer

    def _authorization(self) -> str:
        if not self._is_personal:
            return f"Token {self._token}"
        # No monotonic clock: it may stand still while Lambda freezes the sandbox.
        if self._access is None or not 0 <= time.time() - self._access[1] < _ACCESS_TOKEN_SECONDS:
            try:
                answer = self._http.request(
                    "POST", f"{self.url}/api/token/refresh/", json={"refresh": self._token}, redirect=False
                )
            except urllib3.exceptions.HTTPError as error:
                raise LabelStudioError(f"Label Studio at {self.url} does not answer: {error}") from error
            if answer.status != 200:
                raise LabelStudioError(f"Label Studio refused the personal access token ({answer.status})", status=answer.status)
            try:
                access = str(answer.json()["access"])
            except (ValueError, KeyError, TypeError) as error:
                raise LabelStudioError(f"Label Studio at {self.url} gave no access token for the personal one") from error
            self._access = (access, time.time())
        return f"Bearer {self._access[0]}"


def _stored_prediction(answer: dict[str, Any]) -> StoredPrediction:
    return StoredPrediction(
        id=int(answer["id"]),
        task=int(answer["task"]),
        made_by=str(answer["model_version"] or ""),
        score=answer["score"],
        created_at=str(answer["created_at"]),
        updated_at=str(answer["updated_at"]),
        cluster=answer["cluster"],
    )


def _stored_task(task: dict[str, Any]) -> StoredTask:
    return StoredTask(
        PredictTask(id=int(task["id"]), data=task["data"], meta=task.get("meta")),
        sorted(map(_stored_prediction, task["predictions"]), key=lambda prediction: prediction.id),
        begun=any(task.get(field) for field in _BEGUN.split(",")),
    )


def _prediction_body(project: int, task: int, prediction: Prediction, cluster: int | None) -> dict[str, Any]:
    return {
        "project": project,
        "task": task,
        "result": prediction.result,
        "score": prediction.score,
        "model_version": prediction.model_version,
        "cluster": cluster,
    }


def tasks_exported(body: bytes) -> list[AnnotatedTask]:
    """The tasks of an export as JSON. Raises `LabelStudioError`."""
    try:
        return msgspec.json.decode(body, type=list[AnnotatedTask])
    except ValueError as error:  # no JSON, not UTF-8, or not of the type
        raise LabelStudioError(f"Label Studio exported what is no list of tasks: {error}") from error


def _known_task(task: dict[str, Any], data_key: str) -> KnownTask:
    meta = task.get("meta") or {}
    return KnownTask(
        id=int(task["id"]),
        image=str(task["data"].get(data_key) or ""),
        sha256=meta.get("sha256"),
        size=(int(meta.get("width") or 0), int(meta.get("height") or 0)),
        annotations=int(task["total_annotations"]) + int(task["cancelled_annotations"]),
        group=meta.get("group"),
    )


def connect(settings: Settings) -> LabelStudioClient:
    """A client for the stage's Label Studio, with the token that holds now. Raises `LabelStudioError` when there is none."""
    from labelloop.secrets import label_studio_token  # brings boto3, which who has a token does not need

    return LabelStudioClient(settings.label_studio_url, label_studio_token(settings))
