"""The check of a project, and its set-up, for every problem type: before a Label Studio and a backend that do as a test wants.

What a real Label Studio does is in tests/loop/test_tools.py.
"""

from __future__ import annotations

import base64
import io
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import boto3
import pytest
import yaml
from botocore.config import Config
from rich.console import Console

from cli import doctor
from cli.deployment import Deployment
from cli.doctor import Check, examine
from cli.label_studio_project import set_up_project
from labelloop.artifacts import Bucket, Champions
from labelloop.errors import ConfigError, LabelStudioError, NotSetUpError
from labelloop.ledger import Ledger
from labelloop.model_config import ModelFolder, config_digest
from local.environment import aws_environment
from local.stack import Addresses
from tests import examples
from tests.recording_server import Answer, RecordingServer, Request, serving

TEMPLATES = {
    "classification": '<Choices name="what" toName="image" choice="single">{}</Choices>',
    "multilabel": '<Choices name="what" toName="image" choice="multiple">{}</Choices>',
    "detection": '<RectangleLabels name="what" toName="image" canRotate="false">{}</RectangleLabels>',
}
PASSWORD = "of the backend"


@dataclass
class LabelStudio:
    """As much of Label Studio's API as set-up and check use, in memory. `server` is where it answers."""

    server: RecordingServer
    backend: Callable[[dict[str, Any]], str]  # the state of a backend, given its settings
    token: str = "0" * 40
    presign: Callable[[str], str] = lambda address: address
    projects: dict[int, dict[str, Any]] = field(default_factory=dict)
    webhooks: dict[int, dict[str, Any]] = field(default_factory=dict)
    ml: dict[int, dict[str, Any]] = field(default_factory=dict)
    storages: dict[int, dict[str, Any]] = field(default_factory=dict)
    views: dict[int, dict[str, Any]] = field(default_factory=dict)
    tasks: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, request: Request) -> Answer:
        parts = urlsplit(request.path)
        asked = parse_qs(parts.query)
        path = parts.path.strip("/").removeprefix("api/")
        if path == "health":
            return Answer(body={"status": "UP"})
        if request.headers.get("authorization") != f"Token {self.token}":
            return Answer(401, {"detail": "Invalid token."})
        if path == "current-user/whoami":
            return Answer(body={"email": "me@example.org"})
        if path == "tasks":
            return Answer(body={"tasks": self.tasks})
        if path.endswith("/resolve"):
            address = base64.urlsafe_b64decode(asked["fileuri"][0]).decode()
            return Answer(303, b"", {"Location": self.presign(address)})
        match = re.fullmatch(r"(projects|webhooks|ml|storages/s3|dm/views)(?:/(\d+))?", path)
        assert match is not None, request.path
        kind, number = match[1], int(match[2] or 0)
        return self._rest({"storages/s3": "storages", "dm/views": "views"}.get(kind, kind), number, request, asked)

    def _rest(self, kind: str, number: int, request: Request, asked: dict[str, list[str]]) -> Answer:
        rows: dict[int, dict[str, Any]] = getattr(self, kind)
        if number and number not in rows:
            return Answer(404, {"detail": "Not found."})
        if request.method == "DELETE":
            del rows[number]
            return Answer(204, b"")
        if request.method in ("POST", "PATCH"):
            number = number or len(rows) + 1
            rows[number] = {"id": number, "model_version": "", **rows.get(number, {}), **request.json}
            if kind == "ml":
                self._save_backend(rows[number])
            return Answer(200 if request.method == "PATCH" else 201, self._shown(rows[number]))
        if number:
            return Answer(body=self._shown(rows[number]))
        if kind == "projects":
            title = asked.get("title", [""])[0]
            found = [row for row in rows.values() if title in row["title"]]
            return Answer(body={"count": len(found), "next": None, "previous": None, "results": found})
        if kind == "ml":
            for row in rows.values():
                row["state"] = self.backend(row)
        return Answer(body=[self._shown(row) for row in rows.values()])

    def _save_backend(self, row: dict[str, Any]) -> None:
        row["state"] = self.backend(row)
        project = self.projects[row["project"]]
        project["model_version"] = project["model_version"] or row["title"]

    def _shown(self, row: dict[str, Any]) -> dict[str, Any]:
        hidden = ("basic_auth_pass", "aws_access_key_id", "aws_secret_access_key")
        return {key: value for key, value in row.items() if key not in hidden}


@dataclass
class Backend:
    """A model's backend behind its door; each answer of a route may be late, s."""

    late: dict[str, list[float]] = field(default_factory=dict)
    status: dict[str, int] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=lambda: {"result": [], "score": 0.5})
    lets_everybody_in: bool = False
    config: str = ""

    def __call__(self, request: Request) -> Answer:
        route = request.path.rsplit("/", 1)[-1]
        given = request.headers.get("authorization")
        if given is None and not self.lets_everybody_in:
            return Answer(401)
        if given != authorization(PASSWORD) and not self.lets_everybody_in:
            return Answer(403)
        if self.late.get(route):
            time.sleep(self.late[route].pop(0))
        body = {"predict": {"results": [self.result]}, "versions": {"versions": [], "config": self.config}}.get(route, {})
        return Answer(self.status.get(route, 200), body)


def authorization(password: str) -> str:
    return "Basic " + base64.b64encode(f"pets:{password}".encode()).decode()


@dataclass
class Stage:
    """A deployed stage with a model `pets`."""

    deployment: Deployment
    folder: ModelFolder
    label_studio: LabelStudio
    backend: Backend
    bucket: Bucket

    def checks(self) -> dict[str, Check]:
        return {check.name: check for check in examine(self.deployment, self.folder)}

    def failing(self) -> dict[str, str]:
        return {name: check.message for name, check in self.checks().items() if check.state == "fail"}

    def again(self) -> Stage:
        """As another run of a command sees it."""
        return replace(self, deployment=_deployment(self.deployment.laptop, self.deployment.outputs))


def _deployment(laptop: Addresses | None, outputs: dict[str, str]) -> Deployment:
    deployment = Deployment("local", laptop)
    deployment.outputs = outputs
    return deployment


@pytest.fixture
def stage(
    aws: str, new_bucket: Callable[[], Bucket], ledger_table: str, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Stage]:
    problem_type = getattr(request, "param", "classification")
    images, artifacts = new_bucket(), new_bucket()
    with serving() as studio, serving() as api:
        backend = Backend()
        api.answer = backend
        keys = aws_environment(aws)
        secrets: Any = boto3.client("secretsmanager")
        known = {f"labelloop/local/{name}" for name in ("label-studio", "backend/pets")}
        for name in known:
            with_password = {"username": "pets", "password": PASSWORD, "token": "0" * 40}
            secrets.create_secret(Name=name, SecretString=json.dumps(with_password))
        laptop = Addresses(
            emulator=aws,
            sagemaker="",
            mlflow="",
            label_studio=studio.url,
            api=api.url,
            label_studio_user="",
            label_studio_password="",
            label_studio_token="",
            home=tmp_path,
        )
        label_studio = LabelStudio(studio, lambda row: "CO" if _lets_in(row) else "DI")
        s3: Any = boto3.client("s3", config=Config(signature_version="s3v4"))  # as Label Studio's
        label_studio.presign = lambda address: str(
            s3.generate_presigned_url("get_object", {"Bucket": images.name, "Key": address.split("/", 3)[3]})
        )
        studio.answer = label_studio
        s3.put_bucket_cors(
            Bucket=images.name,
            CORSConfiguration={"CORSRules": [{"AllowedMethods": ["GET", "HEAD"], "AllowedOrigins": [studio.url]}]},
        )
        outputs = {
            "ImagesBucket": images.name,
            "ArtifactsBucket": artifacts.name,
            "LedgerTable": ledger_table,
            "LabelStudioSecret": "labelloop/local/label-studio",
            "LabelStudioUrl": studio.url,
        }
        assert keys["AWS_ACCESS_KEY_ID"]
        try:
            folder = model_folder(tmp_path, problem_type)
            deployed = ModelFolder(folder.folder)  # a folder keeps what it has read, and tests change its files
            backend.config = config_digest(deployed.config, deployed.label_config)
            yield Stage(_deployment(laptop, outputs), folder, label_studio, backend, images)
        finally:
            for name in known:
                secrets.delete_secret(SecretId=name, ForceDeleteWithoutRecovery=True)


def _lets_in(row: dict[str, Any]) -> bool:
    return bool(row.get("basic_auth_pass") == PASSWORD and row.get("basic_auth_user") == "pets")


def model_folder(root: Path, problem_type: str) -> ModelFolder:
    folder = root / "pets"
    folder.mkdir()
    config = yaml.safe_load((examples.REPOSITORY / "model_configs" / "digits" / "config.yaml").read_text())
    config |= {"name": "pets", "problem_type": problem_type, "classes": ["Cat", "Dog"]}
    config["label_studio"] = {"title": "Pets", "instructions": "Cats & <b>dogs</b>.\n"}
    config["hyperparameters"].pop("label_smoothing")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    item = "Label" if problem_type == "detection" else "Choice"
    items = "".join(f'<{item} value="{name}"/>' for name in config["classes"])
    image = '<Image name="image" value="$image"/>'
    (folder / "labeling_template.xml").write_text(f"<View>\n  {image}{TEMPLATES[problem_type].format(items)}\n</View>\n")
    return ModelFolder(folder)


def add_task(stage: Stage, name: str = "a.png", data: bytes | None = None) -> None:
    key = f"images/pets/{name}"
    stage.bucket.put(key, data or examples.png(3))
    image = {"image": f"s3://{stage.bucket.name}/{key}"}
    stage.label_studio.tasks.append({"id": 5, "data": image, "meta": {}, "total_annotations": 0, "cancelled_annotations": 0})


# Set-up


def test_of_a_model_that_is_not_deployed_nothing_is_set_up(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Deployment, "backend_secret", lambda *_: "labelloop/local/backend/none")
    with pytest.raises(NotSetUpError, match="pets is not deployed yet; run: labelloop up"):
        set_up_project(stage.deployment, stage.folder)
    assert stage.label_studio.projects == {}
    assert "run: labelloop up" in stage.failing()["health"]


@pytest.mark.parametrize("stage", TEMPLATES, indirect=True)
def test_a_project_of_every_problem_type_is_set_up_once(stage: Stage) -> None:
    done = set_up_project(stage.deployment, stage.folder)
    assert [change.split(" ", 3)[:3] for change in done.changes] == [
        ["created", "project", "1,"],
        ["added", "the", "image"],
        ["added", "the", "webhook"],
        ["connected", "the", "ML"],
        ["added", "the", "tab"],
    ]
    studio = stage.label_studio
    assert studio.projects[1]["label_config"] == stage.folder.template.strip()
    assert studio.projects[1]["expert_instruction"] == "Cats & <b>dogs</b>."
    assert studio.projects[1]["sampling"] == "Uncertainty sampling"
    assert studio.webhooks[1]["headers"] == {"Authorization": authorization(PASSWORD)}
    assert studio.ml[1]["is_interactive"] is (stage.folder.config.problem_type == "detection")
    assert (studio.ml[1]["basic_auth_user"], studio.ml[1]["basic_auth_pass"], studio.ml[1]["title"]) == (
        "pets",
        PASSWORD,
        "pets v0",
    )
    assert studio.storages[1]["s3endpoint" if "s3endpoint" in studio.storages[1] else "s3_endpoint"]
    changing = [request.method for request in studio.server.requests if request.method != "GET"]
    posted = [request.path.strip("/") for request in studio.server.requests if request.method == "POST"]
    assert posted.index("api/webhooks") < posted.index("api/ml"), "or Label Studio makes a webhook of its own"
    again = stage.again()
    assert set_up_project(again.deployment, again.folder).changes == []
    assert [request.method for request in studio.server.requests if request.method != "GET"] == changing
    assert {check.state for check in again.checks().values()} == {"pass"}


def test_instructions_that_label_studio_escapes_are_not_changed_for_ever(stage: Stage) -> None:
    set_up_project(stage.deployment, stage.folder)
    stage.label_studio.projects[1]["expert_instruction"] = "Cats &amp; <b>dogs</b>."
    assert set_up_project(stage.deployment, stage.folder).changes == []


def test_a_config_that_is_wrong_makes_nothing(stage: Stage) -> None:
    template = Path(str(stage.folder.folder)) / "labeling_template.xml"
    template.write_text(template.read_text().replace("Dog", "Hamster"))
    with pytest.raises(ConfigError, match="Hamster"):
        set_up_project(stage.deployment, stage.folder)
    assert stage.label_studio.projects == {}


def test_label_studios_refusal_is_an_error_with_its_words(stage: Stage) -> None:
    refusal = {
        "status_code": 400,
        "detail": "Validation error",
        "validation_errors": {"label_config": ["These labels still exist"]},
    }
    studio = stage.label_studio
    studio.server.answer = lambda request: Answer(400, refusal) if request.method == "POST" else studio(request)
    with pytest.raises(LabelStudioError, match="These labels still exist") as caught:
        set_up_project(stage.deployment, stage.folder)
    assert caught.value.status == 400


def test_a_label_studio_that_is_not_there_is_an_error(stage: Stage) -> None:
    with serving() as gone:
        url = gone.url
    stage.deployment.outputs["LabelStudioUrl"] = url
    with pytest.raises(LabelStudioError, match="does not answer"):
        set_up_project(stage.deployment, stage.folder)


# The check


@pytest.fixture
def set_up(stage: Stage) -> Stage:
    set_up_project(stage.deployment, stage.folder)
    return stage.again()


def test_every_line_says_what_is_right(set_up: Stage) -> None:
    add_task(set_up)
    checks = set_up.checks()
    assert {check.state for check in checks.values()} == {"pass"}
    assert checks["token"].message == "is me@example.org's"
    assert checks["image"].message == "task 5's loads: PNG, 24 × 24 pixels"
    assert checks["prediction"].message == "no version yet; predictions start with the first training"
    out = io.StringIO()
    doctor.show(list(checks.values()), Console(file=out, width=300))
    lines = out.getvalue().splitlines()
    assert len(lines) == len(checks)
    assert all(line.startswith("pass        ") for line in lines)


def test_one_slow_answer_of_three_is_no_slow_health(set_up: Stage) -> None:
    set_up.backend.late["health"] = [0.6]
    before, doctor_limit = time.monotonic(), 0.3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "HEALTH_SECONDS", doctor_limit)
        assert set_up.failing() == {}
        assert time.monotonic() - before > 0.6
        set_up.backend.late["health"] = [0.5, 0.5, 0.5]
        assert "images open without prediction" in set_up.failing()["health"]


def test_a_cold_setup_is_told_and_a_slow_one_fails(set_up: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SETUP_SECONDS", 0.3)
    set_up.backend.late["setup"] = [0.5]
    checks = set_up.checks()
    assert checks["setup"].state == "pass"
    assert "0.5 s from cold" in checks["setup"].message
    set_up.backend.late["setup"] = [0.5, 0.5]
    assert "memory" in set_up.failing()["setup"]


@pytest.mark.parametrize(
    ("status", "remedy"), [(500, "log of the function predict"), (403, "its own secret is refused"), (502, "labelloop up")]
)
def test_a_backend_that_fails_is_told_with_a_remedy(set_up: Stage, status: int, remedy: str) -> None:
    set_up.backend.status["setup"] = status
    failing = set_up.failing()
    assert list(failing) == ["setup"]
    assert f"answers {status}" in failing["setup"]
    assert remedy in failing["setup"]


def test_a_config_that_is_not_deployed_is_told(set_up: Stage) -> None:
    """Set up with a class more, and never deployed: annotations of that class would be left out of training."""
    for file in (set_up.folder.folder / name for name in ("config.yaml", "labeling_template.xml")):
        file.write_text(file.read_text().replace("- Dog", "- Dog\n- Cow").replace('"Dog"/>', '"Dog"/><Choice value="Cow"/>'))
    changed = replace(set_up.again(), folder=ModelFolder(set_up.folder.folder))
    set_up_project(changed.deployment, changed.folder)
    failing = changed.failing()
    assert list(failing) == ["config"]
    assert "labelloop up" in failing["config"]


def test_a_door_that_stands_open_is_told(set_up: Stage) -> None:
    set_up.backend.lets_everybody_in = True
    assert "answers 200 to no password" in set_up.failing()["door"]


def test_a_password_that_label_studio_has_wrong_is_told(set_up: Stage) -> None:
    set_up.label_studio.ml[1]["basic_auth_pass"] = "old"
    failing = set_up.failing()
    assert list(failing) == ["sign-in"]
    assert "its password there is not the secret's; run: labelloop setup-label-studio-project pets" in failing["sign-in"]
    assert set_up_project(set_up.deployment, set_up.folder).changes == [
        f"updated the ML backend {set_up.deployment.backend('pets').url}: password"
    ]
    assert set_up.failing() == {}


def test_a_missing_queue_is_told_and_made_anew_beside_what_people_have(set_up: Stage) -> None:
    views = set_up.label_studio.views
    assert [view["data"]["title"] for view in views.values()] == ["Default", "Queue"]
    views[2]["data"]["title"] = "mine"
    assert "labelloop setup-label-studio-project pets" in set_up.failing()["queue"]
    assert set_up_project(set_up.deployment, set_up.folder).changes == ["added the tab 'Queue'"]
    assert [view["data"]["title"] for view in views.values()] == ["Default", "mine", "Queue"]
    views[3]["data"]["ordering"] = []  # whoever likes it better so
    assert set_up.failing() == {}
    assert set_up_project(set_up.deployment, set_up.folder).changes == []


def test_somebody_elses_backend_in_first_place_is_told(set_up: Stage) -> None:
    theirs = {**set_up.label_studio.ml[1], "id": 0, "url": "https://example.org/theirs"}
    set_up.label_studio.ml = {0: theirs, **set_up.label_studio.ml}
    assert "only the first backend of a project, which is https://example.org/theirs" in set_up.failing()["ML backend"]
    assert set_up_project(set_up.deployment, set_up.folder).changes == []
    assert 0 in set_up.label_studio.ml


def test_a_deleted_project_is_told_and_what_stands_on_it_is_not_checked(set_up: Stage) -> None:
    set_up.label_studio.projects.clear()
    checks = set_up.checks()
    assert "does not exist in Label Studio any more" in checks["project"].message
    for name in ("settings", "queue", "image storage", "webhook", "ML backend", "sign-in", "image", "prediction"):
        assert (checks[name].state, checks[name].message) == ("not checked", "it stands on what 'project' says")


def test_a_label_studio_that_is_down_is_told(set_up: Stage) -> None:
    with serving() as gone:
        url = gone.url
    set_up.deployment.outputs["LabelStudioUrl"] = url
    checks = set_up.again().checks()
    assert "does not answer" in checks["Label Studio"].message
    assert (checks["token"].state, checks["health"].state) == ("not checked", "pass")


def test_an_address_of_something_else_is_told(set_up: Stage) -> None:
    set_up.label_studio.server.answer = lambda _: Answer(404)
    assert "is that the address of Label Studio?" in set_up.failing()["Label Studio"]


def test_an_empty_secret_is_told(set_up: Stage) -> None:
    boto3.client("secretsmanager").put_secret_value(SecretId="labelloop/local/label-studio", SecretString="{}")
    assert "holds no Label Studio token yet" in set_up.again().failing()["token"]


@pytest.mark.parametrize(
    ("origins", "passes"),
    [
        (["*"], True),
        (["http://127.0.0.1:*"], True),
        (["http://*"], True),
        (["https://127.0.0.1"], False),
        (["http://127.0.0.1"], False),
        (["http://127.0.0.1:*9999999"], False),
    ],
)
def test_an_origin_is_compared_as_s3_does(set_up: Stage, origins: list[str], passes: bool) -> None:
    cors: Any = {"CORSRules": [{"AllowedMethods": ["GET"], "AllowedOrigins": origins}]}
    boto3.client("s3").put_bucket_cors(Bucket=set_up.bucket.name, CORSConfiguration=cors)
    assert (set_up.checks()["CORS"].state == "pass") is passes


def test_rules_that_let_nobody_read_are_no_cors(set_up: Stage) -> None:
    cors: Any = {"CORSRules": [{"AllowedMethods": ["PUT"], "AllowedOrigins": ["*"]}]}
    boto3.client("s3").put_bucket_cors(Bucket=set_up.bucket.name, CORSConfiguration=cors)
    checks = set_up.checks()
    assert checks["CORS"].state == "fail"
    assert (checks["image"].state, checks["image"].message) == ("not checked", "it stands on what 'CORS' says")


def test_an_image_that_is_gone_or_broken_is_told(set_up: Stage) -> None:
    add_task(set_up, data=b"no image")
    assert "not an image" in set_up.failing()["image"]
    boto3.client("s3").delete_object(Bucket=set_up.bucket.name, Key="images/pets/a.png")
    assert "does not exist any more" in set_up.failing()["image"]


def test_a_task_that_is_not_predicted_is_told_with_the_reason(set_up: Stage) -> None:
    add_task(set_up)
    Champions(set_up.deployment.artifacts).swap(examples.champion(version=3, model="pets"), tag=None)
    set_up_project(set_up.deployment, set_up.folder)
    assert set_up.checks()["prediction"].message == "pets v3 predicts task 5"
    set_up.backend.result = {"error": "the model is damaged"}
    assert "task 5 is not predicted: the model is damaged" in set_up.failing()["prediction"]
    set_up.backend.status["predict"] = 500
    assert "predict answers 500" in set_up.failing()["prediction"]


def test_a_promotion_since_the_last_set_up_is_told_where_label_studio_missed_it(set_up: Stage, ledger: Ledger) -> None:
    Champions(set_up.deployment.artifacts).swap(examples.champion(version=2, model="pets"), tag=None)
    assert "title: not as set up" in set_up.failing()["ML backend"]
    changes = set_up_project(set_up.deployment, set_up.folder).changes
    assert changes[0].endswith("/pets: title")
    assert changes[1:] == ["the project shows the predictions of pets v2"]


def test_a_task_without_an_image_under_the_templates_key_is_told(set_up: Stage) -> None:
    add_task(set_up)
    set_up.label_studio.tasks[0]["data"] = {"photo": set_up.label_studio.tasks[0]["data"]["image"]}
    assert "no image under 'image'" in set_up.failing()["image"]
