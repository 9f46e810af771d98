"""The workflows: each step is one script of the repository, each script does what the workflow needs, on any forge.

Commands of the CDK and labelloop are stood in for here; tests/loop/test_workflows.py runs the steps on the laptop's stack.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
import yaml

from local.toolchain import find_uv
from tests.examples import REPOSITORY
from tests.recording_server import Answer, RecordingServer, Request, serving

FOLDER = REPOSITORY / ".github" / "workflows"
WORKFLOWS: dict[str, Any] = {file.stem: yaml.safe_load(file.read_text()) for file in sorted(FOLDER.glob("*.y*ml"))}
JOBS = {f"{name}/{job}": found for name, workflow in WORKFLOWS.items() for job, found in workflow["jobs"].items()}
STEPS = {f"{job}/{step['name']}": step for job, found in JOBS.items() for step in found["steps"]}


def load() -> Any:
    """`.ci/workflow.py` as a module of its own."""
    spec = importlib.util.spec_from_file_location("ci_workflow", REPOSITORY / ".ci" / "workflow.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# What stands in the files


def test_these_are_all_workflows() -> None:
    assert list(WORKFLOWS) == ["deploy_backend", "test", "train"]
    assert not list(REPOSITORY.glob(".forgejo/workflows")), "Forgejo would read those, and not these"


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_one_script_or_one_pinned_action(name: str) -> None:
    step = STEPS[name]
    if "uses" in step:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"])
        return
    words = step["run"].split()
    script = REPOSITORY / words[0]
    assert words[0].startswith(".ci/")
    assert script.is_file()
    assert os.access(script, os.X_OK)
    if words[0] == ".ci/workflow":
        assert words[1:] == [word for word in words[1:] if word in load().STEPS][:1]
    else:
        assert words[1:] == []
    assert "${{" not in step["run"], "what a person typed is handed on in the environment, never in a script's text"


def test_every_pin_says_which_version_it_is() -> None:
    lines = [line for file in FOLDER.iterdir() for line in file.read_text().splitlines() if "uses:" in line]
    assert lines
    for line in lines:
        assert re.search(r"@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line), line


def test_every_step_of_the_script_is_used() -> None:
    used = {step["run"].split()[1] for step in STEPS.values() if step.get("run", "").startswith(".ci/workflow ")}
    assert used == set(load().STEPS)


@pytest.mark.parametrize("name", JOBS)
def test_a_job_may_do_little_and_not_for_long(name: str) -> None:
    job = JOBS[name]
    assert WORKFLOWS[name.partition("/")[0]]["permissions"] == {}
    assert job["timeout-minutes"] <= 350
    writes = {key for key, value in job["permissions"].items() if value == "write"}
    signs_in = any("AWS_ROLE_ARN" in step.get("env", {}) for step in job["steps"])
    comments = any(step.get("run") == ".ci/workflow comment" for step in job["steps"])
    assert ("id-token" in writes) == signs_in
    assert bool(writes & {"issues", "pull-requests"}) == comments
    assert job["permissions"].keys() - writes == {"contents"}
    (checkout,) = (step for step in job["steps"] if step.get("uses", "").startswith("actions/checkout@"))
    assert checkout["with"] == {"persist-credentials": False}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_two_runs_do_not_get_in_each_others_way(name: str) -> None:
    assert WORKFLOWS[name]["concurrency"]["group"].startswith(name)


@pytest.mark.parametrize("name", STEPS)
def test_only_the_step_that_comments_gets_the_forges_token(name: str) -> None:
    step = STEPS[name]
    assert ("GITHUB_TOKEN" in step.get("env", {})) == (step.get("run") == ".ci/workflow comment")


def test_what_changes_the_stage_runs_for_main_only() -> None:
    for name in ("deploy_backend/deploy", "train/train"):
        assert "github.ref == 'refs/heads/main'" in JOBS[name]["if"]
    assert JOBS["deploy_backend/smoke"]["needs"] == "deploy"
    assert "head.repo.full_name == github.repository" in JOBS["deploy_backend/diff"]["if"]


@pytest.mark.parametrize(
    "command", ["zizmor --offline --persona pedantic", "check-jsonschema --builtin-schema vendor.github-workflows"]
)
def test_the_workflows_have_no_lint(command: str) -> None:
    program, *words = command.split()
    files = [str(file) for file in sorted(FOLDER.iterdir())]
    done = subprocess.run(
        [Path(sys.executable).parent / program, *words, *files], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


# What the script does


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script in a forge's environment, with a recorder in place of the CDK command; nothing that it does is real."""
    module = load()
    for name in [name for name in os.environ if name.startswith(("GITHUB_", "ACTIONS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LABELLOOP_STAGE", "dev")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    monkeypatch.setattr(module, "WORK", tmp_path / "work")
    monkeypatch.setattr(module, "SMOKE_WAIT_SECONDS", 0)
    monkeypatch.setattr(module, "cdk_command", lambda _: stand_in(tmp_path, "cdk"))
    monkeypatch.setattr(module, "_LABELLOOP", stand_in(tmp_path, "labelloop"))
    says(tmp_path, "cdk", "cdk was here\n")
    return module


def stand_in(folder: Path, name: str) -> list[str]:
    """A command that writes down its words and what it was given to sign in with, and says and returns what a test wants."""
    file = folder / f"{name}.py"
    file.write_text(
        "import json, os, sys\n"
        f"folder, name = {str(folder)!r}, {name!r}\n"
        "given = {k: v for k, v in os.environ.items() if k.startswith(('AWS_', 'ACTIONS_', 'GITHUB_TOKEN'))}\n"
        "open(f'{folder}/{name}.calls', 'a').write(json.dumps([sys.argv[1:], given]) + '\\n')\n"
        "said = json.load(open(f'{folder}/{name}.json'))\n"
        "answer = next((said[key] for key in said if key in sys.argv), said['*'])\n"
        "print(answer[0], end='')\n"
        "sys.exit(answer[1])\n"
    )
    return [sys.executable, str(file)]


def says(folder: Path, name: str, text: str, code: int = 0, **of_model: tuple[str, int]) -> None:
    (folder / f"{name}.json").write_text(json.dumps({**of_model, "*": (text, code)}))


def calls(folder: Path, name: str) -> list[tuple[list[str], dict[str, str]]]:
    return [tuple(json.loads(line)) for line in (folder / f"{name}.calls").read_text().splitlines()]


@pytest.fixture
def forge(monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordingServer]:
    """A forge and AWS's STS in one."""

    def answer(request: Request) -> Answer:
        if request.path.startswith("/token?"):
            return Answer(body={"value": "id-token"})
        if request.path == "/":
            body = (
                '<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">'
                "<AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>ASIA</AccessKeyId>"
                "<SecretAccessKey>secret</SecretAccessKey><SessionToken>session</SessionToken>"
                "<Expiration>2030-01-01T00:00:00Z</Expiration></Credentials></AssumeRoleWithWebIdentityResult>"
                "</AssumeRoleWithWebIdentityResponse>"
            )
            return Answer(body=body.encode(), headers={"Content-Type": "text/xml"})
        if request.method == "GET":
            return Answer(body=[{"id": 5, "body": "hello"}, {"id": 7, "body": "<!-- labelloop diff dev -->\nold"}])
        return Answer(201)

    with serving(answer) as server:
        monkeypatch.setenv("GITHUB_API_URL", f"{server.url}/api/v1")
        monkeypatch.setenv("GITHUB_REPOSITORY", "acme/labels")
        monkeypatch.setenv("GITHUB_TOKEN", "forge-token")
        yield server


@pytest.fixture
def oidc(forge: RecordingServer, monkeypatch: pytest.MonkeyPatch) -> RecordingServer:
    monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_URL", f"{forge.url}/token?api-version=2")
    monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "request-token")
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/diff")
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", forge.url)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "")
    monkeypatch.setenv("GITHUB_RUN_ID", "42")
    return forge


def test_a_step_signs_in_with_the_jobs_token_and_hands_on_no_other_key(
    script: Any, oidc: RecordingServer, tmp_path: Path
) -> None:
    assert script.main(["diff"]) == 0
    token, session = oidc.requests
    assert (token.path, token.headers["authorization"]) == (
        "/token?api-version=2&audience=sts.amazonaws.com",
        "bearer request-token",
    )
    asked = {key: value[0] for key, value in parse_qs(session.body.decode()).items()}
    assert asked["Action"] == "AssumeRoleWithWebIdentity"
    assert (asked["RoleArn"], asked["WebIdentityToken"]) == ("arn:aws:iam::123456789012:role/diff", "id-token")
    assert (asked["RoleSessionName"], asked["DurationSeconds"]) == ("labelloop-42", "3600")
    assert "authorization" not in session.headers, "there is nothing to sign it with"
    ((_, given),) = calls(tmp_path, "cdk")
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
    assert [given[key] for key in keys] == ["ASIA", "secret", "session"]
    assert not [name for name in given if name.startswith(("ACTIONS_", "GITHUB_"))]


def test_a_training_may_take_hours(script: Any, oidc: RecordingServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    says(tmp_path, "labelloop", json.dumps({"state": "nothing new", "reason": "nothing is annotated"}))
    monkeypatch.setenv("LABELLOOP_MODELS", "digits")
    assert script.main(["train"]) == 0
    assert b"DurationSeconds=21600" in oidc.requests[1].body


def test_without_a_token_the_secrets_of_the_forge_count(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_ROLE_ARN", "")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIA")
    assert script.main(["deploy"]) == 0
    ((words, given),) = calls(tmp_path, "cdk")
    assert given["AWS_ACCESS_KEY_ID"] == "AKIA"
    assert "AWS_ROLE_ARN" not in given, "empty variables would lead SDKs astray"
    assert words[:2] == ["deploy", "labelloop-dev-!(workflows)"]


def test_without_either_it_says_what_to_set(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "")
    assert script.main(["deploy"]) == 2
    assert "docs/deployment-workflows.md" in capsys.readouterr().err


def test_a_role_that_aws_refuses_is_said(
    script: Any, oidc: RecordingServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refusal = b"<ErrorResponse><Error><Code>AccessDenied</Code><Message>not authorized</Message></Error></ErrorResponse>"
    known = oidc.answer
    oidc.answer = lambda request: Answer(403, refusal) if request.path == "/" else known(request)
    assert script.main(["deploy"]) == 3
    said = capsys.readouterr().err
    assert "AccessDenied" in said
    assert "id-token" not in said


def test_context_values_reach_every_cdk_command(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LABELLOOP_CONTEXT", "model_configs=models  stages=other.yaml")
    for step in ("synth", "diff", "deploy"):
        assert script.main([step]) == 0
    for (words, _), step in zip(calls(tmp_path, "cdk"), ("synth", "diff", "deploy"), strict=True):
        assert words[0] == step
        context = [words[number + 1] for number, word in enumerate(words) if word == "--context"]
        assert context == ["stage=dev", "model_configs=models", "stages=other.yaml"]
        assert ("template" in words) == (step == "diff"), "a change set would need rights to make one"
    monkeypatch.setenv("LABELLOOP_CONTEXT", "model_configs")
    assert script.main(["synth"]) == 2


def test_a_diff_becomes_one_comment_that_is_replaced(
    script: Any, oidc: RecordingServer, monkeypatch: Any, tmp_path: Path
) -> None:
    says(tmp_path, "cdk", "Stack labelloop-dev-state\n[~] AWS::S3::Bucket\n~~~~~~ not the end\n" + "x" * 100_000)
    monkeypatch.setenv("ISSUE", "12")
    assert (script.main(["diff"]), script.main(["comment"])) == (0, 0)
    listed, patched = oidc.requests[-2:]
    assert listed.path == "/api/v1/repos/acme/labels/issues/12/comments?per_page=100"
    assert (patched.method, patched.path) == ("PATCH", "/api/v1/repos/acme/labels/issues/comments/7")
    assert patched.headers["authorization"] == "token forge-token"
    body = patched.json["body"]
    assert "[~] AWS::S3::Bucket" in body
    assert len(body) < 65_000
    assert body.count("~~~~~~") == 2, "what is compared does not end the block"
    assert (tmp_path / "summary.md").read_text().strip() == body.strip()


def test_a_command_that_fails_fails_its_step(script: Any, tmp_path: Path) -> None:
    says(tmp_path, "cdk", "no\n", 1)
    assert [script.main([step]) for step in ("synth", "diff", "deploy")] == [1, 1, 1]
    assert "is not deployed" in (tmp_path / "summary.md").read_text()


CHECKS = [{"name": "health", "state": "pass", "message": "answers"}, {"name": "door", "state": "fail", "message": "a | b"}]


def test_every_model_is_tried_and_one_that_fails_fails_it(script: Any, tmp_path: Path) -> None:
    good, bad = json.dumps({"checks": CHECKS[:1]}), json.dumps({"checks": CHECKS})
    says(tmp_path, "labelloop", good)
    assert script.main(["smoke"]) == 0
    asked = [words[:3] for words, _ in calls(tmp_path, "labelloop")]
    assert asked == [["setup-label-studio-project", model, "--check"] for model in ("digit_detector", "digits")]

    says(tmp_path, "labelloop", good, digits=(bad, 2))
    assert script.main(["smoke"]) == 1
    assert len(calls(tmp_path, "labelloop")) == 2 + 1 + script.SMOKE_TRIES, "it is tried again before it counts"
    assert "| digits | door | fail | a \\| b |" in (tmp_path / "summary.md").read_text()


def test_a_model_that_could_not_be_tried_fails_it(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    says(tmp_path, "labelloop", "", 3)
    monkeypatch.setenv("LABELLOOP_MODELS", "digits")
    assert script.main(["smoke"]) == 1
    assert "exit code 3" in (tmp_path / "summary.md").read_text()


JUDGED = {
    "state": "judged",
    "reason": "surely not worse",
    "annotations": 1000,
    "version": 3,
    "verdict": "promote",
    "metric": "accuracy",
    "value": 0.99,
    "difference": {"value": 0.01, "low": -0.002, "high": 0.03},
    "holdout_images": 210,
    "per_class": {"zero": 1.0, "one": 0.95},
    "classes": {"one": {"value": -0.01, "low": -0.1, "high": 0.08}},
    "champion": 3,
}


def test_chosen_models_are_trained_and_their_evaluations_posted(
    script: Any, forge: RecordingServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    says(tmp_path, "labelloop", json.dumps(JUDGED), digit_detector=("", 3))
    monkeypatch.setenv("LABELLOOP_MODELS", "digits, digit_detector")
    monkeypatch.setenv("ISSUE", "9")
    assert (script.main(["train"]), script.main(["comment"])) == (3, 0)
    assert sorted(words for words, _ in calls(tmp_path, "labelloop")) == [
        ["retrain", model, "--wait", "--stage", "dev", "--json"] for model in ("digit_detector", "digits")
    ]
    (posted,) = forge.requests
    assert (posted.method, posted.path) == ("POST", "/api/v1/repos/acme/labels/issues/9/comments")
    body = posted.json["body"]
    for part in (
        "### digits version 3",
        "| verdict | **promote**: surely not worse |",
        "| accuracy | 99.0% on 210 holdout images |",
        "| to the champion | +1.0 points (-0.2 to +3.0) |",
        "| one | 95.0% | -1.0 points (-10.0 to +8.0) |",
        "| serves now | version 3 |",
        "### digit_detector: not trained",
    ):
        assert part in body


def test_nothing_new_is_no_failure(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    says(tmp_path, "labelloop", json.dumps({"state": "nothing new", "reason": "nothing is annotated"}))
    monkeypatch.setenv("LABELLOOP_MODELS", "digits")
    assert (script.main(["train"]), script.main(["comment"])) == (0, 0)
    assert "nothing is annotated" in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize(
    ("step", "variables", "said"),
    [
        ("train", {}, "no model is chosen"),
        ("train", {"LABELLOOP_MODELS": "faces"}, "there is no model faces"),
        ("train", {"LABELLOOP_MODELS": "--help"}, "there is no model --help"),
        ("smoke", {"LABELLOOP_MODELS": "faces"}, "there is no model faces"),
        ("nonsense", {}, "which step?"),
    ],
)
def test_what_a_person_chose_wrongly_is_said(
    script: Any, step: str, variables: dict[str, str], said: str, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert script.main([step]) == 2
    assert said in capsys.readouterr().err


def test_an_issue_is_a_number(script: Any, forge: RecordingServer, monkeypatch: pytest.MonkeyPatch) -> None:
    script.publish("text")
    monkeypatch.setenv("ISSUE", "../../../user")
    assert script.main(["comment"]) == 2
    assert forge.requests == []


def test_a_forge_that_refuses_the_comment_is_said(
    script: Any, forge: RecordingServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script.publish("text")
    monkeypatch.setenv("ISSUE", "1")
    forge.answer = lambda _: Answer(403, {"message": "Resource not accessible by integration"})
    assert script.main(["comment"]) == 3
    assert "answers 403" in capsys.readouterr().err


def test_the_script_itself_starts_with_what_a_bare_runner_has(tmp_path: Path) -> None:
    """As a workflow calls it: it finds uv, starts Python, and says which steps there are."""
    environment = {"PATH": f"{find_uv().parent}:/usr/bin:/bin", "HOME": os.environ["HOME"], "UV_OFFLINE": "1"}
    done = subprocess.run(
        [REPOSITORY / ".ci" / "workflow", "nonsense"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "which step? synth, diff, deploy, smoke, train, comment" in done.stderr
