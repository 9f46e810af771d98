"""`labelloop demo`: the whole loop on this machine, on the stacks that go to AWS, with a data set that needs no download."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import urllib3
import yaml
from rich.console import Console
from rich.markup import escape

from cli import digits
from cli.deployment import BackendAccess, Deployment, addresses_to_show
from cli.digits import Digit
from cli.label_studio_project import set_up_project
from cli.progress import Steps
from cli.upload import upload
from labelloop.artifacts import s3_uri
from labelloop.dataset import split_of
from labelloop.errors import LabelloopError, LocalServiceError, ServiceError
from labelloop.label_studio.payloads import choice_result
from labelloop.model_config import ModelConfigs, ModelFolder
from labelloop.records import Promotion, version_string
from local.stack import Addresses, LaptopStack

MODEL = "digits"
_ANNOTATORS = 2  # at once; Label Studio on SQLite writes one at a time anyway
_TASKS_A_REQUEST = 40
_STALLED_SECONDS = 300  # without any progress


class Version(msgspec.Struct, kw_only=True):
    """A line of the report. Accuracies are shares: `accuracy` on the annotated holdout, `served_accuracy` on all of it."""

    version: int
    annotations: int
    accuracy: float
    holdout_images: int
    served_accuracy: float
    champion: bool


class Report(msgspec.Struct, kw_only=True):
    """What `--report` writes. `seconds` by phase."""

    model: str
    versions: list[Version]
    seconds: dict[str, float]


class Demo:
    """One run. `counts` are the numbers of annotations at which it trains."""

    def __init__(self, home: Path, counts: list[int], console: Console) -> None:
        self._home, self._counts, self._console = home, counts, console
        self._configs = home.with_name(f"{home.name}-model_configs")
        self._report = Report(model=MODEL, versions=[], seconds={})
        self._stack = LaptopStack(home, model_configs=self._configs, report=self._say)

    def run(self, *, linger: Callable[[], None] | None, report: Path | None) -> Report:
        """Start clean, turn the loop, show where to look, `linger` if asked to, and stop everything, whatever happens."""
        self._stack.erase()
        shutil.rmtree(self._configs, ignore_errors=True)
        _configs_that_train_at(self._counts, self._configs)
        try:
            with self._phase("start"):
                addresses = self._stack.up()
            self._report.seconds |= {f"start: {part}": seconds for part, seconds in self._stack.timings.items()}
            self._turn(addresses)
            self._finish(addresses, report)
            if linger:
                self._console.print("\nEverything goes on running until Ctrl-C.", style="bold")
                linger()
        finally:
            self._say("stack", "stopping")
            self._stack.down()
        return self._report

    def _turn(self, addresses: Addresses) -> None:
        deployment = Deployment.on_laptop(addresses)
        folder = ModelConfigs(self._configs)[MODEL]
        data = digits.load()
        with self._phase("project"):
            project = set_up_project(deployment, folder)
            for change in project.changes:
                self._say("Label Studio", change)
        with self._phase("upload"):
            self._upload(deployment, folder, data)
        with self._phase("ingest"):
            self._wait_for_tasks(deployment, project.project, len(data))
        truth = {s3_uri(deployment.images.name, folder.config.images_prefix + digit.name): digit.label for digit in data}
        annotator = Annotator(deployment, folder, project.project, truth)
        for count in self._counts:
            with self._phase(f"annotate {count}"):
                annotator.annotate_up_to(count, self._console)
            with self._phase(f"train {count}"):
                promotion = self._wait_for_version(deployment, count)
                if promotion.verdict == "promote":
                    self._wait_for_label_studio(deployment, project.project, promotion.version)
            with self._phase(f"serve {count}"):
                served = served_accuracy(deployment, folder, data)
            self._note(deployment, promotion, served)

    def _upload(self, deployment: Deployment, folder: ModelFolder, data: list[Digit]) -> None:
        refused: list[str] = []
        with Steps(self._console, "uploading images", len(data)) as steps:

            def done(name: str, refusal: str | None) -> None:
                steps.advance()
                if refusal:
                    refused.append(f"{name}: {refusal}")

            images: list[tuple[str, Callable[[], bytes]]] = [(digit.name, partial(bytes, digit.png)) for digit in data]
            upload(deployment.images, folder.config.images_prefix, images, done)
        if refused:
            raise ServiceError(f"{len(refused)} images were refused: {refused[0]}")

    def _wait_for_tasks(self, deployment: Deployment, project: int, expected: int) -> None:
        with Steps(self._console, "images become tasks", expected) as steps, self._progressing("ingest") as progress:
            while (tasks := deployment.label_studio.counts(project)["tasks"]) < expected:
                steps.reach(tasks)
                progress(tasks)
            steps.reach(tasks)
        if tasks > expected:
            raise ServiceError(f"{expected} images became {tasks} tasks")

    def _wait_for_version(self, deployment: Deployment, annotations: int) -> Promotion:
        """Wait for the verdict about the training with that many annotations, showing how far it is."""
        last = ""
        with self._progressing("training") as progress:
            while True:
                for promotion in deployment.ledger.promotions(MODEL).values():
                    if promotion.n_annotations == annotations:
                        return promotion
                head = deployment.ledger.head(MODEL)
                if head.failure and head.failure.n_annotations == annotations:
                    log = self._stack.job_log(head.failure.job_name)
                    raise LocalServiceError("training", f"{head.failure.job_name} failed: {head.failure.reason}", log)
                if head.running:
                    line = self._training_progress(head.running.job_name)
                elif head.trained and head.trained.n_annotations == annotations:
                    line = "trained; the promotion gate decides"
                else:
                    line = "waiting for the webhook's effect"
                if line != last:
                    self._say("training", line)
                    last = line
                progress(line)

    def _training_progress(self, job_name: str) -> str:
        log = self._stack.job_log(job_name)
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        return next((line for line in reversed(lines) if line.startswith("epoch")), f"{job_name} started")

    def _wait_for_label_studio(self, deployment: Deployment, project: int, version: int) -> None:
        title = version_string(MODEL, version)
        with self._progressing("refresh") as progress:
            while deployment.label_studio.model_version(project) != title:
                progress(title)

    def _note(self, deployment: Deployment, promotion: Promotion, served: float) -> None:
        champion = deployment.champions.read(MODEL)
        serves = champion is not None and champion.version == promotion.version
        for earlier in self._report.versions:
            earlier.champion = earlier.champion and not serves
        version = Version(
            version=promotion.version,
            annotations=promotion.n_annotations,
            accuracy=promotion.accuracy,
            holdout_images=promotion.holdout_images,
            served_accuracy=served,
            champion=serves,
        )
        self._report.versions.append(version)
        self._console.print(_line(version), style="bold green", highlight=False, soft_wrap=True)
        if not serves:
            self._console.print(f"  kept version {champion.version if champion else 0}: {escape(promotion.reason)}")

    def _finish(self, addresses: Addresses, report: Path | None) -> None:
        plot = self._home / "learning-curve.png"
        draw_learning_curve(self._report.versions, plot)
        if report:
            report.write_bytes(msgspec.json.format(msgspec.json.encode(self._report)))
        self._console.print()
        for version in self._report.versions:
            self._console.print(_line(version), highlight=False, soft_wrap=True)
        self._console.print()
        for line in addresses_to_show(addresses):
            self._console.print(line, highlight=False, soft_wrap=True)
        self._console.print(f"learning curve  {plot}", highlight=False, soft_wrap=True)
        if report:
            self._console.print(f"report          {report}", highlight=False, soft_wrap=True)

    def _say(self, part: str, message: str) -> None:
        self._console.print(f"[cyan]{escape(part):<13}[/cyan] {escape(message)}", highlight=False, soft_wrap=True)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        except LocalServiceError:
            raise
        except LabelloopError as error:
            raise LocalServiceError(name, str(error), self._home / "logs") from error
        finally:
            self._report.seconds[name] = round(time.monotonic() - began, 2)

    @contextmanager
    def _progressing(self, part: str) -> Iterator[Callable[[object], None]]:
        """Waits between looks, and gives up when what it is shown stays the same for too long."""
        seen: list[Any] = [None, time.monotonic()]

        def progress(now: object) -> None:
            if now != seen[0]:
                seen[:] = [now, time.monotonic()]
            elif time.monotonic() - seen[1] > _STALLED_SECONDS:
                raise LocalServiceError(part, f"nothing has happened for {_STALLED_SECONDS} s: {now}", self._home / "logs")
            time.sleep(0.3)

        yield progress


class Annotator:
    """A person at Label Studio who knows the truth: opens tasks in a fixed random order and submits an annotation each.

    `tasks` holds image and id of each, in that order; `annotated` counts those done so far.
    """

    def __init__(self, deployment: Deployment, folder: ModelFolder, project: int, truth: dict[str, str]) -> None:
        self._label_studio, self._label_config, self._truth = deployment.label_studio, folder.label_config, truth
        self.tasks = sorted(self._label_studio.images(project, folder.label_config.data_key).items())
        random.Random(0).shuffle(self.tasks)
        self.annotated = 0

    def annotate_up_to(self, count: int, console: Console) -> None:
        """Go on until `count` tasks are annotated in all."""
        if count > len(self.tasks):
            raise ServiceError(f"there are {len(self.tasks)} images; {count} cannot be annotated")
        with Steps(console, f"annotating up to {count:,}", count) as steps, ThreadPoolExecutor(_ANNOTATORS) as pool:
            steps.reach(self.annotated)
            for annotation in [pool.submit(self._annotate, *task) for task in self.tasks[self.annotated : count]]:
                annotation.result()
                steps.advance()
        self.annotated = max(self.annotated, count)

    def _annotate(self, image: str, task: int) -> None:
        self._label_studio.annotate(task, choice_result(self._truth[image], self._label_config), seconds=1.0)


def served_accuracy(deployment: Deployment, folder: ModelFolder, data: list[Digit]) -> float:
    """Share of all holdout images, annotated or not, that the deployed endpoint gets right."""
    config = folder.config
    holdout = [digit for digit in data if split_of(digit.sha256, config.splits) == "test"]
    access, http = deployment.backend(config.name), urllib3.PoolManager(timeout=60)
    right = 0
    for start in range(0, len(holdout), _TASKS_A_REQUEST):
        some = holdout[start : start + _TASKS_A_REQUEST]
        labels = _predicted(http, access, [s3_uri(deployment.images.name, config.images_prefix + d.name) for d in some], folder)
        right += sum(label == digit.label for label, digit in zip(labels, some, strict=True))
    return right / len(holdout)


def _predicted(http: urllib3.PoolManager, access: BackendAccess, images: list[str], folder: ModelFolder) -> list[str]:
    tasks = [{"id": number, "data": {folder.label_config.data_key: image}} for number, image in enumerate(images)]
    body = {"tasks": tasks, "project": "0.0", "label_config": folder.template, "params": {"context": None}}
    answer = http.request("POST", f"{access.url}/predict", json=body, headers={"Authorization": access.authorization})
    if answer.status != 200:
        raise ServiceError(f"predict answered {answer.status}: {answer.data[:300]!r}")
    results = answer.json()["results"]
    missing = [result.get("error") for result in results if "result" not in result]
    if missing:
        raise ServiceError(f"predict left out {len(missing)} of {len(images)} images: {missing[0]}")
    return [str(result["result"][0]["value"]["choices"][0]) for result in results]


def draw_learning_curve(versions: list[Version], file: Path) -> None:
    """Accuracy over annotations, measured and served, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    counts = [version.annotations for version in versions]
    axes.plot(counts, [100 * v.served_accuracy for v in versions], "o-", label="served: every holdout image")
    axes.plot(counts, [100 * v.accuracy for v in versions], "s--", label="measured: the annotated holdout images")
    for version in versions:
        axes.annotate(
            f"v{version.version}", (version.annotations, 100 * version.served_accuracy), (0, -14), textcoords="offset points"
        )
    axes.set(xlabel="annotations", ylabel="accuracy, %", title=f"Learning curve of {MODEL}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)


def _line(version: Version) -> str:
    measured = f"accuracy {version.accuracy:6.1%} ({version.holdout_images} holdout images)"
    served = f"served: {version.served_accuracy:6.1%}{'  champion' if version.champion else ''}"
    return f"Version {version.version}: {version.annotations:>7,} annotations → {measured:<42} {served}"


def _configs_that_train_at(counts: list[int], target: Path) -> None:
    """A copy of the model configs in which the demo's model trains at `counts`."""
    source = ModelConfigs.find()
    for name in source.names:
        folder = target / name
        folder.mkdir(parents=True)
        for file in source[name].folder.iterdir():
            if file.is_file():
                (folder / file.name).write_bytes(file.read_bytes())
    config = target / MODEL / "config.yaml"
    content = yaml.safe_load(config.read_text())
    if content["retrain"]["at"] != counts:
        content["retrain"]["at"] = counts
        config.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
