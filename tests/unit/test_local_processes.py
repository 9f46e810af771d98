"""Server processes: they become ready or say why not, and only they and their children are stopped."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from labelloop.errors import LocalServiceError
from local.environment import clean_environment
from local.processes import (
    ProcessRecord,
    StartedProcess,
    answers,
    free_port,
    is_free,
    is_running,
    run_to_end,
    start,
    stop,
    wait_until_ready,
)


@pytest.fixture
def begun(tmp_path: Path) -> Iterator[object]:
    """Starts Python programs; whatever of them still runs at the end is stopped."""
    records: list[ProcessRecord] = []

    def begin(program: str, *arguments: str, part: str = "thing") -> StartedProcess:
        command = [sys.executable, "-c", program, *arguments]
        started = start(part, command, log=tmp_path / f"{part}.log", environment=clean_environment())
        records.append(started.record)
        return started

    yield begin
    stop(records, grace_s=0)


SERVER = "import http.server as h, sys;h.HTTPServer(('127.0.0.1', int(sys.argv[1])), h.SimpleHTTPRequestHandler).serve_forever()"
SLEEPER = "import time; time.sleep(600)"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"


def wait_for(condition, what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def test_a_server_is_ready_when_it_answers(begun) -> None:
    port = free_port()
    started = begun(SERVER, str(port))
    wait_until_ready(started, lambda: answers(f"http://127.0.0.1:{port}/"), limit_s=60)
    assert not is_free(port)
    assert is_running(started.record)


def test_a_server_that_ends_early_is_an_error_with_the_end_of_its_log(begun) -> None:
    started = begun("print('first line'); raise SystemExit('the database is broken')", part="catalogue")
    with pytest.raises(LocalServiceError) as caught:
        wait_until_ready(started, lambda: False, limit_s=60)
    assert caught.value.part == "catalogue"
    assert caught.value.log == Path(started.record.log)
    assert "exit status 1" in str(caught.value)
    assert "the database is broken" in str(caught.value)


def test_a_server_that_never_answers_is_an_error(begun) -> None:
    with pytest.raises(LocalServiceError, match="not ready after"):
        wait_until_ready(begun(SLEEPER), lambda: False, limit_s=0.2)


def test_a_command_that_cannot_be_started_is_an_error_of_its_part(tmp_path: Path) -> None:
    with pytest.raises(LocalServiceError, match="engine: cannot start"):
        start("engine", [tmp_path / "missing"], log=tmp_path / "log", environment={})


def test_stopping_ends_children_in_their_own_sessions_too(begun, tmp_path: Path) -> None:
    numbers = tmp_path / "pids"
    program = (
        "import subprocess, sys, time, pathlib;"
        "sleeper = [sys.executable, '-c', 'import time; time.sleep(600)'];"
        "children = [subprocess.Popen(sleeper, start_new_session=own) for own in (False, True)];"
        f"pathlib.Path({str(numbers)!r}).write_text(' '.join(str(child.pid) for child in children)); time.sleep(600)"
    )
    started = begun(program)
    wait_for(lambda: numbers.exists() and len(numbers.read_text().split()) == 2, "the children were not started")
    children = [psutil.Process(int(number)) for number in numbers.read_text().split()]
    stop([started.record], grace_s=10)
    assert not is_running(started.record)
    assert [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE] == []


def test_children_are_found_after_their_parent_was_killed(begun, tmp_path: Path) -> None:
    number = tmp_path / "pid"
    program = (
        "import subprocess, sys, time, pathlib;"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True);"
        f"pathlib.Path({str(number)!r}).write_text(str(child.pid)); time.sleep(600)"
    )
    started = begun(program)
    wait_for(lambda: number.exists() and number.read_text(), "the child was not started")
    child = psutil.Process(int(number.read_text()))
    started.popen.kill()
    started.popen.wait()
    assert child.is_running()
    stop([started.record], grace_s=10)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_what_ignores_sigterm_is_killed(begun) -> None:
    started = begun(DEAF)
    wait_for(lambda: "deaf" in Path(started.record.log).read_text(), "the process did not start")
    stop([started.record], grace_s=0.2)
    assert not is_running(started.record)  # its exit status may have been taken by who waited for it first


def test_a_record_read_back_in_another_process_still_names_the_process(begun) -> None:
    record = msgspec.json.decode(msgspec.json.encode(begun(SLEEPER).record), type=ProcessRecord)
    found = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, msgspec, local.processes as p;"
            "print(p.is_running(msgspec.json.decode(sys.argv[1], type=p.ProcessRecord)))",
            msgspec.json.encode(record).decode(),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "True"


def test_a_stranger_that_has_a_recorded_number_is_left_alone() -> None:
    stranger = subprocess.Popen([sys.executable, "-c", SLEEPER], start_new_session=True)
    try:
        created = psutil.Process(stranger.pid).create_time()
        record = ProcessRecord("emulator", stranger.pid, created - 3600, "0" * 32, os.devnull)
        assert not is_running(record)
        stop([record], grace_s=0)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_command_hands_on_its_lines_and_its_failure(tmp_path: Path) -> None:
    lines: list[str] = []
    program = "print('\\x1b[32mone\\x1b[0m'); print('two'); raise SystemExit(3)"
    with pytest.raises(LocalServiceError, match="exit status 3"):
        run_to_end(
            "tool",
            [sys.executable, "-c", program],
            log=tmp_path / "log",
            environment=clean_environment(),
            limit_s=60,
            on_line=lines.append,
        )
    assert lines == ["one", "two"]


def test_a_command_s_failure_shows_nothing_of_what_an_earlier_one_wrote(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for said in ("all is well", "what is wrong"):
        with pytest.raises(LocalServiceError) as caught:
            run_to_end("tool", ["sh", "-c", f"echo {said}; exit 3"], log=log, environment=clean_environment(), limit_s=60)
    assert "what is wrong" in str(caught.value)
    assert "all is well" not in str(caught.value)
    assert "all is well" in log.read_text()


def test_a_command_is_stopped_when_something_else_fails_meanwhile(tmp_path: Path) -> None:
    number = tmp_path / "pid"
    program = f"import os, pathlib, time; pathlib.Path({str(number)!r}).write_text(str(os.getpid())); time.sleep(600)"

    def fail_once_started() -> None:
        if number.exists() and number.read_text():
            raise LocalServiceError("other", "broke")

    with pytest.raises(LocalServiceError, match="other: broke"):
        run_to_end(
            "tool",
            [sys.executable, "-c", program],
            log=tmp_path / "log",
            environment=clean_environment(),
            limit_s=60,
            meanwhile=fail_once_started,
        )
    assert not psutil.pid_exists(int(number.read_text()))


def test_the_environment_names_no_account_and_no_foreign_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "PYTHONPATH", "LABELLOOP_STAGE", "VIRTUAL_ENV", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, "anything")
    monkeypatch.setenv("NO_PROXY", "intranet")
    environment = clean_environment()
    assert not [name for name in environment if name.startswith(("AWS_", "PYTHONPATH", "LABELLOOP_", "VIRTUAL_ENV", "MLFLOW_"))]
    assert environment["NO_PROXY"] == "intranet,127.0.0.1,localhost"
