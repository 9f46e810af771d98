"""`labelloop status --watch`: every model of a stage, live in the terminal, with its queues and alarms.

A look asks the services one after the other, in the main thread; what is shown is drawn twice a second meanwhile, with the age of
what it says. What a service that is away told last stays there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec
from botocore.exceptions import BotoCoreError, ClientError
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cli.deployment import Deployment
from cli.redrive import QUEUES, QueueName
from cli.status import Status, how_far, read_status
from labelloop import aws
from labelloop.errors import LabelloopError, ServiceError
from labelloop.model_config import ModelFolder
from labelloop.records import METRIC_TITLES
from labelloop.wording import counted

_DRAWN = 2  # times a second
_BAR = 24  # characters
_COUNTED = ("tasks", "annotations", "predicted", "next_training")  # what Label Studio says


@dataclass(frozen=True)
class QueueDepth:
    """About how many messages wait, are worked at, and were given up."""

    queue: QueueName
    waiting: int
    taken: int
    dead: int


@dataclass(frozen=True)
class Traffic:
    """What a stage's queues hold, and which of its alarms ring, each with what it says."""

    queues: list[QueueDepth]
    alarms: dict[str, str]


@dataclass
class _Known[T]:
    """The last that was heard, when (by the watch's clock), and why no more was since."""

    facts: T | None = None
    at: float = 0.0
    problem: str = ""


@dataclass
class _Model:
    folder: ModelFolder
    status: _Known[Status] = field(default_factory=_Known)
    counted_at: float | None = None  # when Label Studio last answered


class Watch:
    """What is known of a stage. `look` asks; as a renderable it shows what is known, however old."""

    def __init__(
        self, deployment: Deployment, folders: Sequence[ModelFolder], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Raises `NotSetUpError` or `ServiceError` when there is no such stage."""
        self._deployment, self._models, self._clock = deployment, [_Model(folder) for folder in folders], clock
        self._traffic: _Known[Traffic] = _Known()
        self._looking_since: float | None = None
        self._looked_at: float | None = None
        _ = deployment.outputs

    def look(self) -> None:
        """Ask once about everything. What does not answer is noted, and nothing raised."""
        self._looking_since = self._clock()
        for model in self._models:
            self._look_at(model)
        try:
            self._traffic = _Known(read_traffic(self._deployment), self._clock())
        except LabelloopError as error:
            self._traffic.problem = str(error)
        self._looking_since, self._looked_at = None, self._clock()

    def _look_at(self, model: _Model) -> None:
        before = model.status.facts
        try:
            status = read_status(self._deployment, model.folder, answers=False)
        except LabelloopError as error:
            model.status.problem = str(error)
            return
        now = self._clock()
        if status.annotations is not None:
            model.counted_at = now
        elif before is not None:
            status = msgspec.structs.replace(status, **{name: getattr(before, name) for name in _COUNTED})
        model.status = _Known(status, now)

    def __rich__(self) -> RenderableType:
        return Group(self._head(), *(self._model(model) for model in self._models), self._queues())

    def _head(self) -> Text:
        text = Text.assemble((f"stage {self._deployment.stage}", "bold"), "  ")
        now = self._clock()
        if self._looking_since is not None and now - self._looking_since >= 1:
            text.append(f"asking for {_age(now - self._looking_since)}", "dim")
        elif self._looked_at is not None:
            text.append(f"looked {_age(now - self._looked_at)} ago; Ctrl-C ends it", "dim")
        return text

    def _model(self, model: _Model) -> Panel:
        known, status = model.status, model.status.facts
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, what in self._of(model, status) if status else ():
            grid.add_row(name, what)
        if known.problem:
            old = f"; what stands here is {_age(self._clock() - known.at)} old" if status else ""
            grid.add_row("problem", Text(known.problem + old, "yellow"))
        elif not status:
            grid.add_row("", Text("asking", "dim"))
        return Panel(grid, title=f"[bold]{escape(model.folder.config.name)}[/bold]", title_align="left", border_style="dim")

    def _of(self, model: _Model, status: Status) -> Iterator[tuple[str, RenderableType]]:
        if status.champion:
            champion = status.champion
            serves = f"version {champion.version}: {METRIC_TITLES[champion.metric]} {champion.value:.1%}"
            yield "champion", Text(f"{serves}, trained on {counted(champion.n_annotations, 'annotation')}", "green")
        else:
            yield "champion", Text("none yet", "dim")
        yield from self._work(status)
        if status.running and status.progress:
            done, of = status.progress.epoch or 0, status.progress.epochs
            yield "training", _bar(done, of, f"{how_far(status.progress)}; {counted(status.running.n_annotations, 'annotation')}")
        if status.last_failure:
            yield "failed", Text(f"{status.last_failure.job_name}: {status.last_failure.reason}", "red")
        for problem in status.problems:
            yield "problem", Text(problem, "yellow")
        if model.counted_at is not None and model.counted_at < model.status.at:
            yield "", Text(f"the counts of Label Studio are {_age(self._clock() - model.counted_at)} old", "yellow")

    def _work(self, status: Status) -> Iterator[tuple[str, RenderableType]]:
        if status.annotations is None or status.tasks is None:
            return
        if status.next_training:
            due = status.next_training.due_at
            yield "annotations", _bar(status.annotations, due, f"{status.annotations:,} of {due:,}{_until(status)}")
        left = status.tasks - status.annotations
        predicted = f", {status.predicted:,} of them predicted by the champion" if status.champion else ""
        review = f"; {status.review.open:,} to be looked at again" if status.review.open else ""
        yield "queue", Text(f"{left:,} of {counted(status.tasks, 'task')} open{predicted}{review}")

    def _queues(self) -> Panel:
        known, grid = self._traffic, Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        parts: list[RenderableType] = []
        if known.facts:
            for name in ("queue", "waiting", "taken", "dead letters"):
                grid.add_column(name, justify="left" if name == "queue" else "right", header_style="dim")
            for queue in known.facts.queues:
                dead = Text(f"{queue.dead:,}", "bold red" if queue.dead else "")
                grid.add_row(queue.queue, f"{queue.waiting:,}", f"{queue.taken:,}", dead)
            parts.append(grid)
            if any(queue.dead for queue in known.facts.queues):
                parts.append(Text(f"{self._deployment.command('redrive --list')} shows what was given up", "red"))
            alarms = [Text(f"alarm {name}: {says}", "bold red") for name, says in known.facts.alarms.items()]
            parts += alarms or [Text("no alarm rings", "dim")]
        if known.problem:
            old = f"; what stands here is {_age(self._clock() - known.at)} old" if known.facts else ""
            parts.append(Text(known.problem + old, "yellow"))
        return Panel(Group(*parts or [Text("asking", "dim")]), title="queues and alarms", title_align="left", border_style="dim")


def run(watch: Watch, console: Console, every: float, sleep: Callable[[float], None] = time.sleep) -> None:
    """Look every so many seconds and show it, until interrupted."""
    with suppress(KeyboardInterrupt), Live(get_renderable=watch.__rich__, console=console, refresh_per_second=_DRAWN):
        while True:
            watch.look()
            sleep(every)


def read_traffic(deployment: Deployment) -> Traffic:
    """Ask SQS and CloudWatch. Raises `ServiceError`."""
    sqs, cloudwatch = aws.client("sqs"), aws.client("cloudwatch")

    def count(key: str) -> dict[str, int]:
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible", "ApproximateNumberOfMessagesDelayed"]
        answer = sqs.get_queue_attributes(QueueUrl=deployment.outputs[key], AttributeNames=names)["Attributes"]
        return {name: int(answer.get(name, 0)) for name in names}

    queues = []
    try:
        for name in QUEUES:
            waiting, taken, delayed = count(f"{name.capitalize()}Queue").values()
            dead = sum(count(f"{name.capitalize()}QueueDeadLetters").values())
            queues.append(QueueDepth(name, waiting + delayed, taken, dead))
        prefix = f"labelloop-{deployment.stage}-"
        pages = cloudwatch.get_paginator("describe_alarms").paginate(AlarmNamePrefix=prefix, StateValue="ALARM")
        alarms = {its["AlarmName"]: its.get("AlarmDescription", "") for page in pages for its in page["MetricAlarms"]}
    except (ClientError, BotoCoreError) as error:
        raise ServiceError(f"AWS does not say what lies in the queues and which alarms ring: {error}") from error
    return Traffic(queues, alarms)


def _until(status: Status) -> str:
    """What is missing until the next training: annotations, or, once there are enough, something else."""
    coming, annotations = status.next_training, status.annotations
    if coming is None or annotations is None:
        return ""
    if annotations < coming.due_at:
        return f", {coming.due_at - annotations:,} until the next training"
    if coming.now:
        return ", a training starts at the next look"
    return "" if status.running else f": {coming.reason}"


def _bar(done: int, of: int, text: str) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(width=_BAR)
    grid.add_column(overflow="fold")
    bar = ProgressBar(total=max(of, 1), completed=min(done, of), width=_BAR, complete_style="cyan", finished_style="green")
    grid.add_row(bar, Text(text))
    return grid


def _age(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
