"""Where a prediction comes from, and where an image went: prediction → version → training job → snapshot → annotations.

Everything is read from what the loop wrote down anyway: the ledger, the manifests, Label Studio. A snapshot can be built again
from Label Studio as it is now; where nothing was changed since, its digest is the same.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cli.deployment import Deployment
from labelloop import dataset, snapshot_index
from labelloop.artifacts import parse_s3_uri
from labelloop.errors import LabelStudioError, RequestError, StorageError
from labelloop.label_studio.client import KnownTask
from labelloop.label_studio.payloads import AnnotatedTask
from labelloop.model_config import ModelFolder
from labelloop.promotion import in_points
from labelloop.records import (
    METRIC_TITLES,
    Interval,
    ManifestRow,
    Metric,
    Promotion,
    Snapshot,
    Split,
    Takeover,
    Training,
    TrainingStatus,
    Verdict,
    version_number,
    version_string,
)
from labelloop.wording import counted

_SHA256 = re.compile(r"[0-9a-f]{64}")
_LISTED = 10  # lines of a long list; --json has the rest


class DatasetLineage(msgspec.Struct, kw_only=True):
    """A dataset snapshot. `annotations` are Label Studio's unique ids, in the manifest's order; `left_out` by reason.

    `erased`: its images that were trained on and erased since; their annotations are not named any more.
    """

    digest: str
    manifest: str
    train: int
    validation: int
    test: int
    by_model: int
    erased: int
    left_out: dict[str, int]
    annotations: list[str]


class VersionLineage(msgspec.Struct, kw_only=True):
    """All that is written down about a version. `takeovers`: when it came to serve, and when another one took its place."""

    model: str
    version: int
    serves: bool
    verdict: Verdict
    reason: str
    decided_at: str
    metric: Metric | None
    value: float
    holdout_images: int
    difference: Interval | None
    calibration_error: float | None
    job_name: str
    job_status: TrainingStatus
    started_at: str
    ended_at: str | None
    compared_with: int | None
    run_id: str | None
    dataset: DatasetLineage
    takeovers: list[Takeover]


class PredictionLineage(msgspec.Struct, kw_only=True):
    """A prediction as Label Studio keeps it. `version` is None of one that only orders tasks before the first version."""

    prediction: int
    task: int
    image: str
    made_by: str
    score: float | None
    made_at: str
    version: VersionLineage | None


class Use(msgspec.Struct, kw_only=True):
    """A version whose snapshot has an image, or a near duplicate of it: in which split, and annotated as what.

    `erased_at`: when that image was erased; then nothing is known of its annotation any more.
    """

    version: int
    split: Split
    sha256: str
    erased_at: str | None
    annotation: str
    task: int
    labels: list[str]
    by_model: bool
    job_name: str
    digest: str


class ImageLineage(msgspec.Struct, kw_only=True):
    """An image, the images that look the same and so share its split, and every version whose snapshot has one of them.

    `members` are SHA-256 → address. `split` is the group's by the config of today. `group` is None where no task shows it.
    """

    sha256: str
    image: str | None
    task: int | None
    group: str | None
    split: Split | None
    members: dict[str, str]
    uses: list[Use]


class Change(msgspec.Struct, kw_only=True):
    """An annotation of a snapshot that is no longer what it was."""

    annotation: str
    task: int
    image: str
    what: str


class Rebuilt(msgspec.Struct, kw_only=True):
    """A snapshot that was built again from Label Studio as it is now, out of the same annotations.

    `stored`: the digest of the manifest that lies in S3; it differs from `digest` when images were erased, and `erased` is when
    that was last, or else when somebody overwrote the file.
    """

    version: int
    digest: str
    stored: str
    rebuilt: str
    same: bool
    erased: str | None
    annotations: int
    changes: list[Change]


type Answer = PredictionLineage | ImageLineage | VersionLineage | Rebuilt


class Lineage:
    """Answers about one model of a deployment; what is asked twice is read once."""

    def __init__(self, deployment: Deployment, folder: ModelFolder) -> None:
        self._deployment, self._folder = deployment, folder
        self._model = folder.config.name
        self._manifests: dict[str, list[ManifestRow]] = {}

    def of_version(self, version: int) -> VersionLineage:
        """Raises `RequestError` when there is no such version."""
        promotion, training = self._version(version)
        snapshot = training.job.snapshot
        rows = self._rows(snapshot)
        champion = self._deployment.champions.read(self._model)
        report = self._deployment.champions.evaluation(self._model, version)
        return VersionLineage(
            model=self._model,
            version=version,
            serves=champion is not None and champion.version == version,
            verdict=promotion.verdict,
            reason=promotion.reason,
            decided_at=promotion.decided_at,
            metric=promotion.metric,
            value=promotion.value,
            holdout_images=promotion.holdout_images,
            difference=promotion.difference,
            calibration_error=promotion.calibration_error,
            job_name=training.job.job_name,
            job_status=training.status,
            started_at=training.job.started_at,
            ended_at=training.ended_at,
            compared_with=training.job.champion_version,
            run_id=report.run_id if report else None,
            dataset=DatasetLineage(
                digest=snapshot.digest,
                manifest=snapshot.manifest,
                train=snapshot.n_train,
                validation=snapshot.n_validation,
                test=snapshot.n_test,
                by_model=sum(row.by_model for row in rows),
                erased=sum(row.erased_at is not None for row in rows),
                left_out=snapshot.skipped,
                annotations=[row.annotation for row in rows if row.erased_at is None],
            ),
            takeovers=[t for t in self._deployment.ledger.takeovers(self._model) if version in (t.version, t.before)],
        )

    def of_prediction(self, prediction: int) -> PredictionLineage:
        """Raises `RequestError` when Label Studio has no such prediction, or it is another model's."""
        try:
            stored = self._deployment.label_studio.prediction(prediction)
        except LabelStudioError as error:
            if error.status != 404:
                raise
            raise RequestError(
                f"Label Studio has no prediction {prediction}; a task's predictions have their ids in its JSON, "
                "and an older version's are gone once a newer one has predicted the task"
            ) from None
        image = self._task(stored.task).image
        version = self._number(stored.made_by, prediction)
        return PredictionLineage(
            prediction=prediction,
            task=stored.task,
            image=image,
            made_by=stored.made_by,
            score=stored.score,
            made_at=stored.updated_at,
            version=self.of_version(version) if version else None,
        )

    def of_task(self, task: int) -> ImageLineage:
        """The lineage of the task's image. Raises `RequestError` when Label Studio has no such task."""
        found = self._task(task)
        if found.sha256 is None:
            raise RequestError(f"task {task} was not made by labelloop, so its image is in no snapshot")
        return self._of_image(found.sha256, found)

    def of_image(self, image: str) -> ImageLineage:
        """`image`: its SHA-256, its `s3://` address, or a file of the same content. Raises `RequestError`, `StorageError`."""
        if _SHA256.fullmatch(image):
            return self._of_image(image, None)
        if image.startswith("s3://"):
            return self._of_image(self._sha256_at(image), None)
        file = Path(image)
        try:
            return self._of_image(hashlib.sha256(file.read_bytes()).hexdigest(), None)
        except OSError as error:
            raise RequestError(f"{image} is no file that can be read, no s3:// address and no SHA-256: {error}") from error

    def rebuild(self, version: int) -> Rebuilt:
        """Build the version's snapshot again, out of what Label Studio has now of the same annotations.

        Raises `RequestError`, `StorageError` when the manifest is gone, `LabelStudioError`.
        """
        snapshot = self._version(version)[1].job.snapshot
        rows = self._rows(snapshot)
        emptied = [row for row in rows if row.erased_at is not None]
        before = {row.annotation: row for row in rows if row.erased_at is None}
        stored = hashlib.sha256(self._manifest(snapshot)).hexdigest()
        project = self._deployment.ledger.project(self._model)
        annotated = chain.from_iterable(self._deployment.label_studio.annotated_tasks(project))
        tasks = [task for task in (_restricted(one, before) for one in annotated) if task.annotations]
        rebuilt, again = snapshot_index.freeze(tasks, self._folder.config, self._folder.label_config)
        there = {annotation.unique_id: task for task in tasks for annotation in task.annotations}
        after = {row.annotation: row for row in ManifestRow.read(again)}
        return Rebuilt(
            version=version,
            digest=snapshot.digest,
            stored=stored,
            rebuilt=rebuilt.digest,
            same=rebuilt.digest == snapshot.digest,
            erased=self._erased(snapshot.digest, stored),
            annotations=len(before),
            changes=[
                Change(annotation=row.annotation, task=row.task, image=row.sha256, what=f"erased on {row.erased_at}")
                for row in emptied
            ]
            + [
                Change(annotation=annotation, task=row.task, image=row.image, what=what)
                for annotation, row in before.items()
                if (what := self._change(row, after.get(annotation), there.get(annotation)))
            ],
        )

    def _erased(self, digest: str, stored: str) -> str | None:
        """When the snapshot was last changed by an erasure; None where the manifest is not what that left."""
        erasures = [one for one in self._deployment.ledger.erasures(self._model) if digest in one.snapshots]
        return erasures[-1].at if erasures and erasures[-1].snapshots[digest] == stored else None

    def _change(self, row: ManifestRow, now: ManifestRow | None, task: AnnotatedTask | None) -> str | None:
        """What became of an annotation; None where it is what it was."""
        if now == row:
            return None
        if now is not None:
            fields = [name for name in ManifestRow.__struct_fields__ if getattr(row, name) != getattr(now, name)]
            return "changed: " + ", ".join(f"{name} {_shown(row, name)} → {_shown(now, name)}" for name in fields)
        if task is None:
            return "gone from Label Studio"
        alone, _ = snapshot_index.freeze([task], self._folder.config, self._folder.label_config)
        return "left out now: " + "; ".join(alone.skipped or ["another task shows the same image"])

    def _of_image(self, sha256: str, task: KnownTask | None) -> ImageLineage:
        task = task or next((known for known in self._tasks if known.sha256 == sha256), None)
        group = (task.group if task else None) or self._group_in_snapshots(sha256)
        if group is None:
            raise RequestError(
                f"no task and no snapshot of {self._model} has an image with the SHA-256 {sha256}; "
                f"upload it with: {self._deployment.command(f'upload-images {self._model} FILE')}"
            )
        members = {known.sha256: known.image for known in self._tasks if known.group == group and known.sha256}
        uses = list(self._uses(group))
        return ImageLineage(
            sha256=sha256,
            image=task.image if task else None,
            task=task.id if task else None,
            group=group,
            split=dataset.split_of(group, self._folder.config.splits),
            members=members,
            uses=uses,
        )

    def _uses(self, group: str) -> Iterable[Use]:
        """The group's rows in the snapshots of all versions, the earliest first."""
        for promotion in self._promotions:
            training = self._training(promotion)
            for row in self._rows(training.job.snapshot):
                if row.group == group:
                    yield Use(
                        version=promotion.version,
                        split=row.split,
                        sha256=row.sha256,
                        erased_at=row.erased_at,
                        annotation=row.annotation,
                        task=row.task,
                        labels=[region.label for region in row.regions],
                        by_model=row.by_model,
                        job_name=promotion.job_name,
                        digest=training.job.digest,
                    )

    def _group_in_snapshots(self, sha256: str) -> str | None:
        """The group of an image whose task is gone."""
        return next((row.group for row in self._all_rows if row.sha256 == sha256), None)

    @property
    def _all_rows(self) -> Iterator[ManifestRow]:
        """Of the snapshots of all versions, the earliest first."""
        return (row for promotion in self._promotions for row in self._rows(self._training(promotion).job.snapshot))

    @cached_property
    def _tasks(self) -> list[KnownTask]:
        project = self._deployment.ledger.project(self._model)
        return list(self._deployment.label_studio.tasks(project, self._folder.label_config.data_key))

    @cached_property
    def _promotions(self) -> list[Promotion]:
        """The decisions about versions, the earliest first; version 0 was never one."""
        found = self._deployment.ledger.promotions(self._model).values()
        return sorted((promotion for promotion in found if promotion.version), key=lambda promotion: promotion.version)

    def _version(self, version: int) -> tuple[Promotion, Training]:
        promotion = next((promotion for promotion in self._promotions if promotion.version == version), None)
        if promotion is None:
            there = ", ".join(str(promotion.version) for promotion in self._promotions) or "none yet"
            raise RequestError(f"the ledger knows no version {version} of {self._model}; there are: {there}")
        return promotion, self._training(promotion)

    def _training(self, promotion: Promotion) -> Training:
        training = self._deployment.ledger.training(self._model, promotion.job_name)
        if training is None:
            raise RequestError(f"the ledger has no training job {promotion.job_name}, which made version {promotion.version}")
        return training

    def _number(self, made_by: str, prediction: int) -> int:
        number = version_number(self._model, made_by)
        if number is None:
            raise RequestError(
                f"prediction {prediction} was made by {made_by!r}, which is no version of {self._model}: it shows a case of the "
                "review, was imported, or came from another backend"
            )
        return number

    def _task(self, task: int) -> KnownTask:
        project, data_key = self._deployment.ledger.project(self._model), self._folder.label_config.data_key
        found = self._deployment.label_studio.tasks_after(project, task - 1, data_key, limit=1)
        if not found or found[0].id != task:
            raise RequestError(f"{self._model}'s project {project} has no task {task}")
        return found[0]

    def _sha256_at(self, image: str) -> str:
        """SHA-256 of the image at an `s3://` address; of one that is gone as a task or a snapshot has it."""
        try:
            bucket, key = parse_s3_uri(image)
        except ValueError as error:
            raise RequestError(str(error)) from None
        if bucket == self._deployment.images.name:
            content = self._deployment.images.get(key)
            if content is not None:
                return hashlib.sha256(content).hexdigest()
        known = {row.image: row.sha256 for row in self._all_rows} | {
            task.image: task.sha256 for task in self._tasks if task.sha256
        }
        if image not in known:
            raise RequestError(f"nothing lies at {image}, and no task and no snapshot of {self._model} has it")
        return known[image]

    def _manifest(self, snapshot: Snapshot) -> bytes:
        _, key = parse_s3_uri(snapshot.manifest)
        content = self._deployment.artifacts.get(key)
        if content is None:
            raise StorageError(
                f"the manifest {snapshot.manifest} is missing; manifests are kept for good unless somebody deletes them"
            )
        return content

    def _rows(self, snapshot: Snapshot) -> list[ManifestRow]:
        if snapshot.digest not in self._manifests:
            try:
                rows = ManifestRow.read(self._manifest(snapshot))
            except msgspec.MsgspecError as error:
                raise StorageError(f"the manifest {snapshot.manifest} cannot be read: {error}") from error
            self._manifests[snapshot.digest] = rows
        return self._manifests[snapshot.digest]


def _restricted(task: AnnotatedTask, annotations: Container[str]) -> AnnotatedTask:
    """The task with only those of its annotations."""
    return msgspec.structs.replace(task, annotations=[a for a in task.annotations if a.unique_id in annotations])


def _shown(row: ManifestRow, name: str) -> str:
    """A field of a manifest's row, short enough for a line."""
    value = getattr(row, name)
    if name == "regions":
        return _labels([region.label for region in row.regions])
    return f"{value[:12]}…" if name in ("sha256", "group") else str(value)


def _labels(labels: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(labels)) or "nothing in it"


def show(found: Answer, console: Console) -> None:
    """A lineage as a person reads it."""
    match found:
        case PredictionLineage():
            _show_prediction(found, console)
        case ImageLineage():
            _show_image(found, console)
        case VersionLineage():
            _show_version(found, console)
        case Rebuilt():
            _show_rebuilt(found, console)


def _show_prediction(found: PredictionLineage, console: Console) -> None:
    score = "" if found.score is None else f", score {found.score:.3f}"
    _line(console, "prediction", f"{found.prediction}, made by {found.made_by} on {found.made_at}{score}", bold=True)
    _line(console, "of", f"task {found.task}: {found.image}")
    if found.version:
        _show_version(found.version, console)
    else:
        _line(console, "", "before the first version: it predicts nothing and only orders the tasks")


def _show_version(found: VersionLineage, console: Console) -> None:
    data = found.dataset
    serving = ", serves now" if found.serves else ""
    _line(console, "version", f"{version_string(found.model, found.version)}{serving}", bold=True)
    _line(console, "verdict", f"{found.verdict}, {found.decided_at}: {found.reason}")
    if found.metric:
        against = f", {in_points(found.difference)} against version {found.compared_with}" if found.difference else ""
        title = METRIC_TITLES[found.metric]
        _line(console, "measured", f"{title} {found.value:.1%} on {counted(found.holdout_images, 'holdout image')}{against}")
    _line(console, "trained by", f"{found.job_name}, {found.job_status}, {found.started_at} to {found.ended_at or 'now'}")
    if found.run_id:
        _line(console, "", f"MLflow run {found.run_id}")
    total = data.train + data.validation + data.test
    by_model = f", {data.by_model:,} of them accepted from a model" if data.by_model else ""
    _line(
        console,
        "from",
        f"{counted(total, 'annotation')}{by_model}: {data.train:,} trained on, {data.validation:,} validated with, "
        f"{data.test:,} held out; --json lists their ids",
    )
    if data.erased:
        _line(console, "", f"erased since: {counted(data.erased, 'image')}; what was annotated there is not named any more")
    _line(console, "snapshot", data.digest)
    _line(console, "", data.manifest)
    for reason, count in data.left_out.items():
        _line(console, "left out", f"{counted(count, 'annotated task')}: {reason}")
    for takeover in found.takeovers:
        came = takeover.version == found.version
        other = takeover.before if came else takeover.version
        versus = f" {'from' if came else 'to'} version {other}" if other else ""
        _line(console, "took over" if came else "gave way", f"{takeover.at}{versus}, by {takeover.by}: {takeover.reason}")


def _show_image(found: ImageLineage, console: Console) -> None:
    _line(console, "image", found.sha256, bold=True)
    if found.task is not None:
        _line(console, "", f"task {found.task}: {found.image}")
    others = {sha256: image for sha256, image in found.members.items() if sha256 != found.sha256}
    _line(console, "group", f"{found.group}, in the {found.split} split by the config of now")
    for sha256, image in list(others.items())[:_LISTED]:
        _line(console, "looks like", f"{image} ({sha256[:12]}…)")
    if len(others) > _LISTED:
        _line(console, "", f"and {len(others) - _LISTED:,} more")
    if not found.uses:
        _line(console, "used by", "no version yet: none was trained since it was annotated")
        return
    table = Table(box=None, pad_edge=False)
    for column in ("version", "split", "as", "annotation", "task", "image"):
        table.add_column(column, justify="right" if column in ("version", "task") else "left")
    for use in found.uses:
        labels = (
            f"erased on {use.erased_at}" if use.erased_at else _labels(use.labels) + (" (by a model)" if use.by_model else "")
        )
        which = "this one" if use.sha256 == found.sha256 else f"{use.sha256[:12]}…"
        task = "" if use.erased_at else str(use.task)
        table.add_row(str(use.version), use.split, escape(labels), use.annotation, task, which)
    console.print(table)


def _show_rebuilt(found: Rebuilt, console: Console) -> None:
    _line(console, "snapshot", f"{found.digest} of version {found.version}", bold=True)
    _line(
        console,
        "rebuilt",
        f"{found.rebuilt} from the same {counted(found.annotations, 'annotation')} as Label Studio has them now",
    )
    if found.same:
        _line(console, "", "[green]the same: every annotation is what it was[/green]", markup=True)
        return
    if found.erased:
        _line(console, "", f"[yellow]the manifest was changed by an erasure on {found.erased}[/yellow]", markup=True)
    elif found.stored != found.digest:
        _line(console, "", f"[red]the manifest in S3 was overwritten, its digest is {found.stored}[/red]", markup=True)
    elif not found.changes:
        _line(
            console,
            "",
            "[yellow]another one, though no annotation changed: manifests are written otherwise now[/yellow]",
            markup=True,
        )
    if found.changes:
        count = len(found.changes)
        _line(console, "", f"[yellow]another one: {counted(count, 'annotation')} changed since[/yellow]", markup=True)
    for change in found.changes[:_LISTED]:
        which = f"{change.annotation} of task {change.task} ({change.image})" if change.annotation else change.image
        _line(console, "", f"{which}: {change.what}")
    if len(found.changes) > _LISTED:
        _line(console, "", f"and {len(found.changes) - _LISTED:,} more; --json lists them")


def _line(console: Console, name: str, text: str, *, bold: bool = False, markup: bool = False) -> None:
    shown = text if markup else escape(text)
    console.print(f"{name:<12}{f'[bold]{shown}[/bold]' if bold else shown}", highlight=False, soft_wrap=True)
