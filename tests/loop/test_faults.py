"""What breaks in a running loop, for real: each test ends with the loop turning again and nothing lost.

Tests run in the file's order, after all others of the loop. What heals a fault stands in each test's docstring. The schedule
comes every five minutes: one test waits for it, in the others `schedule` stands for it.
"""

from __future__ import annotations

import base64
import io
import json
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import boto3
import psutil
import pytest

from labelloop import artifacts
from labelloop.records import Promotion, version_string
from tests import examples
from tests.laptop import SECOND, Loop, wait_for

QUEUES = ("RetrainQueue", "PromoteQueue", "RefreshQueue", "PrelabelQueue")
BURST = 2_000


# What the tests do to the loop


@contextmanager
def down(loop: Loop, part: str) -> Iterator[None]:
    """A part of the stack is killed, and comes back afterwards."""
    process = psutil.Process(loop.stack.pids()[part])
    family = [process, *process.children(recursive=True)]
    for member in family:
        member.kill()
    psutil.wait_procs(family, timeout=30)
    try:
        yield
    finally:
        loop.stack.up()


@contextmanager
def held(loop: Loop, queue: str) -> Iterator[None]:
    """Nobody reads a queue for a while."""
    functions: Any = boto3.client("lambda")
    arn = attributes(loop, queue)["QueueArn"]
    (mapping,) = functions.list_event_source_mappings(EventSourceArn=arn)["EventSourceMappings"]
    functions.update_event_source_mapping(UUID=mapping["UUID"], Enabled=False)
    try:
        yield
    finally:
        functions.update_event_source_mapping(UUID=mapping["UUID"], Enabled=True)


def send(loop: Loop, queue: str, message: Any) -> None:
    body = message if isinstance(message, str) else json.dumps(message)
    boto3.client("sqs").send_message(QueueUrl=loop.deployment.outputs[queue], MessageBody=body)


def schedule(loop: Loop) -> None:
    send(loop, "RetrainQueue", {"action": "SCHEDULE"})


def attributes(loop: Loop, queue: str) -> dict[str, str]:
    sqs: Any = boto3.client("sqs")
    return dict(sqs.get_queue_attributes(QueueUrl=loop.deployment.outputs[queue], AttributeNames=["All"])["Attributes"])


def is_empty(loop: Loop, queue: str) -> bool:
    """Nothing waits, and nothing is being worked on."""
    found = attributes(loop, queue)
    return found["ApproximateNumberOfMessages"] == found["ApproximateNumberOfMessagesNotVisible"] == "0"


def start_training(loop: Loop) -> str:
    """Annotate one more and press Start Training; the job, as soon as its process writes."""
    loop.annotate_more(1)
    before = set(loop.job_names())
    assert loop.webhook("START_TRAINING") == 201
    (job,) = wait_for(lambda: set(loop.job_names()) - before, 60, "a job")
    wait_for(lambda: loop.stack.job_log(job).exists(), 60, "its log")
    return job


def log_of(loop: Loop, job: str) -> str:
    return loop.stack.job_log(job).read_text()


def wait_for_log(loop: Loop, job: str, text: str) -> None:
    wait_for(lambda: text in log_of(loop, job), 120, f"the job says {text!r}")


def verdict(loop: Loop, job: str) -> Promotion:
    return wait_for(lambda: loop.deployment.ledger.promotion(loop.model, job), 180, f"the verdict about {job}")


def describe(job: str) -> dict[str, Any]:
    sagemaker: Any = boto3.client("sagemaker")
    return dict(sagemaker.describe_training_job(TrainingJobName=job))


def serves(loop: Loop) -> bool:
    """Whether the champion answers predict."""
    tasks = [{"id": 1, "data": {"image": loop.address(loop.data[0])}}]
    headers = {"Authorization": loop.backend.authorization}
    answer = loop.http.request("POST", f"{loop.backend.url}/predict", json={"tasks": tasks}, headers=headers)
    wanted = version_string(loop.model, loop.champion.version)
    return bool(answer.status == 200 and answer.json()["results"][0].get("model_version") == wanted)


def completed(loop: Loop) -> str:
    """A training that ended; its job."""
    job = start_training(loop)
    wait_for(lambda: describe(job)["TrainingJobStatus"] == "Completed", 120, "the job is completed")
    return job


@contextmanager
def failing(loop: Loop, said: dict[str, str], *, times: int = 1) -> Iterator[None]:
    """What happens in the block makes each of the functions say that something fails; the second time, its message came again."""
    before = {function: loop.function_log(function).count(text) for function, text in said.items()}
    yield
    for function, text in said.items():
        wait_for(
            lambda function=function, text=text: loop.function_log(function).count(text) >= before[function] + times,  # type: ignore[misc]
            120,
            f"{function} says {text!r}, {times} times",
        )


def task_of(loop: Loop, key: str) -> int:
    """How many tasks an image has."""
    address = artifacts.s3_uri(loop.deployment.images.name, key)
    return sum(task.image == address for task in loop.listed())


def dead_letters(loop: Loop) -> int:
    return sum(int(attributes(loop, f"{queue}DeadLetters")["ApproximateNumberOfMessages"]) for queue in ("IngestQueue", *QUEUES))


# Fast ones


@pytest.mark.parametrize(
    "queue",
    [
        "IngestQueue",
        "RetrainQueue",
        "PromoteQueue",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("RefreshQueue", "PrelabelQueue")),
    ],
)
def test_a_poison_message_lies_among_the_dead_letters_at_once(loop: Loop, first_version: Promotion, queue: str) -> None:
    """What is no message comes again at once, is given up, and keeps no other message waiting."""
    poison = f"no json {time.time()}"
    send(loop, queue, poison)
    sqs: Any = boto3.client("sqs")
    url = loop.deployment.outputs[f"{queue}DeadLetters"]

    def dead() -> bool:
        for message in sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10, VisibilityTimeout=1).get("Messages", []):
            if message["Body"] == poison:
                sqs.delete_message(QueueUrl=url, ReceiptHandle=message["ReceiptHandle"])
                return True
        return False

    wait_for(dead, 120, "a dead letter")
    wait_for(lambda: is_empty(loop, queue), 60, "the queue is empty")


def test_a_webhook_that_label_studio_switched_off_is_switched_on(loop: Loop, first_version: Promotion) -> None:
    """The schedule's look at the webhooks."""
    with webhook_off(loop):
        schedule(loop)
        wait_for(lambda: webhook(loop)["is_active"], 60, "the webhook is on again")
        found = webhook(loop)
        assert "ANNOTATION_CREATED" in found["actions"]
        assert found["headers"]["Authorization"] == loop.backend.authorization
        wait_for(lambda: "the webhook was switched off" in loop.function_log("retrain"), 30, "the log says so")


def webhook(loop: Loop) -> dict[str, Any]:
    (found,) = loop.api("GET", f"/api/webhooks/?project={loop.project}")
    return dict(found)


@contextmanager
def webhook_off(loop: Loop) -> Iterator[None]:
    found = webhook(loop)
    address = f"/api/webhooks/{found['id']}/"
    loop.api("PATCH", address, {"is_active": False, "actions": found["actions"]})
    try:
        yield
    finally:
        loop.api("PATCH", address, {"is_active": True, "actions": found["actions"]})


def corrupt(archive: bytes) -> bytes:
    return archive[: len(archive) // 2]


def truncated_model(archive: bytes) -> bytes:
    """The archive with the first half of its model file."""
    files: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar.getmembers():
            content = tar.extractfile(member)
            assert content is not None
            files[member.name] = content.read()
    files["model.onnx"] = files["model.onnx"][: len(files["model.onnx"]) // 2]
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return packed.getvalue()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(corrupt, "the model archive is damaged"), pytest.param(truncated_model, "its SHA-256 differs", marks=pytest.mark.slow)],
)
def test_a_damaged_model_leaves_the_old_one_serving(
    loop: Loop, first_version: Promotion, damage: Callable[[bytes], bytes], reason: str
) -> None:
    """The gate refuses it for good, and the next training may start."""
    champion = loop.champion
    bucket = loop.deployment.artifacts
    with held(loop, "PromoteQueue"):
        job = completed(loop)
        key = artifacts.training_archive_key(loop.model, job)
        archive = bucket.get(key)
        assert archive is not None
        bucket.put(key, damage(archive))
    refused = verdict(loop, job)
    assert (refused.verdict, refused.version) == ("keep", 0)
    assert reason in refused.reason
    assert loop.champion == champion
    assert serves(loop)
    schedule(loop)
    wait_for(lambda: is_empty(loop, "RetrainQueue"), 60, "the loop has looked")
    head = loop.deployment.ledger.head(loop.model)
    assert head.running is None
    assert head.trained is not None
    assert head.trained.job_name == job, "nothing waits for a verdict"


# Slow ones


@pytest.mark.slow
def test_annotations_whose_webhooks_are_all_lost_are_trained_on(loop: Loop, first_version: Promotion) -> None:
    """The schedule, which comes by itself, counts in Label Studio."""
    wait_for(lambda: is_empty(loop, "RetrainQueue"), 60, "no other message has the loop look")
    before = set(loop.job_names())
    missing = max(SECOND - loop.annotated, 0)
    assert missing, "the test needs a count that is still to come"
    with webhook_off(loop):
        loop.annotate_more(missing)
    (job,) = wait_for(lambda: set(loop.job_names()) - before, 330, "a job")
    assert verdict(loop, job).n_annotations >= SECOND


@pytest.mark.slow
def test_a_spot_job_whose_machine_is_taken_away_goes_on_from_its_checkpoint(loop: Loop, first_version: Promotion) -> None:
    """SageMaker starts the job again with its checkpoints; the loop sees one job."""
    job = start_training(loop)
    wait_for_log(loop, job, "epoch 2 of")
    record = json.loads((loop.stack.home / "sagemaker" / "jobs" / f"{job}.json").read_text())
    assert record["request"]["EnableManagedSpotTraining"]
    psutil.Process(record["process"]["pid"]).terminate()
    assert verdict(loop, job).version
    assert "going on from the checkpoint at step" in log_of(loop, job)
    assert "going on with the MLflow run" in log_of(loop, job)
    assert [entry["Status"] for entry in describe(job)["SecondaryStatusTransitions"]].count("Interrupted") == 1
    assert loop.deployment.ledger.head(loop.model).failure is None


@pytest.mark.slow
def test_mlflow_may_go_away_in_mid_training(loop: Loop, first_version: Promotion) -> None:
    """The job asks again for some minutes."""
    job = start_training(loop)
    wait_for_log(loop, job, "epoch 2 of")
    with down(loop, "mlflow"):
        pass
    assert verdict(loop, job).version


@pytest.mark.slow
def test_mlflow_may_be_away_at_the_promotion(loop: Loop, first_version: Promotion) -> None:
    """The verdict stands without it; the message comes again until MLflow knows, within half a minute at first."""
    from mlflow import MlflowClient

    with ExitStack() as outage:
        with held(loop, "PromoteQueue"):
            job = completed(loop)
            outage.enter_context(down(loop, "mlflow"))
            outage.enter_context(failing(loop, {"promote": "comes again"}))
        decided = verdict(loop, job)
        assert decided.version
    wait_for(lambda: is_empty(loop, "PromoteQueue"), 180, "the message was taken")
    version = MlflowClient(loop.deployment.mlflow_tracking_uri).get_model_version(loop.model, str(decided.version))
    assert version.tags["verdict"] == decided.verdict


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_label_studio_may_be_away_while_everybody_wants_it(loop: Loop, first_version: Promotion) -> None:
    """Every message comes again: an image becomes one task, a pressed button one training, and the predictions are made."""
    annotated, before, number = loop.annotate_more(1), set(loop.job_names()), len(loop.listed())
    key = f"{loop.folder.config.images_prefix}outage {number}.png"
    said = dict.fromkeys(("ingest", "refresh", "prelabel"), "comes again")
    with down(loop, "label_studio"), failing(loop, said, times=2), failing(loop, {"retrain": "not reconciled"}):
        loop.deployment.images.put(key, examples.png(7, size=(8, 8), salt=number))
        send(loop, "RefreshQueue", {"model": loop.model, "version": loop.champion.version})
        send(loop, "PrelabelQueue", {"model": loop.model, "after": 0, "upto": 10_000})
        assert loop.webhook("START_TRAINING") == 201
        schedule(loop)
    wait_for(lambda: task_of(loop, key), 300, "the image is a task")  # its claim of the first try holds for 90 s
    loop.verdict_about(annotated)
    for queue in ("IngestQueue", "RefreshQueue", "PrelabelQueue"):  # what failed four times is put off by some minutes
        wait_for(lambda queue=queue: is_empty(loop, queue), 480, f"{queue} is empty")  # type: ignore[misc]
    assert task_of(loop, key) == 1
    assert len(set(loop.job_names()) - before) == 1
    assert dead_letters(loop) == 0
    loop.wait_until_predicted(loop.champion.version)


@pytest.mark.slow
def test_the_training_service_may_be_away_when_a_training_is_due(loop: Loop, first_version: Promotion) -> None:
    """The training is claimed in the ledger; the message comes again, and the very job that was claimed starts."""
    loop.annotate_more(1)
    before = set(loop.job_names())
    with down(loop, "sagemaker"), failing(loop, {"retrain": "SageMaker does not answer"}):
        assert loop.webhook("START_TRAINING") == 201
        (job,) = wait_for(lambda: set(loop.job_names()) - before, 60, "a claim")
    assert verdict(loop, job).version
    assert set(loop.job_names()) - before == {job}


@pytest.mark.slow
def test_two_thousand_webhooks_at_once_during_a_training(
    loop: Loop, first_version: Promotion, record_property: Callable[[str, object], None]
) -> None:
    """The front door only queues them; the queue's reader takes ten at a time and looks once for all of them."""
    wait_for(lambda: is_empty(loop, "RetrainQueue"), 60, "the queue is empty")
    signals, job = loop.signals_seen, start_training(loop)
    annotated, jobs = loop.annotate_more(1), set(loop.job_names())
    access = loop.backend

    def call(number: int) -> tuple[int, float]:
        action = "START_TRAINING" if number == BURST // 2 else "ANNOTATION_CREATED"
        body, headers = {"action": action, "project": {"id": loop.project}}, {"Authorization": access.authorization}
        began = time.perf_counter()
        answer = loop.http.request("POST", f"{access.url}/webhook", json=body, headers=headers)
        return answer.status, time.perf_counter() - began

    assert describe(job)["TrainingJobStatus"] == "InProgress"
    began = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(call, range(BURST)))
    took, waits = time.perf_counter() - began, sorted(wait for _, wait in answers)
    figures = {"seconds": took, **{f"p{share}_ms": 1000 * waits[BURST * share // 100 - 1] for share in (50, 99, 100)}}
    for name, value in figures.items():
        record_property(name, round(value, 1))
        print(f"{name}: {value:.1f}")  # noqa: T201
    assert {status for status, _ in answers} == {201}
    assert verdict(loop, job).version
    loop.verdict_about(annotated)
    wait_for(lambda: is_empty(loop, "RetrainQueue"), 120, "the queue is empty")
    assert loop.signals_seen - signals >= BURST, "every webhook was seen"
    assert len(set(loop.job_names()) - jobs) == 1
    assert dead_letters(loop) == 0


# What all of it has left in the logs


def test_no_log_holds_a_secret_or_an_image(loop: Loop, first_version: Promotion) -> None:
    deployment, laptop = loop.deployment, loop.deployment.laptop
    assert laptop is not None
    secrets = {"Label Studio's token": deployment.label_studio_token, "Label Studio's password": laptop.label_studio_password}
    for model in ("digits", "numerals"):
        access = deployment.backend(model)
        secrets |= {f"the password of {model}": access.password, f"the header of {model}": access.authorization.split()[1]}
    wanted = {what: secret.encode() for what, secret in secrets.items()}
    for what, magic in {"a PNG": b"\x89PNG\r\n\x1a\n", "a JPEG": b"\xff\xd8\xff\xe0"}.items():
        wanted |= {what: magic, f"{what} in base64": base64.b64encode(magic)[: len(magic) * 4 // 3]}
    files = [file for file in (loop.stack.home / "logs").rglob("*") if file.is_file()]
    assert {"retrain", "promote", "ingest", "predict"} <= {
        name for name in ("retrain", "promote", "ingest", "predict") if loop.function_log(name)
    }
    found = {(file.name, what) for file in files for what, text in wanted.items() if text in file.read_bytes()}
    assert found == set()
