"""The laptop's stack without Label Studio: what its tools are told, and that a failure leaves nothing behind."""

from __future__ import annotations

import fcntl
import json
import stat
from pathlib import Path

import psutil
import pytest

from labelloop.errors import ConfigError, ConflictError, LocalServiceError
from local.deploy import progress
from local.environment import clean_environment
from local.processes import MARK, is_running, start, stop
from local.stack import Addresses, LaptopStack
from local.toolchain import cache_folder, cdk_command, find_uv, tool_environment


def a_stack(home: Path, said: list[str]) -> LaptopStack:
    return LaptopStack(home, model_configs=home / "model_configs", report=lambda part, text: said.append(f"{part}: {text}"))


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
