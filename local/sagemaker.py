"""SageMaker on a laptop: runs a training job's container command as a process over a folder that stands for /opt/ml.

An HTTP server for four operations of SageMaker's API (AWS JSON 1.1): CreateTrainingJob, DescribeTrainingJob, ListTrainingJobs and
StopTrainingJob. What is asked for is checked against AWS's own description of the API, as it comes with botocore. A job's end is
announced by an EventBridge event whose source is `labelloop.sagemaker`, because nobody may send as `aws.sagemaker`.

The folder of checkpoints is copied to S3 while a job runs. A spot job whose process is ended by a SIGTERM that nobody asked for
has lost its machine: it starts again on a fresh one, with its checkpoints.

    python -m local.sagemaker --port P --home FOLDER --endpoint URL_OF_THE_EMULATOR
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any

import botocore.session
import msgspec
import obstore
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.validate import ParamValidator
from obstore.store import S3Store

from labelloop.artifacts import is_plain_key
from local.environment import ACCOUNT, LOOPBACK, REGION, aws_client, aws_environment, clean_environment, s3_store
from local.processes import ProcessRecord, start, stop

EVENT_SOURCE = "labelloop.sagemaker"
EVENT_TYPE = "SageMaker Training Job State Change"
STOP_GRACE_S = 10.0  # AWS gives 120
_TERMINATED = (-signal.SIGTERM, 128 + signal.SIGTERM)  # exit status of a process that SIGTERM ended, or that left because of it
_CHECKPOINTS = "/opt/ml/checkpoints"
_SYNC_S = 1.0
_FAILURE_CHARACTERS = 1024
_HYPERPARAMETER_CHARACTERS = 256
_DOWNLOADS = 16
_NOT_READ = (BotoCoreError, ClientError, obstore.exceptions.BaseError, FileNotFoundError)
_TERMINAL = ("Completed", "Failed", "Stopped")
_OPT_ML = re.compile(r"/opt/ml(?![\w.-])")
_ECHOED = (
    "TrainingJobName",
    "HyperParameters",
    "AlgorithmSpecification",
    "RoleArn",
    "InputDataConfig",
    "OutputDataConfig",
    "ResourceConfig",
    "StoppingCondition",
    "CheckpointConfig",
    "Environment",
    "EnableManagedSpotTraining",
)

log = logging.getLogger("local.sagemaker")


class ApiError(Exception):
    """An answer with HTTP status 400; `code` is what AWS calls the error."""

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(message)


class JobFailure(Exception):
    """The job cannot go on; the text is its FailureReason."""


class Job(msgspec.Struct):
    """One training job as it is kept on disk. Times are seconds since the epoch."""

    request: dict[str, Any]
    created: float
    status: str = "InProgress"
    secondary: str = "Starting"
    modified: float = 0.0
    started: float | None = None
    ended: float | None = None
    failure: str | None = None
    artifacts: str | None = None
    process: ProcessRecord | None = None
    event_due: bool = False
    trained_s: float = 0.0  # on the machines that were taken away
    transitions: list[tuple[str, float]] = []  # secondary statuses and when they began

    def __post_init__(self) -> None:
        self.transitions = self.transitions or [(self.secondary, self.created)]

    def enter(self, secondary: str) -> None:
        self.secondary = secondary
        self.transitions.append((secondary, time.time()))

    @property
    def spot(self) -> bool:
        return bool(self.request.get("EnableManagedSpotTraining"))

    @property
    def checkpoints(self) -> str | None:
        """The s3:// address of its checkpoints."""
        uri = self.request.get("CheckpointConfig", {}).get("S3Uri")
        return f"{uri.rstrip('/')}/" if uri else None

    @property
    def name(self) -> str:
        return str(self.request["TrainingJobName"])

    @property
    def arn(self) -> str:
        return f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:training-job/{self.name}"


class JobStore:
    """The job records of a folder: one JSON file each, replaced as a whole."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.RLock()
        folder.mkdir(parents=True, exist_ok=True)
        self._jobs = {
            job.name: job for path in folder.glob("*.json") for job in [msgspec.json.decode(path.read_bytes(), type=Job)]
        }

    def add(self, job: Job) -> None:
        """Raises `ApiError` when the name is taken; names are taken for ever, as on AWS."""
        with self._lock:
            if job.name in self._jobs:
                raise ApiError(
                    "ResourceInUse",
                    "Training job names must be unique within an AWS account and region, "
                    f"and a training job with this name already exists ({job.arn})",
                )
            self._jobs[job.name] = job
            self._write(job)

    def get(self, name: str) -> Job:
        with self._lock:
            if name not in self._jobs:
                raise ApiError("ValidationException", "Requested resource not found.")
            return self._jobs[name]

    def all(self) -> list[Job]:
        with self._lock:
            return list(self._jobs.values())

    @contextmanager
    def change(self, job: Job) -> Iterator[Job]:
        """Change a job and keep the change."""
        with self._lock:
            yield job
            job.modified = time.time()
            self._write(job)

    def _write(self, job: Job) -> None:
        path = self._folder / f"{job.name}.json"
        scratch = path.with_suffix(".new")
        scratch.write_bytes(msgspec.json.format(msgspec.json.encode(job)))
        scratch.replace(path)


class Announcer:
    """Sends each ended job's event, again and again while the emulator does not take it."""

    def __init__(self, jobs: JobStore, events: Any) -> None:
        self._jobs, self._events = jobs, events
        self._due = threading.Event()
        self._due.set()

    def wake(self) -> None:
        self._due.set()

    def run_forever(self) -> None:
        while True:
            self._due.wait()
            self._due.clear()
            for job in self._jobs.all():
                if job.event_due and not self._send(job):
                    threading.Timer(1.0, self.wake).start()
                    break

    def _send(self, job: Job) -> bool:
        entry = {
            "Source": EVENT_SOURCE,
            "DetailType": EVENT_TYPE,
            "Resources": [job.arn],
            "Detail": json.dumps(_event_detail(job)),
        }
        try:
            answer = self._events.put_events(Entries=[entry])
        except (BotoCoreError, ClientError) as error:
            log.warning("%s: the emulator did not take the event: %s", job.name, error)
            return False
        if answer["FailedEntryCount"]:
            log.warning("%s: the emulator did not take the event: %s", job.name, answer["Entries"][0])
            return False
        with self._jobs.change(job):
            job.event_due = False
        return True


class Service:
    """The four operations, over a folder that survives a restart."""

    def __init__(self, home: Path, endpoint: str, *, logs: Path | None = None) -> None:
        self._home, self._endpoint = home, endpoint
        self._logs = logs or home / "logs"
        self._jobs = JobStore(home / "jobs")
        options = Config(max_pool_connections=2 * _DOWNLOADS, retries={"mode": "standard"}, s3={"addressing_style": "path"})
        self._s3 = aws_client("s3", endpoint, options)
        self._announcer = Announcer(self._jobs, aws_client("events", endpoint, options))
        self._model = botocore.session.get_session().get_service_model("sagemaker")
        self._stops: dict[str, threading.Event] = {}
        self._closing = threading.Event()
        self._fail_interrupted()
        threading.Thread(target=self._announcer.run_forever, daemon=True).start()

    def operation(self, name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
        operations = {
            "CreateTrainingJob": self.create,
            "DescribeTrainingJob": self.describe,
            "ListTrainingJobs": self.list,
            "StopTrainingJob": self.stop,
        }
        if name not in operations:
            raise ApiError("UnknownOperationException", f"{name!r} is not among {', '.join(operations)}")

        def checked(request: dict[str, Any]) -> dict[str, Any]:
            _check_shape(self._model.operation_model(name).input_shape, request)
            return operations[name](request)

        return checked

    def create(self, request: dict[str, Any]) -> dict[str, Any]:
        _check_training_job(request)
        job = Job(request=request, created=time.time(), modified=time.time())
        self._jobs.add(job)
        self._stops[job.name] = threading.Event()
        threading.Thread(target=self._run, args=[job], name=job.name, daemon=True).start()
        return {"TrainingJobArn": job.arn}

    def describe(self, request: dict[str, Any]) -> dict[str, Any]:
        job = self._jobs.get(request["TrainingJobName"])
        answer = {
            **{name: job.request[name] for name in _ECHOED if name in job.request},
            **_state(job),
            "CreationTime": job.created,
            "LastModifiedTime": job.modified,
            "TrainingStartTime": job.started,
            "TrainingEndTime": job.ended,
            "TrainingTimeInSeconds": int(job.ended - job.started) if job.started and job.ended else None,
            "SecondaryStatusTransitions": [{"Status": status, "StartTime": began} for status, began in job.transitions],
        }
        return {name: value for name, value in answer.items() if value is not None}

    def list(self, request: dict[str, Any]) -> dict[str, Any]:
        """Newest first, also where no order is asked for."""
        found = [
            job
            for job in self._jobs.all()
            if request.get("NameContains", "") in job.name and request.get("StatusEquals", job.status) == job.status
        ]
        found.sort(key=lambda job: job.created, reverse=request.get("SortOrder") != "Ascending")
        start, size = int(request.get("NextToken") or 0), int(request.get("MaxResults", 10))
        page = [
            {
                "TrainingJobName": job.name,
                "TrainingJobArn": job.arn,
                "CreationTime": job.created,
                "LastModifiedTime": job.modified,
                "TrainingJobStatus": job.status,
                "SecondaryStatus": job.secondary,
                **({"TrainingEndTime": job.ended} if job.ended else {}),
            }
            for job in found[start : start + size]
        ]
        return {"TrainingJobSummaries": page, **({"NextToken": str(start + size)} if start + size < len(found) else {})}

    def stop(self, request: dict[str, Any]) -> dict[str, Any]:
        job = self._jobs.get(request["TrainingJobName"])
        with self._jobs.change(job):
            if job.status in _TERMINAL:
                raise ApiError(
                    "ValidationException", f"The request was rejected because the training job is in status {job.status}."
                )
            job.status = "Stopping"
            job.enter("Stopping")
        self._stops[job.name].set()
        return {}

    def interrupt(self) -> None:
        """End the processes of running jobs; their records stay as they are, so that the next start finds them interrupted."""
        self._closing.set()
        stop([job.process for job in self._jobs.all() if job.process and job.status not in _TERMINAL], grace_s=2)

    def _fail_interrupted(self) -> None:
        for job in self._jobs.all():
            if job.status in _TERMINAL:
                continue
            if job.process:
                stop([job.process], grace_s=2)
            with self._jobs.change(job):
                job.status = "Failed"
                job.enter("Failed")
                job.failure = "InternalServerError: the stand-in was stopped during the job"
                job.ended, job.event_due = time.time(), True

    def _run(self, job: Job) -> None:
        folder = self._home / "opt_ml" / job.name
        try:
            while (ending := self._run_on_one_machine(job, folder)) is None:
                if self._closing.is_set():
                    return
                log.info("%s: interrupted", job.name)
                self._enter(job, "Interrupted")
                shutil.rmtree(folder)  # the next machine knows nothing of this one's
                self._enter(job, "Starting")
            status, secondary = ending
            self._enter(job, "Uploading")
            artifacts = self._upload(job, folder)
            self._end(job, status, secondary, artifacts=artifacts)
        except JobFailure as failure:
            self._end(job, "Failed", "Failed", failure=str(failure))
        except Exception as error:
            log.exception("%s: the stand-in failed", job.name)
            self._end(job, "Failed", "Failed", failure=f"InternalServerError: {error}")

    def _enter(self, job: Job, secondary: str) -> None:
        with self._jobs.change(job):
            if job.status == "InProgress":
                job.enter(secondary)

    def _run_on_one_machine(self, job: Job, folder: Path) -> tuple[str, str] | None:
        """Status and secondary status that the job ends with; None when spot took the machine away."""
        self._prepare(job, folder)
        return self._train(job, folder)

    def _end(self, job: Job, status: str, secondary: str, *, artifacts: str | None = None, failure: str | None = None) -> None:
        if self._closing.is_set():
            return
        with self._jobs.change(job):
            job.status, job.artifacts, job.failure = status, artifacts, failure
            job.enter(secondary)
            job.ended, job.event_due = time.time(), True
        log.info("%s: %s%s", job.name, status, f" ({failure})" if failure else "")
        self._announcer.wake()

    def _prepare(self, job: Job, folder: Path) -> None:
        """Lay out /opt/ml: configuration, empty output folders, and the channels' data."""
        for name in ("input/config", "input/data", "model", "output/data", "checkpoints", "code"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        resources = job.request["ResourceConfig"]
        channels = job.request.get("InputDataConfig", [])
        _write_json(folder / "input/config/hyperparameters.json", job.request.get("HyperParameters", {}))
        _write_json(
            folder / "input/config/resourceconfig.json",
            {"current_host": "algo-1", "hosts": ["algo-1"], "current_instance_type": resources.get("InstanceType")},
        )
        modes = {
            channel["ChannelName"]: channel.get("InputMode", job.request["AlgorithmSpecification"]["TrainingInputMode"])
            for channel in channels
        }
        _write_json(
            folder / "input/config/inputdataconfig.json",
            {
                channel["ChannelName"]: {
                    "TrainingInputMode": modes[channel["ChannelName"]],
                    "S3DistributionType": channel["DataSource"]["S3DataSource"].get("S3DataDistributionType", "FullyReplicated"),
                    "RecordWrapperType": channel.get("RecordWrapperType", "None"),
                    **({"ContentType": channel["ContentType"]} if "ContentType" in channel else {}),
                }
                for channel in channels
            },
        )
        self._enter(job, "Downloading")
        for channel in channels:
            self._download(channel["DataSource"]["S3DataSource"]["S3Uri"], folder / "input/data" / channel["ChannelName"])
        if job.checkpoints:
            self._bring_back_checkpoints(job.checkpoints, folder / "checkpoints")

    def _bring_back_checkpoints(self, uri: str, folder: Path) -> None:
        """Copies of the job's own: it writes there."""
        bucket, prefix = _bucket_and_key(uri)
        store = s3_store(bucket, self._endpoint)
        try:
            for entry in _objects(self._s3, bucket, prefix):
                target = folder / _path_below(prefix, entry["Key"])
                target.parent.mkdir(parents=True, exist_ok=True)
                _fetch(store, entry["Key"], target)
        except _NOT_READ as error:
            raise JobFailure(f"ClientError: Data download failed: {uri}: {error}") from error

    def _download(self, uri: str, target: Path) -> None:
        """Place what lies under an S3 address below `target`, whichever input mode asks for it."""
        bucket, prefix = _bucket_and_key(uri)
        try:
            found = _objects(self._s3, bucket, prefix)
            if not found:
                raise JobFailure(
                    f'ClientError: Data download failed:No S3 objects found under S3 URL "{uri}" given in input data source.'
                )
            wanted = [(entry["Key"], entry["ETag"], target / _path_below(prefix, entry["Key"])) for entry in found]
            store = s3_store(bucket, self._endpoint)
            with ThreadPoolExecutor(_DOWNLOADS) as pool:
                list(pool.map(lambda each: self._place(store, bucket, *each), wanted))
        except _NOT_READ as error:
            raise JobFailure(f"ClientError: Data download failed: {uri}: {error}") from error

    def _place(self, store: S3Store, bucket: str, key: str, tag: str, target: Path) -> None:
        """One object at `target`, as a hard link to a copy that is kept by bucket, key and entity tag."""
        kept = self._home / "objects" / sha256("\0".join((bucket, key, tag)).encode()).hexdigest()
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            scratch = kept.with_suffix(f".{threading.get_ident()}")
            _fetch(store, key, scratch)
            scratch.chmod(0o444)  # a job that wrote into its input would change what the next one reads
            scratch.replace(kept)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.hardlink_to(kept)

    def _train(self, job: Job, folder: Path) -> tuple[str, str] | None:
        """Run the container's command: status and secondary status that the job ends with, None when it was interrupted."""
        if self._stops[job.name].is_set():
            return "Stopped", "Stopped"
        specification, stopping = job.request["AlgorithmSpecification"], job.request["StoppingCondition"]
        words = [*specification["ContainerEntrypoint"], *specification.get("ContainerArguments", [])]
        log_file = self._logs / f"{job.name}.log"
        started = start(
            job.name,
            [_OPT_ML.sub(str(folder), word) for word in words],
            log=log_file,
            environment=self._environment(job, folder),
            folder=folder,
        )
        began = time.time()
        with self._jobs.change(job):
            job.process, job.started = started.record, job.started or began
        self._enter(job, "Training")
        run_out = began + float(stopping["MaxRuntimeInSeconds"]) - job.trained_s
        given_up = job.created + float(stopping.get("MaxWaitTimeInSeconds", math.inf))
        keeper = _Checkpoints(self._s3, job.checkpoints, folder / "checkpoints")
        ending: tuple[str, str] | None = None
        while started.popen.poll() is None and ending is None:
            if self._stops[job.name].wait(0.05):
                ending = "Stopped", "Stopped"
            elif time.time() > given_up:  # asked first: it comes no later where both times are the same
                ending = "Stopped", "MaxWaitTimeExceeded"
            elif time.time() > run_out:
                ending = "Stopped", "MaxRuntimeExceeded"
            keeper.keep_sometimes()
        stop([started.record], grace_s=STOP_GRACE_S)  # as a container's end takes with it whatever still runs in it
        keeper.keep()
        with self._jobs.change(job):
            job.trained_s += time.time() - began
        status = started.popen.returncode
        if ending is None and job.spot and status in _TERMINATED:
            return None
        if ending is None and status:
            raise JobFailure(_failure_reason(folder, status, log_file))
        return ending or ("Completed", "Completed")

    def _environment(self, job: Job, folder: Path) -> Mapping[str, str]:
        given = {name: _OPT_ML.sub(str(folder), value) for name, value in job.request.get("Environment", {}).items()}
        inherited = clean_environment()
        return {
            **inherited,
            **aws_environment(self._endpoint),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), inherited.get("PATH", os.defpath)]),
            "OMP_NUM_THREADS": "1",  # a job asks for more where its network is worth it
            "OMP_WAIT_POLICY": "PASSIVE",  # whoever waits for the others would spin, and keep the stack's servers from the cores
            "TRAINING_JOB_NAME": job.name,
            "TRAINING_JOB_ARN": job.arn,
            **given,
            "LABELLOOP_OPT_ML": str(folder),
        }

    def _upload(self, job: Job, folder: Path) -> str:
        """Pack /opt/ml/model as SageMaker does, also what a stopped job left there. Returns the archive's s3:// address."""
        bucket, prefix = _bucket_and_key(job.request["OutputDataConfig"]["S3OutputPath"])
        key = "/".join(filter(None, [prefix.rstrip("/"), job.name, "output/model.tar.gz"]))
        archive = folder / "model.tar.gz"
        with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
            for path in sorted((folder / "model").iterdir()):
                tar.add(path, arcname=path.name)
        try:
            self._s3.upload_file(str(archive), bucket, key)
        except (BotoCoreError, ClientError, Boto3Error) as error:
            raise JobFailure(f"ClientError: cannot write s3://{bucket}/{key}: {error}") from error
        finally:
            archive.unlink()
        return f"s3://{bucket}/{key}"


class _Checkpoints:
    """Copies what changes in a job's folder of checkpoints to S3, as SageMaker does; without an address it does nothing."""

    def __init__(self, s3: Any, uri: str | None, folder: Path) -> None:
        self._s3, self._uri, self._folder = s3, uri, folder
        self._kept: dict[Path, tuple[int, int]] = {}
        self._due = time.monotonic() + _SYNC_S

    def keep_sometimes(self) -> None:
        if time.monotonic() > self._due:
            self.keep()
            self._due = time.monotonic() + _SYNC_S

    def keep(self) -> None:
        """What cannot be copied now is copied with the next round: a checkpoint is no reason to fail a job."""
        if self._uri is None:
            return
        bucket, prefix = _bucket_and_key(self._uri)
        for path in sorted(path for path in self._folder.rglob("*") if path.is_file()):
            try:
                found = path.stat()
                state = found.st_mtime_ns, found.st_size
                if self._kept.get(path) != state:
                    self._s3.upload_file(str(path), bucket, prefix + path.relative_to(self._folder).as_posix())
                    self._kept[path] = state
            except (OSError, BotoCoreError, ClientError, Boto3Error) as error:
                log.warning("the checkpoint %s is not kept: %s", path, error)


def _state(job: Job) -> dict[str, Any]:
    """What both a description and an event say about where a job stands."""
    return {
        "TrainingJobArn": job.arn,
        "TrainingJobStatus": job.status,
        "SecondaryStatus": job.secondary,
        **({"ModelArtifacts": {"S3ModelArtifacts": job.artifacts}} if job.artifacts else {}),
        **({"FailureReason": job.failure} if job.failure else {}),
    }


def _event_detail(job: Job) -> dict[str, Any]:
    times = {"CreationTime": job.created, "TrainingStartTime": job.started, "TrainingEndTime": job.ended}
    return {
        **{name: job.request[name] for name in _ECHOED if name in job.request},
        **_state(job),
        **{name: int(value * 1000) for name, value in (times | {"LastModifiedTime": job.modified}).items() if value is not None},
        "Tags": {tag["Key"]: tag["Value"] for tag in job.request.get("Tags", [])},
    }


def _failure_reason(folder: Path, status: int, log_file: Path) -> str:
    try:
        with (folder / "output" / "failure").open(encoding="utf-8", errors="replace") as file:
            text = file.read(_FAILURE_CHARACTERS).strip()
    except OSError:
        text = ""
    return f"AlgorithmError: {text or f'{_ending(status)}; its log is {log_file}'}"


def _ending(status: int) -> str:
    """How a process ended that left no word; as SIGKILL the kernel ends one that memory is short for."""
    if status >= 0:
        return f"exit code {status}"
    short = ", perhaps as memory was short" if status == -signal.SIGKILL else ""
    return f"ended by {signal.Signals(-status).name}{short}"


def _objects(s3: Any, bucket: str, prefix: str) -> list[dict[str, Any]]:
    """Everything under a prefix but folders' markers."""
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return [entry for page in pages for entry in page.get("Contents", []) if not entry["Key"].endswith("/")]


def _fetch(store: S3Store, key: str, target: Path) -> None:
    with target.open("wb") as file:
        for piece in obstore.get(store, key):
            file.write(piece)


def _bucket_and_key(uri: str) -> tuple[str, str]:
    """SageMaker takes an address literally: nothing in it is percent-encoded."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def _path_below(prefix: str, key: str) -> PurePosixPath:
    """Where an object lies in a channel's folder: below the prefix, or its base name when the prefix is the whole key."""
    folder = prefix if prefix.endswith("/") else f"{prefix}/"
    path = PurePosixPath(key.removeprefix(folder) if key.startswith(folder) else key[prefix.rfind("/") + 1 :])
    if not is_plain_key(key):
        raise JobFailure(f"ClientError: Data download failed: the key {key!r} does not name a file below the channel's folder")
    return path


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def _check_shape(shape: Any, request: dict[str, Any]) -> None:
    """Types, required fields, lengths and patterns, as AWS describes them. Raises `ApiError`."""
    report = ParamValidator().validate(request, shape)
    problems = [report.generate_report()] if report.has_errors() else list(_limit_problems(shape, request, ""))
    if problems:
        raise ApiError("ValidationException", "; ".join(problems))


def _limit_problems(shape: Any, value: Any, where: str) -> Iterator[str]:
    """What botocore leaves to the server: maximal lengths and patterns."""
    if shape.type_name in ("string", "list", "map"):
        most = shape.metadata.get("max")
        if most is not None and len(value) > most:
            yield f"Value at '{where}' failed to satisfy constraint: length must be less than or equal to {most}"
    if shape.type_name == "string":
        pattern, allowed = shape.metadata.get("pattern"), shape.enum
        if allowed and value not in allowed:
            yield f"Value {value!r} at '{where}' failed to satisfy constraint: must be one of {allowed}"
        if pattern and r"\p" not in pattern and not re.fullmatch(pattern, value, re.DOTALL):  # \p: Java's, unknown to Python
            yield f"Value {value!r} at '{where}' failed to satisfy constraint: must satisfy regular expression pattern {pattern}"
    elif shape.type_name == "structure":
        for name, member in value.items():
            yield from _limit_problems(shape.members[name], member, f"{where}.{name}" if where else name)
    elif shape.type_name == "list":
        for index, member in enumerate(value):
            yield from _limit_problems(shape.member, member, f"{where}[{index}]")
    elif shape.type_name == "map":
        for name, member in value.items():
            yield from _limit_problems(shape.key, name, f"{where} key")
            yield from _limit_problems(shape.value, member, f"{where}.{name}")


def _check_training_job(request: dict[str, Any]) -> None:
    """What the description of the API does not say, and what this stand-in cannot do. Raises `ApiError`."""
    problems = [
        f"{name} is required"
        for name in ("AlgorithmSpecification", "RoleArn", "OutputDataConfig", "ResourceConfig", "StoppingCondition")
        if name not in request
    ]
    if not problems:
        problems = list(_training_job_problems(request))
    if problems:
        raise ApiError("ValidationException", "; ".join(problems))


def _training_job_problems(request: dict[str, Any]) -> Iterator[str]:
    specification, stopping = request["AlgorithmSpecification"], request["StoppingCondition"]
    if "TrainingImage" not in specification:
        yield "AlgorithmSpecification.TrainingImage is required"
    if not specification.get("ContainerEntrypoint"):
        yield "AlgorithmSpecification.ContainerEntrypoint is required: there is no image here whose own command could run"
    for name, value in request.get("HyperParameters", {}).items():
        if len(value) > _HYPERPARAMETER_CHARACTERS:
            yield f"the value of hyperparameter {name!r} has more than {_HYPERPARAMETER_CHARACTERS} characters"
    if "MaxRuntimeInSeconds" not in stopping:
        yield "StoppingCondition.MaxRuntimeInSeconds is required"
    if request.get("EnableManagedSpotTraining"):
        if stopping.get("MaxWaitTimeInSeconds", 0) < stopping.get("MaxRuntimeInSeconds", 0):
            yield "MaxWaitTimeInSeconds must be at least MaxRuntimeInSeconds when spot training is enabled"
    elif "MaxWaitTimeInSeconds" in stopping:
        yield "MaxWaitTimeInSeconds is for spot training, which is not enabled"
    if request.get("CheckpointConfig", {}).get("LocalPath", _CHECKPOINTS) != _CHECKPOINTS:
        yield f"CheckpointConfig.LocalPath: this stand-in knows {_CHECKPOINTS} alone"
    names = [channel["ChannelName"] for channel in request.get("InputDataConfig", [])]
    if len(set(names)) < len(names):
        yield "channel names must be unique"
    for channel in request.get("InputDataConfig", []):
        source = channel["DataSource"].get("S3DataSource", {})
        mode = channel.get("InputMode", specification["TrainingInputMode"])
        if source.get("S3DataType") != "S3Prefix" or mode == "Pipe" or channel.get("CompressionType", "None") != "None":
            yield f"channel {channel['ChannelName']!r}: this stand-in knows S3Prefix in the modes File and FastFile, uncompressed"


def _handler(service: Service) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(200, {"status": "UP"})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            try:
                operation = service.operation(self.headers.get("X-Amz-Target", "").removeprefix("SageMaker."))
                request = json.loads(body or b"{}")
                if not isinstance(request, dict):
                    raise ApiError("SerializationException", "the body is no JSON object")
                self._answer(200, operation(request))
            except json.JSONDecodeError as error:
                self._answer(400, {"__type": "SerializationException", "message": str(error)})
            except ApiError as error:
                self._answer(400, {"__type": error.code, "message": str(error)})
            except Exception as error:
                log.exception("%s", self.headers.get("X-Amz-Target"))
                self._answer(500, {"__type": "InternalFailure", "message": str(error)})

        def _answer(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/x-amz-json-1.1")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *arguments: Any) -> None:
            log.debug(format, *arguments)

    return Handler


def main() -> None:
    parser = argparse.ArgumentParser(description="SageMaker's training jobs as processes of this machine")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--home", type=Path, required=True, help="folder for records, job folders and downloaded data")
    parser.add_argument("--logs", type=Path, help="folder for what jobs write (default: HOME/logs)")
    parser.add_argument("--endpoint", required=True, help="address of the emulator")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    service = Service(options.home.absolute(), options.endpoint, logs=options.logs and options.logs.absolute())
    server = ThreadingHTTPServer((LOOPBACK, options.port), _handler(service))
    server.daemon_threads = True

    def leave(*_: object) -> None:
        threading.Thread(target=server.shutdown).start()

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)
    log.info("training jobs at http://%s:%s", LOOPBACK, options.port)
    server.serve_forever(poll_interval=0.1)
    service.interrupt()


if __name__ == "__main__":
    main()
