"""The CreateTrainingJob request is one that SageMaker takes, and its answers are understood."""

from __future__ import annotations

import re
from typing import Any, cast

import boto3
import botocore.model
import botocore.session
import msgspec
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from botocore.stub import Stubber
from botocore.validate import ParamValidator

from labelloop import launcher
from labelloop.errors import TrainingServiceError
from labelloop.launcher import Launcher, job_name, training_request
from labelloop.model_config import Architecture, ModelConfig, Training
from labelloop.settings import Settings
from tests import examples

ENVIRONMENT = {
    "AWS_REGION": "eu-west-1",
    "LABELLOOP_STAGE": "local",
    "LABELLOOP_IMAGES_BUCKET": "labelloop-local-images",
    "LABELLOOP_ARTIFACTS_BUCKET": "labelloop-local-artifacts",
    "LABELLOOP_MLFLOW_TRACKING_URI": "http://127.0.0.1:5000",
    "LABELLOOP_TRAINING_ROLE": "arn:aws:iam::000000000000:role/labelloop-training",
    "LABELLOOP_TRAINING_IMAGE": "763104351884.dkr.ecr.us-east-1.amazonaws.com/pytorch-training:2.14-cu133",
    "LABELLOOP_TRAINING_CODE": "s3://labelloop-local-artifacts/code/abc.zip",
}
SETTINGS = Settings(ENVIRONMENT)
OPERATION = botocore.session.get_session().get_service_model("sagemaker").operation_model("CreateTrainingJob")
INPUT: botocore.model.Shape = cast(botocore.model.Shape, OPERATION.input_shape)
JOB = examples.job(job_name("local", "digits", "d" * 64, 1))
REQUEST = training_request(SETTINGS, examples.DIGITS, JOB, None)


def limits(shape: botocore.model.Shape, value: Any, path: str = "") -> list[str]:
    """What of a request breaks a length, range, choice or pattern of the service; botocore itself checks only the least."""
    broken: list[str] = []
    least, most = shape.metadata.get("min"), shape.metadata.get("max")
    size = value if isinstance(value, int | float) else len(value)
    if (least is not None and size < least) or (most is not None and size > most):
        broken.append(f"{path}: {size} is not between {least} and {most}")
    if isinstance(shape, botocore.model.StructureShape):
        for name, member in value.items():
            broken += limits(shape.members[name], member, f"{path}.{name}")
    elif isinstance(shape, botocore.model.ListShape):
        for number, member in enumerate(value):
            broken += limits(shape.member, member, f"{path}[{number}]")
    elif isinstance(shape, botocore.model.MapShape):
        for name, member in value.items():
            broken += limits(shape.key, name, f"{path} key") + limits(shape.value, member, f"{path}.{name}")
    elif isinstance(shape, botocore.model.StringShape):
        letters = shape.metadata.get("pattern", "").replace(r"\p{L}", "a-zA-Z").replace(r"\p{N}", "0-9").replace(r"\p{Z}", " ")
        if letters and not re.fullmatch(letters, value):
            broken.append(f"{path}: {value!r} does not match {letters}")
        if shape.enum and value not in shape.enum:
            broken.append(f"{path}: {value!r} is none of {shape.enum}")
    return broken


MIRRORED = msgspec.structs.replace(
    examples.DIGITS, architecture=Architecture(name="mobilenet_v3_large", weights="s3://mirror/torchvision/mobilenet.pth")
)
CONFIGS = {
    "digits": examples.DIGITS,
    "mirrored weights": MIRRORED,
    "no spot": msgspec.structs.replace(examples.DIGITS, training=Training(spot=False, max_runtime_minutes=600)),
    "longest name": msgspec.structs.replace(examples.DIGITS, name="a" * 31 + "_"),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("champion", [None, examples.champion(3)], ids=["first", "against a champion"])
def test_sagemaker_takes_the_request(config: Any, champion: Any) -> None:
    request = training_request(SETTINGS, config, JOB, champion)
    report = ParamValidator().validate(request, INPUT)
    assert not report.has_errors(), report.generate_report()
    assert limits(INPUT, request) == []


def test_the_check_of_limits_finds_what_breaks_them() -> None:
    """So that the test above can fail."""
    wrong = {
        **REQUEST,
        "TrainingJobName": "under_score",
        "HyperParameters": {"model": "x" * 2501},
        "ResourceConfig": {**REQUEST["ResourceConfig"], "InstanceType": "ml.none"},
        "AlgorithmSpecification": {**REQUEST["AlgorithmSpecification"], "ContainerArguments": ["two\nlines", "x" * 257]},
    }
    assert sorted(text.split(":")[0] for text in limits(INPUT, wrong)) == [
        ".AlgorithmSpecification.ContainerArguments[0]",
        ".AlgorithmSpecification.ContainerArguments[1]",
        ".HyperParameters.model",
        ".ResourceConfig.InstanceType",
        ".TrainingJobName",
    ]


def channels(request: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {
        channel["ChannelName"]: (channel["InputMode"], channel["DataSource"]["S3DataSource"]["S3Uri"])
        for channel in request["InputDataConfig"]
    }


def test_the_request_keeps_the_contract_of_the_job() -> None:
    request = training_request(SETTINGS, examples.DIGITS, JOB, examples.champion(3))
    assert request["TrainingJobName"] == "labelloop-local-digits-dddddddddddd-1"
    assert request["HyperParameters"] == {
        "model": "digits",
        "digest": "d" * 64,
        "n_annotations": "100",
        "job_name": "labelloop-local-digits-dddddddddddd-1",
        "champion_version": "3",
        "champion_annotations": "100",
    }
    assert channels(request) == {
        "code": ("File", "s3://labelloop-local-artifacts/code/abc.zip"),
        "manifest": ("File", JOB.snapshot.manifest),
        "images": ("FastFile", "s3://labelloop-local-images/images/digits/"),
        "champion": ("File", "s3://labelloop-local-artifacts/models/digits/3/model.onnx"),
    }
    assert request["Environment"]["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5000"
    assert request["Environment"]["AWS_DEFAULT_REGION"] == "eu-west-1", "its own calls to S3 and Secrets Manager go there"
    assert request["Environment"]["LABELLOOP_CACHE"] == "s3://labelloop-local-artifacts/cache/digits/"
    assert request["OutputDataConfig"]["S3OutputPath"] == "s3://labelloop-local-artifacts/training/digits/"
    assert request["StoppingCondition"]["MaxWaitTimeInSeconds"] >= request["StoppingCondition"]["MaxRuntimeInSeconds"] == 1800
    assert request["CheckpointConfig"]["S3Uri"].endswith(f"checkpoints/digits/{JOB.job_name}/")


def test_mirrored_weights_are_a_channel_and_others_are_not() -> None:
    request = training_request(SETTINGS, MIRRORED, JOB, None)
    assert channels(request)["weights"] == ("File", "s3://mirror/torchvision/mobilenet.pth")
    assert "weights" not in channels(REQUEST)


def test_without_a_champion_there_is_no_channel_for_it() -> None:
    assert "champion" not in channels(REQUEST)
    assert REQUEST["HyperParameters"]["champion_version"] == ""


def test_a_job_that_is_not_on_spot_waits_for_no_spot() -> None:
    request = training_request(SETTINGS, CONFIGS["no spot"], JOB, None)
    assert request["EnableManagedSpotTraining"] is False
    assert "MaxWaitTimeInSeconds" not in request["StoppingCondition"]


def test_a_job_runs_in_the_stages_network_where_it_has_one() -> None:
    assert "VpcConfig" not in training_request(SETTINGS, CONFIGS["no spot"], JOB, None)
    inside = {"LABELLOOP_TRAINING_SUBNETS": "subnet-1,subnet-2", "LABELLOOP_TRAINING_SECURITY_GROUPS": "sg-3"}
    request = training_request(Settings({**ENVIRONMENT, **inside}), CONFIGS["no spot"], JOB, None)
    assert request["VpcConfig"] == {"Subnets": ["subnet-1", "subnet-2"], "SecurityGroupIds": ["sg-3"]}


NAME = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}")


@pytest.mark.parametrize("stage", ["dev", "local", "production"])
@pytest.mark.parametrize("model", ["ab", "traffic_signs", "a" * 32, "a_" * 16])
@pytest.mark.parametrize("attempt", [1, 99])
def test_job_names_are_ones_that_sagemaker_takes(stage: str, model: str, attempt: int) -> None:
    name = job_name(stage, model, "0123456789abcdef" * 4, attempt)
    assert NAME.fullmatch(name)
    assert name.startswith(f"labelloop-{stage}-")
    assert name.endswith(f"-0123456789ab-{attempt}")


def test_another_attempt_or_snapshot_has_another_name() -> None:
    names = {job_name("dev", "digits", digest * 64, attempt) for digest in "ab" for attempt in (1, 2)}
    assert len(names) == 4


@pytest.fixture
def sagemaker() -> Any:
    return boto3.client("sagemaker")


def error(operation: str, code: str) -> Any:
    client = boto3.client("sagemaker")
    stub = Stubber(client)
    stub.add_client_error(operation, code, "some text that nobody decides by")
    stub.activate()
    return client


def test_a_job_that_was_started_already_is_fine() -> None:
    Launcher(SETTINGS, error("create_training_job", "ResourceInUse")).start(examples.DIGITS, JOB, None)


@pytest.mark.parametrize("code", ["ValidationException", "ResourceLimitExceeded", "AccessDeniedException"])
def test_a_refused_job_is_a_training_service_error(code: str) -> None:
    with pytest.raises(TrainingServiceError, match=JOB.job_name):
        Launcher(SETTINGS, error("create_training_job", code)).start(examples.DIGITS, JOB, None)


class Quotas:
    """SageMaker of an account that may use some types of instances only."""

    def __init__(self, *allowed: str) -> None:
        self._allowed, self.asked = allowed, list[str]()

    def create_training_job(self, **request: Any) -> None:
        self.asked.append(request["ResourceConfig"]["InstanceType"])
        if self.asked[-1] not in self._allowed:
            raise ClientError({"Error": {"Code": "ResourceLimitExceeded", "Message": "limit is 0"}}, "CreateTrainingJob")


def with_fallbacks(*types: str) -> ModelConfig:
    return changed_training(fallback_instance_types=list(types))


def changed_training(**changes: Any) -> ModelConfig:
    config = examples.DIGITS
    return msgspec.structs.replace(config, training=msgspec.structs.replace(config.training, **changes))


def test_without_a_quota_the_next_type_is_taken() -> None:
    sagemaker = Quotas("ml.g4dn.xlarge")
    Launcher(SETTINGS, sagemaker).start(with_fallbacks("ml.g6.xlarge", "ml.g4dn.xlarge"), JOB, None)
    assert sagemaker.asked == ["ml.g5.xlarge", "ml.g6.xlarge", "ml.g4dn.xlarge"]


def test_after_a_shortage_the_next_type_comes_first() -> None:
    sagemaker, short = Quotas("ml.g6.xlarge"), msgspec.structs.replace(JOB, shortages=1)
    Launcher(SETTINGS, sagemaker).start(with_fallbacks("ml.g6.xlarge"), short, None)
    assert sagemaker.asked == ["ml.g6.xlarge"]
    assert with_fallbacks("ml.g6.xlarge").training.instance_types(2) == ["ml.g5.xlarge", "ml.g6.xlarge"]


def test_without_any_quota_the_error_says_what_to_do() -> None:
    with pytest.raises(
        TrainingServiceError, match=r"limit is 0; raise the quota, or name other instances under training.fallback_inst"
    ):
        Launcher(SETTINGS, Quotas()).start(with_fallbacks("ml.g6.xlarge"), JOB, None)


@pytest.mark.parametrize(
    ("failure", "none"),
    [("CapacityError: Unable to provision requested ML compute capacity.", True), ("AlgorithmError: CapacityError", False)],
)
def test_a_shortage_of_machines_is_no_failure_of_the_job(failure: str, none: bool) -> None:
    state = Launcher(SETTINGS, Describes(TrainingJobStatus="Failed", FailureReason=failure)).state("job-1")
    assert state is not None
    assert state.no_machine is none


@pytest.mark.parametrize(
    ("secondary", "none", "reason"),
    [
        ("MaxWaitTimeExceeded", True, "CapacityError: no spot machine"),
        ("MaxRuntimeExceeded", False, "it took longer than training.max_runtime_minutes"),
        ("Stopped", False, "None"),
    ],
)
def test_why_sagemaker_itself_stopped_a_job_is_told(secondary: str, none: bool, reason: str) -> None:
    state = Launcher(SETTINGS, Describes(TrainingJobStatus="Stopped", SecondaryStatus=secondary)).state("job-1")
    assert state is not None
    assert state.no_machine is none
    assert str(state.failure).startswith(reason)


def test_a_started_job_is_the_request_of_the_contract() -> None:
    client = boto3.client("sagemaker")
    with Stubber(client) as stub:
        arn = f"arn:aws:sagemaker:us-east-1:000000000000:training-job/{JOB.job_name}"
        stub.add_response("create_training_job", {"TrainingJobArn": arn}, REQUEST)
        Launcher(SETTINGS, client).start(examples.DIGITS, JOB, None)
        stub.assert_no_pending_responses()


class Describes:
    """SageMaker's describe_training_job with a fixed answer."""

    def __init__(self, **answer: str) -> None:
        self._answer = answer

    def describe_training_job(self, TrainingJobName: str) -> dict[str, str]:
        return self._answer


@pytest.mark.parametrize(
    ("status", "ended"), [("InProgress", False), ("Stopping", False), ("Completed", True), ("Failed", True), ("Stopped", True)]
)
def test_the_state_of_a_job_is_read(status: str, ended: bool) -> None:
    state = Launcher(SETTINGS, Describes(TrainingJobStatus=status, FailureReason="why")).state("job")
    assert state is not None
    assert (state.status, state.ended, state.failure) == (status, ended, "why")


@pytest.mark.parametrize("code", ["ValidationException", "ResourceNotFound"])
def test_a_job_that_was_never_started_has_no_state(code: str) -> None:
    assert Launcher(SETTINGS, error("describe_training_job", code)).state("job") is None


def test_a_service_that_does_not_answer_is_an_error() -> None:
    class Dead:
        def describe_training_job(self, **_: Any) -> Any:
            raise EndpointConnectionError(endpoint_url="http://127.0.0.1:9")

        create_training_job = describe_training_job

    with pytest.raises(TrainingServiceError, match="does not answer"):
        Launcher(SETTINGS, Dead()).state("job")
    with pytest.raises(TrainingServiceError, match="does not answer"):
        Launcher(SETTINGS, Dead()).start(examples.DIGITS, JOB, None)
    with pytest.raises(TrainingServiceError, match="refused to describe"):
        Launcher(SETTINGS, error("describe_training_job", "AccessDeniedException")).state("job")


def test_the_container_command_fits_into_one_argument() -> None:
    assert REQUEST["AlgorithmSpecification"]["ContainerArguments"] == [launcher.COMMAND]
    assert launcher.COMMAND.endswith("exec bash training_jobs/start.sh")
