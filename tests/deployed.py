"""A stage as the commands find it: outputs, ledger, bucket and queues in the emulator; the other services are played.

Versions come about as they do in the loop: truths and predictions are drawn, a training's own functions measure them, and the
promotion gate decides from the archive.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

import boto3
import msgspec
import numpy as np
import pytest
from botocore.exceptions import ClientError

from cli import cost
from cli.deployment import Deployment
from cli.redrive import QUEUES
from infra_cdk.stage_facts import StageFacts
from labelloop import artifacts, problem_types
from labelloop.artifacts import Bucket, Champions
from labelloop.ledger import Ledger
from labelloop.model_config import ModelConfigs, ModelFolder
from labelloop.promotion import Promoter
from labelloop.records import (
    Evaluation,
    HoldoutImage,
    Interval,
    Job,
    LabelsSaved,
    ManifestRow,
    Promotion,
    Region,
    Timing,
    Trained,
    Training,
    now,
)
from tests import examples
from tests.conftest import new_ledger_table
from tests.fake_aws import FakeRegistry
from tests.recording_server import Answer, RecordingServer, Request, serving
from training_jobs import calibration, problem
from training_jobs.comparison import compare

NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)
TIMING = Timing(
    seconds={"read": 2.1, "build": 0.4, "fit": 48.0, "export": 3.2, "out-of-fold": 31.0, "evaluate": 2.5, "record": 1.8},
    images_per_second=812.0, waiting=0.01, decoded=400,
)  # fmt: skip


@dataclass
class LabelStudio:
    """A project as the REST API shows it. `annotated`: tasks as exported; `predicted`: open tasks with a prediction."""

    model: str
    tasks: int = 1797
    predicted: int = 0
    annotated: list[dict[str, Any]] = field(default_factory=list)
    down: bool = False

    def answer(self, request: Request) -> Answer:
        if self.down:
            return Answer(500, b"down")
        address = urlsplit(request.path)
        query = {name: values[0] for name, values in parse_qs(address.query).items()}
        if address.path == "/api/projects/1":
            return Answer(body={"id": 1, "task_number": self.tasks})
        if address.path == "/api/projects/1/export":
            wanted = {int(number) for number in parse_qs(address.query)["ids[]"]}
            return Answer(body=[task for task in self.annotated if task["id"] in wanted])
        if address.path == "/api/ml":
            return Answer(body=[{"url": f"{_API}/{self.model}", "state": "CO"}])
        if address.path == "/api/webhooks/":
            return Answer(body=[{"id": 1, "url": f"{_API}/{self.model}/webhook", "is_active": True, "actions": []}])
        assert address.path == "/api/tasks"
        filters = {its["filter"]: its for its in json.loads(query["query"])["filters"]["items"]}
        if "filter:tasks:predictions_model_versions" in filters:
            assert filters["filter:tasks:total_annotations"]["operator"] == "equal"
            return Answer(body={"tasks": [], "total": self.predicted, "total_annotations": 0})
        after = filters.get("filter:tasks:id", {"value": 0})["value"]
        listed = [{"id": task["id"]} for task in self.annotated if task["id"] > after][: int(query["page_size"])]
        return Answer(body={"tasks": listed, "total": len(self.annotated), "total_annotations": len(self.annotated)})


@dataclass
class Services:
    """SageMaker and MLflow. `phase` and `epoch`: of whichever job is asked about; one that has `ended` lies in the past.

    `gone`: SageMaker knows none of them.
    """

    phase: str = "Training"
    epoch: int | None = None
    ended: set[str] = field(default_factory=set)
    gone: bool = False

    def answer(self, request: Request) -> Answer:
        if "x-amz-target" in request.headers and self.gone:
            return Answer(400, {"__type": "ValidationException", "message": "Requested resource not found."})
        if "x-amz-target" in request.headers:
            return Answer(body=self._job(request.json["TrainingJobName"]))
        if "get-by-name" in request.path:
            return Answer(body={"experiment": {"experiment_id": "1"}})
        metrics = [] if self.epoch is None else [{"key": "loss", "value": 0.1, "timestamp": 1, "step": self.epoch}]
        return Answer(body={"runs": [{"info": {"run_id": "r"}, "data": {"metrics": metrics}}]})

    def _job(self, name: str) -> dict[str, Any]:
        states = [("Starting", 0.0), ("Downloading", 60.0), ("Training", 75.0)]
        if name in self.ended:
            states += [("Uploading", 170.0), ("Completed", 176.0)]
        else:
            states = [*states[:2], (self.phase, 75.0)]
        return {
            "TrainingJobName": name,
            "CreationTime": NOON.timestamp(),
            "SecondaryStatus": states[-1][0],
            "TrainingEndTime": NOON.timestamp() + 176,
            "SecondaryStatusTransitions": [{"Status": state, "StartTime": NOON.timestamp() + at} for state, at in states],
        }


@dataclass
class Stage:
    """A stage with one model, `folder`'s."""

    name: str
    folder: ModelFolder
    bucket: Bucket
    ledger: Ledger
    label_studio: LabelStudio
    services: Services
    label_studio_server: RecordingServer
    queues: dict[str, str]
    reports: list[Evaluation] = field(default_factory=list)
    skills: list[float] = field(default_factory=list)  # of the versions, in order

    @property
    def deployment(self) -> Deployment:
        return Deployment(self.name)

    @property
    def model(self) -> str:
        return self.folder.config.name

    def train(self, annotations: int, skill: float, *, images: int | None = None) -> Promotion:
        """A version that is right about a holdout image with a chance of `skill`; the gate decides about it."""
        self.skills.append(skill)
        return self.judge(self._evaluation(annotations, images or annotations // 5))

    def judge(self, report: Evaluation) -> Promotion:
        """What a training job leaves, and the gate's decision about it."""
        job = examples.job(report.job_name, report.n_annotations, report.dataset_digest)
        self.bucket.put(artifacts.training_archive_key(self.model, job.job_name), examples.model_archive(report))
        head = self.ledger.claim(self.ledger.head(self.model), job)
        ended = now()
        trained = Trained(digest=job.digest, n_annotations=job.n_annotations, job_name=job.job_name, ended_at=ended)
        after = msgspec.structs.replace(head, trained=trained)
        self.ledger.finish(head, after, Training(job=job, status="completed", ended_at=ended))
        self.services.ended.add(job.job_name)
        decided = Promoter(self.bucket, self.ledger, FakeRegistry(), lambda _: None, log=print).decide(self.model, job.job_name)  # type: ignore[arg-type]
        assert decided is not None
        at = (NOON + timedelta(seconds=181)).isoformat()
        noted = {"model": {"S": self.model}, "record": {"S": f"promotion#{job.job_name}"}}
        boto3.client("dynamodb").delete_item(TableName=self.ledger._table, Key=noted)  # or it would stay as it is
        self.ledger.record_promotion(msgspec.structs.replace(decided, decided_at=at))
        self.reports.append(report)
        return decided

    def run(self, annotations: int) -> Job:
        """A training that goes on running."""
        job = examples.job(f"labelloop-{self.name}-running", annotations, "e" * 64)
        self.ledger.claim(self.ledger.head(self.model), job)
        return job

    def _evaluation(self, annotations: int, images: int) -> Evaluation:
        """A report whose figures are the training job's own, about predictions that are drawn."""
        config, number = self.folder.config, len(self.reports) + 1
        kind, measure = config.problem_type, problem.of(config.problem_type)
        rows = [_row(self.folder, i) for i in range(images)]
        found = self._found(number, rows)
        serving_now = Champions(self.bucket).read(self.model)
        before = self.reports[serving_now.version - 1] if serving_now else None
        card = msgspec.structs.replace(
            examples.model_card(self.model), problem_type=kind, classes=config.classes, boxes=config.box_rules
        )
        earlier, champion = None, None
        if before:
            earlier = self._found(before.challenger.version, rows)
            champion = measure.scores(rows, earlier, config.classes, before.challenger.version)
        sure = _candidates(kind, found, config.classes)
        saved = LabelsSaved(share=Interval(value=0.41, low=0.18, high=0.58), control=annotations // 10)
        return Evaluation(
            model=self.model,
            problem_type=kind,
            job_name=f"labelloop-{self.name}-{self.model.replace('_', '-')}-{number}",
            run_id=f"run-{number}",
            dataset_digest=f"{number:064x}",
            n_annotations=annotations,
            n_train=annotations - images - annotations // 10,
            n_validation=annotations // 10,
            classes=config.classes,
            challenger=measure.scores(rows, found, config.classes, number),
            champion=champion,
            holdout=[
                HoldoutImage(sha256=row.sha256, truth=row.regions, challenger=its, champion=earlier[i] if earlier else None)
                for i, (row, its) in enumerate(zip(rows, found, strict=True))
            ],
            onnx_sha256=examples.sha256(b"onnx"),
            parity=1e-6,
            gate=config.gate,
            comparison=compare(rows, found, earlier, card, card, config.gate) if earlier else None,
            calibration_error=calibration.calibration_error(kind, rows, sure, config.classes),
            labels_saved=saved if number > 1 else None,
            accept_from=None,
            suspects=[],
            champion_annotations=before.n_annotations if before else None,
            timing=TIMING,
        )

    def _found(self, version: int, rows: list[ManifestRow]) -> list[list[Region]]:
        skill = self.skills[version - 1]
        return [_found(self.folder, row, skill, np.random.default_rng([version, i])) for i, row in enumerate(rows)]

    def annotate(self, count: int, *, kept: float = 0.8, version: int | None = None) -> None:
        """Annotations of classes; of those that had a version's prediction before them, the share `kept` agrees with it."""
        control, config = self.folder.label_config, self.folder.config
        data_key = control.data_key
        for _ in range(count):
            number = len(self.label_studio.annotated) + 1
            label, other = config.classes[number % len(config.classes)], config.classes[(number + 1) % len(config.classes)]
            result = _result(self.folder, label)
            prediction = None
            if version:
                same = number % 10 < 10 * kept
                drawn = _result(self.folder, label if same else other)
                prediction = {"id": number, "model_version": f"{self.model} v{version}", "result": drawn}
            self.label_studio.annotated.append(
                {
                    "id": number,
                    "data": {data_key: f"s3://images/{number}.png"},
                    "meta": {"sha256": examples.sha256(str(number))},
                    "annotations": [
                        {
                            "id": number,
                            "unique_id": f"annotation-{number}",
                            "result": result,
                            "was_cancelled": False,
                            "updated_at": "2026-03-02T12:00:00.000000Z",
                            "prediction": prediction or {},
                        }
                    ],
                }
            )


def _result(folder: ModelFolder, label: str) -> list[dict[str, Any]]:
    """What Label Studio keeps of an image with one thing in it."""
    box = (0.2, 0.2, 0.6, 0.6) if folder.config.problem_type == "detection" else None
    kind = problem_types.of(folder.config.problem_type)
    return [dict(its) for its in kind.result([Region(label=label, box=box)], folder.label_config, (100, 100))]


def _row(folder: ModelFolder, number: int) -> ManifestRow:
    """A holdout image, the same for every version."""
    random, config = np.random.default_rng(number), folder.config
    names = list(config.classes)
    if config.problem_type == "classification":
        regions = [Region(label=names[number % len(names)])]
    elif config.problem_type == "multilabel":
        regions = [Region(label=name) for name in names if random.random() < 0.4] or [Region(label=names[0])]
    else:
        regions = [Region(label=str(random.choice(names)), box=_box(random)) for _ in range(random.integers(1, 4))]
    return ManifestRow(
        image=f"s3://images/{number}.png",
        sha256=f"{number:064x}",
        group=f"{number:064x}",
        regions=regions,
        split="test",
        annotation=f"annotation-{number}",
        task=number,
    )


def _box(random: np.random.Generator) -> tuple[float, float, float, float]:
    left, top = random.uniform(0, 0.7, 2)
    return float(left), float(top), float(left + 0.25), float(top + 0.25)


def _found(folder: ModelFolder, row: ManifestRow, skill: float, random: np.random.Generator) -> list[Region]:
    """What a model with this skill keeps of an image; the score is a little too sure."""
    config = folder.config
    names, found = list(config.classes), []
    if config.problem_type == "multilabel":
        there = {region.label for region in row.regions}
        shown = [name for name in names if (name in there) == (random.random() < skill)]
        return [Region(label=name, score=float(random.uniform(0.5, 1))) for name in shown]
    for region in row.regions:
        right = random.random() < skill
        label = region.label if right else str(random.choice([name for name in names if name != region.label]))
        score = random.beta(14, 2) if right else random.beta(6, 4)
        found.append(Region(label=label, box=region.box, score=float(score)))
    if config.problem_type == "detection" and random.random() > skill:
        found.append(Region(label=str(random.choice(names)), box=_box(random), score=float(random.beta(2, 5))))
    return found


def _candidates(kind: str, found: list[list[Region]], classes: list[str]) -> list[list[Region]]:
    """All classes of an image, where only what is kept of them was drawn."""
    if kind == "detection":
        return found
    every = []
    for regions in found:
        scores = {region.label: region.score or 0.0 for region in regions}
        rest = max(0.0, 1 - sum(scores.values())) / max(1, len(classes) - len(scores))
        every.append([Region(label=name, score=scores.get(name, rest)) for name in classes])
    return every


STAGE = "dev"  # one that stages.yaml has
_PARTS = ("state", "training", "serving")
_API = "https://api/v1"
_synthesize = cost.synthesize
_templates: dict[str, dict[str, cost.Resource]] = {}


def _synthesized_once(models: ModelConfigs, names: Sequence[str], stage: str, facts: StageFacts) -> dict[str, cost.Resource]:
    """The templates of a model, which take seconds; their prices are the same whatever its classes and the stage's name."""
    (model,) = names
    if model not in _templates:
        _templates[model] = _synthesize(models, names, stage, facts)
    return _templates[model]


@contextmanager
def deployed(folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    """A stage in the emulator of the fixture `aws`, with a project and no version yet."""
    name = f"t{uuid.uuid4().hex[:10]}"
    label_studio, services = LabelStudio(folder.config.name), Services()
    boto3.client("s3").create_bucket(Bucket=name)
    ledger_table = new_ledger_table()
    with ExitStack() as stack:
        asked = stack.enter_context(serving(label_studio.answer))
        others = stack.enter_context(serving(services.answer))
        monkeypatch.setenv("AWS_ENDPOINT_URL_SAGEMAKER", others.url)
        monkeypatch.setattr(cost, "synthesize", _synthesized_once)
        boto3.client("secretsmanager").create_secret(Name=f"{name}/label-studio", SecretString='{"token": "0123456789abcdef"}')
        stack.enter_context(_mlflow_token())
        sqs = boto3.client("sqs")
        ends = ("Queue", "QueueDeadLetters")
        queues = {
            f"{queue.capitalize()}{end}": sqs.create_queue(QueueName=f"{name}-{queue}-{end}")["QueueUrl"]
            for queue in QUEUES
            for end in ends
        }
        outputs = {
            "ApiUrl": f"{_API}/",
            "ArtifactsBucket": name,
            "LedgerTable": ledger_table,
            "MlflowTrackingUri": others.url,
            "LabelStudioUrl": asked.url,
            "LabelStudioSecret": f"{name}/label-studio",
            "RetrainFunction": "retrain-of-dev",
            **queues,
        }
        stack.enter_context(_stacks(outputs))
        ledger = Ledger(ledger_table)
        ledger.set_project(folder.config.name, 1)
        yield Stage(STAGE, folder, Bucket(name), ledger, label_studio, services, asked, queues)


@contextmanager
def _mlflow_token() -> Iterator[None]:
    """A server of one's own wants a token."""
    secrets, name = boto3.client("secretsmanager"), f"labelloop/{STAGE}/mlflow"
    secrets.create_secret(Name=name, SecretString='{"token": "0123456789abcdef"}')
    try:
        yield
    finally:
        secrets.delete_secret(SecretId=name, ForceDeleteWithoutRecovery=True)


@contextmanager
def _stacks(outputs: dict[str, str]) -> Iterator[None]:
    """Three stacks as a deployment has them; everything stands in the outputs of one."""
    cloudformation = boto3.client("cloudformation")
    for part, its in (("state", outputs), ("training", {}), ("serving", {})):
        template = {
            "Resources": {"Topic": {"Type": "AWS::SNS::Topic", "Properties": {}}},
            "Outputs": {key: {"Value": value} for key, value in its.items()},
        }
        cloudformation.create_stack(StackName=f"labelloop-{STAGE}-{part}", TemplateBody=json.dumps(template))
    _wait_for(cloudformation, "CREATE_COMPLETE")
    try:
        yield
    finally:
        for part in _PARTS:
            cloudformation.delete_stack(StackName=f"labelloop-{STAGE}-{part}")
        _wait_for(cloudformation, "DELETE_COMPLETE")


def _wait_for(cloudformation: Any, state: str) -> None:
    for part in _PARTS:
        until = time.monotonic() + 30
        while _state(cloudformation, f"labelloop-{STAGE}-{part}") != state:
            assert time.monotonic() < until
            time.sleep(0.05)


def _state(cloudformation: Any, stack: str) -> str:
    try:
        return str(cloudformation.describe_stacks(StackName=stack)["Stacks"][0]["StackStatus"])
    except ClientError:  # as CloudFormation says it of a stack that is gone
        return "DELETE_COMPLETE"
