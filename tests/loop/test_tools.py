"""The commands around a project, on the real stack: set-up and its check, and bringing images in.

The project is the second model's, so that the digits' counts stay as other tests know them. Whatever a test breaks, it mends.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from http.cookiejar import CookieJar
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import HTTPCookieProcessor, Request, build_opener

import boto3
import msgspec
import pytest
from PIL import Image
from typer.testing import CliRunner

from cli.deployment import Deployment
from cli.doctor import Check, examine
from cli.label_studio_project import QUEUE_TAB, STORAGE_TITLE, set_up_project
from cli.main import app
from labelloop.artifacts import s3_uri
from labelloop.errors import ConfigError
from labelloop.label_studio.payloads import Value
from labelloop.model_config import ModelConfigs, ModelFolder
from labelloop.records import Promotion
from local.processes import free_port
from tests import examples
from tests.laptop import Loop, wait_for

MODEL = "numerals"
ELSEWHERE = "https://example.org/someone/webhook"


class Project:
    """The second model's project, and Label Studio's own lists of what it has."""

    def __init__(self, loop: Loop, folder: ModelFolder) -> None:
        self.loop, self.folder, self.deployment = loop, folder, loop.deployment
        self.label_studio = loop.deployment.label_studio
        self.number = set_up_project(loop.deployment, folder).project

    def api(self, method: str, path: str, body: Any = None) -> Any:
        """A request to Label Studio's API; the answer, or None where it has no content."""
        headers = {"Authorization": f"Token {_addresses(self).label_studio_token}"}
        answer = self.loop.http.request(
            method, self.deployment.label_studio_url + path, headers=headers, json=body, redirect=False
        )
        assert answer.status < 300, (method, path, answer.status, answer.data)
        return answer.json() if answer.data else None

    def listed(self, kind: str) -> list[dict[str, Any]]:
        """`webhooks`, `ml` or `storages/s3`."""
        return list(self.api("GET", f"/api/{kind}/?project={self.number}"))

    def everything(self) -> dict[str, Any]:
        """Label Studio's own lists. It saves a backend whenever it is looked at, which changes that one's time."""
        return {
            "project": self.api("GET", f"/api/projects/{self.number}"),
            "webhooks": self.listed("webhooks"),
            "backends": [{**backend, "updated_at": ""} for backend in self.listed("ml")],
            "storages": self.listed("storages/s3"),
        }

    def settings(self) -> dict[str, Any]:
        """The same without what a repair may change: numbers and times."""
        passing = {"id", "created_at", "updated_at"}
        found = self.everything()
        for kind in ("webhooks", "backends", "storages"):
            found[kind] = sorted(({k: v for k, v in one.items() if k not in passing} for one in found[kind]), key=str)
        return found

    def set_up(self) -> list[str]:
        return set_up_project(self.deployment, self.folder).changes

    def in_database(self, table: str, number: int, **values: str) -> None:
        """Change what Label Studio's API tries before it takes it."""
        with closing(sqlite3.connect(self.loop.stack.home / "label_studio" / "label_studio.sqlite3", timeout=30)) as database:
            for name, value in values.items():
                database.execute(f"UPDATE {table} SET {name} = ? WHERE id = ?", (value, number))  # noqa: S608
            database.commit()

    def checks(self) -> dict[str, Check]:
        return {check.name: check for check in examine(self.deployment, self.folder)}

    def failing(self) -> dict[str, str]:
        return {name: check.message for name, check in self.checks().items() if check.state == "fail"}


@pytest.fixture(scope="module")
def _set_up(running_loop: Loop, model_configs: Path) -> Iterator[Project]:
    addresses = running_loop.deployment.laptop
    assert addresses is not None
    with pytest.MonkeyPatch.context() as patch:
        for name, value in addresses.aws_environment().items():
            patch.setenv(name, value)
        yield Project(running_loop, ModelConfigs(model_configs)[MODEL])


@pytest.fixture
def project(loop: Loop, _set_up: Project) -> Project:
    return _set_up


@pytest.fixture(scope="module")
def personal_token(_set_up: Project) -> str:
    """A personal access token, which Label Studio gives a browser's session once."""
    laptop = _set_up.deployment.laptop
    assert laptop is not None
    cookies = CookieJar()
    browser = build_opener(HTTPCookieProcessor(cookies))

    def post(path: str, data: bytes, **headers: str) -> bytes:
        token = next(str(cookie.value) for cookie in cookies if cookie.name == "csrftoken")
        fields = {"Referer": laptop.label_studio + path, "X-CSRFToken": token, **headers}
        answer: bytes = browser.open(Request(laptop.label_studio + path, data=data, headers=fields)).read()
        return answer

    browser.open(laptop.label_studio + "/user/login/").read()
    post("/user/login/", urlencode({"email": laptop.label_studio_user, "password": laptop.label_studio_password}).encode())
    return str(json.loads(post("/api/token/", b"{}", **{"Content-Type": "application/json"}))["token"])


# Set-up


def test_a_second_set_up_changes_nothing(project: Project) -> None:
    before = project.everything()
    assert project.set_up() == []
    assert project.everything() == before
    assert [len(before[kind]) for kind in ("webhooks", "backends", "storages")] == [1, 1, 1]


def test_a_personal_access_token_does_as_well(project: Project, personal_token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert personal_token.count(".") == 2
    before = project.everything()
    deployment = Deployment.on_laptop(_addresses(project))
    monkeypatch.setattr(Deployment, "label_studio_token", personal_token)
    assert set_up_project(deployment, project.folder).changes == []
    assert project.everything() == before
    states = {check.name: check.state for check in examine(deployment, project.folder)}
    assert states == dict.fromkeys(states, "pass")
    (hook,) = project.listed("webhooks")
    project.api("DELETE", f"/api/webhooks/{hook['id']}/")
    (change,) = set_up_project(deployment, project.folder).changes
    assert "added the webhook" in change


def _addresses(project: Project) -> Any:
    assert project.deployment.laptop is not None
    return project.deployment.laptop


def _one(project: Project, kind: str) -> dict[str, Any]:
    """The only one that is ours."""
    (one,) = [one for one in project.listed(kind) if one.get("url") != ELSEWHERE]
    return one


def _change(project: Project, kind: str, **values: Any) -> None:
    one = _one(project, kind)
    project.api("PATCH", f"/api/{kind}/{one['id']}" + ("/" if kind == "webhooks" else ""), {**one, **values})


def _double(project: Project, kind: str, **values: Any) -> None:
    one = {key: value for key, value in _one(project, kind).items() if key not in ("id", "created_at", "updated_at")}
    project.api("POST", f"/api/{kind}/" if kind != "ml" else "/api/ml", {**one, **values})


def _password(project: Project) -> dict[str, Any]:
    return {"basic_auth_pass": project.deployment.backend(MODEL).password}


def _keys(project: Project) -> dict[str, str]:
    keys = _addresses(project).aws_environment()
    return {"aws_access_key_id": keys["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": keys["AWS_SECRET_ACCESS_KEY"]}


def _old_address(project: Project) -> str:
    """The model's webhook below an API that was replaced."""
    return f"https://old.example.org/v1/{MODEL}/webhook"


def _without_its_webhook(project: Project) -> None:
    """As when somebody connects the backend by hand: Label Studio makes a webhook for everything, without credentials."""
    hook, backend = _one(project, "webhooks"), _one(project, "ml")
    project.api("DELETE", f"/api/webhooks/{hook['id']}/")
    project.api("DELETE", f"/api/ml/{backend['id']}")
    project.api("POST", "/api/ml", {**backend, **_password(project)})
    assert _one(project, "webhooks")["headers"] == {}


def _moved_storage(project: Project) -> None:
    boto3.client("s3").put_object(Bucket=project.deployment.images.name, Key="images/old/")
    _double(project, "storages/s3", prefix="images/old/", title=STORAGE_TITLE, **_keys(project))


def _without_the_queue(project: Project) -> None:
    tabs = project.label_studio.tabs(project.number)
    project.api("DELETE", f"/api/dm/views/{tabs[QUEUE_TAB]}/")


# What is wrong, how it came so, which check says so, and which changes set-up reports.
SABOTAGE: dict[str, tuple[Callable[[Project], object], str, list[str]]] = {
    "webhook removed": (
        lambda p: p.api("DELETE", f"/api/webhooks/{_one(p, 'webhooks')['id']}/"),
        "webhook",
        ["added the webhook"],
    ),
    "webhook doubled": (lambda p: _double(p, "webhooks"), "webhook", ["removed the webhook"]),
    "webhook switched off": (lambda p: _change(p, "webhooks", is_active=False), "webhook", ["updated the webhook"]),
    "webhook with an old password": (
        lambda p: _change(p, "webhooks", headers={"Authorization": "Basic bnVtZXJhbHM6b2xk"}),
        "webhook",
        ["updated the webhook"],
    ),
    "webhook with too few actions": (
        lambda p: _change(p, "webhooks", actions=["ANNOTATION_CREATED"]),
        "webhook",
        ["updated the webhook"],
    ),
    "webhook of a replaced API": (
        lambda p: _double(p, "webhooks", url=_old_address(p)),
        "webhook",
        ["removed the webhook"],
    ),
    "webhook made by Label Studio": (_without_its_webhook, "webhook", ["updated the webhook"]),
    "backend's password": (
        lambda p: p.in_database("ml_mlbackend", _one(p, "ml")["id"], basic_auth_pass="wrong"),
        "sign-in",
        ["updated the ML backend"],
    ),
    "backend removed": (
        lambda p: p.api("DELETE", f"/api/ml/{_one(p, 'ml')['id']}"),
        "ML backend",
        ["connected the ML backend"],
    ),
    "backend doubled": (
        lambda p: _double(p, "ml", **_password(p)),
        "ML backend",
        # Label Studio forgets what it shows with the backend that is deleted.
        ["removed the ML backend", "the project shows the predictions"],
    ),
    "backend interactive": (
        lambda p: _change(p, "ml", is_interactive=True, **_password(p)),
        "ML backend",
        ["updated the ML backend"],
    ),
    "backend's title": (lambda p: _change(p, "ml", title="mine", **_password(p)), "ML backend", ["updated the ML backend"]),
    "version shown": (
        lambda p: p.api("PATCH", f"/api/projects/{p.number}", {"model_version": ""}),
        "ML backend",
        ["the project shows the predictions"],
    ),
    "storage's lifetime": (
        lambda p: _change(p, "storages/s3", presign_ttl=1, **_keys(p)),
        "image storage",
        ["updated the image storage"],
    ),
    "storage's keys": (
        lambda p: p.in_database("io_storages_s3importstorage", _one(p, "storages/s3")["id"], aws_access_key_id="AKIAOLD"),
        "image storage",
        ["updated the image storage"],
    ),
    "storage's secret": (
        lambda p: p.in_database("io_storages_s3importstorage", _one(p, "storages/s3")["id"], aws_secret_access_key="old"),
        "image storage",
        ["updated the image storage"],
    ),
    "storage removed": (
        lambda p: p.api("DELETE", f"/api/storages/s3/{_one(p, 'storages/s3')['id']}"),
        "image storage",
        ["added the image storage"],
    ),
    "storage doubled": (lambda p: _double(p, "storages/s3", **_keys(p)), "image storage", ["removed the image storage"]),
    "storage of another prefix": (_moved_storage, "image storage", ["removed the image storage"]),
    "project's settings": (
        lambda p: p.api("PATCH", f"/api/projects/{p.number}", {"title": "mine", "sampling": "Sequential sampling"}),
        "settings",
        ["updated the project: title, sampling"],
    ),
    "tab removed": (_without_the_queue, "queue", ["added the tab 'Queue'"]),
    "pre-annotations switched off": (
        lambda p: p.api("PATCH", f"/api/projects/{p.number}", {"show_collab_predictions": False}),
        "settings",
        ["updated the project: show_collab_predictions", "the project shows the predictions"],
    ),
}


# Each takes five seconds; the others are slow ones for that reason alone.
_ALWAYS = {
    *("webhook removed", "webhook with an old password", "webhook made by Label Studio", "backend's password"),
    *("backend doubled", "storage's keys", "project's settings"),
}


@pytest.mark.parametrize("sabotage", [pytest.param(kind, marks=[] if kind in _ALWAYS else pytest.mark.slow) for kind in SABOTAGE])
def test_what_is_wrong_is_found_and_mended_and_nothing_else_touched(project: Project, sabotage: str) -> None:
    break_it, finds, changes = SABOTAGE[sabotage]
    before = project.settings()
    someone = project.api("POST", "/api/webhooks/", {"url": ELSEWHERE, "project": project.number, "send_payload": True})
    try:
        break_it(project)
        failing = project.failing()
        assert finds in failing, failing
        assert "labelloop setup-label-studio-project numerals" in failing[finds]
        made = project.set_up()
        assert [change[: len(start)] for change, start in zip(made, changes, strict=True)] == changes
        assert project.set_up() == []
        assert project.api("GET", f"/api/webhooks/{someone['id']}/") == someone
    finally:
        project.set_up()
        project.api("DELETE", f"/api/webhooks/{someone['id']}/")
    assert project.failing() == {}
    assert project.settings() == before


def test_a_storage_of_somebody_elses_stays(project: Project) -> None:
    boto3.client("s3").put_object(Bucket=project.deployment.artifacts.name, Key="theirs/")
    storage = _one(project, "storages/s3")
    theirs = {**storage, "bucket": project.deployment.artifacts.name, "prefix": "theirs/", "title": "theirs", **_keys(project)}
    made = project.api("POST", "/api/storages/s3", theirs)
    try:
        assert project.set_up() == []
        assert project.failing() == {}
        assert made["id"] in [one["id"] for one in project.listed("storages/s3")]
    finally:
        project.api("DELETE", f"/api/storages/s3/{made['id']}")


def test_a_deleted_project_is_made_again(project: Project) -> None:
    title = project.folder.config.label_studio.title
    folder = _other_title(project.folder, "labelloop doomed")
    deployment = project.deployment
    doomed = int(project.api("POST", "/api/projects", {"title": "labelloop doomed"})["id"])
    deployment.ledger.set_project(MODEL, doomed)
    try:
        project.api("DELETE", f"/api/projects/{doomed}")
        checks = {check.name: check for check in examine(deployment, folder)}
        assert "does not exist" in checks["project"].message
        assert checks["webhook"].state == "not checked"
        assert "'project'" in checks["sign-in"].message
        done = set_up_project(deployment, folder)
        assert done.changes[0] == f"created project {done.project}, 'labelloop doomed'"
        assert deployment.ledger.project(MODEL) == done.project
        project.api("DELETE", f"/api/projects/{done.project}")
    finally:
        deployment.ledger.set_project(MODEL, project.number)
    assert project.api("GET", f"/api/projects/{project.number}")["title"] == title


def test_a_title_of_another_models_project_is_refused(project: Project, loop: Loop) -> None:
    folder = _other_title(project.folder, loop.folder.config.label_studio.title)
    deployment = project.deployment
    boto3.client("dynamodb").delete_item(
        TableName=deployment.outputs["LedgerTable"], Key={"model": {"S": MODEL}, "record": {"S": "project"}}
    )
    try:
        with pytest.raises(ConfigError, match=r"label_studio\.title: project \d+ has this title and is digits's"):
            set_up_project(deployment, folder)
    finally:
        deployment.ledger.set_project(MODEL, project.number)


def _other_title(folder: ModelFolder, title: str) -> ModelFolder:
    other = ModelFolder(folder.folder)
    settings = msgspec.structs.replace(folder.config.label_studio, title=title)
    other.__dict__["config"] = msgspec.structs.replace(folder.config, label_studio=settings)
    return other


# The check


def test_the_check_passes_where_all_is_well(
    loop: Loop, first_version: Promotion, model_configs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LABELLOOP_MODEL_CONFIGS", str(model_configs))
    wait_for(lambda: loop.deployment.label_studio.model_version(loop.project) != "digits v0" or None, 60, "Label Studio shows it")
    shown = CliRunner().invoke(app, ["setup-label-studio-project", "digits", "--check", "--home", str(loop.stack.home), "--json"])
    checks = json.loads(shown.stdout)["checks"]
    states = {check["name"]: check["state"] for check in checks}
    assert states == dict.fromkeys(states, "pass"), checks
    messages = {check["name"]: check["message"] for check in checks}
    assert messages["prediction"].startswith("digits v")
    assert "PNG, 8 × 8 pixels" in messages["image"]
    assert shown.exit_code == 0


def test_the_check_changes_nothing(project: Project) -> None:
    before = project.everything()
    project.checks()
    assert project.everything() == before


def test_the_check_finds_a_wrong_token(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong for this command only: the functions keep theirs for minutes, and other tests stand on them."""
    deployment = Deployment.on_laptop(_addresses(project))
    for token in ("0" * 40, "eyJh.eyJi.c2ln"):
        monkeypatch.setattr(Deployment, "label_studio_token", token)
        checks = {check.name: check for check in examine(Deployment.on_laptop(_addresses(project)), project.folder)}
        assert checks["token"].state == "fail"
        assert deployment.outputs["LabelStudioSecret"] in checks["token"].message
        assert "Account & Settings" in checks["token"].message
        assert [name for name, check in checks.items() if check.state == "not checked"] == [
            *("project", "settings", "queue", "image storage", "webhook", "ML backend", "sign-in", "image", "prediction")
        ]
        assert {checks[name].state for name in ("Label Studio", "health", "setup", "door", "CORS")} == {"pass"}


def test_the_check_finds_missing_cors(project: Project) -> None:
    s3, bucket = boto3.client("s3"), project.deployment.images.name
    rules: Any = s3.get_bucket_cors(Bucket=bucket)["CORSRules"]
    try:
        s3.delete_bucket_cors(Bucket=bucket)
        failing = project.failing()
        assert list(failing) == ["CORS"]
        assert "labelloop up" in failing["CORS"]
        s3.put_bucket_cors(
            Bucket=bucket,
            CORSConfiguration={"CORSRules": [{"AllowedMethods": ["GET"], "AllowedOrigins": ["https://other.example"]}]},
        )
        assert "lets https://other.example read, not http://127.0.0.1" in project.failing()["CORS"]
    finally:
        s3.put_bucket_cors(Bucket=bucket, CORSConfiguration={"CORSRules": rules})
    assert project.failing() == {}


def test_the_check_finds_a_backend_that_fails(project: Project) -> None:
    with _broken_predict():
        failing = project.failing()
    assert list(failing) == ["setup"]
    assert "log of the function predict" in failing["setup"]
    wait_for(lambda: project.failing() == {} or None, 60, "the backend is well again")


@contextmanager
def _broken_predict() -> Iterator[None]:
    """The predict function with a handler that does not exist."""
    functions = boto3.client("lambda")
    name = next(
        f["FunctionName"] for f in functions.list_functions()["Functions"] if "predictfunction" in f["FunctionName"].lower()
    )
    handler = functions.get_function_configuration(FunctionName=name)["Handler"]
    try:
        functions.update_function_configuration(FunctionName=name, Handler="gone.handler")
        yield
    finally:
        functions.update_function_configuration(FunctionName=name, Handler=handler)


def test_the_check_finds_a_stopped_backend(project: Project) -> None:
    """Nothing listens where the stage's API should be."""
    stopped = replace(_addresses(project), api=f"http://127.0.0.1:{free_port()}/v1")
    checks = {check.name: check for check in examine(Deployment.on_laptop(stopped), project.folder)}
    assert "does not answer" in checks["health"].message
    assert "labelloop up" in checks["health"].message
    assert (checks["health"].state, checks["setup"].state, checks["sign-in"].state) == ("fail", "not checked", "not checked")


def test_the_command_says_what_to_do_and_fails(project: Project, model_configs: Path) -> None:
    (hook,) = project.listed("webhooks")
    project.api("DELETE", f"/api/webhooks/{hook['id']}/")
    try:
        done = labelloop(project, "setup-label-studio-project", MODEL, "--check")
        assert done.returncode == 2, done.stderr
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("fail")]
        assert "webhook: there is none to" in line
        assert "run: labelloop setup-label-studio-project numerals" in line
    finally:
        assert labelloop(project, "setup-label-studio-project", MODEL).returncode == 0
    done = labelloop(project, "setup-label-studio-project", MODEL, "--check", "--json")
    assert {check["state"] for check in json.loads(done.stdout)["checks"]} == {"pass"}
    assert done.returncode == 0


def command(project: Project, *words: str) -> tuple[list[str], dict[str, str]]:
    environment = {**os.environ, "LABELLOOP_MODEL_CONFIGS": str(project.folder.folder.parent)}
    return [sys.executable, "-m", "cli.main", *words, "--home", str(project.loop.stack.home)], environment


def labelloop(project: Project, *words: str) -> subprocess.CompletedProcess[str]:
    line, environment = command(project, *words)
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=500, check=False)


# Images


def pictures(folder: Path, count: int, broken: int, seed: int) -> tuple[list[str], list[str]]:
    """Images that all differ, JPEGs and PNGs, and some that are cut off; the names of both, as they are uploaded."""
    good: list[str] = []
    bad: list[str] = []
    noise = random.Random(seed)
    for number in range(count):
        name = f"{number % 7}/photo {seed} {number:04}.{'jpg' if number % 2 else 'png'}"
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.frombytes("L", (24, 24), noise.randbytes(24 * 24))
        data = examples.encoded(image, "JPEG" if number % 2 else "PNG")
        cut = number % (count // broken) == 3
        path.write_bytes(data[: len(data) // 3] if cut else data)
        (bad if cut else good).append(name)
    assert len(bad) == broken
    return good, bad


def upload_killed_and_again(project: Project, folder: Path, good: list[str], bad: list[str]) -> dict[str, float]:
    """Upload, kill it in the middle, run it again, and again: every good image is a task exactly once. Seconds by step."""
    bucket, prefix = project.deployment.images, project.folder.config.images_prefix
    ours = {s3_uri(bucket.name, prefix + name) for name in good}
    there_before = len(bucket.keys(prefix))
    words = ("upload-images", MODEL, str(folder), "--json")
    seconds = {}

    line, environment = command(project, *words)
    running = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: len(bucket.keys(prefix)) - there_before > len(good) // 4 or None, 120, "a quarter is uploaded")
    finally:
        running.send_signal(signal.SIGKILL)
        assert running.wait(30) == -signal.SIGKILL
    arrived = len(bucket.keys(prefix)) - there_before
    assert len(good) // 4 < arrived < len(good), "it was killed in the middle"

    began = time.monotonic()
    second = labelloop(project, *words)
    seconds["second run"] = time.monotonic() - began
    assert second.returncode == 2, second.stderr
    report = json.loads(second.stdout)
    assert sorted(report["refused"]) == sorted(bad)
    assert all(report["refused"].values())
    assert (report["uploaded"], report["already_there"], report["copies"]) == (len(good) - arrived, arrived, {})

    def all_tasks() -> list[str] | None:
        images = [task.image for task in project.label_studio.tasks(project.number, "image") if task.image in ours]
        return images if len(images) >= len(good) else None

    images = wait_for(all_tasks, 300, "every image is a task")
    seconds["until all are tasks"] = time.monotonic() - began
    assert sorted(images) == sorted(ours)

    began = time.monotonic()
    third = json.loads(labelloop(project, *words).stdout)
    seconds["third run"] = time.monotonic() - began
    assert (third["uploaded"], third["already_there"], third["sent_again"]) == (0, len(good), 0)
    assert sorted(third["refused"]) == sorted(bad)
    time.sleep(2)
    assert sorted(all_tasks() or []) == sorted(ours), "no task is doubled afterwards"
    return seconds


def test_a_killed_upload_goes_on_and_every_image_is_a_task_once(project: Project, tmp_path: Path) -> None:
    good, bad = pictures(tmp_path, 400, 4, seed=1)
    upload_killed_and_again(project, tmp_path, good, bad)


def test_a_deleted_task_comes_back_only_when_asked_for(project: Project, tmp_path: Path) -> None:
    image = examples.png(5, salt=77)
    (tmp_path / "deleted.png").write_bytes(image)
    words = ("upload-images", MODEL, str(tmp_path / "deleted.png"), "--json")
    address = s3_uri(project.deployment.images.name, project.folder.config.images_prefix + "deleted.png")
    ledger, content = project.deployment.ledger, examples.sha256(image)

    def task() -> int | None:
        return next((known.id for known in project.label_studio.tasks(project.number, "image") if known.image == address), None)

    labelloop(project, *words)
    first = wait_for(task, 60, "the image is a task")
    wait_for(lambda: ledger.had_task(MODEL, project.number, content) or None, 60, "ingest has noted it")
    project.label_studio.delete_task(first)
    left = json.loads(labelloop(project, *words).stdout)
    assert (left["deleted"], left["sent_again"]) == (1, 0)
    back = json.loads(labelloop(project, *words, "--restore-deleted").stdout)
    assert (back["deleted"], back["sent_again"]) == (0, 1)
    wait_for(task, 60, "the image is a task again")


@pytest.mark.slow
def test_two_thousand_images_with_twenty_broken_ones(
    project: Project, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    good, bad = pictures(tmp_path, 2_000, 20, seed=2)
    assert (len(good), len(bad)) == (1_980, 20)
    for step, took in upload_killed_and_again(project, tmp_path, good, bad).items():
        record_property(step, round(took, 1))
        print(f"{step}: {took:.1f} s")  # noqa: T201


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_upload_stops_at_once(project: Project, tmp_path: Path, number: signal.Signals) -> None:
    good, _ = pictures(tmp_path, 3000, 1, seed=3 + number)
    bucket, prefix = project.deployment.images, project.folder.config.images_prefix
    before = len(bucket.keys(prefix))
    line, environment = command(project, "upload-images", MODEL, str(tmp_path))
    running = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: len(bucket.keys(prefix)) - before > 20 or None, 60, "some are uploaded")
        running.send_signal(number)
        _, said = running.communicate(timeout=20)
    finally:
        running.kill()
    assert running.returncode == 130
    assert "Traceback" not in said
    assert len(bucket.keys(prefix)) - before < len(good)


def test_folders_of_classes_become_annotations_once(project: Project, tmp_path: Path) -> None:
    names = [f"{digit}/labelled {number}.png" for number in range(4) for digit in range(3)]
    for salt, name in enumerate(names, start=100):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(examples.png(int(name[0]), size=(20, 16), salt=salt))
    (tmp_path / "2" / "copy.png").write_bytes((tmp_path / "2" / "labelled 0.png").read_bytes())
    before = project.label_studio.tally(project.number).tasks
    words = ("upload-images", MODEL, str(tmp_path), "--labels-from-folders", "--json")

    dry = json.loads(labelloop(project, *words, "--dry-run").stdout)
    assert (dry["uploaded"], dry["annotated"], len(dry["copies"])) == (12, 12, 1)
    assert project.label_studio.tally(project.number).tasks == before

    done = labelloop(project, *words)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["uploaded"], report["annotated"], len(report["copies"]), report["refused"]) == (12, 12, 1, {})
    assert project.label_studio.tally(project.number).tasks == before + 12

    again = json.loads(labelloop(project, *words).stdout)
    assert (again["uploaded"], again["already_there"], again["annotated"], again["already_annotated"]) == (0, 12, 0, 12)
    assert project.label_studio.tally(project.number).tasks == before + 12

    key = {examples.sha256((tmp_path / name).read_bytes()): name[0] for name in names}
    exported = {task.content[0]: task for page in project.label_studio.annotated_tasks(project.number) for task in page}
    chosen = {digest: exported[digest].annotations[0].result[0].value for digest in key}  # type: ignore[index]
    assert chosen == {digest: Value(choices=[label]) for digest, label in key.items()}
    assert all(len(exported[digest].annotations) == 1 for digest in key)
