"""What a model is doing: versions, champion, annotations, the next training and why, the running job, failures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cli import training_job
from cli.deployment import Deployment
from cli.training_job import JobProgress
from labelloop import auto_accept, drift, problem_types, shadow
from labelloop.acceptance import Acceptance, acceptance
from labelloop.auto_accept import AutoAcceptState
from labelloop.dataset import resolution
from labelloop.errors import LabelloopError, NotSetUpError
from labelloop.label_studio.client import CONNECTED
from labelloop.model_config import ModelFolder
from labelloop.policy import decide
from labelloop.promotion import judge_live
from labelloop.records import (
    METRIC_TITLES,
    Champion,
    Failure,
    Interval,
    Job,
    LabelsSaved,
    Metric,
    ProblemTypeName,
    Promotion,
    Takeover,
    Timing,
    Verdict,
    version_string,
)
from labelloop.wording import counted

_TAKEOVERS = _FAILURES = 3  # shown; --json has all
_REASONS = 3  # versions whose verdict is explained
_VERDICTS: dict[Verdict, str] = {
    "promote": "promote",
    "keep": "keep",
    "undecided": "[yellow]undecided[/yellow]",
    "shadow": "[cyan]in shadow[/cyan]",
}
_SMALL = 0.05  # a holdout that tells apart no less than this is warned about

type _Fact = tuple[str, str, str]  # name, text, colour


class Version(msgspec.Struct, kw_only=True):
    """A row of the version table; `value` is that of `metric` on the holdout; None where nothing was measured.

    `difference`: to the champion of then. `calibration_error`: between confidence and accuracy. `suspects`: annotations that
    the review was offered. `acceptance`: pre-annotations that annotators had before them, and kept; None where there are none.
    """

    version: int
    annotations: int
    metric: Metric | None
    value: float
    difference: Interval | None
    calibration_error: float | None
    holdout_images: int
    champion: bool
    verdict: Verdict
    reason: str
    suspects: int
    acceptance: Acceptance | None
    job_name: str
    timing: Timing | None


class Holdout(msgspec.Struct, kw_only=True):
    """The holdout of the last version. `resolution`: the smallest difference of two versions that it can tell apart."""

    images: int
    resolution: float


class QueueStatus(msgspec.Struct, kw_only=True):
    """How annotators are asked, and what it has saved so far; `labels_saved` is None while too little was measured."""

    strategy: str
    control: float
    labels_saved: LabelsSaved | None


class ReviewStatus(msgspec.Struct, kw_only=True):
    """Cases of the review tab; an open one waits for an annotator's answer."""

    open: int
    settled: int


class ShadowStatus(msgspec.Struct, kw_only=True):
    """A version in shadow beside `champion`: the tasks that both have predicted, those that annotators have answered since."""

    version: int
    champion: int
    tasks: int
    answered: int
    so_far: str


class DriftStatus(msgspec.Struct, kw_only=True):
    """How far the newest images of the holdout are from those that the champion was measured on: `embedding` and `confidence`,
    as far as known; 1 is what chance gives."""

    images: int
    figures: dict[str, float]


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
    """`annotations`, `tasks`, `predicted`, `next_training`, `auto_accept` and all acceptance are None when Label Studio does not
    say; `problems` tells why. `predicted`: tasks without an annotation that have the champion's prediction.
    `auto_accept` is None, too, where config.yaml has no such section or nothing serves; `accept_from` is the certainty from
    which the champion accepts, None while none is precise enough.

    `takeovers`: changes of the champion, the latest first. `last_failure`: of a training, if none has gone well since;
    `failures`: all of them, the earliest first. `left_out`: annotated tasks that the last snapshot could not use, by reason, or
    those for whose sake a due training does not start. `progress`: of what is `running`.
    """

    model: str
    problem_type: ProblemTypeName
    metric: Metric
    stage: str
    champion: Champion | None
    tasks: int | None
    annotations: int | None
    predicted: int | None
    next_training: NextTraining | None
    running: Job | None
    progress: JobProgress | None
    versions: list[Version]
    holdout: Holdout | None
    queue: QueueStatus
    review: ReviewStatus
    auto_accept: AutoAcceptState | None
    accept_from: float | None
    shadow: ShadowStatus | None
    drift: DriftStatus | None
    takeovers: list[Takeover]
    last_failure: Failure | None
    failures: list[FailedTraining]
    left_out: dict[str, int]
    problems: list[str]


def read_status(deployment: Deployment, folder: ModelFolder, *, answers: bool = True) -> Status:
    """Ask the ledger, the pointer and Label Studio; a Label Studio that is down costs only its own figures.

    `answers`: read all annotations, for acceptance and auto-accept; it takes the longer the more there are.
    """
    config, model = folder.config, folder.config.name
    head = deployment.ledger.head(model)
    champion = deployment.champions.read(model)
    trainings = deployment.ledger.trainings(model)
    promotions = sorted(deployment.ledger.promotions(model).values(), key=lambda p: (p.version, p.decided_at))
    work = _Work()
    problems: list[str] = []
    try:
        work = _work(deployment, folder, champion, answers=answers)
        problems += _cut_off(deployment, model, backend=answers)
    except LabelloopError as error:
        problems.append(str(error))
    progress = training_job.progress(head.running, config, deployment.registry) if head.running else None
    if progress and progress.problem:
        problems.append(progress.problem)
    coming = None
    left_out = max((t.job for t in trainings), key=lambda job: job.started_at).snapshot.skipped if trainings else {}
    if work.annotated is not None:
        decision = decide(config.retrain, head, work.annotated, datetime.now(UTC))
        coming = NextTraining(due_at=decision.due_at, now=decision.train, reason=decision.reason)
        found = head.left_out if decision.train else None
        if found and found.annotated == work.annotated:  # the last look counted the same, and looked closer
            usable = f"{found.usable:,} of {counted(found.annotated, 'annotated task')} can be trained on"
            coming, left_out = msgspec.structs.replace(coming, now=False, reason=usable), found.reasons
        failed = next((t.job for t in trainings if head.failure and t.job.job_name == head.failure.job_name), None)
        if decision.train and failed and head.failure and not head.failure.no_machine and _annotated(failed) == work.annotated:
            same = f"{failed.job_name} failed with as many annotations; any change of them allows another try"
            coming = msgspec.structs.replace(coming, now=False, reason=same)
    return Status(
        model=model,
        problem_type=config.problem_type,
        metric=problem_types.of(config.problem_type).metric,
        stage=deployment.stage,
        champion=champion,
        tasks=work.tasks,
        annotations=work.annotated,
        predicted=work.predicted,
        next_training=coming,
        running=head.running,
        progress=progress,
        versions=[_version(promotion, champion, work.acceptance.get(promotion.version)) for promotion in promotions],
        holdout=_holdout(promotions),
        queue=QueueStatus(
            strategy=config.queue.strategy,
            control=config.queue.control,
            labels_saved=next((p.labels_saved for p in reversed(promotions) if p.labels_saved), None),
        ),
        review=_review(deployment, model),
        auto_accept=work.auto_accept,
        accept_from=_accept_from(deployment, folder, champion),
        shadow=_shadow(deployment, promotions, champion),
        drift=_drift(deployment, champion),
        takeovers=deployment.ledger.takeovers(model)[::-1],
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
        left_out=left_out,
        problems=problems,
    )


def _annotated(job: Job) -> int:
    """The tasks that were annotated when its snapshot was taken."""
    return job.n_annotations + sum(job.snapshot.skipped.values())


@dataclass(frozen=True)
class _Work:
    """What Label Studio tells of the annotators' work."""

    tasks: int | None = None
    annotated: int | None = None
    predicted: int | None = None
    acceptance: dict[int, Acceptance] = field(default_factory=dict)
    auto_accept: AutoAcceptState | None = None


def _work(deployment: Deployment, folder: ModelFolder, champion: Champion | None, *, answers: bool) -> _Work:
    project, label_studio = deployment.ledger.project(folder.config.name), deployment.label_studio
    counts = label_studio.counts(project)
    predicted = label_studio.count_predicted(project, version_string(champion.model, champion.version)) if champion else 0
    if not answers:
        return _Work(tasks=counts["tasks"], annotated=counts["annotated"], predicted=predicted)
    tasks = list(chain.from_iterable(label_studio.annotated_tasks(project))) if champion else []
    return _Work(
        tasks=counts["tasks"],
        annotated=counts["annotated"],
        predicted=predicted,
        acceptance=acceptance(tasks, folder.config, folder.label_config),
        auto_accept=auto_accept.summary(folder, champion.version, deployment.ledger, tasks) if champion else None,
    )


def _cut_off(deployment: Deployment, model: str, *, backend: bool) -> Iterator[str]:
    """What is wrong between Label Studio and the model; `backend`: have it try whether it reaches that."""
    label_studio, project = deployment.label_studio, deployment.ledger.project(model)
    url, again = deployment.backend_url(model), deployment.command(f"setup-label-studio-project {model}")
    if not any(hook.is_active and hook.url == f"{url}/webhook" for hook in label_studio.webhooks(project)):
        yield f"Label Studio has no webhook that tells of annotations: trainings wait for the next look; run: {again}"
    if backend and not any(its["url"] == url and its["state"] == CONNECTED for its in label_studio.backends(project)):
        yield f"Label Studio has no ML backend that answers: it asks for no predictions; run: {again}, then with --check"


def _review(deployment: Deployment, model: str) -> ReviewStatus:
    try:
        cases = deployment.ledger.review_cases(model, deployment.ledger.project(model))
    except NotSetUpError:
        cases = []
    settled = sum(case.settled_at is not None for case in cases)
    return ReviewStatus(open=len(cases) - settled, settled=settled)


def _shadow(deployment: Deployment, promotions: list[Promotion], champion: Champion | None) -> ShadowStatus | None:
    running = shadow.running(promotions, champion)
    if running is None or running.shadow is None:
        return None
    pairs = deployment.ledger.pairs(running.model, running.version)
    return ShadowStatus(
        version=running.version,
        champion=running.shadow.champion.version,
        tasks=len(pairs),
        answered=len(shadow.in_order(pairs)),
        so_far=judge_live(running.shadow, pairs)[1],
    )


def _drift(deployment: Deployment, champion: Champion | None) -> DriftStatus | None:
    found = deployment.ledger.drift(champion.model, champion.version) if champion else None
    return DriftStatus(images=len(found.served), figures=found.figures) if found else None


def _accept_from(deployment: Deployment, folder: ModelFolder, champion: Champion | None) -> float | None:
    if champion is None or folder.config.auto_accept is None:
        return None
    report = deployment.champions.evaluation(champion.model, champion.version)
    return report.accept_from if report else None


def _version(promotion: Promotion, champion: Champion | None, kept: Acceptance | None) -> Version:
    return Version(
        version=promotion.version,
        annotations=promotion.n_annotations,
        metric=promotion.metric,
        value=promotion.value,
        difference=promotion.difference,
        calibration_error=promotion.calibration_error,
        holdout_images=promotion.holdout_images,
        champion=champion is not None and champion.version == promotion.version,
        verdict=promotion.verdict,
        reason=promotion.reason,
        suspects=promotion.suspects,
        acceptance=kept,
        job_name=promotion.job_name,
        timing=promotion.timing,
    )


def _holdout(promotions: list[Promotion]) -> Holdout | None:
    images = next((promotion.holdout_images for promotion in reversed(promotions) if promotion.holdout_images), 0)
    return Holdout(images=images, resolution=resolution(images)) if images else None


def show(status: Status, console: Console) -> None:
    """The status as a person reads it."""
    console.print(f"[bold]{status.model}[/bold]  ({status.problem_type}, stage {status.stage})")
    if status.versions:
        console.print(_versions(status))
    else:
        console.print("no version yet")
    facts = Table.grid(padding=(0, 2, 0, 0))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for name, text, colour in (*_of_the_model(status), *_of_the_work(status), *_of_the_trainings(status)):
        facts.add_row(f"[{colour}]{name}[/{colour}]" if colour else name, escape(text))
    console.print(facts)


def _of_the_model(status: Status) -> Iterator[_Fact]:
    for row in status.versions[-_REASONS:]:
        yield f"version {row.version}", f"{row.verdict}: {row.reason}", ""
    if status.shadow:
        seen = f"{counted(status.shadow.tasks, 'task')} predicted by both, {status.shadow.answered:,} answered"
        beside = f"version {status.shadow.version} beside version {status.shadow.champion}"
        yield "in shadow", f"{beside}: {seen}; {status.shadow.so_far}", ""
    for takeover in status.takeovers[:_TAKEOVERS]:
        before = f" from version {takeover.before}" if takeover.before else ""
        text = f"version {takeover.version} took over{before}, {moment(takeover.at)} ({takeover.by}: {takeover.reason})"
        yield "serving", text, ""
    if status.holdout:
        finest = f"{100 * status.holdout.resolution:.1f} points"
        tell = f"{counted(status.holdout.images, 'image tells', 'images tell')} apart"
        if status.holdout.resolution > _SMALL:
            yield "holdout", f"{tell} no less than {finest}; annotate more to compare versions", "yellow"
        else:
            yield "holdout", f"{tell} {finest}", ""


def _of_the_work(status: Status) -> Iterator[_Fact]:
    """The annotators' and the model's."""
    saved = "not measured yet"
    if status.queue.labels_saved:
        share, control = status.queue.labels_saved.share, status.queue.labels_saved.control
        saved = f"{share.value:.0%} ({share.low:.0%} to {share.high:.0%}), by {counted(control, 'control label')}"
    yield "queue", f"{status.queue.strategy}, {status.queue.control:.0%} at random; labels saved against random: {saved}", ""
    if status.review.open or status.review.settled:
        yield "review", f"{counted(status.review.open, 'annotation')} to look at again, {status.review.settled:,} settled", ""
    if status.auto_accept:
        yield _auto_accept(status.auto_accept, status.accept_from)
    if status.drift:
        yield _drifted(status.drift)
    if status.annotations is not None:
        predicted = f"; the champion has predicted {status.predicted:,} of the others" if status.champion else ""
        yield "annotations", f"{status.annotations:,} of {counted(status.tasks or 0, 'task')}{predicted}", ""


def _of_the_trainings(status: Status) -> Iterator[_Fact]:
    if status.next_training is not None and not status.running:
        due = "at the next look" if status.next_training.now else f"at {counted(status.next_training.due_at, 'annotation')}"
        yield "next training", f"{due} ({status.next_training.reason})", ""
    if status.running:
        far = f", {how_far(status.progress)}" if status.progress else ""
        since = f"since {moment(status.running.started_at)}"
        yield "running", f"{status.running.job_name}, {counted(status.running.n_annotations, 'annotation')}, {since}{far}", ""
    if status.versions and (timing := status.versions[-1].timing):
        yield "last training", timing.text, ""
    for reason, count in status.left_out.items():
        yield "left out", f"{count:,} of the annotated tasks ({reason})", ""
    for failed in reversed(status.failures[-_FAILURES:]):
        still = status.last_failure is not None and status.last_failure.job_name == failed.job_name  # none has gone well since
        yield "failed", f"{failed.job_name}, {moment(failed.ended_at or '?')}: {failed.reason}", "red" if still else ""
    for problem in status.problems:
        yield "problem", problem, "yellow"


def how_far(progress: JobProgress) -> str:
    """Phase and epoch of a running job."""
    phase = progress.phase.lower()
    return phase if progress.epoch is None else f"{phase}, epoch {progress.epoch:,} of {progress.epochs:,}"


def _versions(status: Status) -> Table:
    table = Table(box=None, pad_edge=False)
    right = ("version", "annotations", METRIC_TITLES[status.metric], "calibration\nerror", "kept")
    difference = "to the champion\n(points)"
    for column in (*right, difference, "verdict", ""):
        narrows = column in (METRIC_TITLES[status.metric], difference)
        table.add_column(column, justify="right" if column in right else "left", overflow="fold", no_wrap=not narrows)
    for row in status.versions:
        table.add_row(
            str(row.version),
            f"{row.annotations:,}",
            f"{row.value:.1%}" if row.metric else "–",
            "–" if row.calibration_error is None else f"{row.calibration_error:.1%}",
            f"{row.acceptance.kept / row.acceptance.shown:.0%}" if row.acceptance else "–",
            points(row.difference) if row.difference else "–",
            _VERDICTS[row.verdict],
            "[green]champion[/green]" if row.champion else "",
        )
    return table


def _auto_accept(state: AutoAcceptState, accept_from: float | None) -> _Fact:
    audited, waiting = counted(state.audited, "audited prediction"), counted(state.waiting, "waits", "wait")
    audit = f"people agree with {state.right:,} of {audited}, {waiting} for them"
    work = f"{counted(state.accepted, 'annotation is', 'annotations are')} the model's; {audit}"
    if state.off:
        return "auto-accept", f"turned off: {state.off}; {work}", "yellow"
    if accept_from is None:
        return "auto-accept", f"the champion is nowhere as precise as promised, and accepts nothing; {work}", ""
    return "auto-accept", f"from a certainty of {accept_from:.3f}; {work}", ""


def _drifted(found: DriftStatus) -> _Fact:
    if not found.figures:
        return "drift", f"not measured yet, {found.images:,} of {drift.FEWEST:,} images", ""
    text = ", ".join(f"{figure:.1f} ({name})" for name, figure in found.figures.items())
    away = max(found.figures.values()) >= drift.ALARM
    return "drift", f"{text} over the last {counted(found.images, 'holdout image')}; 1 is chance", "yellow" if away else ""


def points(difference: Interval) -> str:
    """A difference of shares in percentage points with its interval."""
    return f"{100 * difference.value:+.1f} ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"


def moment(at: str) -> str:
    """A time to the minute, in UTC."""
    return at[:16].replace("T", " ")
