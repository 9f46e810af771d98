"""The laptop stack: the emulator with the deployed stacks, the SageMaker stand-in, Label Studio and MLflow, under one folder.

home/stack.json    addresses, sign-in and processes; readable by the owner only
home/logs/         one log per part, per training job (jobs/) and per function (functions/)
home/emulator/     what AWS would keep
home/sagemaker/    training jobs: records and their /opt/ml folders
home/label_studio/ home/mlflow/ home/cdk/
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
from botocore.exceptions import BotoCoreError, ClientError

from labelloop.errors import ConfigError, ConflictError, LocalServiceError
from labelloop.model_config import ModelConfigs
from local import emulator
from local.deploy import Deployment
from local.environment import LOOPBACK, REGION, aws_client, aws_environment, clean_environment
from local.processes import (
    ProcessRecord,
    StartedProcess,
    answers,
    failure,
    free_port,
    is_free,
    is_ready,
    is_running,
    start,
    stop,
    working_in,
)
from local.toolchain import find_uv, tool_environment

STAGE = "local"
LABEL_STUDIO = "label-studio==1.23.2"
PARTS = ("emulator", "sagemaker", "mlflow", "label_studio")
_READY_PATHS = {"emulator": emulator.READY_PATH, "sagemaker": "/", "mlflow": "/health", "label_studio": "/health"}
# For a part that hangs; one that ends is noticed at once. A first start downloads packages, and a busy machine is far slower.
_READY_LIMIT_S = 600.0
_LEAST_FREE = 1_000_000_000  # bytes; each of the functions that run at once unpacks its layers, some 100 MB
_STOP_GRACE_S = 30.0  # the emulator writes its state when it is asked to stop


@dataclass(frozen=True, kw_only=True)
class Addresses:
    """Where the parts are (no trailing slashes) and how to sign in. A model's backend is `{api}/{model}`."""

    emulator: str
    sagemaker: str
    mlflow: str
    label_studio: str
    api: str
    label_studio_user: str
    label_studio_password: str
    label_studio_token: str
    home: Path
    stage: str = STAGE
    region: str = REGION

    def aws_environment(self) -> Mapping[str, str]:
        """The variables with which any AWS client reaches this stack; see `use`."""
        return aws_environment(self.emulator, sagemaker=self.sagemaker)

    def use(self) -> None:
        """Let every AWS client of this process, and of those that it starts, reach this stack and no account."""
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            del os.environ[name]
        os.environ.update(self.aws_environment())


class _Record(msgspec.Struct):
    """What `stack.json` holds. Ports and sign-in stay the same for the folder's life: Label Studio's webhooks hold them."""

    ports: dict[str, int]
    password: str
    token: str
    user: str = "admin@labelloop.local"
    api: str | None = None
    processes: dict[str, ProcessRecord] = {}


@dataclass(frozen=True)
class _Pending:
    """A part that was started and is not ready yet; `since` is of the monotonic clock."""

    process: StartedProcess
    address: str
    ready_path: str
    since: float


class LaptopStack:
    """One stack, kept in the folder `home`. `report(part, text)` is told what happens.

    Every method that fails raises `LocalServiceError`, which names the part and its log, `ConflictError` while another command
    starts or stops the stack, or `ConfigError` for a `home` that no stack can be, or is, kept in, or whose record is damaged.
    """

    def __init__(self, home: Path, *, model_configs: Path, report: Callable[[str, str], None]) -> None:
        self.home = home.absolute()
        self.timings: dict[str, float] = {}
        self._model_configs = model_configs.absolute()
        self._report = report
        self._pending: dict[str, _Pending] = {}
        self._started: list[str] = []

    def up(self) -> Addresses:
        """Start what does not run and deploy. After a failure or an interruption, what this call started is stopped again.

        Raises `ConfigError` for a model's wrong config or template, a damaged record, a disk that is all but full, or a folder
        that holds anything else (it is the stack's alone, and `erase` deletes it), before anything is started.
        """
        ModelConfigs(self._model_configs).checked()
        if _read(self.home) is None and self._holds_anything:
            raise ConfigError(
                self.home,
                "holds files, but no stack.json; name an empty folder, or put a copy of a stack.json that was lost back",
                "--home",
            )
        with self._alone():
            self._demand_room()
            record = _read(self.home) or _Record(ports={}, password=secrets.token_urlsafe(12), token=secrets.token_hex(20))
            self._pending, self._started = {}, []
            try:
                self._start_missing(record)
                self._wait_for("emulator")
                self._deploy(record)
                for part in PARTS:
                    self._wait_for(part)
            except BaseException:
                self._stop(record, self._started)
                raise
        addresses = self.addresses()
        if addresses is None:
            raise LocalServiceError("laptop", "a part stopped as soon as it was ready", self._log("emulator").parent)
        return addresses

    def down(self) -> None:
        """Stop everything; what the parts hold is kept. A folder without a stack is left as it is."""
        if _read(self.home) is None and not self._lock.exists():
            return
        with self._alone():
            self._stop_all()

    def erase(self) -> None:
        """Stop everything and delete the folder, also where its record is damaged. Refuses a folder that no stack was kept in."""
        damaged = False
        try:
            record = _read(self.home)
        except ConfigError:
            if not self._lock.exists():  # which `up` makes where there is no such file yet, or a sound one
                raise
            record, damaged = None, True
        if not self.home.exists():
            return
        if record is None and not damaged and self._holds_anything:
            raise ConfigError(self.home, "holds no stack; delete it by hand if it is to go", "--home")
        with self._alone():  # an `up` that has recorded nothing yet holds it, too
            if damaged:
                stop(working_in(self.home), grace_s=_STOP_GRACE_S)
            else:
                self._stop_all()
            shutil.rmtree(self.home)

    def _stop_all(self) -> None:
        record = _read(self.home)
        if record is not None:
            self._stop(record, list(record.processes))

    def addresses(self) -> Addresses | None:
        """Of the recorded stack; see `running`."""
        return self.running(self.home)

    @staticmethod
    def running(home: Path) -> Addresses | None:
        """Addresses of the stack that is kept in `home`; None when it was not deployed, or nothing of it runs.

        Raises `LocalServiceError` when only a part of it runs.
        """
        record = _read(home)
        if record is None or record.api is None:
            return None
        stopped = [part for part in PARTS if part not in record.processes or not is_running(record.processes[part])]
        if len(stopped) == len(PARTS):
            return None
        if stopped:
            raise LocalServiceError(
                stopped[0],
                f"does not run in {home}, the rest of the stack does; run: labelloop up --home {home}",
                home / "logs" / f"{stopped[0]}.log",
            )
        return Addresses(
            emulator=_url(record, "emulator"),
            sagemaker=_url(record, "sagemaker"),
            mlflow=_url(record, "mlflow"),
            label_studio=_url(record, "label_studio"),
            api=record.api,
            label_studio_user=record.user,
            label_studio_password=record.password,
            label_studio_token=record.token,
            home=home.absolute(),
        )

    def pids(self) -> dict[str, int]:
        """The process of each part that was started; its own children do not count."""
        record = _read(self.home)
        return {part: process.pid for part, process in record.processes.items()} if record else {}

    def job_log(self, job_name: str) -> Path:
        """What a training job has written so far; the file appears when its process starts."""
        return self._logs / "jobs" / f"{job_name}.log"

    def _demand_room(self) -> None:
        free = shutil.disk_usage(self.home).free
        if free < _LEAST_FREE:
            raise ConfigError(
                self.home,
                f"has {free / 1e9:.1f} GB free, and a stack wants {_LEAST_FREE / 1e9:.0f} GB; make room, or name another folder",
                "--home",
            )

    def _start_missing(self, record: _Record) -> None:
        """Start every part that does not run, all at once: each knows the others' addresses beforehand."""
        running = [part for part in PARTS if part in record.processes and is_running(record.processes[part])]
        dead = [process for part, process in record.processes.items() if part not in running]
        if dead:  # their children may live on, hold the port, and write into the folder
            stop(dead, grace_s=_STOP_GRACE_S)
        before = dict(record.ports)
        for part in PARTS:
            if part not in running and not (part in record.ports and is_free(record.ports[part])):
                record.ports[part] = _other_port(record.ports)
        moved = [part for part in before if before[part] != record.ports[part]]
        if moved:
            self._report(moved[0], f"port {before[moved[0]]} is taken: it is at {record.ports[moved[0]]} from now on")
            self._stop(record, running)  # they were told the old address
            running = []
        self._write(record)
        for part in PARTS:
            if part in running:
                self._report(part, "runs already")
                continue
            self._report(part, "starting")
            process = self._start(part, record)
            self._started.append(part)
            record.processes[part] = process.record
            self._write(record)
            self._pending[part] = _Pending(process, _url(record, part), _READY_PATHS[part], time.monotonic())

    def _start(self, part: str, record: _Record) -> StartedProcess:
        command, environment = {
            "emulator": self._emulator,
            "sagemaker": self._sagemaker,
            "mlflow": self._mlflow,
            "label_studio": self._label_studio,
        }[part](record)
        folder = self.home / part
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # secrets and images are nobody else's
        return start(part, command, log=self._log(part), environment=environment, folder=folder)

    def _emulator(self, record: _Record) -> tuple[list[str], Mapping[str, str]]:
        data = self.home / "emulator"
        shutil.rmtree(data / "tmp", ignore_errors=True)  # what functions of the last time unpacked there
        settings = emulator.environment(record.ports["emulator"], data, self._logs / "functions")
        return emulator.command(find_uv(), sys.executable), {**tool_environment(), **settings}

    def _sagemaker(self, record: _Record) -> tuple[list[str], Mapping[str, str]]:
        endpoint = _url(record, "emulator")
        command = [sys.executable, "-P", "-m", "local.sagemaker", "--port", str(record.ports["sagemaker"])]
        command += ["--home", str(self.home / "sagemaker"), "--logs", str(self._logs / "jobs"), "--endpoint", endpoint]
        return command, {**clean_environment(), **aws_environment(endpoint)}

    def _mlflow(self, record: _Record) -> tuple[list[str], Mapping[str, str]]:
        folder = self.home / "mlflow"
        command = [sys.executable, "-P", "-m", "mlflow", "server", "--host", LOOPBACK, "--port", str(record.ports["mlflow"])]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
        command += ["--artifacts-destination", str(folder / "artifacts")]
        switches = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        return command, {**clean_environment(), **switches}

    def _label_studio(self, record: _Record) -> tuple[list[str], Mapping[str, str]]:
        data = str(self.home / "label_studio")
        command = [str(find_uv()), "tool", "run", "--python", "3.11", "--from", LABEL_STUDIO, "label-studio"]
        command += ["start", "--no-browser"]
        command += ["--data-dir", data, "--internal-host", LOOPBACK]
        command += ["--port", str(record.ports["label_studio"])]
        switches = {
            "LABEL_STUDIO_BASE_DATA_DIR": data,  # also before it reads its arguments, or it makes a folder in the user's home
            "COLLECT_ANALYTICS": "false",
            "SENTRY_DSN": "",
            "FRONTEND_SENTRY_DSN": "",
            "LATEST_VERSION_CHECK": "false",
            "ML_BLOCK_LOCAL_IP": "false",  # backends and storage are on this machine
            "SSRF_PROTECTION_ENABLED": "false",
            "ML_TIMEOUT_HEALTH": "10",
            "ML_TIMEOUT_SETUP": "15",
            "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
            "LABEL_STUDIO_USERNAME": record.user,
            "LABEL_STUDIO_PASSWORD": record.password,
            "LABEL_STUDIO_USER_TOKEN": record.token,
        }
        return command, {**tool_environment(), **switches}

    def _wait_for(self, part: str) -> None:
        while part in self._pending:
            self._look()
            time.sleep(0.05)

    def _look(self) -> None:
        """Note what has become ready. Raises `LocalServiceError` when a part has exited or takes too long."""
        for part, pending in list(self._pending.items()):
            took = time.monotonic() - pending.since
            if is_ready(pending.process, partial(answers, pending.address + pending.ready_path)):
                del self._pending[part]
                self.timings[part] = took
                self._report(part, f"ready after {took:.1f} s at {pending.address}")
            elif took > _READY_LIMIT_S:
                raise failure(pending.process.record, f"not ready after {_READY_LIMIT_S:.0f} s")

    def _deploy(self, record: _Record) -> None:
        endpoint = _url(record, "emulator")
        deployment = Deployment(
            endpoint=endpoint,
            context={
                "stage": STAGE,
                "label_studio_url": _url(record, "label_studio"),
                "mlflow_url": _url(record, "mlflow"),
                "sagemaker_endpoint": _url(record, "sagemaker"),
                "model_configs": str(self._model_configs),
            },
            work=self.home / "cdk",
            log=self._log("deploy"),
        )
        with self._timed("bootstrap"):
            self._report("deploy", "preparing the account for CDK")
            deployment.bootstrap(meanwhile=self._look)
        with self._timed("deploy"):
            self._report("deploy", "cdk deploy --all")
            deployment.deploy(lambda text: self._report("deploy", text), meanwhile=self._look)
        api_id = self._hand_over(endpoint, record.token)
        record.api = f"{endpoint}/_aws/execute-api/{api_id}/v1"
        self._write(record)

    def _hand_over(self, endpoint: str, token: str) -> str:
        """Put Label Studio's token where the functions read it. Returns the id of the REST API."""
        try:
            aws_client("secretsmanager", endpoint).put_secret_value(
                SecretId=f"labelloop/{STAGE}/label-studio", SecretString=msgspec.json.encode({"token": token}).decode()
            )
            stacks = aws_client("cloudformation", endpoint).describe_stacks(StackName=f"labelloop-{STAGE}-serving")["Stacks"]
        except (BotoCoreError, ClientError) as error:
            raise LocalServiceError("deploy", f"what was deployed is not complete: {error}", self._log("deploy")) from error
        outputs = {output["OutputKey"]: output["OutputValue"] for output in stacks[0].get("Outputs", [])}
        if "ApiId" not in outputs:
            raise LocalServiceError("deploy", f"labelloop-{STAGE}-serving has no output ApiId", self._log("deploy"))
        return str(outputs["ApiId"])

    def _stop(self, record: _Record, parts: list[str]) -> None:
        processes = [record.processes[part] for part in parts if part in record.processes]
        if processes:
            self._report("laptop", f"stopping {', '.join(process.part for process in processes)}")
            stop(processes, grace_s=_STOP_GRACE_S)
        for part in parts:
            record.processes.pop(part, None)
        self._write(record)
        if "emulator" not in record.processes:
            shutil.rmtree(self.home / "emulator" / "tmp", ignore_errors=True)

    @property
    def _holds_anything(self) -> bool:
        return self.home.is_dir() and any(file != self._lock for file in self.home.iterdir())

    @property
    def _lock(self) -> Path:
        return self.home / "stack.lock"

    @property
    def _logs(self) -> Path:
        return self.home / "logs"

    def _log(self, part: str) -> Path:
        return self._logs / f"{part}.log"

    def _write(self, record: _Record) -> None:
        path = _file(self.home)
        scratch = path.with_suffix(".new")
        scratch.touch(mode=0o600)
        scratch.write_bytes(msgspec.json.format(msgspec.json.encode(record)))
        scratch.replace(path)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the folder, so that two commands never start or stop the same stack at once."""
        try:
            self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise _unusable(self.home, error) from error
        busy = f"another command is starting or stopping the stack in {self.home}; let it finish, then run this one again"
        with held(self._lock, busy):
            yield

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        since = time.monotonic()
        yield
        self.timings[phase] = time.monotonic() - since


@contextmanager
def held(lock: Path, taken: str) -> Iterator[None]:
    """Hold a file, which is made where it is missing. Raises `ConflictError`, saying `taken`, when another process has it."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        raise _unusable(lock.parent, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConflictError(taken) from None
        yield


def _file(home: Path) -> Path:
    return home / "stack.json"


def _read(home: Path) -> _Record | None:
    try:
        return msgspec.json.decode(_file(home).read_bytes(), type=_Record)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unusable(home, error) from error
    except msgspec.DecodeError as error:
        raise ConfigError(
            _file(home),
            f"is damaged: {error}; put a copy of it back if you have one, or delete the stack with all its data: "
            f"labelloop down --erase --home {shlex.quote(str(home))}",
        ) from error


def _unusable(home: Path, error: OSError) -> ConfigError:
    """Of a file, or a folder that is closed to the user."""
    return ConfigError(home, f"no stack can be kept there: {error.strerror}; name another folder", "--home")


def _url(record: _Record, part: str) -> str:
    return f"http://{LOOPBACK}:{record.ports[part]}"


def _other_port(taken: Mapping[str, int]) -> int:
    while (port := free_port()) in taken.values():
        pass
    return port
