"""The laptop's stack without Label Studio: what its tools are told, and that a failure leaves nothing behind."""

from __future__ import annotations

import fcntl
import json
import os
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import msgspec
import psutil
import pytest
from rich.console import Console

from cli.demo import Demo
from labelloop.errors import ConfigError, ConflictError, LocalServiceError
from local.deploy import progress
from local.environment import clean_environment
from local.processes import MARK, free_port, is_free, is_running, start, stop, wait_until_ready
from local.stack import PARTS, Addresses, LaptopStack, held
from local.toolchain import REPOSITORY, cache_folder, cdk_command, find_uv, tool_environment

MODEL_CONFIGS = REPOSITORY / "model_configs"


def a_stack(home: Path, said: list[str]) -> LaptopStack:
    return LaptopStack(home, model_configs=MODEL_CONFIGS, report=lambda part, text: said.append(f"{part}: {text}"))


def executable(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_when_a_part_fails_the_others_are_stopped_and_the_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = f'case "$1" in tool) echo "label-studio is not to be had"; exit 4;; *) exec {find_uv()} "$@";; esac'
    monkeypatch.setenv("UV", str(executable(tmp_path / "uv", broken)))
    monkeypatch.setenv(MARK, "of-this-test")  # inherited by whatever the stack starts
    home, said = tmp_path / "home", list[str]()
    with pytest.raises(LocalServiceError, match="label-studio is not to be had") as caught:
        a_stack(home, said).up()
    assert caught.value.part == "label_studio"
    assert caught.value.log == home / "logs" / "label_studio.log"
    assert "emulator: starting" in said
    assert [process.pid for process in psutil.process_iter() if _is_of_this_test(process)] == []
    assert LaptopStack.running(home) is None
    kept = json.loads((home / "stack.json").read_text())
    assert kept["processes"] == {}
    assert len(set(kept["ports"].values())) == 4
    assert stat.S_IMODE((home / "stack.json").stat().st_mode) == 0o600


def test_a_model_s_wrong_config_is_said_before_anything_is_started(tmp_path: Path) -> None:
    folder = tmp_path / "model_configs" / "digits"
    folder.mkdir(parents=True)
    (folder / "labeling_template.xml").write_text((MODEL_CONFIGS / "digits" / "labeling_template.xml").read_text())
    config = (MODEL_CONFIGS / "digits" / "config.yaml").read_text()
    home, said = tmp_path / "home", list[str]()
    stack = LaptopStack(home, model_configs=folder.parent, report=lambda part, text: said.append(f"{part}: {text}"))
    for wrong in (config.replace("epochs:", "epoch:"), config.replace('"3"', '"three"')):
        assert wrong != config
        (folder / "config.yaml").write_text(wrong)
        with pytest.raises(ConfigError, match=r"epochs|three"):
            stack.up()
    assert said == []
    assert not home.exists()


def test_a_full_disk_is_said_before_anything_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=200_000_000))
    said = list[str]()
    with pytest.raises(ConfigError, match=r"has 0\.2 GB free, and a stack wants 1 GB; make room"):
        a_stack(tmp_path / "home", said).up()
    assert said == []


def test_a_stack_of_which_a_part_has_died_is_not_taken_for_none(tmp_path: Path) -> None:
    parts = {part: start(part, ["sleep", "600"], log=tmp_path / "log", environment=os.environ) for part in PARTS}
    try:
        record = {
            "ports": {part: number for number, part in enumerate(PARTS, 1)},
            "password": "b",
            "token": "c",
            "api": "http://127.0.0.1:1/_aws/execute-api/abc/v1",
            "processes": {part: msgspec.to_builtins(process.record) for part, process in parts.items()},
        }
        (tmp_path / "stack.json").write_text(json.dumps(record))
        running = LaptopStack.running(tmp_path)
        assert running is not None
        assert running.mlflow == "http://127.0.0.1:3"
        stop([parts["mlflow"].record], grace_s=5)
        parts["mlflow"].popen.wait()
        with pytest.raises(LocalServiceError, match=rf"mlflow: does not run .*; run: labelloop up --home {tmp_path}") as caught:
            LaptopStack.running(tmp_path)
        assert caught.value.log == tmp_path / "logs" / "mlflow.log"
    finally:
        stop([process.record for process in parts.values()], grace_s=5)
        for process in parts.values():
            process.popen.wait()
    assert LaptopStack.running(tmp_path) is None


def test_what_a_killed_part_leaves_behind_keeps_no_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """uv starts the servers: whoever kills it alone leaves the server."""
    broken = f'case "$1" in tool|run) exit 4;; *) exec {find_uv()} "$@";; esac'
    monkeypatch.setenv("UV", str(executable(tmp_path / "uv", broken)))
    home, said, port = tmp_path / "home", list[str](), free_port()
    server = f"{sys.executable} -m http.server {port} --bind 127.0.0.1 & wait"
    part = start("mlflow", ["sh", "-c", server], log=tmp_path / "log", environment=os.environ)
    try:
        wait_until_ready(part, lambda: not is_free(port), limit_s=60)
        part.popen.kill()
        part.popen.wait()
        assert not is_free(port)
        record = {"ports": {"mlflow": port}, "password": "b", "token": "c"}
        home.mkdir()
        (home / "stack.json").write_text(json.dumps(record | {"processes": {"mlflow": msgspec.to_builtins(part.record)}}))
        with pytest.raises(LocalServiceError):
            a_stack(home, said).up()
    finally:
        stop([part.record], grace_s=5)
    assert [text for text in said if "is taken" in text] == []
    assert json.loads((home / "stack.json").read_text())["ports"]["mlflow"] == port


def _is_of_this_test(process: psutil.Process) -> bool:
    try:
        return "of-this-test" in process.environ().get(MARK, "")
    except psutil.Error:
        return False


def test_only_a_stacks_own_folder_is_erased(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    a_stack(tmp_path, []).down()
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "stack.lock").touch()  # whatever left it there
    with pytest.raises(ConfigError, match="holds no stack"):
        a_stack(tmp_path, []).erase()
    assert (tmp_path / "thesis.tex").exists()
    with pytest.raises(ConfigError, match=r"holds files, but no stack\.json; name an empty folder"):
        a_stack(tmp_path, []).up()  # else the next `erase` would take the thesis for the stack's
    assert sorted(file.name for file in tmp_path.iterdir()) == ["stack.lock", "thesis.tex"]
    a_stack(tmp_path / "never", []).erase()
    kept = tmp_path / "kept"
    a_stack(kept, []).down()
    assert not kept.exists(), "nothing was there to stop"
    kept.mkdir()
    with (kept / "stack.lock").open("w") as lock:  # as an `up` holds it that has recorded nothing yet
        fcntl.flock(lock, fcntl.LOCK_EX)
        for end in (a_stack(kept, []).down, a_stack(kept, []).erase):
            with pytest.raises(ConflictError, match=r"another command is starting .*; let it finish"):
                end()
    a_stack(kept, []).erase()
    assert not kept.exists()


def test_a_second_demo_leaves_the_first_one_s_stack_alone(tmp_path: Path) -> None:
    home = tmp_path / "demo"
    home.mkdir()
    (home / "stack.json").write_text("the first one's")
    demo = Demo(home, "digits", [100], Console())
    with held(tmp_path / "demo.lock", ""), pytest.raises(ConflictError, match=r"another demo runs in .*; end it with Ctrl-C"):
        demo.run(linger=None, report=None)
    assert (home / "stack.json").read_text() == "the first one's"


def test_a_stack_whose_record_is_damaged_can_be_erased_with_what_still_runs_of_it(tmp_path: Path) -> None:
    home = tmp_path / "my laptop"
    (home / "emulator").mkdir(parents=True)
    (home / "stack.lock").touch()
    (home / "stack.json").write_text('{"ports": {"emul')
    started, other = (
        start("part", ["sleep", "600"], log=tmp_path / "log", environment=clean_environment(), folder=folder)
        for folder in (home / "emulator", tmp_path)
    )
    try:
        stack = a_stack(home, [])
        for command in (stack.up, stack.down, stack.addresses, stack.pids):
            with pytest.raises(ConfigError, match=rf"stack\.json: is damaged: .* labelloop down --erase --home '{home}'"):
                command()
        stack.erase()
        assert not home.exists()
        assert not is_running(started.record)
        assert is_running(other.record)
    finally:
        stop([started.record, other.record], grace_s=0)


def test_a_file_of_somebody_else_that_has_the_records_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "stack.json").write_text("[]")
    stack = a_stack(tmp_path, [])
    for command in (stack.up, stack.down, stack.erase):
        with pytest.raises(ConfigError, match="is damaged"):
            command()
    assert [file.name for file in tmp_path.iterdir()] == ["stack.json"]


def test_addresses_replace_every_aws_setting_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.setenv(name, "the-users")
    addresses = Addresses(
        emulator="http://127.0.0.1:1",
        sagemaker="http://127.0.0.1:2",
        mlflow="http://127.0.0.1:3",
        label_studio="http://127.0.0.1:4",
        api="http://127.0.0.1:1/_aws/execute-api/abc/v1",
        label_studio_user="a",
        label_studio_password="b",
        label_studio_token="c",
        home=tmp_path,
    )
    with monkeypatch.context() as patch:
        environment: dict[str, str] = {"AWS_PROFILE": "the-users", "AWS_SESSION_TOKEN": "the-users", "HOME": "/home/user"}
        patch.setattr("os.environ", environment)
        addresses.use()
    assert environment["AWS_ENDPOINT_URL"] == "http://127.0.0.1:1"
    assert environment["AWS_ENDPOINT_URL_SAGEMAKER"] == "http://127.0.0.1:2"
    assert not {"AWS_PROFILE", "AWS_SESSION_TOKEN"} & set(environment)
    assert environment["HOME"] == "/home/user"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("labelloop-local-state: deploying... [1/3]", "labelloop-local-state: deploying"),
        (" ✅  labelloop-local-state (no changes)", "labelloop-local-state: no changes"),
        (
            "labelloop-local-state | 4/4 | 12:00:03 PM | CREATE_COMPLETE   | AWS::CloudFormation::Stack | labelloop-local-state",
            "labelloop-local-state: create complete",
        ),
        (
            "labelloop-local-state | 2/4 | 12:00:03 PM | CREATE_FAILED | AWS::S3::Bucket | Images (Images9E4C3D12) not allowed",
            "labelloop-local-state: AWS::S3::Bucket Images create failed",
        ),
        ("labelloop-local-state | 1/4 | 12:00:03 PM | CREATE_COMPLETE | AWS::S3::Bucket | Images (Images9E4C3D12)", None),
        ("✨  Synthesis time: 3.45s", "stacks synthesized"),
        ("Outputs:", None),
    ],
)
def test_a_deployments_log_is_told_in_few_words(line: str, said: str | None) -> None:
    assert progress(line) == said


def test_the_cache_folder_is_the_users_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LABELLOOP_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "labelloop"
    monkeypatch.setenv("LABELLOOP_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    assert tool_environment()["LABELLOOP_CACHE"] == str(tmp_path / "own")


def test_uv_is_found_past_a_variable_and_a_shim_that_lead_nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    working = find_uv()
    shims = tmp_path / "shims"
    shims.mkdir()
    executable(shims / "uv", "exit 127")
    monkeypatch.setenv("UV", str(tmp_path / "gone"))
    monkeypatch.setenv("PATH", str(shims))
    monkeypatch.setattr("local.toolchain.REPOSITORY", tmp_path)
    with pytest.raises(LocalServiceError, match="run `make` once"):
        find_uv()
    (tmp_path / ".uv" / "bin").mkdir(parents=True)
    (tmp_path / ".uv" / "bin" / "uv").symlink_to(working)
    assert find_uv() == tmp_path / ".uv" / "bin" / "uv"


def test_a_failed_install_of_the_cdk_command_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LABELLOOP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9/")  # nothing listens there
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
    with pytest.raises(LocalServiceError) as caught:
        cdk_command(tmp_path / "log")
    assert caught.value.part == "npm"
    assert list((tmp_path / "cache").iterdir()) == []
