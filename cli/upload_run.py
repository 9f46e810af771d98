"""`labelloop upload-images`: files become tasks, and what people said of them before becomes annotations."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from rich.console import Console
from rich.markup import escape

from cli.deployment import Deployment
from cli.image_sources import Source, Sources
from cli.imported_labels import annotate
from cli.progress import Steps
from cli.upload import Uploaded, send_again, upload
from labelloop.artifacts import s3_uri
from labelloop.label_studio.client import KnownTask
from labelloop.model_config import ModelFolder


class Report(msgspec.Struct, kw_only=True):
    """What an upload did, or with `dry_run` would do. Images go by their names in S3, files refused before by their paths.

    `copies`: the image with the same content, whose task counts for both. `sent_again`: images that lay there without a task.
    `already_annotated`: images with a class whose tasks had an annotation, and were left alone.
    """

    dry_run: bool
    uploaded: int = 0
    already_there: int = 0
    sent_again: int = 0
    annotated: int = 0
    already_annotated: int = 0
    copies: dict[str, str] = {}
    refused: dict[str, str] = {}


def run(deployment: Deployment, folder: ModelFolder, sources: Sources, console: Console, *, dry_run: bool) -> Report:
    """Upload what is not there, and annotate what somebody has given a class. `console` shows the progress."""
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
    )
    sent = set(uploaded.uploaded)
    before = {name: digest for name, digest in uploaded.content.items() if name not in sent}
    tasks = list(deployment.label_studio.tasks(project, folder.label_config.data_key)) if before else []
    if dry_run:
        done = {task.sha256 for task in tasks if task.annotations}
        report.already_annotated = len(done & set(labels))
        report.annotated = len(labels) - report.already_annotated
        return report
    report.sent_again = len(_send_lost_again(deployment, config.images_prefix, images, uploaded, before, tasks))
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
        say(f"{len(report.copies):,} files are copies of others: the task of the same content counts for both")
    if report.sent_again:
        say(f"{report.sent_again:,} lay there without a task and were sent to Label Studio again")
    if report.annotated or report.already_annotated:
        say(f"{would}annotated {report.annotated:,}, left alone {report.already_annotated:,} that have an annotation")
    for name, reason in report.refused.items():
        say(f"[yellow]refused[/yellow] {escape(name)}: {escape(reason)}")


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


def _send_lost_again(
    deployment: Deployment,
    prefix: str,
    images: Mapping[str, Source],
    uploaded: Uploaded,
    before: Mapping[str, str],
    tasks: list[KnownTask],
) -> list[str]:
    """Images that lay in S3 before, content → `before`, and have no task in the project: S3 is made to tell of them again."""
    known = {task.sha256 for task in tasks} | {task.image for task in tasks}
    lost = {}
    for name, digest in before.items():
        there = uploaded.copies.get(name, name)
        if digest not in known and s3_uri(deployment.images.name, prefix + there) not in known:
            lost[there] = images[name].path.read_bytes
    return send_again(deployment.images, prefix, lost) if lost else []
