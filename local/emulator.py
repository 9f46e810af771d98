"""AWS on a laptop: ministack, in an environment of its own, with the few things it gets wrong put right.

Run as a script by an interpreter that holds ministack and nothing of labelloop: functions run on that same interpreter, and
must find only what their layers bring. This file therefore imports neither labelloop nor anything else that is installed.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REQUIREMENTS = ("ministack==1.5.33", "boto3==1.43.106")  # boto3: Lambda's own Python brings it, so functions may rely on it
READY_PATH = "/_ministack/health"
FUNCTION_LOGS = "LABELLOOP_FUNCTION_LOGS"
SAVE_S = 5.0  # between two savings of the state
_SAVE_SHARE = 20  # as many times longer than a saving takes it is idle before the next, if that is more
CONCURRENCY = 8  # each concurrent invocation unpacks its own copy of the layers: some 100 MB

# What reaches ministack, and through it the functions, of the environment that it is started with.
_KEPT = re.compile(
    r"PATH|HOME|USER|LANG|LC_.*|TZ|TMPDIR|NO_PROXY|no_proxy|SSL_CERT_(FILE|DIR)|LABELLOOP_PROCESS"
    r"|GATEWAY_PORT|BIND_HOST|SFTP_ENABLED|IOT_MTLS_ENABLED|AUTH|LAMBDA_.*|PERSIST_STATE|S3_PERSIST|S3_DATA_DIR|STATE_DIR"
    r"|AWS_ACCESS_KEY_ID|AWS_SECRET_ACCESS_KEY|AWS_REGION|AWS_DEFAULT_REGION|LOG_LEVEL|PYTHON(UNBUFFERED|DONTWRITEBYTECODE)"
    r"|OMP_NUM_THREADS|OPENBLAS_NUM_THREADS"
)


def command(uv: Path, python: str) -> list[str]:
    """The words that start the emulator on the Python at `python`; its packages come from uv's cache or from PyPI."""
    packages = [word for requirement in REQUIREMENTS for word in ("--with", requirement)]
    return [
        str(uv),
        "run",
        "--no-project",
        "--isolated",
        "--python",
        python,
        *packages,
        "python",
        "-P",
        str(Path(__file__).resolve()),
    ]


def environment(port: int, data: Path, function_logs: Path) -> Mapping[str, str]:
    """Settings of an emulator on 127.0.0.1:`port` that keeps its state below `data`."""
    return {
        "GATEWAY_PORT": str(port),
        "BIND_HOST": "127.0.0.1",  # it executes code: nobody else may reach it
        "SFTP_ENABLED": "0",
        "IOT_MTLS_ENABLED": "0",
        "AUTH": "true",  # IAM policies are enforced, so that a missing grant shows on the laptop
        "LAMBDA_ACCOUNT_CONCURRENCY": str(CONCURRENCY),
        "PERSIST_STATE": "1",
        "S3_PERSIST": "1",
        "STATE_DIR": str(data / "state"),
        "S3_DATA_DIR": str(data / "s3"),
        "TMPDIR": str(data / "tmp"),
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "OMP_NUM_THREADS": "1",  # as many threads per function as cores would only compete
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",  # as on Lambda, where a layer cannot be written to
        FUNCTION_LOGS: str(function_logs),
    }


def count_loopback_as_tls() -> None:
    """Let `aws:SecureTransport` be true for callers on this machine.

    CDK's bootstrap bucket and every `enforce_ssl=True` bucket deny requests without TLS; on AWS nobody notices, and on
    loopback there is no TLS and nobody to listen.
    """
    from ministack import app
    from ministack.core.iam_evaluator import pin_request_origin

    def pin(source_ip: str, secure_transport: bool) -> None:
        pin_request_origin(source_ip, secure_transport or ipaddress.ip_address(source_ip).is_loopback)

    app.pin_request_origin = pin


def keep_function_logs(folder: Path) -> None:
    """Append all that a function writes to `folder/{function}.log`, as it writes it.

    ministack reads it only after an answer, into CloudWatch Logs: what a function writes while it fails to start is lost, and
    nothing is on disk.
    """
    from ministack.core.lambda_runtime import Worker

    folder.mkdir(parents=True, exist_ok=True)
    lock = threading.Lock()

    def read(worker: Any) -> None:
        with (folder / f"{worker.func_name}.log").open("a", buffering=1) as log:
            for line in worker._proc.stderr:
                worker._stderr_queue.put(line.rstrip("\n"))
                with lock:
                    log.write(line)

    Worker._read_stderr = read


def flush_authorizers() -> None:
    """Add API Gateway's FlushStageAuthorizersCache, which ministack lacks: it keeps what authorizers answered, as AWS does."""
    from ministack.services import apigateway_v1

    handle = apigateway_v1.handle_request
    answered = apigateway_v1._authorizer_cache

    async def handle_or_flush(method: str, path: str, headers: Any, body: Any, query: Any) -> Any:
        match [method, *path.strip("/").split("/")]:
            case ["DELETE", "restapis", api, "stages", stage, "cache", "authorizers"]:
                for key in [key for key in answered if (key[2], key[4]) == (api, stage)]:
                    del answered[key]
                return 202, {}, b""
        return await handle(method, path, headers, body, query)

    apigateway_v1.handle_request = handle_or_flush


def save_meanwhile() -> None:
    """Save what has changed every few seconds. ministack saves when it is asked to stop, and nothing where it is killed.

    Its event loop answers the requests, so between two of them nothing is half-done.
    """
    from ministack import app
    from ministack.core.persistence import save_state
    from ministack.core.responses import AccountRegionScopedDict, AccountScopedDict

    for kind in (AccountScopedDict, AccountRegionScopedDict):
        kind.__eq__ = lambda self, other: type(self) is type(other) and self._data == other._data
    logging.getLogger("persistence").setLevel(logging.WARNING)
    load = app._load_persisted_state

    async def save_again_and_again() -> None:
        saved: dict[str, Any] = {}
        while True:
            took = 0.0
            for name, get_state in app._build_persistence_save_dict().items():
                began = time.monotonic()
                try:
                    state = get_state()
                    if name == "lambda":  # or each batch of messages would have all layers written, some 90 MB
                        for mapping in state["esms"]._data.values():
                            mapping["LastProcessingResult"] = "No records processed"
                    if state is not None and state != saved.get(name):
                        save_state(name, state)
                        saved[name] = state
                except Exception:  # a thread changes it: the next round
                    logging.getLogger("persistence").exception("%s is not saved yet", name)
                took += time.monotonic() - began
                await asyncio.sleep(0)
            await asyncio.sleep(max(SAVE_S, took * _SAVE_SHARE))

    def load_and_save_from_then_on() -> None:
        load()
        app.saving = asyncio.get_running_loop().create_task(save_again_and_again())

    app._load_persisted_state = load_and_save_from_then_on


def main() -> None:
    function_logs = os.environ[FUNCTION_LOGS]
    for name in list(os.environ):
        if not _KEPT.fullmatch(name):
            del os.environ[name]
    for name in ("STATE_DIR", "S3_DATA_DIR", "TMPDIR"):
        Path(os.environ[name]).mkdir(parents=True, exist_ok=True)

    from ministack import app  # reads its settings from the environment when it is imported

    count_loopback_as_tls()
    keep_function_logs(Path(function_logs))
    flush_authorizers()
    save_meanwhile()
    sys.argv = ["ministack"]
    app.main()


if __name__ == "__main__":
    main()
