"""`labelloop upload-images`: files become tasks, and what people said of them before becomes annotations.

S3 itself is the record of what is done: the prefix is listed once, an image that lies there already is not sent again, and each
new one becomes a task by itself. A task that has an annotation already, a skipped one too, is left alone, so that what an
annotator has said stays. So an upload that was interrupted at any moment goes on where it stopped when it is run again.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import msgspec
from rich.console import Console
from rich.markup import escape

from cli.deployment import Deployment
from cli.image_sources import Source, Sources
from cli.progress import Steps
from labelloop import imaging, problem_types
from labelloop.artifacts import Bucket, Entry, s3_uri
from labelloop.errors import ConflictError, ImageError, LabelStudioError
from labelloop.label_studio.client import KnownTask, LabelStudioClient
from labelloop.model_config import ModelFolder
from labelloop.records import Region
from labelloop.wording import counted

_UPLOADED_AT_ONCE = 16
_INGEST = timedelta(minutes=15)  # an object older than that without a task has been lost on the way to Label Studio
_ANNOTATED_AT_ONCE = 2  # Label Studio on SQLite writes one at a time anyway
_PAGE = 100  # tasks; few, so that a task is annotated seconds after it was seen without an annotation
_LOOK_SECONDS = 1.0
_AGAIN_SECONDS = 30  # then from the first task on: ids of transactions that overlap appear out of order
_STALLED_SECONDS = 300  # without a new task
_COUNTS = 3  # attempts at having all counted
_SETTLED_SECONDS = 5.0  # far more than an import usually takes from reading a count to writing it

Reader = Callable[[], bytes]


class Report(msgspec.Struct, kw_only=True):
    """What an upload did, or with `dry_run` would do. Images go by their names in S3, files refused before by their paths.

    `copies`: the image with the same content, whose task counts for both. `sent_again`: images that lay there without a task.
    `on_the_way`: those without one that lie there for so short a time that `ingest` may be at them.
    `deleted`: how many of those there stay without one, because somebody deleted it in Label Studio.
    `already_annotated`: images with a class whose tasks had an annotation, and were left alone. `notes`: what may not have been
    meant.
    """

    dry_run: bool
    uploaded: int = 0
    already_there: int = 0
    sent_again: int = 0
    on_the_way: int = 0
    deleted: int = 0
    annotated: int = 0
    already_annotated: int = 0
    copies: dict[str, str] = {}
    refused: dict[str, str] = {}
    notes: list[str] = []


def run(
    deployment: Deployment,
    folder: ModelFolder,
    sources: Sources,
    console: Console,
    *,
    dry_run: bool,
    restore_deleted: bool = False,
) -> Report:
    """Upload what is not there, and annotate what somebody has given a class. `console` shows the progress.

    Images whose task was deleted in Label Studio stay without one, unless `restore_deleted`.
    """
    config = folder.config
    project = deployment.ledger.project(config.name)  # without a project the images could become no tasks
    images = sources.images
    with Steps(console, "looking" if dry_run else "uploading", len(images)) as steps:
        uploaded = upload(
            deployment.images,
            config.images_prefix,
            [(name, source.path.read_bytes) for name, source in images.items()],
            lambda *_: steps.advance(),
            dry_run=dry_run,
        )
    labels = _labels(images, uploaded)
    report = Report(
        dry_run=dry_run,
        uploaded=len(uploaded.uploaded),
        already_there=len(uploaded.there),
        copies=uploaded.copies,
        refused={**sources.refused, **uploaded.refused},
        notes=sources.notes,
    )
    sent = set(uploaded.uploaded)
    before = {name: digest for name, digest in uploaded.content.items() if name not in sent}
    tasks = list(deployment.label_studio.tasks(project, folder.label_config.data_key)) if before else []
    lost = _without_task(deployment, config.images_prefix, uploaded, before, tasks)
    deleted = _deleted(deployment, folder, project, {before[name] for name in lost.values()})
    if not restore_deleted:
        report.deleted = len(deleted)
        labels = {digest: classes for digest, classes in labels.items() if digest not in deleted}
    waited = _waited(deployment.images, config.images_prefix) if lost else set()
    again = [there for there, name in lost.items() if (restore_deleted if before[name] in deleted else there in waited)]
    report.sent_again = len(again)
    report.on_the_way = sum(before[name] not in deleted and there not in waited for there, name in lost.items())
    if dry_run:
        done = {task.sha256 for task in tasks if task.annotations}
        report.already_annotated = len(done & set(labels))
        report.annotated = len(labels) - report.already_annotated
        return report
    if restore_deleted and deleted:
        deployment.ledger.forget_images(config.name, project, deleted)

    def send_again(there: str) -> None:
        """Write it once more: S3 then tells `ingest` of it once more."""
        deployment.images.put(config.images_prefix + there, images[lost[there]].path.read_bytes())

    _in_parallel(send_again, again, _UPLOADED_AT_ONCE)
    if labels:
        with Steps(console, "annotating", len(labels)) as steps:
            annotated = annotate(deployment.label_studio, project, folder, labels, steps.advance)
        report.annotated, report.already_annotated = annotated.now, annotated.before
    return report


def show(report: Report, console: Console) -> None:
    """Print a report for a person."""

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    would = "would be " if report.dry_run else ""
    say(f"{would}uploaded {report.uploaded:,}, already there {report.already_there:,}, refused {len(report.refused):,}")
    if report.copies:
        copies = counted(len(report.copies), "file is a copy", "files are copies")
        say(f"{copies} of another: the task of the same content counts for both")
    if report.sent_again:
        were = would or ("was " if report.sent_again == 1 else "were ")
        say(f"{report.sent_again:,} lay there without a task and {were}sent to Label Studio again")
    if report.on_the_way:
        have = "has no task yet" if report.on_the_way == 1 else "have no task yet"
        late = f"if none appears, run this again {_INGEST.seconds // 60} minutes after the upload"
        say(f"{report.on_the_way:,} {have} and may be on the way to Label Studio; {late}")
    if report.deleted:
        say(f"{report.deleted:,} had a task that was deleted in Label Studio; --restore-deleted makes it anew")
    if report.annotated or report.already_annotated:
        alone = counted(report.already_annotated, "that has", "that have")
        say(f"{would}annotated {report.annotated:,}, left alone {alone} an annotation")
    for name, reason in report.refused.items():
        say(f"[yellow]refused[/yellow] {escape(name)}: {escape(reason)}")
    for note in report.notes:
        say(f"[yellow]note[/yellow] {escape(note)}")


def _labels(images: Mapping[str, Source], uploaded: Uploaded) -> dict[str, tuple[str, ...]]:
    """Classes by the SHA-256 of the image. A copy with other classes than the first file's is refused."""
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for name, source in images.items():
        if source.labels is None or name not in uploaded.content:
            continue
        first, labels = found.setdefault(uploaded.content[name], (name, source.labels))
        if set(labels) != set(source.labels):
            uploaded.refused[name] = (
                f"is a copy of {first}, which has the class {', '.join(labels)}, this one {', '.join(source.labels)}; "
                "an image has one annotation: remove one of the files"
            )
    return {digest: labels for digest, (_, labels) in found.items()}


def _without_task(
    deployment: Deployment, prefix: str, uploaded: Uploaded, before: Mapping[str, str], tasks: list[KnownTask]
) -> dict[str, str]:
    """Images that lay in S3, content → `before`, and have no task in the project: their names there and at hand."""
    known = {task.sha256 for task in tasks} | {task.image for task in tasks}
    found = {}
    for name, digest in before.items():
        there = uploaded.copies.get(name, name)
        if digest not in known and s3_uri(deployment.images.name, prefix + there) not in known:
            found[there] = name
    return found


def _deleted(deployment: Deployment, folder: ModelFolder, project: int, lost: set[str]) -> set[str]:
    """Of images (SHA-256) without a task, those that had one."""
    had = {digest for digest in lost if deployment.ledger.had_task(folder.config.name, project, digest)}
    if not had:
        return set()
    # Some may have got theirs since the tasks were listed.
    return had - {task.sha256 for task in deployment.label_studio.tasks(project, folder.label_config.data_key)}


def _waited(bucket: Bucket, prefix: str) -> set[str]:
    """The names of objects that have lain there for so long that `ingest` can no longer be at them."""
    before = datetime.now(UTC) - _INGEST
    return {key.removeprefix(prefix) for key, entry in bucket.entries(prefix).items() if entry.last_modified < before}


@dataclass
class Uploaded:
    """What became of each image, by name.

    `there`: lay there already. `copies`: the name of the image that has the same content, and the task. `content`: SHA-256 of
    each that was not refused.
    """

    uploaded: list[str] = field(default_factory=list)
    there: list[str] = field(default_factory=list)
    copies: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    content: dict[str, str] = field(default_factory=dict)


def upload(
    bucket: Bucket,
    prefix: str,
    images: Iterable[tuple[str, Reader]],
    done: Callable[[str, str | None], None],
    *,
    dry_run: bool = False,
) -> Uploaded:
    """Upload (name, reader) pairs under `prefix`, several at once. `done(name, refusal)` hears of each, refused or not.

    Refused are what is no image and a name that another image has in S3. A `dry_run` says the same and writes nothing.
    """
    run = _Upload(bucket, prefix, dry_run=dry_run)

    def one(image: tuple[str, Reader]) -> None:
        name, read = image
        try:
            run.take(name, read())
        except (ImageError, OSError) as error:
            run.refuse(name, _reason(error))
        done(name, run.result.refused.get(name))

    _in_parallel(one, images, _UPLOADED_AT_ONCE)
    return run.result


class _Upload:
    """One run: what lies in S3, what this run has sent, and what became of each image."""

    def __init__(self, bucket: Bucket, prefix: str, *, dry_run: bool) -> None:
        self.result = Uploaded()
        self._bucket, self._prefix, self._dry_run = bucket, prefix, dry_run
        listed = bucket.entries(prefix)
        self._there = {key.removeprefix(prefix): entry for key, entry in listed.items() if key.startswith(prefix)}
        self._by_md5 = {md5: name for name, entry in self._there.items() if (md5 := _md5_of(entry))}
        self._lock = threading.Lock()

    def refuse(self, name: str, reason: str) -> None:
        with self._lock:
            self.result.refused[name] = reason

    def take(self, name: str, data: bytes) -> None:
        """Upload one image unless its content is there. Raises `ImageError`."""
        imaging.inspect(data)
        md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
        with self._lock:
            entry = self._there.get(name)
            first = self._by_md5.setdefault(md5, name) if entry is None else name
        if entry is not None:
            self._demand_same(name, data, md5, entry)
            self._note(self.result.there, name, data)
        elif first != name:
            with self._lock:
                self.result.copies[name] = first
                self.result.content[name] = hashlib.sha256(data).hexdigest()
        else:
            if not self._dry_run:
                self._put(name, data)
            self._note(self.result.uploaded, name, data)

    def _put(self, name: str, data: bytes) -> None:
        """Write where nothing lies. S3 also says no where an earlier try of the same request did arrive."""
        key = self._prefix + name
        try:
            self._bucket.put_if(key, data, tag=None)
        except ConflictError:
            if self._bucket.get(key) != data:
                raise _other_image(self._bucket, key) from None

    def _demand_same(self, name: str, data: bytes, md5: str, entry: Entry) -> None:
        key = self._prefix + name
        known = _md5_of(entry)
        same = known == md5 if known else entry.size == len(data) and self._bucket.get(key) == data
        if not same:
            raise _other_image(self._bucket, key)

    def _note(self, names: list[str], name: str, data: bytes) -> None:
        with self._lock:
            names.append(name)
            self.result.content[name] = hashlib.sha256(data).hexdigest()


@dataclass
class Annotated:
    """How many tasks were annotated now, and how many had an annotation already."""

    now: int = 0
    before: int = 0


def annotate(
    label_studio: LabelStudioClient,
    project: int,
    folder: ModelFolder,
    labels: Mapping[str, tuple[str, ...]],
    done: Callable[[], None],
    *,
    stalled_s: float = _STALLED_SECONDS,
) -> Annotated:
    """Annotate the tasks of images, SHA-256 → classes, as they appear; `done` hears of each. Those with an annotation stay.

    At the end all of them that have one, of an earlier run that was interrupted, too, count as annotated in Label Studio (see
    `_have_all_counted`). Raises `LabelStudioError`, also when for `stalled_s` seconds none of the missing tasks has appeared.
    """
    result, waiting = Annotated(), dict(labels)
    kind, label_config = problem_types.of(folder.config.problem_type), folder.label_config
    last, progressed = 0, time.monotonic()
    restarted = progressed
    ours: set[int] = set()

    def one(known: tuple[KnownTask, tuple[str, ...]]) -> None:
        task, classes = known
        regions = [Region(label=label) for label in classes]
        label_studio.annotate(task.id, kind.result(regions, label_config, task.size), seconds=0)
        done()

    while waiting:
        page = label_studio.tasks_after(project, last, label_config.data_key, limit=_PAGE)
        found = [(task, waiting.pop(task.sha256)) for task in page if task.sha256 in waiting]
        uncounted = _annotations(label_studio, project, [task.id for task, _ in found if not task.annotations])
        new = [(task, classes) for task, classes in found if not task.annotations and task.id not in uncounted]
        for _ in range(len(found) - len(new)):
            done()
        _in_parallel(one, new, _ANNOTATED_AT_ONCE)
        ours |= {task.id for task, _ in found}
        result.now += len(new)
        result.before += len(found) - len(new)
        moment = time.monotonic()
        if found:
            progressed = moment
        if page:
            last = page[-1].id
        elif moment - progressed > stalled_s:
            raise LabelStudioError(_stalled(len(waiting), stalled_s))
        elif waiting:
            if moment - restarted > _AGAIN_SECONDS:
                last, restarted = 0, moment
            time.sleep(_LOOK_SECONDS)
    if ours:
        _have_all_counted(label_studio, project, ours)
    return result


def _have_all_counted(label_studio: LabelStudioClient, project: int, tasks: set[int]) -> None:
    """See to it that those of the tasks count as annotated that have an annotation, now or of a run that was interrupted.

    Label Studio counts the annotations of tasks that it imports last of all, and in between reading and writing a count, which
    may wait for a locked database, somebody can annotate the task: it then has an annotation and counts none, so that no
    training would ever see it (provoked on 1.23.2 by a slower import). Raises `LabelStudioError`.
    """
    for attempt in range(_COUNTS + 1):
        time.sleep(_SETTLED_SECONDS)
        without = [task for task in _unlabelled(label_studio, project, min(tasks), max(tasks)) if task in tasks]
        forgotten = _annotations(label_studio, project, without)
        if not forgotten:
            return
        if attempt == _COUNTS:
            break
        for annotation in forgotten.values():
            label_studio.count_anew(annotation)
    raise LabelStudioError(
        f"Label Studio keeps counting no annotation of {counted(len(forgotten), 'task that was', 'tasks that were')} "
        f"annotated, {min(forgotten)} among them; "
        "open them there and update their annotations, or no training will see them"
    )


def _annotations(label_studio: LabelStudioClient, project: int, tasks: Sequence[int]) -> dict[int, int]:
    """An annotation of each of the tasks that has one, whatever Label Studio counts: task → annotation."""
    return {task.id: task.annotations[0].id for task in label_studio.annotations_of(project, tasks)}


def _unlabelled(label_studio: LabelStudioClient, project: int, first: int, last: int) -> Iterator[int]:
    before = first - 1
    while before < last and (ids := label_studio.unlabelled_ids(project, before)):
        yield from ids
        before = ids[-1]


def _in_parallel[T](do: Callable[[T], object], things: Iterable[T], threads: int) -> None:
    """Do all, several at once. An interruption or an error lets those under way end and begins no others."""
    pool = ThreadPoolExecutor(threads)
    try:
        for result in [pool.submit(do, thing) for thing in things]:
            result.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _other_image(bucket: Bucket, key: str) -> ImageError:
    return ImageError(
        f"another image lies at s3://{bucket.name}/{key}, and its annotations belong to that one; "
        "rename the file, or put it into a folder of another name and give the folder above"
    )


def _md5_of(entry: Entry) -> str | None:
    """The MD5 of an object's content; None where it came in several parts, or encrypted with a key of KMS."""
    tag = (entry.e_tag or "").strip('"')
    return tag if len(tag) == 32 and entry.size else None


def _reason(error: Exception) -> str:
    return f"cannot be read: {error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)


def _stalled(missing: int, seconds: float) -> str:
    return (
        f"{counted(missing, 'image has', 'images have')} become no task, and none has for {seconds:.0f} s; look "
        "at the log of the function ingest and "
        "its queue's dead letters. Then run the same command again: it goes on where it stopped"
    )
