"""`setup-label-studio-project MODEL --check`: is everything between Label Studio and the model's backend as it should be?

Looks and changes nothing. Each check says what is right, or what to do; one that stands on another is not made when that failed.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Literal
from urllib.parse import urlsplit

import boto3
import msgspec
import urllib3
from botocore.exceptions import BotoCoreError, ClientError
from rich.console import Console
from rich.markup import escape

from cli.deployment import BackendAccess, Deployment
from cli.label_studio_project import QUEUE_TAB, ModelProject, differences, label_studio_errors
from labelloop import imaging
from labelloop.errors import LabelloopError, LabelStudioError
from labelloop.label_studio.client import CONNECTED, KnownTask
from labelloop.model_config import ModelFolder, config_digest
from labelloop.records import version_string

State = Literal["pass", "fail", "not checked"]

HEALTH_SECONDS, HEALTH_TRIES = 1.0, 3  # Label Studio's own limits
SETUP_SECONDS = 3.0
PREDICT_SECONDS = 100.0
_CONNECT_SECONDS = 1.0
_PATIENCE = 10.0  # s; how long a slow answer is waited for, to say how slow it is


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the report; `message` says what is right, or what to do, or why it was not checked."""

    name: str
    state: State
    message: str


class _Failed(Exception):
    """A check found something wrong; its text says what to do."""


def examine(deployment: Deployment, folder: ModelFolder) -> list[Check]:
    """Check everything, in the order in which one thing stands on another."""
    return _Examination(deployment, folder).run()


def show(checks: list[Check], console: Console) -> None:
    """Print a line a check."""
    style = {"pass": "green", "fail": "red", "not checked": "yellow"}
    for check in checks:
        state = f"[{style[check.state]}]{check.state:<12}[/{style[check.state]}]"
        console.print(f"{state}{escape(check.name)}: {escape(check.message)}", highlight=False, soft_wrap=True)


class _Examination:
    def __init__(self, deployment: Deployment, folder: ModelFolder) -> None:
        self._deployment, self._folder = deployment, folder
        self._model = folder.config.name
        self._set_up = deployment.command(f"setup-label-studio-project {self._model}")
        self._deploy = deployment.deploy_command
        self._checks: dict[str, Check] = {}
        self._root: dict[str, str] = {}  # what was not checked → what failed
        self._found: Any = None

    def run(self) -> list[Check]:
        self._check("Label Studio", self._label_studio)
        self._check("token", self._token, "Label Studio")
        self._check("project", self._project, "token")
        self._check("settings", self._settings, "project")
        self._check("queue", self._queue, "project")
        self._check("image storage", self._storage, "project")
        self._check("webhook", self._webhook, "project")
        self._check("ML backend", self._backend, "project")
        self._check("health", self._health)
        self._check("setup", self._setup, "health")
        self._check("config", self._config, "setup")
        self._check("door", self._door, "health")
        self._check("sign-in", self._sign_in, "ML backend", "setup")
        self._check("CORS", self._cors)
        self._check("image", self._image, "image storage", "CORS")
        self._check("prediction", self._prediction, "project", "setup")
        return list(self._checks.values())

    def _check(self, name: str, look: Callable[[], str], *after: str) -> None:
        missing = next((earlier for earlier in after if self._checks[earlier].state != "pass"), None)
        if missing:
            self._root[name] = self._root.get(missing, missing)
            state: State = "not checked"
            message = f"it stands on what {self._root[name]!r} says"
        else:
            state, message = self._look(look)
        self._checks[name] = Check(name=name, state=state, message=message)

    def _look(self, look: Callable[[], str]) -> tuple[State, str]:
        try:
            with label_studio_errors():
                return "pass", look()
        except (_Failed, LabelloopError) as problem:
            return "fail", str(problem)
        except (ClientError, BotoCoreError) as error:
            return "fail", f"AWS refused: {error}; sign in with a role that may read the stage {self._deployment.stage!r}"

    # Label Studio

    def _label_studio(self) -> str:
        url = self._deployment.label_studio_url
        answer = self._ask("GET", f"{url}/health", _PATIENCE, f"start it, or deploy with its right address ({self._deploy})")
        if answer.status != 200:
            raise _Failed(f"{url}/health answers {answer.status}: is that the address of Label Studio? ({self._deploy})")
        return f"answers at {url}"

    def _token(self) -> str:
        secret = self._deployment.outputs["LabelStudioSecret"]
        try:
            return f"is {self._deployment.label_studio.signed_in_as()}'s"
        except LabelStudioError as error:
            if error.status not in (401, 403):
                raise
            raise _Failed(
                f"Label Studio refuses the token in the secret {secret} ({error.status}); make a new one there under Account & "
                f'Settings, and store it as {{"token": "…"}}' + (f" ({self._deploy} does)" if self._deployment.laptop else "")
            ) from error

    @cached_property
    def _wanted(self) -> ModelProject:
        return ModelProject(self._deployment, self._folder)

    def _project(self) -> str:
        number = self._deployment.ledger.project(self._model)
        self._found = self._wanted.known()
        if self._found is None or int(self._found.id) != number:
            raise _Failed(f"the ledger's project {number} does not exist in Label Studio any more; run: {self._set_up}")
        return f"{number}, {self._found.title!r}"

    def _settings(self) -> str:
        wrong = differences(self._found, self._wanted.wanted_project())
        if wrong:
            raise _Failed(f"{', '.join(wrong)} differ from config.yaml and labeling_template.xml; run: {self._set_up}")
        return "are the config's"

    def _queue(self) -> str:
        if not self._wanted.has_tab(int(self._found.id)):
            raise _Failed(f"the Data Manager has no tab {QUEUE_TAB!r}, which shows what is asked for next; run: {self._set_up}")
        return f"is the tab {QUEUE_TAB!r} of the Data Manager"

    def _storage(self) -> str:
        storage, others = self._wanted.storages(self._found.id)
        if storage is None:
            raise _Failed(f"there is none for the model's images; run: {self._set_up}")
        unseen = ("aws_access_key_id", "aws_secret_access_key")
        wrong = differences(storage, self._wanted.wanted_storage(), unseen=unseen)
        if wrong or others:
            raise _Failed(f"{', '.join(wrong) or 'an outdated storage'} not as set up; run: {self._set_up}")
        problem = self._wanted.marker_problem(self._found.id)
        if problem:
            remedy = f"run: {self._set_up}" if self._deployment.laptop else "let Label Studio's role read the images bucket"
            raise _Failed(f"it {problem}; {remedy}")
        return f"s3://{storage.bucket}/{storage.prefix}"

    def _webhook(self) -> str:
        wanted = self._wanted.wanted_webhook()
        ours = self._wanted.webhooks(self._found.id)
        if not ours or ours[0].url != wanted["url"]:
            raise _Failed(f"there is none to {wanted['url']}: annotations are only noticed by the schedule; run: {self._set_up}")
        wrong = differences(ours[0], wanted)
        if wrong:
            raise _Failed(f"{', '.join(wrong)} not as set up; run: {self._set_up}")
        if len(ours) > 1:
            raise _Failed(
                f"{len(ours) - 1} more than the one wanted: {', '.join(hook.url for hook in ours[1:])}; run: {self._set_up}"
            )
        return f"sends annotations to {wanted['url']}"

    def _backend(self) -> str:
        wanted = self._wanted.wanted_backend()
        all_of_them = self._wanted.sdk.ml.list(project=self._found.id)
        ours = self._wanted.backends(self._found.id)
        if not ours:
            raise _Failed(f"none is connected: no image is pre-annotated; run: {self._set_up}")
        wrong = differences(ours[0], wanted)
        if wrong or len(ours) > 1:
            raise _Failed(f"{', '.join(wrong) or 'more than one connected'}: not as set up; run: {self._set_up}")
        if all_of_them[0].id != ours[0].id:
            raise _Failed(
                f"Label Studio asks only the first backend of a project, which is {all_of_them[0].url}; remove that one"
            )
        shown = self._deployment.label_studio.model_version(self._found.id)
        if shown != wanted["title"]:
            raise _Failed(f"the project shows predictions of {shown!r} in place of {wanted['title']!r}; run: {self._set_up}")
        return f"{wanted['title']} at {wanted['url']}"

    def _sign_in(self) -> str:
        """Label Studio has just tried: it does whenever its backends are listed."""
        backend = self._wanted.backends(self._found.id)[0]
        if backend.state != CONNECTED:
            said = f" ({backend.error_message})" if backend.error_message else ""
            raise _Failed(
                f"the backend answers here, but not to Label Studio{said}: its password there is not the secret's; run: "
                f"{self._set_up}. If that is refused, {backend.url} cannot be reached from Label Studio's machine"
            )
        return "Label Studio signs in to the backend"

    # The backend itself

    @cached_property
    def _access(self) -> BackendAccess:
        return self._deployment.backend(self._model)

    def _health(self) -> str:
        took = []
        for _ in range(HEALTH_TRIES):
            answer, seconds = self._timed("GET", "health")
            if answer.status != 200:
                raise _Failed(f"{self._access.url}/health answers {answer.status}; {self._remedy(answer.status)}")
            took.append(seconds)
            if seconds <= HEALTH_SECONDS:
                return f"{self._access.url} answers in {seconds:.2f} s; Label Studio gives it {HEALTH_SECONDS:.0f} s"
        raise _Failed(
            f"takes {min(took):.1f} s, and Label Studio gives it {HEALTH_SECONDS:.0f} s: images open without prediction"
        )

    def _setup(self) -> str:
        cold = ""
        for _ in range(2):
            answer, seconds = self._timed("POST", "setup", {"project": "0.0", "schema": self._folder.template})
            if answer.status != 200:
                raise _Failed(f"{self._access.url}/setup answers {answer.status}; {self._remedy(answer.status)}")
            if seconds <= SETUP_SECONDS:
                return f"answers in {seconds:.2f} s{cold}; Label Studio gives it {SETUP_SECONDS:.0f} s"
            cold = f" ({seconds:.1f} s from cold: that task opens without prediction)"
        raise _Failed(
            f"takes {seconds:.1f} s, and Label Studio gives it {SETUP_SECONDS:.0f} s; give predict more serving.memory_mb"
        )

    def _config(self) -> str:
        answer, _ = self._timed("GET", "versions")
        if answer.status != 200:
            raise _Failed(f"{self._access.url}/versions answers {answer.status}; {self._remedy(answer.status)}")
        if answer.json().get("config") != config_digest(self._folder.config, self._folder.label_config):
            raise _Failed(
                f"the stage goes by another config.yaml or labeling_template.xml than {self._folder.folder} has; deploy again: "
                f"{self._deploy}"
            )
        return "the stage goes by this config.yaml and labeling_template.xml"

    def _door(self) -> str:
        for password in (None, secrets.token_urlsafe(8)):
            basic = urllib3.make_headers(basic_auth=f"{self._model}:{password}") if password else {}
            status = self._request("POST", "setup", basic, {}, SETUP_SECONDS + _PATIENCE).status
            if status != (403 if password else 401):
                who = "a wrong password" if password else "no password"
                raise _Failed(f"answers {status} to {who}, in place of {403 if password else 401}; deploy again: {self._deploy}")
        return "refuses a wrong password, and none"

    def _remedy(self, status: int) -> str:
        if status in (401, 403):
            return (
                f"its own secret is refused (a new one is let in after an hour at the latest); else deploy again: {self._deploy}"
            )
        return f"look at the log of the function predict; deploy again: {self._deploy}"

    def _timed(self, method: str, route: str, body: Any = None) -> tuple[urllib3.BaseHTTPResponse, float]:
        """An answer and the seconds it took, connecting included, as Label Studio does each time."""
        headers = {"Authorization": self._access.authorization}
        began = time.monotonic()
        answer = self._request(method, route, headers, body, _PATIENCE)
        return answer, time.monotonic() - began

    def _request(
        self, method: str, route: str, headers: Mapping[str, str], body: Any, seconds: float
    ) -> urllib3.BaseHTTPResponse:
        url = f"{self._access.url}/{route}"
        return self._ask(method, url, seconds, f"the backend is not deployed or has stopped: {self._deploy}", headers, body)

    def _ask(
        self, method: str, url: str, seconds: float, remedy: str, headers: Mapping[str, str] | None = None, body: Any = None
    ) -> urllib3.BaseHTTPResponse:
        """Send a request over a connection of its own; no answer is a failure with its remedy."""
        timeout = urllib3.Timeout(connect=_CONNECT_SECONDS, read=seconds)
        try:
            with urllib3.PoolManager(retries=False, timeout=timeout) as http:
                return http.request(method, url, headers=dict(headers or {}), json=body, redirect=False)
        except urllib3.exceptions.HTTPError as error:
            raise _Failed(f"{url} does not answer ({type(error).__name__}); {remedy}") from error

    # What an annotator sees

    @property
    def _origin(self) -> str:
        parts = urlsplit(self._deployment.label_studio_url)
        return f"{parts.scheme}://{parts.netloc}"

    def _cors(self) -> str:
        bucket = self._deployment.images.name
        remedy = f"deploy again, with Label Studio's address as browsers see it (label_studio_url in stages.yaml): {self._deploy}"
        try:
            rules = boto3.client("s3").get_bucket_cors(Bucket=bucket)["CORSRules"]
        except ClientError as error:
            if error.response["Error"]["Code"] != "NoSuchCORSConfiguration":
                raise
            raise _Failed(f"{bucket} has no CORS rules, so browsers show no image; {remedy}") from error
        if not any(_allows(rule, self._origin) for rule in rules):
            origins = ", ".join(origin for rule in rules for origin in rule["AllowedOrigins"])
            raise _Failed(f"{bucket} lets {origins} read, not {self._origin}; {remedy}")
        return f"{bucket} lets pages of {self._origin} read"

    @cached_property
    def _task(self) -> KnownTask | None:
        """The project's first task, if there is one."""
        page = self._deployment.label_studio.tasks_after(self._found.id, 0, self._folder.label_config.data_key, limit=1)
        return page[0] if page else None

    def _image(self) -> str:
        """Load an image as a browser does: asked at Label Studio, sent on to S3, with the page's origin."""
        if self._task is None:
            return f"there is none yet; {self._deployment.command(f'upload-images {self._model} FOLDER')}"
        if not self._task.image:
            key = self._folder.label_config.data_key
            raise _Failed(
                f"task {self._task.id} has no image under {key!r}, which labeling_template.xml shows: let <Image value> name the "
                f"key that tasks have, deploy again ({self._deploy}), and run: {self._set_up}"
            )
        presigned = self._deployment.label_studio.presigned_address(f"tasks/{self._task.id}", self._task.image)
        remedy = "is S3 reachable from here?"
        answer = self._ask("GET", presigned, _PATIENCE, remedy, {"Origin": self._origin})
        if answer.status == 404:
            raise _Failed(f"{self._task.image} of task {self._task.id} does not exist any more; upload it again")
        if answer.status != 200:
            raise _Failed(f"S3 answers {answer.status} to the presigned address of {self._task.image}: {answer.data[:200]!r}")
        if answer.headers.get("Access-Control-Allow-Origin") not in ("*", self._origin):
            raise _Failed(f"S3 does not allow pages of {self._origin} to read {self._task.image}; deploy again: {self._deploy}")
        info = imaging.inspect(answer.data)
        return f"task {self._task.id}'s loads: {info.format}, {info.width} × {info.height} pixels"

    def _prediction(self) -> str:
        champion = self._deployment.champions.read(self._model)
        if champion is None:
            return "no version yet; predictions start with the first training"
        if self._task is None:
            return "no task yet to predict"
        version = version_string(self._model, champion.version)
        body = {
            "tasks": [{"id": self._task.id, "data": {self._folder.label_config.data_key: self._task.image}}],
            "project": f"{self._found.id}.0",
            "label_config": self._folder.template,
            "params": {"context": None},
        }
        headers = {"Authorization": self._access.authorization}
        answer = self._request("POST", "predict", headers, body, PREDICT_SECONDS)
        if answer.status != 200:
            raise _Failed(f"predict answers {answer.status}: {answer.data[:200]!r}; {self._remedy(answer.status)}")
        (result,) = answer.json()["results"]
        if "result" not in result:
            raise _Failed(f"task {self._task.id} is not predicted: {result.get('error')}")
        return f"{version} predicts task {self._task.id}"


def _allows(rule: Mapping[str, Any], origin: str) -> bool:
    """Whether a CORS rule lets pages of an origin read; one * in its pattern stands for anything."""
    return "GET" in rule["AllowedMethods"] and any(_matches(pattern, origin) for pattern in rule["AllowedOrigins"])


def _matches(pattern: str, origin: str) -> bool:
    before, star, after = pattern.partition("*")
    if not star:
        return pattern == origin
    return len(origin) >= len(before) + len(after) and origin.startswith(before) and origin.endswith(after)
