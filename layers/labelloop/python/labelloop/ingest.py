"""From an image in S3 to a Label Studio task: validated, batched, exactly once, with its content group.

A duplicated event finds the ledger's note; an event whose first delivery died half-way asks Label Studio whether the task
exists. Two files with the same content are one image and get one task; near duplicates get a task each, of one group.

The task's place in the queue comes from the champion, which is asked for it over the prelabel queue. Before the first version
each task comes with an empty prediction whose score orders a diverse start: images like none before them come first.
"""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote_plus

import msgspec

from labelloop import imaging
from labelloop.active_learning import stream_of
from labelloop.artifacts import Bucket, Champions, is_plain_key, s3_uri
from labelloop.dataset import position
from labelloop.duplicates import Fingerprint, Groups, Membership, fingerprint
from labelloop.errors import ImageError, LabelloopError, TooLargeError, UnknownModelError
from labelloop.label_studio.client import LabelStudioClient
from labelloop.label_studio.payloads import can_be_shown
from labelloop.ledger import Ledger
from labelloop.model_config import ModelConfig, ModelConfigs
from labelloop.records import TaskRange, version_string


@dataclass
class Outcome:
    """What became of a batch: messages by fate. Only `again` is redelivered, of it `unreadable` are no events at all."""

    created: list[str] = field(default_factory=list)
    known: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)  # key → reason
    again: dict[str, str] = field(default_factory=dict)  # message id → reason
    unreadable: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class _Image:
    message: str
    key: str
    address: str
    sha256: str
    info: imaging.ImageInfo
    fingerprint: Fingerprint


class Ingest:
    """Turns S3 `Object Created` events into tasks. `prelabel` has ranges of tasks predicted; it may raise `ServiceError`."""

    def __init__(
        self,
        configs: ModelConfigs,
        images: Bucket,
        champions: Champions,
        ledger: Ledger,
        label_studio: LabelStudioClient,
        prelabel: Callable[[list[TaskRange]], object],
    ) -> None:
        self._configs, self._images, self._champions, self._ledger = configs, images, champions, ledger
        self._label_studio, self._prelabel = label_studio, prelabel
        self._groups = Groups(ledger)

    def __call__(self, messages: Iterable[tuple[str, str]]) -> Outcome:
        """Take pairs of message id and body. What fails for its own reason is refused; for another's, it comes again.

        A body that is no JSON comes again, too, until it is a dead letter, for somebody to look at.
        """
        outcome = Outcome()
        by_model: dict[str, list[tuple[str, str]]] = {}
        for message, body in messages:
            try:
                key = _key(msgspec.json.decode(body))
            except (ValueError, RecursionError) as error:  # no JSON, no text; nested too deep
                outcome.again[message] = f"the message is no event of S3: {error}"
                outcome.unreadable.add(message)
                continue
            if key.endswith("/"):  # the marker of a folder
                continue
            model = key.split("/")[1] if key.count("/") >= 2 else ""
            try:
                self._configs[model]
            except UnknownModelError as error:
                outcome.refused[key] = str(error)
            else:
                by_model.setdefault(model, []).append((message, key))
        for model, messages in by_model.items():
            try:
                self._ingest(model, messages, outcome)
            except Exception:  # noqa: BLE001 - a fault of ours, or an answer that nobody foresaw; the other models go on
                outcome.again.update(dict.fromkeys((message for message, _ in messages), traceback.format_exc()))
        return outcome

    def _ingest(self, model: str, messages: list[tuple[str, str]], outcome: Outcome) -> None:
        try:
            project = self._ledger.project(model)
            data_key = self._configs[model].label_config.data_key
        except LabelloopError as error:
            outcome.again.update({message: str(error) for message, _ in messages})
            return
        ours: dict[str, _Image] = {}
        copies: list[_Image] = []  # of these
        perhaps: dict[str, set[str]] = {}  # SHA-256 → addresses under which a task may exist
        for message, key in messages:
            try:
                image = self._inspect(message, key)
                if image is None:  # deleted meanwhile
                    outcome.refused[key] = "the object is gone"
                    continue
                if image.sha256 in ours:
                    copies.append(image)
                    continue
                claim = self._ledger.claim_image(model, project, image.sha256, image.address)
            except (ImageError, TooLargeError) as error:
                outcome.refused[key] = str(error)
            except LabelloopError as error:
                outcome.again[message] = str(error)
            else:
                match claim.state:
                    case "done":
                        outcome.known.append(key)
                    case "busy":
                        outcome.again[message] = "another delivery of the same image is under way"
                    case _:
                        ours[image.sha256] = image
                        if claim.before:
                            perhaps[image.sha256] = {claim.before, image.address}
        try:
            self._make_tasks(model, project, data_key, list(ours.values()), perhaps, outcome)
        except LabelloopError as error:
            outcome.again.update({image.message: str(error) for image in (*ours.values(), *copies)})
        else:
            outcome.known += [image.key for image in copies]

    def _make_tasks(
        self, model: str, project: int, data_key: str, images: list[_Image], perhaps: dict[str, set[str]], outcome: Outcome
    ) -> None:
        groups = self._groups.assign(model, project, {image.sha256: image.fingerprint for image in images})
        addresses = sorted(set().union(*perhaps.values()))
        exist = self._label_studio.find_images(project, addresses, data_key) if addresses else {}
        known = [image for image in images if exist.keys() & perhaps.get(image.sha256, set())]
        missing = [image for image in images if image not in known]
        unplaced = [TaskRange(model=model, after=task - 1, upto=task) for task in sorted(exist.values())]
        first = self._champions.read(model) is None
        if missing:
            config = self._configs[model].config if first else None
            new = [_task(image, data_key, groups[image.sha256], config) for image in missing]
            tasks = self._label_studio.import_tasks(project, new)
            unplaced.append(TaskRange(model=model, after=min(tasks) - 1, upto=max(tasks)))
        # The first champion may have come meanwhile, and its refresh seen none of these.
        if unplaced and not (first and self._champions.read(model) is None):
            self._prelabel(unplaced)
        self._ledger.images_done(model, project, {image.sha256: image.address for image in images})
        outcome.created += [image.key for image in missing]
        outcome.known += [image.key for image in known]

    def _inspect(self, message: str, key: str) -> _Image | None:
        if not is_plain_key(key):
            raise ImageError("its key has an empty or dotted part, or a control character; give it another name")
        if not can_be_shown(key):
            raise ImageError("Label Studio cannot show an image with a ? in its key; give it another name")
        data = self._images.get(key, limit=imaging.MAX_BYTES)
        if data is None:
            return None
        info, decoded = imaging.survey(data)
        sha256 = hashlib.sha256(data).hexdigest()
        return _Image(message, key, s3_uri(self._images.name, key), sha256, info, fingerprint(decoded))


def _key(event: Any) -> str:
    """The object's key in an EventBridge event of S3, which percent-encodes nothing; older notifications do. "" without one."""
    key = _at(event, "detail", "object", "key")
    if isinstance(key, str):
        return key
    key = _at(event, "Records", 0, "s3", "object", "key")
    return unquote_plus(key) if isinstance(key, str) else ""


def _at(value: Any, *path: str | int) -> Any:
    """What lies at a path of keys and places; None where nothing does."""
    for step in path:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def _task(image: _Image, data_key: str, membership: Membership, first: ModelConfig | None) -> dict[str, Any]:
    """The task of an image; with a place in the queue where `first`, the config of a model without a version, is given."""
    meta: dict[str, Any] = {
        "sha256": image.sha256,
        "width": image.info.width,
        "height": image.info.height,
        "group": membership.group,
    }
    if membership.resembles:
        meta["resembles"] = membership.resembles
    task = {"data": {data_key: image.address}, "meta": meta}
    if first is None:
        return task
    score = _start_score(membership, first)
    return {**task, "predictions": [{"model_version": version_string(first.name, None), "score": score, "result": []}]}


def _start_score(membership: Membership, config: ModelConfig) -> float:
    """Where a task stands before there is a version, from 0, which comes first, to 1.

    Active tasks by how familiar they are, a rank; the others, or all with the strategy `random`, at a fixed random position, so
    that they come at their natural share.
    """
    if config.queue.strategy != "random" and stream_of(membership.group, config) == "active":
        return membership.familiar
    return position("start", membership.group)
