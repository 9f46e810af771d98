"""The laptop's stack for the loop and browser tests: real servers, real stacks, started once for the whole session."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import boto3
import pytest
import urllib3
import yaml
from rich.console import Console

from cli import examples
from cli.demo import Annotator
from cli.deployment import BackendAccess, Deployment
from cli.examples import Example
from cli.label_studio_project import set_up_project
from cli.upload import upload
from labelloop.artifacts import s3_uri
from labelloop.model_config import ModelConfigs, ModelFolder
from labelloop.records import Champion, Promotion, version_string
from local.stack import LaptopStack

IMAGES = 300
FIRST, SECOND = 60, 200  # annotations at which the test's model trains by itself


def _log(part: str, text: str) -> None:
    logging.getLogger(__name__).info("%s: %s", part, text)


@dataclass(frozen=True)
class ListedTask:
    """A task as Label Studio has it. `labelled`: annotated or skipped."""

    id: int
    image: str
    group: str
    labelled: bool
    predictions: list[dict[str, Any]]


@dataclass
class Loop:
    """A stack with a set-up project whose images have become tasks."""

    stack: LaptopStack
    deployment: Deployment
    folder: ModelFolder
    project: int
    data: list[Example]
    annotator: Annotator
    http: urllib3.PoolManager = field(default_factory=lambda: urllib3.PoolManager(maxsize=50, timeout=60, retries=False))

    @property
    def model(self) -> str:
        return self.folder.config.name

    @property
    def backend(self) -> BackendAccess:
        return self.deployment.backend(self.model)

    @property
    def annotated(self) -> int:
        return self.deployment.label_studio.tally(self.project).tasks

    def annotate_more(self, count: int) -> int:
        """Annotate that many more tasks; how many there are then."""
        self.annotator.annotate_up_to(self.annotator.annotated + count, Console(quiet=True))
        return self.annotated

    def address(self, example: Example) -> str:
        return s3_uri(self.deployment.images.name, self.folder.config.images_prefix + example.name)

    def webhook(self, action: str) -> int:
        """Send a webhook as Label Studio does; the HTTP status."""
        answer = self.http.request(
            "POST",
            f"{self.backend.url}/webhook",
            json={"action": action, "project": {"id": self.project}},
            headers={"Authorization": self.backend.authorization},
        )
        return int(answer.status)

    def api(self, method: str, path: str, body: Any = None) -> Any:
        """A request to Label Studio's API, and what it answers."""
        headers = {"Authorization": f"Token {self.deployment.label_studio_token}"}
        answer = self.http.request(method, self.deployment.label_studio_url + path, headers=headers, json=body)
        assert answer.status < 300, (method, path, answer.status, answer.data)
        return answer.json()

    def listed(self) -> list[ListedTask]:
        """All tasks of the project with their predictions."""
        fields = {"include": "id,data,meta,predictions,total_annotations,cancelled_annotations", "fields": "all"}
        query = urlencode({"project": self.project, "page_size": 5000, "resolve_uri": "false", **fields})
        return [
            ListedTask(
                id=task["id"],
                image=task["data"]["image"],
                group=task["meta"]["group"],
                labelled=bool(task["total_annotations"] + task["cancelled_annotations"]),
                predictions=task["predictions"],
            )
            for task in self.api("GET", f"/api/tasks?{query}")["tasks"]
        ]

    @property
    def champion(self) -> Champion:
        """The version that serves."""
        champion = self.deployment.champions.read(self.model)
        assert champion is not None
        return champion

    def wait_until_predicted(self, version: int) -> None:
        """Wait until every unlabelled task has one prediction, of that version."""
        wanted = [version_string(self.model, version)]

        def all_of_them() -> bool:
            waiting = [task for task in self.listed() if not task.labelled]
            return all([one["model_version"] for one in task.predictions] == wanted for task in waiting)

        wait_for(all_of_them, 180, f"every unlabelled task is predicted by version {version}, once")

    def function_log(self, name: str) -> str:
        """What a function (`retrain`, say) has logged so far, in all its workers."""
        files = sorted((self.stack.home / "logs" / "functions").glob(f"*{name.capitalize()}Function*"))
        return "".join(file.read_text(errors="replace") for file in files)

    @property
    def signals_seen(self) -> int:
        """How many messages `retrain` has worked off, by its own log."""
        lines = [line for line in self.function_log("retrain").splitlines() if '"reconciled"' in line]
        return sum(int(json.loads(line)["signals"]) for line in lines)

    def job_names(self) -> list[str]:
        return [training.job.job_name for training in self.deployment.ledger.trainings(self.model)]

    def verdict_about(self, annotations: int) -> Promotion:
        """Wait for the training with that many annotations, and for the gate's verdict about it."""

        def found() -> Promotion | None:
            head = self.deployment.ledger.head(self.model)
            failure = head.failure
            assert failure is None or failure.n_annotations != annotations, failure
            promotions = self.deployment.ledger.promotions(self.model).values()
            return next((p for p in promotions if p.n_annotations == annotations), None)

        return wait_for(found, 180, f"the verdict about {annotations} annotations")


def wait_for[T](look: Callable[[], T | None], seconds: float, what: str) -> T:
    """Look until there is something; an assertion fails when the time is over."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = look()
        if found:
            return found
        time.sleep(0.3)
    pytest.fail(f"{what}: not within {seconds} s")


def wait_until_idle(loop: Loop, queue: str) -> None:
    """Wait until a queue has neither waiting nor taken messages."""
    for _ in range(3):  # an event needs a moment from its bus to its queue
        wait_for(lambda: messages(loop, queue) == 0, 120, f"{queue} is empty")
        time.sleep(0.5)


def messages(loop: Loop, queue: str) -> int:
    """Messages that wait in a queue or are being worked on."""
    url = loop.deployment.outputs[queue]
    attributes = boto3.client("sqs").get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"]
    return int(attributes["ApproximateNumberOfMessages"]) + int(attributes["ApproximateNumberOfMessagesNotVisible"])


def connect(home: Path, patch: pytest.MonkeyPatch) -> Deployment:
    """The deployment in `home`; the environment that leads clients to it is taken back with `patch`."""
    addresses = LaptopStack.running(home)
    assert addresses is not None
    for name, value in addresses.aws_environment().items():
        patch.setenv(name, value)
    return Deployment.on_laptop(addresses)


@pytest.fixture(scope="session")
def model_configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's digits with fewer annotations to train at, and two models beside it."""
    root = tmp_path_factory.mktemp("model_configs")
    source = ModelConfigs.find()["digits"]
    for name in ("digits", "numerals", "ciphers"):
        folder = root / name
        folder.mkdir()
        for file in ("labeling_template.xml", "model.py"):
            (folder / file).write_bytes((source.folder / file).read_bytes())
        config = yaml.safe_load((source.folder / "config.yaml").read_text())
        config["name"] = name
        config["label_studio"]["title"] = f"labelloop {name}"
        config["retrain"] = {"at": [FIRST, SECOND], "factor": 10.0, "failure_backoff_minutes": 0}
        config["hyperparameters"]["epochs"] = 15  # each job trains out-of-fold models as well
        config["queue"] = {"strategy": "diverse", "control": 0.1, "clusters": 4}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return root


@pytest.fixture(scope="session")
def running_loop(tmp_path_factory: pytest.TempPathFactory, model_configs: Path) -> Iterator[Loop]:
    """The stack, deployed, with the digits' project set up and its images ingested."""
    stack = LaptopStack(tmp_path_factory.mktemp("stack"), model_configs=model_configs, report=_log)
    try:
        with pytest.MonkeyPatch.context() as patch:
            addresses = stack.up()
            for name, value in addresses.aws_environment().items():
                patch.setenv(name, value)
            deployment = Deployment.on_laptop(addresses)
            folder = ModelConfigs(model_configs)["digits"]
            project = set_up_project(deployment, folder).project
            data = examples.load("digits")[:IMAGES]
            refused: dict[str, str] = {}
            upload(
                deployment.images,
                folder.config.images_prefix,
                [(example.name, partial(bytes, example.image)) for example in data],
                lambda name, refusal: refused.update({name: refusal} if refusal else {}),
            )
            assert refused == {}
            tasks = deployment.label_studio
            wait_for(lambda: tasks.counts(project)["tasks"] >= len(data), 120, "every image becomes a task")
            annotator = Annotator(deployment, folder, project, data)
        yield Loop(stack, deployment, folder, project, data, annotator)
    finally:
        stack.down()


@pytest.fixture
def loop(running_loop: Loop, monkeypatch: pytest.MonkeyPatch) -> Loop:
    """The running loop; the environment of this one test leads every client to it, and not to the unit tests' emulator."""
    addresses = running_loop.deployment.laptop
    assert addresses is not None
    for name, value in addresses.aws_environment().items():
        monkeypatch.setenv(name, value)
    return running_loop


@pytest.fixture
def first_version(loop: Loop) -> Promotion:
    """The first training by itself: annotated up to `FIRST`, trained, promoted. The first test that asks waits for it."""
    loop.annotator.annotate_up_to(FIRST, Console(quiet=True))
    return loop.verdict_about(FIRST)
