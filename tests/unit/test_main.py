"""The command line's manners: what a person did wrong is said in a line, with an exit code, and never as a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import local.stack
from cli.deployment import Deployment
from cli.main import app


def labelloop(*words: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cli.main", *words]
    plain = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "AWS_EC2_METADATA_DISABLED": "true", **environment}
    return subprocess.run(command, cwd=folder, env=plain, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["status", "digits"], 2, "labelloop up"),
        (["status", "digits", "--stage", "dev"], 2, "AWS is not configured"),
        (["status", "--watch"], 2, "labelloop status --json"),
        (["report", "digits"], 2, "labelloop up"),
        (["report", "no-such-model"], 2, "no-such-model"),
        (["rollback", "digits"], 2, "labelloop up"),
        (["retrain", "digits", "--wait"], 2, "labelloop up"),
        (["promote", "digits", "2"], 2, "Missing option '--reason'"),
        (["rotate-secrets", "digits"], 2, "labelloop up"),
        (["rotate-secrets", "digits", "--stage", "dev"], 2, "AWS is not configured"),
        (["redrive"], 2, "labelloop up"),
        (["erase", "digits"], 2, "Missing option '--image'"),
        (["erase", "digits", "--image", "a.png"], 2, "labelloop up"),
        (["erase", "digits", "--image", "a.png", "--json"], 2, "add --yes"),
        (["redrive", "no-such-model"], 2, "no-such-model"),
        (["redrive", "--queue", "nope"], 2, "there are: ingest, retrain"),
        (["demo", "--annotations", "5,3"], 2, "must rise"),
        (["demo", "--annotations", "many"], 2, "numbers with commas"),
        (["demo", "--report", "/nowhere/at/all.json"], 2, "there is no folder"),
        (["upload-images", "digits", "/nowhere.png"], 2, "does not exist"),
        (["no-such-command"], 2, "No such command"),
    ],
)
def test_a_mistake_is_said_in_a_line(tmp_path: Path, words: list[str], code: int, said: str) -> None:
    done = labelloop(*words, folder=tmp_path)
    assert done.returncode == code, done.stderr
    assert said in " ".join(done.stderr.replace("│", " ").split())  # without its box
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "home", "said"),
    [
        (["status"], "notes.txt", "no stack can be kept there"),
        (["up"], "notes.txt", "no stack can be kept there"),
        (["up"], "notes.txt/below", "no stack can be kept there"),
        (["down"], "notes.txt", "no stack can be kept there"),
        (["down", "--erase"], "thesis", "holds no stack"),
    ],
)
def test_a_home_of_something_else_is_a_mistake(tmp_path: Path, words: list[str], home: str, said: str) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    done = labelloop(*words, "--home", str(tmp_path / home), folder=tmp_path)
    assert done.returncode == 2, done.stderr
    assert f"error: {tmp_path / home}: --home: {said}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_record_of_the_stack_is_a_mistake_that_the_named_command_mends(tmp_path: Path) -> None:
    home = tmp_path / ".labelloop/laptop"
    home.mkdir(parents=True)
    (home / "stack.lock").touch()
    (home / "stack.json").write_text("{")
    done = labelloop("status", folder=tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    _, named, words = done.stderr.strip().rpartition("labelloop ")
    assert named
    done = labelloop(*words.split(), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not home.exists()


@pytest.mark.parametrize("command", ["up", "check"])
def test_an_empty_folder_of_models_says_how_to_make_one(tmp_path: Path, command: str) -> None:
    done = labelloop(command, folder=tmp_path, LABELLOOP_MODEL_CONFIGS=str(tmp_path))
    assert (done.returncode, "create-new-model" in done.stderr) == (2, True), done.stderr


def test_remedies_name_the_stack_that_was_asked_for(tmp_path: Path) -> None:
    home = tmp_path / "my stack"
    done = labelloop("status", folder=tmp_path, LABELLOOP_HOME=str(home))
    assert f"no stack runs in {home}; start one with: labelloop up --home '{home}'" in done.stderr
    assert Deployment("dev").command("status pets") == "labelloop status pets --stage dev"


def test_up_and_down_take_their_home_from_the_variable_that_the_other_commands_read(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for command in ("up", "down", "status"):
        done = labelloop(command, folder=tmp_path, LABELLOOP_HOME=str(tmp_path / "notes.txt"))
        assert (done.returncode, "notes.txt: --home: no stack can be kept there" in done.stderr) == (2, True), done.stderr


def test_down_says_when_nothing_runs(tmp_path: Path) -> None:
    done = labelloop("down", folder=tmp_path)
    assert (done.returncode, "nothing runs" in done.stdout) == (0, True)


def test_for_scripts_up_prints_addresses_alone_and_tells_its_progress_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stack:
        def __init__(self, home: Path, *, model_configs: Path, report: Callable[[str, str], None]) -> None:
            self.report = report

        def up(self) -> SimpleNamespace:
            self.report("mlflow", "starts")
            sign_in = {"label_studio_user": "me@example.org", "label_studio_password": "secret", "label_studio_token": "token"}
            return SimpleNamespace(label_studio="http://127.0.0.1:1", mlflow="http://127.0.0.1:2", **sign_in)

    monkeypatch.setattr(local.stack, "LaptopStack", Stack)
    done = CliRunner().invoke(app, ["up", "--home", "elsewhere"])
    following = [line.strip() for line in done.stdout.splitlines() if "--home" in line]
    assert following == [
        "next: labelloop setup-label-studio-project MODEL --home elsewhere",
        "labelloop upload-images MODEL FOLDER --home elsewhere",
    ]
    done = CliRunner().invoke(app, ["up", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {
        "label_studio": "http://127.0.0.1:1",
        "user": "me@example.org",
        "password": "secret",
        "mlflow": "http://127.0.0.1:2",
    }
    assert "starts" in done.stderr
