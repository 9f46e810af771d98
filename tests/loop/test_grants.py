"""No grant is idle: each one is taken away in turn, and the function that had it fails at what it is there for.

The deployed functions are invoked as their queues and the API invoke them, with IAM enforced. What the emulator cannot show is
listed with its reason.
"""

from __future__ import annotations

import io
import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import count
from typing import Any

import boto3
import msgspec
import numpy as np
import pytest
from PIL import Image

from labelloop import artifacts, problem_types
from labelloop.messages import announce
from labelloop.predict import PART
from labelloop.records import Promotion, Suspect, VersionJudged
from tests.laptop import Loop, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

ASKED_AGAIN = timedelta(seconds=31)  # after a training's end `retrain` asks for a verdict that is missing
NO_TASK = 10**8  # ids that no task has
LATER = 900  # a version that no training of these tests reaches
NOT_SEEN_HERE = {  # action, and where it counts for some functions only, their names
    "logs:CreateLogStream": "the emulator writes logs itself",
    "logs:PutLogEvents": "the emulator writes logs itself",
    "xray:PutTraceSegments": "the emulator has no X-Ray",
    "xray:PutTelemetryRecords": "the emulator has no X-Ray",
    "sqs:ReceiveMessage": "the emulator's event sources read queues without the function's role",
    "sqs:DeleteMessage": "the emulator's event sources read queues without the function's role",
    "sqs:GetQueueAttributes": "the emulator's event sources read queues without the function's role",
    "sqs:GetQueueUrl": "the emulator's event sources read queues without the function's role",
    "sqs:ChangeMessageVisibility": "asked for only when a message fails",
    "s3:ListBucket": "S3 answers 404 for what is missing only to who may list; the emulator always does",
    "s3:AbortMultipartUpload": "only a broken upload of a large file is taken back",
    "iam:PassRole": "the stand-in for SageMaker asks for no role",
    "sagemaker:CreateTrainingJob": "the stand-in for SageMaker checks no policy",
    "sagemaker:DescribeTrainingJob": "the stand-in for SageMaker checks no policy",
    "sagemaker:AddTags": "the stand-in for SageMaker checks no policy",
    "prelabel dynamodb:Query": "only auto_accept reads audits",
    "prelabel dynamodb:PutItem": "only auto_accept notes audits",
}


class Function:
    """A deployed function and its role's one policy."""

    def __init__(self, configuration: dict[str, Any]) -> None:
        self.name = str(configuration["Environment"]["Variables"]["POWERTOOLS_SERVICE_NAME"])
        self._environment, self._physical = configuration["Environment"]["Variables"], configuration["FunctionName"]
        self._timeout = int(configuration["Timeout"])
        self._role = configuration["Role"].rpartition("/")[2]
        self._iam, self._lambda = boto3.client("iam"), boto3.client("lambda")
        (self._policy,) = self._iam.list_role_policies(RoleName=self._role)["PolicyNames"]
        self._document = self._iam.get_role_policy(RoleName=self._role, PolicyName=self._policy)["PolicyDocument"]
        self._starts = count(1)

    @property
    def grants(self) -> list[tuple[str, str]]:
        """Action and resource, one by one."""
        return [(s["Action"], s["Resource"]) for s in self._statements]

    @property
    def _statements(self) -> list[dict[str, Any]]:
        return [
            {**statement, "Action": action, "Resource": resource}
            for statement in self._document["Statement"]
            for action in _as_list(statement["Action"])
            for resource in _as_list(statement["Resource"])
        ]

    @contextmanager
    def without(self, grant: tuple[str, str]) -> Iterator[None]:
        left = [s for s in self._statements if (s["Action"], s["Resource"]) != grant]
        self._put({**self._document, "Statement": left})
        try:
            yield
        finally:
            self._put(self._document)

    def _put(self, document: dict[str, Any]) -> None:
        self._iam.put_role_policy(RoleName=self._role, PolicyName=self._policy, PolicyDocument=json.dumps(document))

    def invoke(self, event: dict[str, Any], *, seconds: int | None = None) -> Any:
        """Its answer, from a process that remembers nothing. `seconds`: it has only that long."""
        variables = {**self._environment, "LABELLOOP_START": str(next(self._starts))}
        self._lambda.update_function_configuration(
            FunctionName=self._physical, Environment={"Variables": variables}, Timeout=seconds or self._timeout
        )
        self._lambda.get_waiter("function_updated_v2").wait(FunctionName=self._physical, WaiterConfig={"Delay": 1})
        for _ in range(3):  # the emulator may lose a process that it has just replaced
            answer = self._lambda.invoke(FunctionName=self._physical, Payload=json.dumps(event).encode())
            if "FunctionError" not in answer:
                break
        return json.loads(answer["Payload"].read())

    def forget(self) -> None:
        """Leave the function as it was deployed."""
        self._lambda.update_function_configuration(
            FunctionName=self._physical, Environment={"Variables": self._environment}, Timeout=self._timeout
        )


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _message(body: dict[str, Any]) -> dict[str, Any]:
    record = {
        "messageId": uuid.uuid4().hex,
        "eventSource": "aws:sqs",
        "eventSourceARN": "arn:aws:sqs:us-east-1:000000000000:none",
        "receiptHandle": "1",
        "attributes": {"ApproximateReceiveCount": "1"},
        "body": json.dumps(body),
    }
    return {"Records": [record]}


class Works:
    """For each function: do all that it is there for; whether it did."""

    def __init__(self, loop: Loop, functions: dict[str, Function]) -> None:
        self._loop, self._functions, self._numbers = loop, functions, count(1)
        self._model, self._deployment = loop.model, loop.deployment

    def of(self, name: str) -> Callable[[], bool]:
        return partial(getattr(self, name), self._functions[name])

    def authorize(self, function: Function) -> bool:
        event = {
            "headers": {"Authorization": self._loop.backend.authorization},
            "methodArn": f"arn:aws:execute-api:us-east-1:000000000000:api/v1/POST/{self._model}/setup",
        }
        answer = function.invoke(event)
        return "policyDocument" in answer and answer["policyDocument"]["Statement"][0]["Effect"] == "Allow"

    def predict(self, function: Function) -> bool:
        """It predicts, has parts of many tasks predicted, and queues what it has no time for."""

        def results(tasks: list[dict[str, Any]], seconds: int | None = None) -> list[dict[str, Any]]:
            body = json.dumps({"tasks": tasks})
            event = {"resource": "/{model}/predict", "pathParameters": {"model": self._model}, "body": body}
            answer = function.invoke(event, seconds=seconds)
            return list(json.loads(answer["body"]).get("results", [])) if "body" in answer else []

        few = results(self._two_tasks())
        if not self._are_answers(few):
            return False
        own, _ = self._two_tasks()
        many = results([own] * (PART + 1))
        late = results([own], seconds=7)
        return bool(many and all("result" in entry for entry in many) and late and late[0].get("error", "").startswith("queued"))

    def predict_part(self, function: Function) -> bool:
        champion = msgspec.to_builtins(self._loop.champion)
        answer = function.invoke({"champion": champion, "tasks": self._two_tasks(), "until": time.time() + 60})
        return self._are_answers(answer.get("results", []))

    def _two_tasks(self) -> list[dict[str, Any]]:
        """An image of the bucket, and a file that Label Studio refuses; of an upload that is not there it answers 500."""
        addresses = [self._loop.address(self._loop.data[0]), "/data/local-files/?d=never-there.png"]
        return [{"id": NO_TASK + number, "data": {"image": address}} for number, address in enumerate(addresses)]

    def _are_answers(self, results: list[dict[str, Any]]) -> bool:
        if len(results) != 2 or None in results:
            return False
        own, upload = results
        return bool(own.get("result")) and "Label Studio answered" in upload["error"]  # asked for with the token, and not there

    def ingest(self, function: Function) -> bool:
        name = f"grants/{next(self._numbers)}.png"
        key = self._loop.folder.config.images_prefix + name
        self._deployment.images.put(key, _new_image())
        event = {"detail": {"bucket": {"name": self._deployment.images.name}, "object": {"key": key}}}
        return function.invoke(_message(event)) == {"batchItemFailures": []} and self._is_task(name)

    def retrain(self, function: Function) -> bool:
        """It asks for a lost verdict, and starts a training of what is new."""
        trained = self._deployment.ledger.head(self._model).trained
        assert trained is not None
        verdict = self._deployment.ledger.promotion(self._model, trained.job_name)
        assert verdict is not None
        ended = datetime.fromisoformat(trained.ended_at)
        wait_for(lambda: datetime.now(UTC) - ended > ASKED_AGAIN, 60, "it is time to ask for the verdict again")
        self._forget(f"promotion#{trained.job_name}")
        self._forget(f"recall#{trained.job_name}")  # or it asks in an hour
        try:
            if function.invoke(_message({"model": self._model, "action": "SCHEDULE"})) != {"batchItemFailures": []}:
                return False
        finally:
            self._deployment.ledger.record_promotion(verdict)
        before = self._loop.job_names()
        annotated = self._loop.annotate_more(1)
        asked = function.invoke(_message({"model": self._model, "action": "START_TRAINING"})) == {"batchItemFailures": []}
        started = self._loop.job_names() != before
        if started:
            self._loop.verdict_about(annotated)
        return asked and started

    def promote(self, function: Function) -> bool:
        """It lets the first version serve that it hears of."""
        champions, bucket = self._deployment.champions, self._deployment.outputs["ArtifactsBucket"]
        champion = champions.read(self._model)
        assert champion is not None
        verdict = next(p for p in self._deployment.ledger.promotions(self._model).values() if p.version == champion.version)
        boto3.client("s3").delete_object(Bucket=bucket, Key=artifacts.champion_key(self._model))
        self._forget(f"promotion#{verdict.job_name}")
        try:
            message = _message({"model": self._model, "job_name": verdict.job_name})
            first = function.invoke(message)
            self._forget(f"promotion#{verdict.job_name}")  # of the version that serves already it looks for how it came to
            again = function.invoke(message)
            return first == again == {"batchItemFailures": []} and champions.read(self._model) is not None
        finally:
            self._forget(f"promotion#{verdict.job_name}")
            self._deployment.ledger.record_promotion(verdict)
            champions.swap(champion, tag=champions.read_tagged(self._model)[1])

    def refresh(self, function: Function) -> bool:
        """It mends the backend's title, has tasks predicted, and offers an annotation for review."""
        champion, label_studio = self._loop.champion, self._deployment.label_studio
        (backend,) = label_studio.backends(self._loop.project)
        label_studio.rename_backend(backend, "of another version", self._loop.backend.password)
        report = self._deployment.champions.evaluation(self._model, champion.version)
        assert report is not None
        suspect = self._suspect()
        doubted = msgspec.structs.replace(report, suspects=[suspect])
        self._deployment.artifacts.put(artifacts.evaluation_key(self._model, LATER), msgspec.json.encode(doubted))
        answers = [function.invoke(_message({"model": self._model, "version": version})) for version in (champion.version, LATER)]
        cases = {case.sha256 for case in self._deployment.ledger.review_cases(self._model, self._loop.project)}
        return answers == 2 * [{"batchItemFailures": []}] and suspect.sha256 in cases

    def prelabel(self, function: Function) -> bool:
        """It finds a prediction too many, which somebody may have open, and asks to look again."""
        task = next(task for task in self._loop.listed() if not task.labelled and len(task.predictions) == 1)
        (prediction,) = task.predictions
        fields = ("task", "project", "result", "score", "model_version", "cluster")
        added = self._loop.api("POST", "/api/predictions/", {name: prediction[name] for name in fields})
        try:
            answer = function.invoke(_message({"model": self._model, "after": task.id - 1, "upto": task.id}))
        finally:
            self._deployment.label_studio.delete_prediction(added["id"])
        return bool(answer == {"batchItemFailures": []})

    def _suspect(self) -> Suspect:
        """An annotation that is not up for review yet."""
        known = {case.sha256 for case in self._deployment.ledger.review_cases(self._model, self._loop.project)}
        pages = self._deployment.label_studio.annotated_tasks(self._loop.project)
        task = next(task for page in pages for task in page if task.latest and task.content[0] not in known)
        assert task.latest is not None
        given = problem_types.of("classification").annotated(task.latest, self._loop.folder.label_config)
        annotation = task.latest.unique_id
        return Suspect(task=task.id, annotation=annotation, sha256=task.content[0], quality=0.1, given=given, suggested=given)

    def _is_task(self, name: str) -> bool:
        return any(task.image.endswith(name) for task in self._deployment.label_studio.tasks(self._loop.project, "image"))

    def _forget(self, record: str) -> None:
        key = {"model": {"S": self._model}, "record": {"S": record}}
        boto3.client("dynamodb").delete_item(TableName=self._deployment.outputs["LedgerTable"], Key=key)


def _new_image() -> bytes:
    """An image like no other."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng().integers(0, 255, (8, 8), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def functions(loop: Loop, first_version: Promotion) -> Iterator[dict[str, Function]]:
    """The deployed functions by name; new images are nobody's but the tests' meanwhile, and no schedule looks."""
    events = boto3.client("events")
    rules = [
        rule["Name"] for rule in events.list_rules()["Rules"] if "ImageUploaded" in rule["Name"] or "Schedule" in rule["Name"]
    ]
    assert len(rules) == 2
    found = [Function(dict(each)) for each in boto3.client("lambda").list_functions()["Functions"]]
    # A task of an ingest that was not allowed to ask for its prediction gets it by the next promotion.
    announce(
        events,
        loop.deployment.outputs["EventBus"],
        "ModelPromoted",
        VersionJudged(model=loop.model, version=loop.champion.version),
    )
    loop.wait_until_predicted(loop.champion.version)
    for rule in rules:
        events.disable_rule(Name=rule)
    try:
        yield {function.name: function for function in found}
    finally:
        for rule in rules:
            events.enable_rule(Name=rule)
        for function in found:
            function.forget()


@pytest.mark.parametrize("name", ["authorize", "predict", "predict_part", "ingest", "prelabel", "refresh", "promote", "retrain"])
def test_a_function_misses_each_of_its_grants(loop: Loop, functions: dict[str, Function], name: str) -> None:
    function, works = functions[name], Works(loop, functions).of(name)
    assert works(), "it does not work with all its grants"
    idle = []
    for action, resource in function.grants:
        if action in NOT_SEEN_HERE or f"{name} {action}" in NOT_SEEN_HERE:
            continue
        with function.without((action, resource)):
            if works():
                idle.append((action, resource))
    assert not idle, "it does as well without these"
    assert works(), "it does not work any more"
