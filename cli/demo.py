"""`labelloop demo`: the whole loop on this machine, on the stacks that go to AWS, with data sets that need no download."""

from __future__ import annotations

import io
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import urllib3
import yaml
from rich.console import Console
from rich.markup import escape

from cli import examples, training_job
from cli.deployment import BackendAccess, Deployment, addresses_to_show
from cli.examples import Example, ExampleModel
from cli.label_studio_project import set_up_project
from cli.progress import Steps
from cli.upload import upload
from labelloop import imaging, problem_types
from labelloop.artifacts import s3_uri
from labelloop.dataset import split_of
from labelloop.errors import LabelloopError, LocalServiceError, ServiceError
from labelloop.label_studio.payloads import Annotation
from labelloop.model_config import ModelConfigs, ModelFolder
from labelloop.records import METRIC_TITLES, ManifestRow, Metric, Promotion, Region, version_string
from labelloop.wording import counted
from local.stack import Addresses, LaptopStack, held

_ANNOTATORS = 2  # at once; Label Studio on SQLite writes one at a time anyway
_TASKS_A_REQUEST = 40
_STALLED_SECONDS = 300  # without any progress
_LOOK_SECONDS = 10  # between looks at the queue, which Label Studio lists whole
_PICTURES = (3, 4)  # rows and columns of holdout images with their predicted boxes


class Version(msgspec.Struct, kw_only=True):
    """A line of the report. `value` is the metric on the annotated holdout, `served_value` that on all of the holdout.

    `turnaround`: seconds from the deciding annotation to the version's serving, by part.
    """

    version: int
    annotations: int
    value: float
    holdout_images: int
    served_value: float
    champion: bool
    turnaround: dict[str, float]


class Report(msgspec.Struct, kw_only=True):
    """What `--report` writes. `seconds` by phase."""

    model: str
    metric: Metric
    versions: list[Version]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Served:
    """What the deployed endpoint answers about the whole holdout, annotated or not, and the metric over it."""

    holdout: list[Example]
    found: list[list[Region]]
    value: float


class Demo:
    """One run with the example data set of `model`. `counts` are the numbers of annotations at which it trains."""

    def __init__(self, home: Path, model: ExampleModel, counts: list[int], console: Console) -> None:
        self._home, self._model, self._counts, self._console = home, model, counts, console
        self._configs = home.with_name(f"{home.name}-model_configs")
        self._problem_type = problem_types.of(ModelConfigs.find()[model].config.problem_type)
        self._report = Report(model=model, metric=self._problem_type.metric, versions=[], seconds={})
        self._stack = LaptopStack(home, model_configs=self._configs, report=self._say)

    def run(self, *, linger: Callable[[], None] | None, report: Path | None) -> Report:
        """Start clean, turn the loop, show where to look, `linger` if asked to, and stop everything, whatever happens.

        Raises `ConflictError` when another demo runs in the folder, which is left alone then.
        """
        lock = self._home.with_name(f"{self._home.name}.lock")  # not in the folder, which is emptied
        with held(lock, f"another demo runs in {self._home}; end it with Ctrl-C there, or name another folder: --home FOLDER"):
            return self._run(linger, report)

    def _run(self, linger: Callable[[], None] | None, report: Path | None) -> Report:
        self._stack.erase()
        shutil.rmtree(self._configs, ignore_errors=True)
        _configs_that_train_at(self._model, self._counts, self._configs)
        try:
            with self._phase("start"):
                addresses = self._stack.up()
            self._report.seconds |= {f"start: {part}": seconds for part, seconds in self._stack.timings.items()}
            served = self._turn(addresses)
            self._finish(served, report)
            if linger:
                for line in addresses_to_show(addresses):
                    self._console.print(line, highlight=False, soft_wrap=True)
                self._console.print("\nEverything goes on running until Ctrl-C.", style="bold")
                linger()
        finally:
            self._say("stack", "stopping")
            self._stack.down()
        return self._report

    def _turn(self, addresses: Addresses) -> Served:
        """From the upload to the last training; what serves then."""
        deployment = Deployment.on_laptop(addresses)
        folder = ModelConfigs(self._configs)[self._model]
        data = examples.load(self._model)
        with self._phase("project"):
            project = set_up_project(deployment, folder)
            for change in project.changes:
                self._say("Label Studio", change)
        with self._phase("upload"):
            self._upload(deployment, folder, data)
        with self._phase("ingest"):
            self._wait_for_tasks(deployment, project.project, len(data))
        annotator = Annotator(deployment, folder, project.project, data)
        for count in self._counts:
            with self._phase(f"queue {count}"):
                self._wait_for_queue(deployment, annotator)
            with self._phase(f"annotate {count}"):
                annotator.annotate_up_to(count, self._console)
                annotated_at = datetime.now(UTC)
            with self._phase(f"train {count}"):
                promotion = self._wait_for_version(deployment, count)
                if promotion.verdict == "promote":
                    self._wait_for_label_studio(deployment, project.project, promotion.version)
                job = training_job.description(promotion.job_name)
                parts = training_job.turnaround(job, promotion, annotated_at=annotated_at, served_at=datetime.now(UTC))
            with self._phase(f"serve {count}"):
                served = ask_about_holdout(deployment, folder, data)
            self._note(deployment, promotion, served, parts)
        return served

    def _upload(self, deployment: Deployment, folder: ModelFolder, data: list[Example]) -> None:
        with Steps(self._console, "uploading images", len(data)) as steps:
            images = [(example.name, partial(bytes, example.image)) for example in data]
            refused = upload(deployment.images, folder.config.images_prefix, images, lambda _name, _why: steps.advance()).refused
        for name, why in refused.items():
            raise ServiceError(f"{counted(len(refused), 'image was', 'images were')} refused: {name}: {why}")

    def _wait_for_tasks(self, deployment: Deployment, project: int, expected: int) -> None:
        with Steps(self._console, "images become tasks", expected) as steps, self._progressing("ingest") as progress:
            while (tasks := deployment.label_studio.counts(project)["tasks"]) < expected:
                steps.reach(tasks)
                progress(tasks)
            steps.reach(tasks)
        if tasks > expected:
            raise ServiceError(f"{counted(expected, 'image')} became {counted(tasks, 'task')}")

    def _wait_for_version(self, deployment: Deployment, annotations: int) -> Promotion:
        """Wait for the verdict about the training with that many annotations, showing how far it is."""
        last = ""
        with self._progressing("training") as progress:
            while True:
                for promotion in deployment.ledger.promotions(self._model).values():
                    if promotion.n_annotations == annotations:
                        return promotion
                head = deployment.ledger.head(self._model)
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
        title = version_string(self._model, version)
        with self._progressing("refresh") as progress:
            while deployment.label_studio.model_version(project) != title:
                progress(title)

    def _wait_for_queue(self, deployment: Deployment, annotator: Annotator) -> None:
        """Wait until the version that serves has predicted what is not annotated, and annotate in the order that follows.

        Before the first, the order came with the tasks.
        """
        champion = deployment.champions.read(self._model)
        if champion is None:
            annotator.follow_queue(version_string(self._model, None))
            return
        version, left = version_string(self._model, champion.version), len(annotator.left)
        with Steps(self._console, f"{version} orders the queue", left) as steps, self._progressing("prelabel") as progress:
            while (ordered := annotator.follow_queue(version)) < left:
                steps.reach(ordered)
                progress(ordered)
                time.sleep(_LOOK_SECONDS)
            steps.reach(ordered)

    def _note(self, deployment: Deployment, promotion: Promotion, served: Served, parts: dict[str, float]) -> None:
        champion = deployment.champions.read(self._model)
        serves = champion is not None and champion.version == promotion.version
        for earlier in self._report.versions:
            earlier.champion = earlier.champion and not serves
        version = Version(
            version=promotion.version,
            annotations=promotion.n_annotations,
            value=promotion.value,
            holdout_images=promotion.holdout_images,
            served_value=served.value,
            champion=serves,
            turnaround=parts,
        )
        self._report.versions.append(version)
        self._console.print(_line(version, self._report.metric), style="bold green", highlight=False, soft_wrap=True)
        self._console.print(f"  {training_job.turnaround_in_words(parts)}", highlight=False, soft_wrap=True)
        if not serves:
            self._console.print(f"  kept version {champion.version if champion else 0}: {escape(promotion.reason)}")

    def _finish(self, served: Served, report: Path | None) -> None:
        pictures = {"learning curve": self._home / "learning-curve.png"}
        draw_learning_curve(self._report, pictures["learning curve"])
        if self._problem_type.name == "detection":
            pictures["boxes"] = self._home / "predicted-boxes.png"
            draw_boxes(served, pictures["boxes"])
        if report:
            report.write_bytes(msgspec.json.format(msgspec.json.encode(self._report)))
        self._console.print()
        for version in self._report.versions:
            self._console.print(_line(version, self._report.metric), highlight=False, soft_wrap=True)
        self._console.print()
        for title, file in pictures.items():
            self._console.print(f"{title:<15} {file}", highlight=False, soft_wrap=True)
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
    """A person at Label Studio who knows the truth and submits an annotation a task, in a fixed random order or the queue's.

    `data` are the images that became the project's tasks. `tasks` holds image and id of each, in the order of work;
    `annotated` counts those done so far.
    """

    def __init__(self, deployment: Deployment, folder: ModelFolder, project: int, data: Sequence[Example]) -> None:
        self._label_studio, self._label_config, self._project = deployment.label_studio, folder.label_config, project
        self._problem_type = problem_types.of(folder.config.problem_type)
        self._data = dict(zip(_addresses(deployment, folder, data), data, strict=True))
        self.tasks = sorted((task.image, task.id) for task in self._label_studio.tasks(project, folder.label_config.data_key))
        random.Random(0).shuffle(self.tasks)
        self.annotated = 0

    @property
    def left(self) -> list[tuple[str, int]]:
        """The tasks that are not annotated yet, in the order of work."""
        return self.tasks[self.annotated :]

    def follow_queue(self, version: str) -> int:
        """Bring what is left into the order in which Label Studio hands it out: by turns among clusters, the lowest score first.

        Returns how many of them `version` has predicted; the others come last.
        """
        last = max((task for _, task in self.left), default=0)
        predicted: list[tuple[int | None, float, int]] = sorted(
            (
                (stored.cluster, stored.score or 0.0, listed.task.id)
                for listed in self._label_studio.unlabelled_tasks(self._project, 0, last)
                for stored in listed.predictions[-1:]
                if stored.made_by == version
            ),
            key=lambda its: its[1],
        )
        turns: Counter[int | None] = Counter()
        order: dict[int, tuple[int, float]] = {}
        for cluster, score, task in predicted:
            order[task] = (turns[cluster], score)
            turns[cluster] += cluster is not None  # without clusters there are no turns
        self.tasks[self.annotated :] = sorted(self.left, key=lambda its: order.get(its[1], (len(self.tasks), 0.0)))
        return len(order)

    def annotate_up_to(self, count: int, console: Console) -> None:
        """Go on until `count` tasks are annotated in all."""
        if count > len(self.tasks):
            raise ServiceError(f"of {counted(len(self.tasks), 'image')} {count:,} cannot be annotated")
        steps = Steps(console, f"annotating up to {count:,}", count, before=self.annotated)
        with steps, ThreadPoolExecutor(_ANNOTATORS) as pool:
            for annotation in [pool.submit(self._annotate, *task) for task in self.tasks[self.annotated : count]]:
                annotation.result()
                steps.advance()
        self.annotated = max(self.annotated, count)

    def _annotate(self, image: str, task: int) -> None:
        example = self._data[image]
        result = self._problem_type.result(example.truth, self._label_config, imaging.upright_size(example.image))
        self._label_studio.annotate(task, result, seconds=1.0)


def ask_about_holdout(deployment: Deployment, folder: ModelFolder, data: Sequence[Example]) -> Served:
    """Send every holdout image, annotated or not, through the deployed endpoint, and measure what it answers.

    A detector is measured by the boxes that annotators are shown, so a little under what the evaluation report says, which
    also knows the less sure ones.
    """
    from training_jobs import problem  # torch takes seconds to import, and the other commands do without it

    config = folder.config
    groups = groups_of(deployment, folder)
    holdout = [example for example in data if split_of(groups[example.sha256], config.splits) == "test"]
    addresses = _addresses(deployment, folder, holdout)
    access, http = deployment.backend(config.name), urllib3.PoolManager(timeout=60)
    found: list[list[Region]] = []
    for start in range(0, len(holdout), _TASKS_A_REQUEST):
        found += _predicted(http, access, addresses[start : start + _TASKS_A_REQUEST], folder)
    rows = [
        ManifestRow(
            image=address,
            sha256=example.sha256,
            group=groups[example.sha256],
            regions=example.truth,
            split="test",
            annotation="",
            task=0,
        )
        for address, example in zip(addresses, holdout, strict=True)
    ]
    scores = problem.of(config.problem_type).scores(rows, found, config.classes, version=0)
    return Served(holdout, found, scores.value)


def groups_of(deployment: Deployment, folder: ModelFolder) -> dict[str, str]:
    """The content group of every image that is a task, both by SHA-256; it decides the image's split."""
    project = deployment.ledger.project(folder.config.name)
    tasks = deployment.label_studio.tasks(project, folder.label_config.data_key)
    return {task.sha256: task.group for task in tasks if task.sha256 and task.group}


def _addresses(deployment: Deployment, folder: ModelFolder, data: Sequence[Example]) -> list[str]:
    return [s3_uri(deployment.images.name, folder.config.images_prefix + example.name) for example in data]


def _predicted(http: urllib3.PoolManager, access: BackendAccess, images: list[str], folder: ModelFolder) -> list[list[Region]]:
    tasks = [{"id": number, "data": {folder.label_config.data_key: image}} for number, image in enumerate(images)]
    body = {"tasks": tasks, "project": "0.0", "label_config": folder.template, "params": {"context": None}}
    answer = http.request("POST", f"{access.url}/predict", json=body, headers={"Authorization": access.authorization})
    if answer.status != 200:
        raise ServiceError(f"predict answered {answer.status}: {answer.data[:300]!r}")
    results = answer.json()["results"]
    missing = [result.get("error") for result in results if "result" not in result]
    if missing:
        raise ServiceError(f"predict left out {len(missing):,} of {counted(len(images), 'image')}: {missing[0]}")
    return [_regions(result["result"], folder) for result in results]


def _regions(result: list[dict[str, Any]], folder: ModelFolder) -> list[Region]:
    """A prediction's result as regions with their scores, which reading it as an annotation leaves away."""
    problem_type = problem_types.of(folder.config.problem_type)
    return [
        msgspec.structs.replace(region, score=item.get("score"))
        for number, item in enumerate(result)
        for region in problem_type.annotated(msgspec.convert({"id": number, "result": [item]}, Annotation), folder.label_config)
    ]


def draw_learning_curve(report: Report, file: Path) -> None:
    """The metric over annotations, measured and served, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    counts = [version.annotations for version in report.versions]
    axes.plot(counts, [100 * v.served_value for v in report.versions], "o-", label="served: every holdout image")
    axes.plot(counts, [100 * v.value for v in report.versions], "s--", label="measured: the annotated holdout images")
    for version in report.versions:
        axes.annotate(
            f"v{version.version}", (version.annotations, 100 * version.served_value), (0, -14), textcoords="offset points"
        )
    axes.set(xlabel="annotations", ylabel=f"{METRIC_TITLES[report.metric]}, %", title=f"Learning curve of {report.model}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)


def draw_boxes(served: Served, file: Path) -> None:
    """The first images of the holdout with the boxes that the endpoint answers, as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from PIL import Image

    rows, columns = _PICTURES
    figure = Figure(figsize=(2.4 * columns, 2.4 * rows), layout="constrained")
    shown = zip(figure.subplots(rows, columns).flat, served.holdout, served.found, strict=False)
    for axes, example, regions in shown:
        image = Image.open(io.BytesIO(example.image))
        axes.imshow(image)
        axes.axis("off")
        for region in reversed(regions):  # the surest on top
            left, top, right, bottom = (corner * side for corner, side in zip(region.box or (), image.size * 2, strict=True))
            axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="yellow", linewidth=1.5))
            label = f"{region.label}  {region.score or 0:.0%}"
            axes.text(left, top, label, fontsize=7, va="bottom", color="black", bbox={"facecolor": "yellow", "pad": 0.8, "lw": 0})
    figure.savefig(file, dpi=120)


def _line(version: Version, metric: Metric) -> str:
    measured = f"{METRIC_TITLES[metric]} {version.value:6.1%} ({counted(version.holdout_images, 'holdout image')})"
    served = f"served: {version.served_value:6.1%}{'  champion' if version.champion else ''}"
    return f"Version {version.version}: {counted(version.annotations, 'annotation'):>19} → {measured:<42} {served}"


def _configs_that_train_at(model: str, counts: list[int], target: Path) -> None:
    """A copy of the model configs in which `model` trains at `counts`."""
    source = ModelConfigs.find()
    for name in source.names:
        folder = target / name
        folder.mkdir(parents=True)
        for file in source[name].folder.iterdir():
            if file.is_file():
                (folder / file.name).write_bytes(file.read_bytes())
    config = target / model / "config.yaml"
    content = yaml.safe_load(config.read_text())
    if content["retrain"]["at"] != counts:
        content["retrain"]["at"] = counts
        config.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
