"""Server processes that outlive the command that started them, and that only their own stack may stop."""

from __future__ import annotations

import errno
import os
import random
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil

from labelloop.errors import LocalServiceError
from local.environment import LOOPBACK

MARK = "LABELLOOP_PROCESS"  # in the environment of a started process: its mark, after those of the processes it descends from
_LOG_LINES = 15
_ANSWER_S = 2.0
_CLOCK_SLACK_S = 2.0  # psutil derives start times from the boot time, which moves when the clock is set
_PORTS = range(20_000, 32_000)  # below what systems hand to outgoing connections, so that a port is still free after a rest
_COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class ProcessRecord(msgspec.Struct, frozen=True):
    """Enough to find a process again from another one. `created` is seconds since the epoch."""

    part: str
    pid: int
    created: float
    mark: str
    log: str


@dataclass(frozen=True)
class StartedProcess:
    """A process of ours; `popen` tells its exit status."""

    record: ProcessRecord
    popen: subprocess.Popen[bytes]


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nothing listens on."""
    for port in random.sample(_PORTS, 200):
        if is_free(port):
            return port
    raise LocalServiceError("network", f"no free port between {_PORTS.start} and {_PORTS.stop}")


def is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: a closed connection does not hold the port
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
    return True


def start(
    part: str, command: Sequence[str | Path], *, log: Path, environment: Mapping[str, str], folder: Path | None = None
) -> StartedProcess:
    """Start a command in a session of its own, with stdout and stderr appended to `log`. Raises `LocalServiceError`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex
    with log.open("ab") as output:
        try:
            popen = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**environment, MARK: " ".join(filter(None, [os.environ.get(MARK), mark]))},
                cwd=folder,
                start_new_session=True,
            )
        except OSError as error:
            raise LocalServiceError(part, f"cannot start {command[0]}: {error}", log) from error
    try:
        created = psutil.Process(popen.pid).create_time()
    except psutil.NoSuchProcess:  # it has ended already; whoever waits for it learns so
        created = time.time()
    return StartedProcess(ProcessRecord(part, popen.pid, created, mark, str(log)), popen)


def answers(url: str) -> bool:
    """Whether an HTTP GET is answered with a 2xx status."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_ANSWER_S) as answer:
            return 200 <= int(answer.status) < 300
    except (urllib.error.URLError, OSError, ValueError):
        return False


def wait_until_ready(started: StartedProcess, ready: Callable[[], bool], *, limit_s: float) -> None:
    """Return as soon as `ready()`. Raises `LocalServiceError` with the log's end when the process exits or the time is up."""
    deadline = time.monotonic() + limit_s
    while not is_ready(started, ready):
        if time.monotonic() > deadline:
            raise failure(started.record, f"not ready after {limit_s:.0f} s")
        time.sleep(0.05)


def is_ready(started: StartedProcess, ready: Callable[[], bool]) -> bool:
    """One look. Raises `LocalServiceError` with the log's end when the process has exited."""
    status = started.popen.poll()
    if status is not None:
        raise failure(started.record, f"ended with exit status {status}")
    return ready()


def run_to_end(
    part: str,
    command: Sequence[str | Path],
    *,
    log: Path,
    environment: Mapping[str, str],
    folder: Path | None = None,
    limit_s: float,
    on_line: Callable[[str], None] = lambda _: None,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Run a command until it ends with status 0, handing on each line that it writes.

    `meanwhile` is called a few times a second. When it raises, or the command fails or takes longer than `limit_s`, the
    command is stopped; a failure of its own is a `LocalServiceError` with the log's end.
    """
    start_of_log = log.stat().st_size if log.exists() else 0
    started = start(part, command, log=log, environment=environment, folder=folder)
    deadline = time.monotonic() + limit_s
    try:
        with log.open("rb") as written:
            written.seek(start_of_log)
            rest = b""
            while True:
                ended = started.popen.poll() is not None  # before reading, so that the last lines are read
                *lines, rest = (rest + written.read()).split(b"\n")
                for line in lines:
                    on_line(plain(line.decode(errors="replace")))
                if ended:
                    break
                if time.monotonic() > deadline:
                    raise failure(started.record, f"not done after {limit_s:.0f} s", start_of_log)
                meanwhile()
                time.sleep(0.1)
    finally:
        stop([started.record], grace_s=5)
    if started.popen.returncode:
        raise failure(started.record, f"ended with exit status {started.popen.returncode}", start_of_log)


def is_running(record: ProcessRecord) -> bool:
    return _leader(record) is not None


def working_in(folder: Path) -> list[ProcessRecord]:
    """What was started here or in a folder below, for want of its records."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # gone, or not ours to look into
            marks = process.environ().get(MARK, "").split()
            if marks and Path(process.cwd()).is_relative_to(folder.resolve()):
                found.append(ProcessRecord(process.name(), process.pid, process.create_time(), marks[-1], ""))
    return found


def stop(records: Iterable[ProcessRecord], *, grace_s: float) -> None:
    """End these processes and whatever they started: SIGTERM, and SIGKILL after `grace_s` seconds.

    Each process's own group is asked first, so that a process can see to its children itself; then what is left of them.
    A process that merely has a recorded one's number is left alone: its start time and environment differ.
    """
    records = list(records)
    deadline = time.monotonic() + grace_s
    for record in records:
        if _leader(record) is not None:
            with suppress(ProcessLookupError, PermissionError):  # it ended this moment
                os.killpg(record.pid, signal.SIGTERM)
    _wait(lambda: [leader for record in records if (leader := _leader(record))], deadline)
    for process in _belonging(records):
        _send(process, signal.SIGTERM)
    _wait(lambda: _belonging(records), deadline)
    for process in _belonging(records):
        _send(process, signal.SIGKILL)
    _wait(lambda: _belonging(records), time.monotonic() + 5.0)
    if left := _belonging(records):
        raise LocalServiceError(records[0].part, f"process {left[0].pid} cannot be stopped", Path(records[0].log))


def failure(record: ProcessRecord, message: str, start_of_log: int = 0) -> LocalServiceError:
    """The error that says how a part failed, with the end of its log, as far as that was written after `start_of_log` bytes."""
    log = Path(record.log)
    ending = tail(log, start_of_log)
    return LocalServiceError(record.part, message + (f"; the log ends with\n{ending}" if ending else ""), log)


def tail(log: Path, start: int = 0) -> str:
    """The last lines of a log from byte `start` on, without colours."""
    try:
        with log.open("rb") as file:
            file.seek(max(start, log.stat().st_size - 64 * 1024))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(plain(text).rstrip().splitlines()[-_LOG_LINES:])


def plain(text: str) -> str:
    """Text without terminal colours."""
    return _COLOURS.sub("", text)


def _leader(record: ProcessRecord) -> psutil.Process | None:
    """The recorded process while it runs and is the one that was recorded."""
    try:
        process = psutil.Process(record.pid)
        ours = abs(process.create_time() - record.created) < _CLOCK_SLACK_S and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return None
    return process if ours else None


def _belonging(records: list[ProcessRecord]) -> list[psutil.Process]:
    """What runs of these processes and of all they started, in whatever session."""
    marks = {record.mark for record in records}
    found = {process.pid: process for record in records if (process := _leader(record))}
    for process in list(found.values()):
        try:
            found |= {child.pid: child for child in process.children(recursive=True)}
        except psutil.Error:
            continue
    for process in psutil.process_iter():
        try:
            if process.pid not in found and marks.intersection(process.environ().get(MARK, "").split()):
                found[process.pid] = process
        except psutil.Error:
            continue  # gone, or not ours to look into
    return [process for process in found.values() if _is_alive(process)]


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _send(process: psutil.Process, number: int) -> None:
    with suppress(psutil.Error):  # psutil itself refuses when the number has been taken over by another process
        process.send_signal(number)


def _wait(left: Callable[[], list[psutil.Process]], deadline: float) -> None:
    while (processes := left()) and time.monotonic() < deadline:
        psutil.wait_procs(processes, timeout=min(0.5, max(0.0, deadline - time.monotonic())))
