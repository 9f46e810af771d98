"""What a model is doing: versions, champion, annotations, the next training and why, the running job, failures."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cli.deployment import Deployment
from labelloop import problem_types
from labelloop.errors import LabelloopError
from labelloop.model_config import ModelFolder
from labelloop.policy import decide
from labelloop.records import METRIC_TITLES, Champion, Failure, Job, Metric, ProblemTypeName, Verdict


class Version(msgspec.Struct, kw_only=True):
    """A row of the version table; `value` is that of `metric` on the holdout; None where nothing was measured."""

    version: int
    annotations: int
    metric: Metric | None
    value: float
    holdout_images: int
    champion: bool
    verdict: Verdict
    reason: str
    job_name: str


class NextTraining(msgspec.Struct, kw_only=True):
    """`due_at` is the count of annotations that starts it; `now` whether the next look will."""

    due_at: int
    now: bool
    reason: str


class FailedTraining(msgspec.Struct, kw_only=True):
    job_name: str
    annotations: int
    ended_at: str | None
    reason: str


class Status(msgspec.Struct, kw_only=True):
    """`annotations`, `tasks` and `next_training` are None when Label Studio does not say; `problems` tells why.

    `left_out`: annotated tasks that the last snapshot could not use, by reason.
    """

    model: str
    problem_type: ProblemTypeName
    metric: Metric
    stage: str
    champion: Champion | None
    tasks: int | None
    annotations: int | None
    next_training: NextTraining | None
    running: Job | None
    versions: list[Version]
    last_failure: Failure | None
    failures: list[FailedTraining]
    left_out: dict[str, int]
    problems: list[str]


def read_status(deployment: Deployment, folder: ModelFolder) -> Status:
    """Ask the ledger, the pointer and Label Studio; a Label Studio that is down costs only its own figures."""
    config, model = folder.config, folder.config.name
    head = deployment.ledger.head(model)
    champion = deployment.champions.read(model)
    trainings = deployment.ledger.trainings(model)
    promotions = deployment.ledger.promotions(model)
    counts: dict[str, int] = {}
    problems: list[str] = []
    try:
        counts = deployment.label_studio.counts(deployment.ledger.project(model))
    except LabelloopError as error:
        problems.append(str(error))
    coming = None
    if counts:
        decision = decide(config.retrain, head, counts["annotated"], datetime.now(UTC))
        coming = NextTraining(due_at=decision.due_at, now=decision.train, reason=decision.reason)
    return Status(
        model=model,
        problem_type=config.problem_type,
        metric=problem_types.of(config.problem_type).metric,
        stage=deployment.stage,
        champion=champion,
        tasks=counts.get("tasks"),
        annotations=counts.get("annotated"),
        next_training=coming,
        running=head.running,
        versions=[
            Version(
                version=promotion.version,
                annotations=promotion.n_annotations,
                metric=promotion.metric,
                value=promotion.value,
                holdout_images=promotion.holdout_images,
                champion=champion is not None and champion.version == promotion.version,
                verdict=promotion.verdict,
                reason=promotion.reason,
                job_name=promotion.job_name,
            )
            for promotion in sorted(promotions.values(), key=lambda p: (p.version, p.decided_at))
        ],
        last_failure=head.failure,
        failures=[
            FailedTraining(
                job_name=training.job.job_name,
                annotations=training.job.n_annotations,
                ended_at=training.ended_at,
                reason=training.failure or training.status,
            )
            for training in trainings
            if training.status in ("failed", "stopped")
        ],
        left_out=max((t.job for t in trainings), key=lambda job: job.started_at).snapshot.skipped if trainings else {},
        problems=problems,
    )


def show(status: Status, console: Console) -> None:
    """The status as a person reads it."""
    console.print(f"[bold]{status.model}[/bold]  ({status.problem_type}, stage {status.stage})")
    if status.versions:
        table = Table(box=None, pad_edge=False)
        title = METRIC_TITLES[status.metric]
        for column in ("version", "annotations", title, "holdout", "verdict", ""):
            table.add_column(column, justify="left" if column in ("verdict", "") else "right")
        for row in status.versions:
            mark = "[green]champion[/green]" if row.champion else ""
            reason = escape(f"{row.verdict}: {row.reason}")
            value = f"{row.value:.1%}" if row.metric else "–"
            table.add_row(str(row.version), f"{row.annotations:,}", value, str(row.holdout_images), reason, mark)
        console.print(table)
    else:
        console.print("no version yet")
    if status.annotations is not None:
        console.print(f"annotations: {status.annotations:,} of {status.tasks:,} tasks")
    if status.next_training is not None:
        due = "at the next look" if status.next_training.now else f"at {status.next_training.due_at:,} annotations"
        console.print(f"next training: {due} ({escape(status.next_training.reason)})")
    if status.running:
        since = f"since {status.running.started_at}"
        console.print(f"running: {status.running.job_name}, {status.running.n_annotations:,} annotations, {since}")
    for reason, count in status.left_out.items():
        console.print(f"left out of the last training: {count:,} annotated tasks ({escape(reason)})")
    for failed in status.failures:
        console.print(f"[red]failed[/red]: {failed.job_name} at {failed.ended_at}: {escape(failed.reason)}")
    for problem in status.problems:
        console.print(f"[yellow]problem[/yellow]: {escape(problem)}")
