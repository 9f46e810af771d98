"""Erase an image everywhere it lives: `labelloop erase`.

An image is what its bytes are: all files of the same content go, under whatever name, and all that ever lay under the given one.
First a record is written that says by hashes what is to go. Each step after it finds by itself what there is left to do, so
that an erasure that was interrupted is finished by the next one of the model, whatever that one is asked for.

What stays: hashes, groups and splits, without which copies of the image that come later would move into another split, and nobody
could tell which versions learnt from it; and those versions themselves.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import boto3
import msgspec
from botocore.exceptions import BotoCoreError, ClientError
from rich.console import Console

from cli import train
from cli.deployment import Deployment
from labelloop import artifacts
from labelloop.artifacts import Bucket, parse_s3_uri, s3_uri
from labelloop.duplicates import forget_looks
from labelloop.errors import ConflictError, RequestError, StorageError
from labelloop.label_studio.client import KnownTask
from labelloop.model_config import ModelFolder
from labelloop.records import ErasedImage, Erasure, Evaluation, ManifestRow, Shard, Split, now
from labelloop.registry import Registry, Run
from labelloop.wording import counted

_SHA256 = re.compile(r"[0-9a-f]{64}")
_MD5 = re.compile(r"[0-9a-f]{32}")  # an entity tag that is one: of an object written by one PUT, without KMS
_BATCH = 1000  # S3's limit of a deletion
_IN_MLFLOW = ("manifest.jsonl", "evaluation.html", "evaluation.json")  # files of a run that name images; in the order of change


@dataclass(frozen=True)
class Use:
    """A version whose snapshot has the image. Of the test split it was measured with it, and has not learnt from it."""

    version: int
    split: Split


@dataclass(frozen=True)
class Found:
    """An image that is to go. `names`: all under which it lies, or lay; `objects`: versions and delete markers in S3."""

    sha256: str
    names: list[str]
    objects: int
    tasks: list[int]
    uses: list[Use]


@dataclass(frozen=True)
class Plan:
    """What an erasure would do. `unknown`: what was asked for and is nowhere. `unfinished`: erasures that were interrupted."""

    model: str
    images: list[Found]
    unknown: list[str]
    unfinished: list[str]


@dataclass
class Erased:
    """What was erased. `records`: of the ledger, `files`: manifests, reports and archives in S3 and MLflow that named images.

    `unknown`: what was asked for and is nowhere. `left`: where something remains that the command does not reach. `serving`: the
    champion where it learnt from an image. `without`: the newest version that did not. `trials`: jobs of `labelloop train` on a
    snapshot with an image.
    """

    model: str
    images: list[Found]
    unknown: list[str]
    objects: int = 0
    tasks: int = 0
    records: int = 0
    files: int = 0
    left: list[str] = field(default_factory=list)
    trials: list[str] = field(default_factory=list)
    serving: int | None = None
    without: int | None = None


@dataclass(frozen=True)
class _Object:
    """A version of an object, or a delete marker, which has no size."""

    key: str
    version: str
    tag: str = ""
    size: int | None = None


@dataclass(frozen=True)
class _Content:
    sha256: str
    md5: str | None
    size: int | None


class Eraser:
    """One model of a deployment. What there is is read when it is asked for first; use a new one for another erasure."""

    def __init__(self, deployment: Deployment, folder: ModelFolder) -> None:
        self._deployment, self._folder = deployment, folder
        self._model = folder.config.name
        self._prefix = folder.config.images_prefix
        self._project = deployment.ledger.project(self._model)
        self._s3: Any = boto3.client("s3")
        self._read: dict[tuple[str, str], _Content] = {}
        self._keys: set[str] = set()  # asked for: all that lies there goes
        self._contents: dict[str, _Content] = {}  # asked for, by SHA-256

    # What there is

    def plan(self, images: Sequence[str]) -> Plan:
        """Find images, given as `s3://` addresses, names below the model's prefix, or SHA-256; nothing changes.

        Raises `RequestError` for an address that is not the model's, `ServiceError`.
        """
        unknown = [image for image in images if not self._find(image)]
        found = [self._found(content) for content in self._contents.values()]
        return Plan(self._model, found, unknown, [one.at for one in self._unfinished])

    def _find(self, image: str) -> bool:
        """Whether anything is known of an image; what, is noted."""
        if _SHA256.fullmatch(image):
            hashes, asked = {image}, set[str]()
        else:
            key = self._key(image)
            address = s3_uri(self._deployment.images.name, key)
            asked = {key}
            hashes = {task.sha256 for task in self._tasks if task.image == address and task.sha256}
            hashes |= {row.sha256 for row in self._all_rows if row.image == address}
            hashes |= {content.sha256 for content in self._lying(key)}
            self._keys |= asked
        keys = asked.union(*(self._keys_of(sha256) for sha256 in hashes))
        contents = {content.sha256: content for key in sorted(keys) for content in self._lying(key)}
        known = {task.sha256 for task in self._tasks} | {row.sha256 for row in self._all_rows if row.erased_at is None}
        found = hashes & (known | contents.keys() | self._contents.keys())
        for sha256 in sorted(found):
            self._contents[sha256] = contents.get(sha256) or self._contents.get(sha256) or _Content(sha256, None, None)
        return bool(found) or any(one.key in asked for one in self._objects)

    def _key(self, image: str) -> str:
        if not image.startswith("s3://"):
            return image if image.startswith(self._prefix) else self._prefix + image
        try:
            bucket, key = parse_s3_uri(image)
        except ValueError as error:
            raise RequestError(str(error)) from None
        if bucket != self._deployment.images.name or not key.startswith(self._prefix) or key == self._prefix:
            wanted = s3_uri(self._deployment.images.name, self._prefix)
            raise RequestError(f"{image} is no image of {self._model}; those lie under {wanted}")
        return key

    def _keys_of(self, sha256: str) -> Iterator[str]:
        """Keys under which an image lies by what tasks, manifests and the ledger say."""
        addresses = {task.image for task in self._tasks if task.sha256 == sha256}
        addresses |= {row.image for row in self._all_rows if row.sha256 == sha256 and row.image}
        addresses.add(self._deployment.ledger.image_address(self._model, self._project, sha256) or "")
        begin = s3_uri(self._deployment.images.name, "")
        yield from (address.removeprefix(begin) for address in addresses if address.startswith(begin))

    def _found(self, content: _Content) -> Found:
        objects = self._objects_of([content])
        return Found(
            sha256=content.sha256,
            names=sorted(
                {one.key.removeprefix(self._prefix) for one in objects}
                | {key.removeprefix(self._prefix) for key in self._keys_of(content.sha256)}
            ),
            objects=len(objects),
            tasks=[task.id for task in self._tasks_of({content.sha256})],
            uses=self._uses(content.sha256),
        )

    @cached_property
    def _objects(self) -> list[_Object]:
        """Everything that lies or lay under the model's prefix, but for the folder's marker."""
        return [one for one in self._versions(self._deployment.images.name, self._prefix) if not one.key.endswith("/")]

    def _objects_of(self, contents: Iterable[_Content]) -> list[_Object]:
        """What is to go: all under the keys that were asked for, all of these contents, and markers over nothing else."""
        wanted = list(contents)
        keys = {key for key in self._keys if any(one.sha256 in {c.sha256 for c in wanted} for one in self._lying(key))}
        going = {one for one in self._objects if one.key in keys or self._is_one_of(one, wanted)}
        staying = {one.key for one in self._objects if one not in going and one.size is not None}
        touched = {one.key for one in going} - staying
        return [one for one in self._objects if one in going or (one.size is None and one.key in touched)]

    def _is_one_of(self, one: _Object, contents: Sequence[_Content]) -> bool:
        alike = [c for c in contents if one.size is not None and one.size == c.size]
        if _MD5.fullmatch(one.tag):
            alike = [c for c in alike if c.md5 == one.tag]
        return bool(alike) and self._content(one).sha256 in {c.sha256 for c in alike}

    def _lying(self, key: str) -> list[_Content]:
        """All contents that lie or lay under a key."""
        return [self._content(one) for one in self._objects if one.key == key and one.size is not None]

    def _content(self, one: _Object) -> _Content:
        if (one.key, one.version) not in self._read:
            with self._errors():
                body = self._s3.get_object(Bucket=self._deployment.images.name, Key=one.key, VersionId=one.version)["Body"]
                data = body.read()
            md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
            self._read[one.key, one.version] = _Content(hashlib.sha256(data).hexdigest(), md5, len(data))
        return self._read[one.key, one.version]

    @cached_property
    def _tasks(self) -> list[KnownTask]:
        return list(self._deployment.label_studio.tasks(self._project, self._folder.label_config.data_key))

    def _tasks_of(self, hashes: set[str]) -> list[KnownTask]:
        """Tasks of the images, and of the addresses that were asked for whoever made them."""
        addresses = {s3_uri(self._deployment.images.name, key) for key in self._keys}
        return [task for task in self._tasks if task.sha256 in hashes or task.image in addresses]

    @cached_property
    def _manifests(self) -> dict[str, list[ManifestRow]]:
        """The rows of all snapshots that there ever were, by digest."""
        keys = self._deployment.artifacts.keys(f"snapshots/{self._model}/")
        return {key.split("/")[2]: _rows(self._deployment.artifacts.get(key) or b"", key) for key in keys}

    @property
    def _all_rows(self) -> Iterator[ManifestRow]:
        return (row for rows in self._manifests.values() for row in rows)

    @cached_property
    def _digests(self) -> dict[int, str]:
        """The snapshot of each version."""
        jobs = {training.job.job_name: training.job.digest for training in self._deployment.ledger.trainings(self._model)}
        decided = self._deployment.ledger.promotions(self._model).values()
        return {one.version: jobs[one.job_name] for one in decided if one.version and one.job_name in jobs}

    def _uses(self, sha256: str) -> list[Use]:
        return [
            Use(version, row.split)
            for version, digest in sorted(self._digests.items())
            for row in self._manifests.get(digest, [])
            if row.sha256 == sha256
        ]

    @cached_property
    def _unfinished(self) -> list[Erasure]:
        return [one for one in self._deployment.ledger.erasures(self._model) if one.finished_at is None]

    # The erasure

    def erase(self, plan: Plan, by: str, reason: str) -> Erased:
        """Carry out a plan of this eraser, and finish what was interrupted before.

        Raises `RequestError` when there is nothing to do; `ConflictError` while a training runs, which would write the image down
        anew; `ServiceError`. After either of these, the same call goes on.
        """
        self._demand_that_nothing_trains()
        outcome = Erased(self._model, plan.images, plan.unknown)
        waiting = list(self._unfinished)
        begun = {image.sha256 for erasure in waiting for image in erasure.images}
        uses = {found.sha256: [use.version for use in found.uses] for found in plan.images}
        images = [
            ErasedImage(sha256=one.sha256, md5=one.md5, size=one.size, versions=uses[one.sha256])
            for one in self._contents.values()
            if one.sha256 not in begun
        ]
        if images:
            waiting.append(Erasure(model=self._model, at=now(), by=by, reason=reason, images=images))
        if waiting:
            self._deployment.ledger.record_erasure(waiting[-1])
        elif markers := [one for one in self._objects if one.key in self._keys]:  # of an image that has gone otherwise
            outcome.objects += self._delete(self._deployment.images.name, markers)
        else:
            raise RequestError(
                f"{self._model} has nothing of {', '.join(plan.unknown)}; an image goes by its s3:// address, its name below "
                f"{self._prefix}, or its SHA-256"
            )
        for erasure in waiting:
            self._carry_out(erasure, outcome)
        if waiting:
            self._advise({image.sha256 for erasure in waiting for image in erasure.images}, outcome)
            outcome.left += self._out_of_reach()
        return outcome

    def _carry_out(self, erasure: Erasure, outcome: Erased) -> None:
        hashes = {image.sha256 for image in erasure.images}
        contents = [self._contents.get(image.sha256) or _Content(image.sha256, image.md5, image.size) for image in erasure.images]
        outcome.objects += self._delete(self._deployment.images.name, self._objects_of(contents))
        for task in self._tasks_of(hashes):
            self._deployment.label_studio.delete_task(task.id)
            self._tasks.remove(task)
            outcome.tasks += 1
        self._demand_that_nothing_trains()  # one may have begun while the task was there
        outcome.objects += self._forget_decoded(hashes)
        outcome.records += self._deployment.ledger.forget_images(self._model, self._project, hashes)
        outcome.records += forget_looks(self._deployment.ledger, self._model, self._project, hashes)
        self._empty_index()
        erasure = self._empty_manifests(erasure, hashes, outcome)
        self._empty_reports(erasure, hashes, outcome)
        for digest in erasure.snapshots:
            self._empty_runs(digest, erasure.at, hashes, outcome)
        self._deployment.ledger.record_erasure(msgspec.structs.replace(erasure, finished_at=now()))

    def _empty_index(self) -> None:
        """Of the index of annotated tasks nothing is left. Empty and not deleted: what read it before cannot write it back."""
        key = artifacts.index_key(self._model)
        self._deployment.artifacts.put(key, b"")
        self._delete_replaced(self._deployment.artifacts.name, key)

    def _forget_decoded(self, hashes: set[str]) -> int:
        """Delete what training jobs keep of the images, whole files of it: the next job decodes the others again."""
        bucket = self._deployment.artifacts
        objects = self._versions(bucket.name, artifacts.cache_prefix(self._model))
        going = {name for name in {_stem(one.key) for one in objects} if self._may_hold(name, hashes)}
        # Notes come last: by them the next erasure finds what an interrupted one has left.
        return self._delete(bucket.name, sorted((one for one in objects if _stem(one.key) in going), key=_is_note))

    def _may_hold(self, name: str, hashes: set[str]) -> bool:
        """Whether a file of decoded images holds one of these: also where its note does not say."""
        note = self._deployment.artifacts.get(f"{name}.json")
        try:
            return note is None or not hashes.isdisjoint(msgspec.json.decode(note, type=Shard).images)
        except ValueError:
            return True

    def _empty_manifests(self, erasure: Erasure, hashes: set[str], outcome: Erased) -> Erasure:
        """Empty the images' rows in all manifests; the record with what the manifests are then, which it says before they are.

        They are read again: a training may have begun, and a snapshot come, since they were read.
        """
        for key in self._deployment.artifacts.keys(f"snapshots/{self._model}/"):
            digest = key.split("/")[2]
            content, tag = self._deployment.artifacts.get_tagged(key) or (b"", None)
            emptied = _emptied(content, hashes, erasure.at, key)
            if emptied is not None:
                erasure = msgspec.structs.replace(
                    erasure, snapshots={**erasure.snapshots, digest: hashlib.sha256(emptied).hexdigest()}
                )
                self._deployment.ledger.record_erasure(erasure)
                self._deployment.artifacts.put_if(key, emptied, tag=tag)
                outcome.files += 1
            if digest in erasure.snapshots:
                self._delete_replaced(self._deployment.artifacts.name, key)
        return erasure

    def _empty_reports(self, erasure: Erasure, hashes: set[str], outcome: Erased) -> None:
        """Take the images out of evaluation reports, where promote has unpacked them and in the jobs' archives."""
        bucket = self._deployment.artifacts
        for version, digest in self._digests.items():
            if digest in erasure.snapshots:
                key = artifacts.evaluation_key(self._model, version)
                outcome.files += self._rewrite(bucket, key, lambda content: _without(content, hashes))
        digests = {training.job.job_name: training.job.digest for training in self._deployment.ledger.trainings(self._model)}
        prefix = artifacts.training_prefix(self._model)
        for key in bucket.keys(prefix):
            job_name = key.removeprefix(prefix).partition("/")[0]
            unaffected = job_name in digests and digests[job_name] not in erasure.snapshots  # of trials the ledger knows nothing
            if key == artifacts.training_archive_key(self._model, job_name) and not unaffected:
                outcome.files += self._rewrite(bucket, key, lambda content: _repacked(content, hashes))

    def _empty_runs(self, digest: str, at: str, hashes: set[str], outcome: Erased) -> None:
        """The same in the artifacts of the snapshot's runs in MLflow."""
        registry = self._deployment.registry
        for run in registry.runs_of(self._model, digest):
            if run.name.startswith(train.PREFIX):
                outcome.trials.append(run.name)
            store = self._store(registry, run)
            if store is None:
                outcome.left.append(f"MLflow run {run.id}: {', '.join(_IN_MLFLOW)} under {run.artifacts}")
                continue
            read, rewrite = store
            report = read("evaluation.json")
            changed = _without(report, hashes) if report else None
            changes: dict[str, Callable[[bytes], bytes | None]] = {
                "manifest.jsonl": partial(_emptied, hashes=hashes, at=at, where=f"of run {run.id}"),
                "evaluation.html": _always(_page(changed) if changed else None),
                "evaluation.json": _always(changed),
            }  # the report comes last: as long as it names the image, the page may
            for name in _IN_MLFLOW:
                outcome.files += rewrite(name, changes[name])

    def _store(
        self, registry: Registry, run: Run
    ) -> tuple[Callable[[str], bytes | None], Callable[[str, Callable[[bytes], bytes | None]], bool]] | None:
        """How a run's artifacts are read and rewritten, by name; None where they lie out of reach."""
        if run.served is not None:

            def rewrite(name: str, change: Callable[[bytes], bytes | None]) -> bool:
                content = registry.artifact(f"{run.served}/{name}")
                changed = change(content) if content is not None else None
                if changed is not None:
                    registry.put_artifact(f"{run.served}/{name}", changed)
                return changed is not None

            return lambda name: registry.artifact(f"{run.served}/{name}"), rewrite
        try:
            name, prefix = parse_s3_uri(run.artifacts)
        except ValueError:
            return None
        bucket = self._deployment.bucket(name)
        return lambda file: bucket.get(f"{prefix}/{file}"), lambda file, change: self._rewrite(bucket, f"{prefix}/{file}", change)

    def _demand_that_nothing_trains(self) -> None:
        """A training that has read the image writes it into reports and MLflow; the gate unpacks them."""
        head = self._deployment.ledger.head(self._model)
        busy = head.running.job_name if head.running else None
        if busy is None and head.trained and self._deployment.ledger.promotion(self._model, head.trained.job_name) is None:
            busy = head.trained.job_name
        if busy is None:
            busy = next(iter(train.running(self._deployment.artifacts.name, self._model)), None)
        if busy:
            where = "MLflow" if busy.startswith(train.PREFIX) else self._deployment.command(f"status {self._model}")
            raise ConflictError(
                f"{busy} is training or waits for the promotion gate, and would write the image down once more; "
                f"run the command again when {where} shows that it has ended"
            )

    def _advise(self, hashes: set[str], outcome: Erased) -> None:
        learnt = {use.version for sha256 in hashes for use in self._uses(sha256) if use.split != "test"}
        champion = self._deployment.champions.read(self._model)
        if champion and champion.version in learnt:
            outcome.serving = champion.version
            outcome.without = max((v for v in self._digests if v not in learnt), default=None)

    def _out_of_reach(self) -> list[str]:
        laptop = self._deployment.laptop
        there = [
            "Label Studio's data folder: it keeps a file of each export, with addresses and annotations",
            "logs: an image that ingest refused is named there",
        ]
        if laptop:
            return [*there, f"{laptop.home / 'sagemaker'}: what training jobs read and wrote; it can be deleted while none runs"]
        return [*there, "backups: the ledger can be restored as it was up to 35 days ago"]

    # S3

    def _versions(self, bucket: str, prefix: str) -> list[_Object]:
        found = []
        with self._errors():
            for page in self._s3.get_paginator("list_object_versions").paginate(Bucket=bucket, Prefix=prefix):
                found += [_Object(v["Key"], v["VersionId"], v["ETag"].strip('"'), v["Size"]) for v in page.get("Versions", [])]
                found += [_Object(marker["Key"], marker["VersionId"]) for marker in page.get("DeleteMarkers", [])]
        return found

    def _delete(self, bucket: str, objects: Sequence[_Object]) -> int:
        """Delete versions and markers for good; how many."""
        for start in range(0, len(objects), _BATCH):
            some = [{"Key": one.key, "VersionId": one.version} for one in objects[start : start + _BATCH]]
            with self._errors():
                answer = self._s3.delete_objects(Bucket=bucket, Delete={"Objects": some, "Quiet": True})
            if answer.get("Errors"):
                error = answer["Errors"][0]
                raise StorageError(f"S3 does not delete s3://{bucket}/{error['Key']}: {error.get('Message') or error['Code']}")
        return len(objects)

    def _delete_replaced(self, bucket: str, key: str) -> None:
        """Delete all versions of an object but the one of now."""
        with self._errors():
            current = self._s3.head_object(Bucket=bucket, Key=key).get("VersionId")
        old = [one for one in self._versions(bucket, key) if one.key == key and one.version != (current or "null")]
        self._delete(bucket, old)

    def _rewrite(self, bucket: Bucket, key: str, change: Callable[[bytes], bytes | None]) -> bool:
        """Replace an object for good, unless the change is None; whether it was. What it was before goes in either case."""
        found = bucket.get_tagged(key)
        if found is None:
            return False
        changed = change(found[0])
        if changed is not None:
            bucket.put_if(key, changed, tag=found[1])
        self._delete_replaced(bucket.name, key)
        return changed is not None

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except ClientError as error:
            raise StorageError(f"S3 refused: {error}") from error
        except BotoCoreError as error:
            raise StorageError(f"S3 does not answer: {error}") from error


def caller() -> str:
    """Who is signed in to AWS. Raises `StorageError`."""
    try:
        return str(boto3.client("sts").get_caller_identity()["Arn"])
    except (ClientError, BotoCoreError) as error:
        raise StorageError(f"AWS does not say who you are: {error}") from error


def _stem(key: str) -> str:
    return key.rpartition(".")[0]


def _is_note(one: _Object) -> bool:
    return one.key.endswith(".json")


def _always(content: bytes | None) -> Callable[[bytes], bytes | None]:
    """The change to a content, whatever was there."""
    return lambda _: content


def _rows(manifest: bytes, where: str) -> list[ManifestRow]:
    try:
        return ManifestRow.read(manifest)
    except msgspec.MsgspecError as error:
        raise StorageError(f"the manifest {where} cannot be read: {error}") from error


def _emptied(manifest: bytes, hashes: set[str], at: str, where: str) -> bytes | None:
    """The manifest without the images, or None where it has none of them. All other rows stay as they are, byte by byte."""
    lines, rows = manifest.splitlines(), _rows(manifest, where)
    ours = [row.sha256 in hashes and row.erased_at is None for row in rows]
    if not any(ours):
        return None
    left = [msgspec.json.encode(row.emptied(at)) if go else line for line, row, go in zip(lines, rows, ours, strict=True)]
    return b"".join(line + b"\n" for line in left)


def _without(report: bytes, hashes: set[str]) -> bytes | None:
    """The evaluation report without the images, or None where it has none of them."""
    try:
        evaluation = msgspec.json.decode(report, type=Evaluation)
    except ValueError as error:
        raise StorageError(f"an evaluation report cannot be read: {error}") from error
    holdout = [image for image in evaluation.holdout if image.sha256 not in hashes]
    suspects = [suspect for suspect in evaluation.suspects if suspect.sha256 not in hashes]
    if len(holdout) + len(suspects) == len(evaluation.holdout) + len(evaluation.suspects):
        return None
    return msgspec.json.encode(msgspec.structs.replace(evaluation, holdout=holdout, suspects=suspects))


def _repacked(archive: bytes, hashes: set[str]) -> bytes | None:
    """The archive of a training job with the report without the images, or None where it has none of them."""
    packed, changed = io.BytesIO(), False
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar, tarfile.open(fileobj=packed, mode="w:gz") as after:
            for entry in tar.getmembers():
                file = tar.extractfile(entry)
                content = file.read() if file else b""
                if entry.name.removeprefix("./") == "evaluation.json":
                    left = _without(content, hashes)
                    changed, content = left is not None, content if left is None else left
                    entry.size = len(content)
                after.addfile(entry, io.BytesIO(content) if file else None)
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise StorageError(f"an archive of a training job is damaged: {error}") from error
    return packed.getvalue() if changed else None


def _page(report: bytes) -> bytes:
    """The page about a report."""
    from training_jobs import evaluation_page  # matplotlib

    with tempfile.TemporaryDirectory() as scratch:
        page = Path(scratch) / "evaluation.html"
        evaluation_page.write(msgspec.json.decode(report, type=Evaluation), page)
        return page.read_bytes()


def show_plan(plan: Plan, console: Console) -> None:
    """What is to go, before anybody is asked."""
    for found in plan.images:
        names = ", ".join(found.names) or "no file of it is left"
        tasks = ", ".join(map(str, found.tasks)) or "none"
        _line(console, f"{found.sha256[:12]}…  {names}")
        _line(console, f"  {counted(found.objects, 'version')} in S3, tasks: {tasks}, {_used(found.uses)}")
    for image in plan.unknown:
        _line(console, f"{image}: nothing of it is here")
    for at in plan.unfinished:
        _line(console, f"the erasure of {at} was interrupted, and will be finished")


def _used(uses: Sequence[Use]) -> str:
    words = {"train": "trained on it", "validation": "validated with it", "test": "measured with it"}
    return ", ".join(f"version {use.version} was {words[use.split]}" for use in uses) or "no version has seen it"


def show(erased: Erased, console: Console, *, deployment: Deployment) -> None:
    """What was erased, what was not, and what follows for the versions."""
    _line(
        console,
        f"erased: {counted(erased.objects, 'version')} in S3, {counted(erased.tasks, 'task')} with annotations and predictions, "
        f"{counted(erased.records, 'record')} of the ledger, and what manifests, "
        f"reports and archives said of it ({counted(erased.files, 'file')})",
    )
    for found in erased.images:
        _line(console, f"{found.sha256}: {_used(found.uses)}")
    for trial in erased.trials:
        _line(console, f"{trial}, a trial in MLflow, was given a snapshot with it")
    if erased.trials or any(found.uses for found in erased.images):
        _line(console, "a version that has learnt from an image is not changed by this")
    if erased.serving:
        command = deployment.command(f"rollback {erased.model} --to {erased.without}")
        back = f", or go back now: {command}" if erased.without else ""
        _line(
            console,
            f"version {erased.serving}, which serves, has learnt from it: train the next one without it, with Start Training in "
            f"Label Studio{back}",
        )
    for place in erased.left:
        _line(console, f"not reached: {place}")


def _line(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)
