"""The SageMaker stand-in, as its callers see it: through boto3, S3 and EventBridge, with real processes as jobs."""

from __future__ import annotations

import io
import json
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from botocore.exceptions import ClientError, ParamValidationError

from local import emulator
from local.environment import aws_client, clean_environment
from local.processes import StartedProcess, answers, free_port, start, stop, wait_until_ready
from local.sagemaker import EVENT_SOURCE, EVENT_TYPE
from local.toolchain import find_uv, tool_environment

ROLE = "arn:aws:iam::000000000000:role/training"
BUCKET = "artifacts"
SPECIFICATION: dict[str, Any] = {
    "TrainingImage": "000000000000.dkr.ecr.us-east-1.amazonaws.com/any:1",
    "TrainingInputMode": "File",
    "ContainerEntrypoint": ["python", "-c"],
}


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder, port = tmp_path_factory.mktemp("emulator"), free_port()
    environment = {**tool_environment(), **emulator.environment(port, folder, folder / "functions")}
    started = start(
        "emulator", emulator.command(find_uv(), sys.executable), log=folder / "log", environment=environment, folder=folder
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(started, lambda: answers(url + emulator.READY_PATH), limit_s=180)
        aws_client("s3", url).create_bucket(Bucket=BUCKET)
        yield url
    finally:
        stop([started.record], grace_s=20)


@pytest.fixture(scope="module")
def events(endpoint: str) -> str:
    """Address of a queue that gets every event of the stand-in."""
    sqs, rules = aws_client("sqs", endpoint), aws_client("events", endpoint)
    url = str(sqs.create_queue(QueueName="ends")["QueueUrl"])
    arn = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    rules.put_rule(Name="ends", EventPattern=json.dumps({"source": [EVENT_SOURCE], "detail-type": [EVENT_TYPE]}))
    statement = {
        "Effect": "Allow",
        "Principal": {"Service": "events.amazonaws.com"},
        "Action": "sqs:SendMessage",
        "Resource": arn,
    }
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    sqs.set_queue_attributes(QueueUrl=url, Attributes={"Policy": policy})
    rules.put_targets(Rule="ends", Targets=[{"Id": "queue", "Arn": arn}])
    return url


@dataclass
class StandIn:
    """A stand-in that can be stopped and started again over the same folder."""

    endpoint: str
    home: Path
    events: str
    url: str = ""
    process: StartedProcess | None = None
    arrived: dict[str, dict[str, Any]] = field(default_factory=dict)

    def start(self) -> None:
        port = free_port()
        command = [
            sys.executable,
            "-m",
            "local.sagemaker",
            "--port",
            str(port),
            "--home",
            str(self.home),
            "--endpoint",
            self.endpoint,
        ]
        self.process = start("sagemaker", command, log=self.home / "log", environment=clean_environment())
        self.url = f"http://127.0.0.1:{port}"
        wait_until_ready(self.process, lambda: answers(self.url), limit_s=60)

    def stop(self) -> None:
        assert self.process is not None
        stop([self.process.record], grace_s=20)

    @property
    def client(self) -> Any:
        return aws_client("sagemaker", self.url)

    @property
    def s3(self) -> Any:
        return aws_client("s3", self.endpoint)

    def create(self, name: str, program: str, **changes: Any) -> None:
        self.client.create_training_job(**{**request(name, program), **changes})

    def wait(self, name: str, reached: Callable[[dict[str, Any]], bool] | None = None) -> dict[str, Any]:
        """The job's description as soon as it has ended, or is as wanted."""
        reached = reached or (lambda job: job["TrainingJobStatus"] in ("Completed", "Failed", "Stopped"))
        deadline = time.monotonic() + 60
        while not reached(job := self.client.describe_training_job(TrainingJobName=name)):
            assert time.monotonic() < deadline, job
            time.sleep(0.05)
        return dict(job)

    def event(self, name: str) -> dict[str, Any]:
        """The event of a job's end."""
        sqs, deadline = aws_client("sqs", self.endpoint), time.monotonic() + 60
        while name not in self.arrived:
            assert time.monotonic() < deadline, f"no event for {name}"
            for message in sqs.receive_message(QueueUrl=self.events, WaitTimeSeconds=1, MaxNumberOfMessages=10).get(
                "Messages", []
            ):
                event = json.loads(message["Body"])
                self.arrived[event["detail"]["TrainingJobName"]] = event
                sqs.delete_message(QueueUrl=self.events, ReceiptHandle=message["ReceiptHandle"])
        return self.arrived[name]


@pytest.fixture(scope="module")
def standin(endpoint: str, events: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    made = StandIn(endpoint, tmp_path_factory.mktemp("sagemaker"), events)
    made.start()
    yield made
    made.stop()


def request(name: str, program: str, *arguments: str) -> dict[str, Any]:
    return {
        "TrainingJobName": name,
        "RoleArn": ROLE,
        "AlgorithmSpecification": {**SPECIFICATION, "ContainerArguments": [program, *arguments]},
        "HyperParameters": {"model": "digits", "digest": "abc"},
        "OutputDataConfig": {"S3OutputPath": f"s3://{BUCKET}/training/digits/"},
        "ResourceConfig": {"InstanceType": "ml.g5.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 30},
        "StoppingCondition": {"MaxRuntimeInSeconds": 300},
    }


def channel(name: str, uri: str, **more: Any) -> dict[str, Any]:
    return {"ChannelName": name, "DataSource": {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": uri}}, **more}


def model_of(standin: StandIn, job: dict[str, Any]) -> dict[str, bytes]:
    """The files of a job's archive."""
    bucket, _, key = job["ModelArtifacts"]["S3ModelArtifacts"].removeprefix("s3://").partition("/")
    archive = standin.s3.get_object(Bucket=bucket, Key=key)["Body"].read()
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}  # type: ignore[union-attr]


# AWS takes no container argument of more than 256 characters.
LIST_EVERYTHING = """
import json, os, pathlib, sys
top = pathlib.Path("/opt/ml")
files = {str(p.relative_to(top)): p.read_text() for p in top.glob("input/**/*") if p.is_file()}
(top / "model/seen").write_text(json.dumps([files, dict(os.environ), sys.executable]))
"""


def test_a_job_sees_the_container_contract_and_leaves_an_archive_and_an_event(standin: StandIn) -> None:
    for key in (
        "images/digits/a.png",
        "images/digits/deep/b c#ü.png",
        "images/digits/",
        "images/digits2/no.png",
        "s/manifest.jsonl",
    ):
        standin.s3.put_object(Bucket=BUCKET, Key=key, Body=key.encode())
    standin.create(
        "labelloop-local-digits-1",
        LIST_EVERYTHING,
        InputDataConfig=[
            channel("images", f"s3://{BUCKET}/images/digits/", InputMode="FastFile"),
            channel("manifest", f"s3://{BUCKET}/s/manifest.jsonl"),
        ],
        Environment={"MLFLOW_TRACKING_URI": "http://127.0.0.1:1", "WHERE": "/opt/ml/model"},
        Tags=[{"Key": "owner", "Value": "tests"}],
    )
    job = standin.wait("labelloop-local-digits-1")
    assert job["TrainingJobStatus"] == job["SecondaryStatus"] == "Completed", job
    assert (
        job["ModelArtifacts"]["S3ModelArtifacts"] == f"s3://{BUCKET}/training/digits/labelloop-local-digits-1/output/model.tar.gz"
    )
    files, environment, python = json.loads(model_of(standin, job)["seen"])
    data = {path: text for path, text in files.items() if path.startswith("input/data/")}
    assert data == {
        "input/data/images/a.png": "images/digits/a.png",
        "input/data/images/deep/b c#ü.png": "images/digits/deep/b c#ü.png",
        "input/data/manifest/manifest.jsonl": "s/manifest.jsonl",
    }
    assert json.loads(files["input/config/hyperparameters.json"]) == {"model": "digits", "digest": "abc"}
    assert json.loads(files["input/config/resourceconfig.json"])["hosts"] == ["algo-1"]
    modes = {name: each["TrainingInputMode"] for name, each in json.loads(files["input/config/inputdataconfig.json"]).items()}
    assert modes == {"images": "FastFile", "manifest": "File"}
    assert environment["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:1"
    assert environment["WHERE"] == environment["LABELLOOP_OPT_ML"] + "/model"
    assert environment["AWS_ENDPOINT_URL"] == standin.endpoint
    assert (environment["OMP_NUM_THREADS"], environment["OMP_WAIT_POLICY"]) == ("1", "PASSIVE")
    assert Path(python).parent == Path(sys.executable).parent

    event = standin.event("labelloop-local-digits-1")
    assert (event["source"], event["detail-type"]) == (EVENT_SOURCE, EVENT_TYPE)
    detail = event["detail"]
    assert detail["TrainingJobStatus"] == "Completed"
    assert detail["HyperParameters"]["model"] == "digits"
    assert detail["ModelArtifacts"] == job["ModelArtifacts"]
    assert detail["TrainingJobArn"] == job["TrainingJobArn"]
    assert detail["Tags"] == {"owner": "tests"}
    assert detail["TrainingEndTime"] == pytest.approx(job["TrainingEndTime"].timestamp() * 1000, abs=1000)
    assert "FailureReason" not in detail


def test_a_changed_object_reaches_the_next_job_and_an_unchanged_one_is_not_fetched_again(standin: StandIn) -> None:
    uri = f"s3://{BUCKET}/again"
    for key, body in (("again/same", b"one"), ("again/changed", b"old"), ("again/empty", b"")):
        standin.s3.put_object(Bucket=BUCKET, Key=key, Body=body)
    standin.create("again-1", LIST_EVERYTHING, InputDataConfig=[channel("data", uri)])
    standin.wait("again-1")
    before = len(list((standin.home / "objects").iterdir()))
    standin.s3.put_object(Bucket=BUCKET, Key="again/changed", Body=b"new")
    standin.create("again-2", LIST_EVERYTHING, InputDataConfig=[channel("data", uri)])
    files = json.loads(model_of(standin, standin.wait("again-2"))["seen"])[0]
    assert [files[f"input/data/data/{name}"] for name in ("same", "changed", "empty")] == ["one", "new", ""]
    assert len(list((standin.home / "objects").iterdir())) == before + 1


def test_a_failing_job_says_why(standin: StandIn) -> None:
    program = "import pathlib; pathlib.Path('/opt/ml/output/failure').write_text('no class has two images' + '.' * 2000)"
    program += "; raise SystemExit(1)"
    standin.create("failing", program)
    job = standin.wait("failing")
    assert job["TrainingJobStatus"] == job["SecondaryStatus"] == "Failed"
    assert job["FailureReason"].startswith("AlgorithmError: no class has two images...")
    assert len(job["FailureReason"]) == len("AlgorithmError: ") + 1024
    assert standin.event("failing")["detail"]["FailureReason"] == job["FailureReason"]


def test_a_job_that_dies_without_a_word_fails_with_its_exit_code(standin: StandIn) -> None:
    standin.create("mute", "print('last words'); raise SystemExit(7)")
    log = standin.home / "logs" / "mute.log"
    assert standin.wait("mute")["FailureReason"] == f"AlgorithmError: exit code 7; its log is {log}"
    assert log.read_text() == "last words\n"


def test_a_job_that_is_killed_says_so(standin: StandIn) -> None:
    standin.create("killed", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert "ended by SIGKILL, perhaps as memory was short; its log" in standin.wait("killed")["FailureReason"]


def test_a_channel_without_objects_fails_the_job(standin: StandIn) -> None:
    standin.create("empty", "pass", InputDataConfig=[channel("data", f"s3://{BUCKET}/nothing/here/")])
    reason = standin.wait("empty")["FailureReason"]
    assert reason.startswith("ClientError: Data download failed:No S3 objects found")


def test_a_key_that_names_no_file_fails_the_job(standin: StandIn) -> None:
    standin.s3.put_object(Bucket=BUCKET, Key="strange//a.png", Body=b"1")
    standin.create("strange", "pass", InputDataConfig=[channel("data", f"s3://{BUCKET}/strange/")])
    reason = standin.wait("strange")["FailureReason"]
    assert reason.startswith("ClientError: Data download failed: the key 'strange//a.png' does not name a file")


SAVE_AND_WAIT = "import pathlib, time; pathlib.Path('/opt/ml/model/half').write_text('1'); time.sleep(600)"


def is_saved(standin: StandIn, name: str) -> bool:
    return (standin.home / "opt_ml" / name / "model" / "half").exists()


def test_stopping_ends_the_process_and_keeps_what_it_saved(standin: StandIn) -> None:
    standin.create("stopped", SAVE_AND_WAIT)
    standin.wait("stopped", lambda _: is_saved(standin, "stopped"))
    standin.client.stop_training_job(TrainingJobName="stopped")
    job = standin.wait("stopped")
    assert (job["TrainingJobStatus"], job["SecondaryStatus"]) == ("Stopped", "Stopped")
    assert list(model_of(standin, job)) == ["half"]
    assert standin.event("stopped")["detail"]["TrainingJobStatus"] == "Stopped"
    with pytest.raises(ClientError, match="is in status Stopped"):
        standin.client.stop_training_job(TrainingJobName="stopped")


def test_a_job_that_runs_too_long_is_stopped(standin: StandIn) -> None:
    standin.create("slow", "import time; time.sleep(600)", StoppingCondition={"MaxRuntimeInSeconds": 1})
    job = standin.wait("slow")
    assert (job["TrainingJobStatus"], job["SecondaryStatus"]) == ("Stopped", "MaxRuntimeExceeded")


# Counts the machines that it has been on, and ends on the third.
COUNT_MACHINES = """
import pathlib, time
top = pathlib.Path("/opt/ml")
kept, done = top / "checkpoints/n", top / "model/half"
n = kept.read_text() if kept.exists() else ""
kept.write_text(n + "x")
done.write_text(f"{n} {done.exists()}")
time.sleep(0 if n == "xx" else 600)
"""


def spot(name: str, *, seconds: int = 300) -> dict[str, Any]:
    """What makes a request one for spot training with checkpoints."""
    return {
        "EnableManagedSpotTraining": True,
        "StoppingCondition": {"MaxRuntimeInSeconds": seconds, "MaxWaitTimeInSeconds": seconds},
        "CheckpointConfig": {"S3Uri": f"s3://{BUCKET}/checkpoints/{name}"},
    }


def take_machine_away(standin: StandIn, name: str) -> None:
    record = json.loads((standin.home / "jobs" / f"{name}.json").read_text())["process"]
    psutil.Process(record["pid"]).terminate()


def checkpoint(standin: StandIn, name: str) -> str:
    """What lies in S3 of the job's checkpoint."""
    s3 = standin.s3
    try:
        answer = s3.get_object(Bucket=BUCKET, Key=f"checkpoints/{name}/n")
    except s3.exceptions.NoSuchKey:
        return ""
    return str(answer["Body"].read().decode())


def test_a_spot_job_whose_machine_is_taken_away_goes_on_from_its_checkpoint_on_a_fresh_one(standin: StandIn) -> None:
    standin.create("spot", COUNT_MACHINES, **spot("spot"))
    for machines in ("x", "xx"):
        standin.wait("spot", lambda _, machines=machines: checkpoint(standin, "spot") == machines)  # type: ignore[misc]
        take_machine_away(standin, "spot")
    job = standin.wait("spot")
    assert (job["TrainingJobStatus"], job["SecondaryStatus"]) == ("Completed", "Completed"), job
    assert checkpoint(standin, "spot") == "xxx"
    assert model_of(standin, job)["half"] == b"xx False", "nothing of the lost machines is left but the checkpoints"
    statuses = [entry["Status"] for entry in job["SecondaryStatusTransitions"]]
    machine = ["Starting", "Downloading", "Training"]
    assert statuses == [*machine, "Interrupted", *machine, "Interrupted", *machine, "Uploading", "Completed"]
    assert standin.event("spot")["detail"]["TrainingJobStatus"] == "Completed", "one event, of the end"


def test_without_spot_nobody_starts_a_terminated_job_again(standin: StandIn) -> None:
    standin.create("on-demand", SAVE_AND_WAIT)
    standin.wait("on-demand", lambda _: is_saved(standin, "on-demand"))
    take_machine_away(standin, "on-demand")
    assert standin.wait("on-demand")["FailureReason"].startswith("AlgorithmError: ended by SIGTERM; its log")


def test_a_spot_job_that_was_asked_to_stop_is_not_started_again(standin: StandIn) -> None:
    standin.create("spot-stopped", COUNT_MACHINES, **spot("spot-stopped"))
    standin.wait("spot-stopped", lambda _: is_saved(standin, "spot-stopped"))
    standin.client.stop_training_job(TrainingJobName="spot-stopped")
    assert standin.wait("spot-stopped")["TrainingJobStatus"] == "Stopped"


def test_a_spot_job_gets_no_more_time_than_was_asked_for(standin: StandIn) -> None:
    standin.create("patient", COUNT_MACHINES, **spot("patient", seconds=2))
    job = standin.wait("patient")
    assert (job["TrainingJobStatus"], job["SecondaryStatus"]) == ("Stopped", "MaxWaitTimeExceeded")


def test_a_name_is_taken_for_ever(standin: StandIn) -> None:
    standin.create("once", "pass")
    standin.wait("once")
    with pytest.raises(ClientError) as caught:
        standin.create("once", "pass")
    assert caught.value.response["Error"]["Code"] == "ResourceInUse"
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 400


def test_an_unknown_job_is_a_validation_error(standin: StandIn) -> None:
    with pytest.raises(ClientError, match="Requested resource not found") as caught:
        standin.client.describe_training_job(TrainingJobName="never")
    assert caught.value.response["Error"]["Code"] == "ValidationException"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"TrainingJobName": "under_score"}, "regular expression"),
        ({"RoleArn": "arn:aws:iam::0:role/too-short-account"}, "regular expression"),
        ({"HyperParameters": {"digest": "x" * 257}}, "more than 256 characters"),
        ({"HyperParameters": {f"p{number}": "1" for number in range(101)}}, "less than or equal to 100"),
        ({"AlgorithmSpecification": SPECIFICATION | {"ContainerArguments": ["x" * 257]}}, "less than or equal to 256"),
        ({"AlgorithmSpecification": {"TrainingImage": "any", "TrainingInputMode": "File"}}, "ContainerEntrypoint"),
        ({"StoppingCondition": {}}, "MaxRuntimeInSeconds is required"),
        ({"EnableManagedSpotTraining": True}, "MaxWaitTimeInSeconds"),
        ({"CheckpointConfig": {"S3Uri": "s3://b/c", "LocalPath": "/opt/ml/elsewhere"}}, "LocalPath"),
        ({"InputDataConfig": [channel("a", "s3://b/c"), channel("a", "s3://b/d")]}, "unique"),
        ({"InputDataConfig": [channel("a", "s3://b/c", InputMode="Pipe")]}, "File and FastFile"),
        ({"ResourceConfig": {"InstanceType": "ml.fast", "InstanceCount": 1, "VolumeSizeInGB": 1}}, "must be one of"),
    ],
)
def test_what_aws_would_refuse_is_refused(standin: StandIn, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ClientError, match=complaint) as caught:
        standin.create("refused", "pass", **changes)
    assert caught.value.response["Error"]["Code"] == "ValidationException"
    with pytest.raises(ClientError, match="not found"):
        standin.client.describe_training_job(TrainingJobName="refused")


def test_a_missing_field_is_refused_by_the_server_too(standin: StandIn) -> None:
    complete = request("lacking", "pass")
    with pytest.raises(ParamValidationError):
        standin.client.create_training_job(**{**complete, "OutputDataConfig": {}})

    body = json.dumps({**complete, "OutputDataConfig": {}}).encode()
    headers = {"X-Amz-Target": "SageMaker.CreateTrainingJob", "Content-Type": "application/x-amz-json-1.1"}
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(standin.url, body, headers))
    assert caught.value.code == 400
    assert json.load(caught.value)["__type"] == "ValidationException"


def test_jobs_are_listed_newest_first_by_name_and_status(standin: StandIn) -> None:
    for number in range(3):
        standin.create(f"listed-{number}", "pass" if number else "raise SystemExit(1)")
        standin.wait(f"listed-{number}")
    listed = standin.client.list_training_jobs(NameContains="listed-", MaxResults=2)
    rest = standin.client.list_training_jobs(NameContains="listed-", MaxResults=2, NextToken=listed["NextToken"])
    names = [job["TrainingJobName"] for page in (listed, rest) for job in page["TrainingJobSummaries"]]
    assert names == ["listed-2", "listed-1", "listed-0"]
    assert "NextToken" not in rest
    failed = standin.client.list_training_jobs(NameContains="listed-", StatusEquals="Failed")["TrainingJobSummaries"]
    assert [job["TrainingJobName"] for job in failed] == ["listed-0"]


@pytest.mark.parametrize("how", ["terminated", "killed"])
def test_a_restart_fails_the_job_that_was_running_and_says_so(endpoint: str, events: str, tmp_path: Path, how: str) -> None:
    standin = StandIn(endpoint, tmp_path, events)
    name = f"interrupted-{how}"
    standin.start()
    try:
        standin.create(name, SAVE_AND_WAIT)
        standin.wait(name, lambda job: is_saved(standin, name) and job["SecondaryStatus"] == "Training")
        record = json.loads((tmp_path / "jobs" / f"{name}.json").read_text())["process"]
        training = psutil.Process(record["pid"])
        assert standin.process is not None
        if how == "killed":
            standin.process.popen.kill()
            standin.process.popen.wait()
            assert training.is_running()
        else:
            standin.stop()
        standin.start()
        assert not training.is_running() or training.status() == psutil.STATUS_ZOMBIE
        job = standin.client.describe_training_job(TrainingJobName=name)
        assert job["TrainingJobStatus"] == "Failed"
        assert job["FailureReason"] == "InternalServerError: the stand-in was stopped during the job"
        assert standin.event(name)["detail"]["TrainingJobStatus"] == "Failed"
        with pytest.raises(ClientError, match="ResourceInUse"):
            standin.create(name, "pass")
    finally:
        standin.stop()


def test_an_event_waits_for_the_emulator(endpoint: str, events: str, tmp_path: Path) -> None:
    standin = StandIn(f"http://127.0.0.1:{free_port()}", tmp_path, events)
    standin.start()
    try:
        standin.create("unheard", "pass", InputDataConfig=[channel("data", f"s3://{BUCKET}/any")])
        assert standin.wait("unheard")["TrainingJobStatus"] == "Failed"  # no emulator, no data
    finally:
        standin.stop()
    standin.endpoint = endpoint
    standin.start()
    try:
        assert standin.event("unheard")["detail"]["TrainingJobStatus"] == "Failed"
    finally:
        standin.stop()
