"""What operators do with a running stack: a new password, an image erased, dead letters put back."""

from __future__ import annotations

import hashlib
import json
import threading
from typing import Any

import boto3
from typer.testing import CliRunner

from cli.deployment import BackendAccess
from cli.main import app
from labelloop.errors import RequestError
from labelloop.records import Promotion
from tests.laptop import Loop, wait_for, wait_until_idle


def test_a_password_changes_while_label_studio_goes_on(loop: Loop, first_version: Promotion) -> None:
    old = loop.backend
    assert _opens(loop, old)
    backend = _backend(loop)
    assert backend["state"] == "CO"
    refused: list[str] = []
    done = threading.Event()

    def go_on() -> None:
        """Label Studio signs in to its backends whenever they are listed."""
        while not done.wait(0.5):
            state = _backend(loop)["state"]
            if state != "CO":
                refused.append(state)

    annotators = threading.Thread(target=go_on)
    annotators.start()
    try:
        rotated = _labelloop(loop, "rotate-secrets", "digits")
    finally:
        done.set()
        annotators.join()
    assert (rotated["project"], rotated["finished"], refused) == (loop.project, False, [])
    new = loop.backend
    assert new.password != old.password
    assert (_opens(loop, new), _opens(loop, old)) == (True, False)
    assert _backend(loop)["state"] == "CO"
    sent = loop.api("GET", f"/api/webhooks/?project={loop.project}")
    assert [hook["headers"]["Authorization"] for hook in sent] == [new.authorization]
    assert loop.webhook("ANNOTATION_CREATED") == 201
    assert _labelloop(loop, "setup-label-studio-project", "digits")["changes"] == []


def test_a_training_of_ones_own_leaves_the_loop_alone(loop: Loop, first_version: Promotion) -> None:
    wait_for(lambda: loop.deployment.ledger.head("digits").running is None, 120, "no training runs")
    before, known = loop.champion, loop.job_names()
    done = _labelloop(loop, "train", "digits", "--instance", "ml.m5.xlarge", "--on-demand")
    assert (done["instance_type"], done["metric"]) == ("ml.m5.xlarge", "accuracy")
    assert (done["version"] > before.version, done["value"] > 0.5, done["difference"] is not None) == (True, True, True)
    asked = boto3.client("sagemaker").describe_training_job(TrainingJobName=done["job_name"])
    assert asked["ResourceConfig"]["InstanceType"] == "ml.m5.xlarge"
    wait_until_idle(loop, "PromoteQueue")
    assert (loop.champion, loop.deployment.ledger.promotion("digits", done["job_name"])) == (before, None)
    assert loop.job_names() == known, "the ledger knows nothing of it"


def test_an_erased_image_is_nowhere_and_its_versions_are_named(loop: Loop, first_version: Promotion) -> None:
    image, task = loop.annotator.tasks[0]
    example = next(one for one in loop.data if loop.address(one) == image)
    sha256 = hashlib.sha256(example.image).hexdigest()
    loop.wait_until_predicted(loop.champion.version)
    wait_for(lambda: loop.deployment.ledger.head("digits").running is None, 120, "no training runs")
    erased = _labelloop(loop, "erase", "digits", "--image", example.name, "--yes", "--reason", "a test")
    (found,) = erased["images"]
    assert (found["sha256"], found["tasks"]) == (sha256, [task])
    assert 1 in {use["version"] for use in found["uses"]}
    assert (erased["tasks"], erased["objects"] >= 1) == (1, True)
    assert erased["files"] >= 2, "the manifest in S3 and in MLflow"

    assert task not in {listed.id for listed in loop.listed()}
    assert image not in {listed.image for listed in loop.listed()}
    assert loop.deployment.images.get(loop.folder.config.images_prefix + example.name) is None
    traced = _labelloop(loop, "lineage", "digits", "--image", sha256)
    assert all(use["erased_at"] for use in traced["uses"] if use["sha256"] == sha256)
    rebuilt = CliRunner().invoke(app, ["lineage", "digits", "--version", "1", "--rebuild", *_here(loop), "--json"])
    assert rebuilt.exit_code == 2
    assert json.loads(rebuilt.stdout)["erased"]
    again = CliRunner().invoke(app, ["erase", "digits", "--image", example.name, "--yes", *_here(loop)])
    assert isinstance(again.exception, RequestError)


def test_dead_letters_go_back_and_are_worked_off(loop: Loop) -> None:
    wait_until_idle(loop, "RetrainQueue")
    sqs: Any = boto3.client("sqs")
    dead, seen = loop.deployment.outputs["RetrainQueueDeadLetters"], loop.signals_seen
    sqs.send_message(QueueUrl=dead, MessageBody=json.dumps({"model": "digits", "action": "SCHEDULE"}))
    listed = _labelloop(loop, "redrive", "--list")["queues"]
    assert {queue["queue"]: len(queue["messages"]) for queue in listed if queue["messages"]} == {"retrain": 1}
    moved = _labelloop(loop, "redrive", "digits")["queues"]
    assert {queue["queue"]: queue["moved"] for queue in moved if queue["moved"]} == {"retrain": 1}

    def left() -> int:
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        urls = [dead, loop.deployment.outputs["RetrainQueue"]]
        counts = [sqs.get_queue_attributes(QueueUrl=url, AttributeNames=names)["Attributes"] for url in urls]
        return sum(int(count) for one in counts for count in one.values())

    wait_for(lambda: left() == 0, 60, "it lies in neither queue")
    wait_for(lambda: loop.signals_seen > seen, 60, "the function has worked it off")


def _here(loop: Loop) -> list[str]:
    return ["--home", str(loop.stack.home)]


def _labelloop(loop: Loop, *words: str) -> Any:
    done = CliRunner().invoke(app, [*words, *_here(loop), "--json"])
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout)


def _opens(loop: Loop, access: BackendAccess) -> bool:
    """Whether these credentials get predictions."""
    body = {"tasks": [{"id": 1, "data": {"image": loop.address(loop.data[-1])}}], "label_config": loop.folder.template}
    headers = {"Authorization": access.authorization}
    answer = loop.http.request("POST", f"{access.url}/predict", json=body, headers=headers)
    assert answer.status in (200, 403), answer.data
    return answer.status == 200 and "result" in answer.json()["results"][0]


def _backend(loop: Loop) -> dict[str, Any]:
    (backend,) = loop.api("GET", f"/api/ml?project={loop.project}")
    return dict(backend)
