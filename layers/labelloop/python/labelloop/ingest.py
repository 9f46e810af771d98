"""From an image in S3 to a Label Studio task: validated, batched, exactly once.

A duplicated event finds the ledger's note; an event whose first delivery died half-way asks Label Studio whether the task
exists. Two files with the same content are one image and get one task.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote_plus

from labelloop import imaging
from labelloop.artifacts import Bucket, is_plain_key, s3_uri
from labelloop.errors import ImageError, LabelloopError, UnknownModelError
from labelloop.label_studio.client import LabelStudioClient
from labelloop.ledger import Ledger
from labelloop.model_config import ModelConfigs


@dataclass
class Outcome:
    """What became of a batch: messages by fate. Only `again` is redelivered."""

    created: list[str] = field(default_factory=list)
    known: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)  # key → reason
    again: dict[str, str] = field(default_factory=dict)  # message id → reason


@dataclass(frozen=True)
class _Image:
    message: str
    key: str
    address: str
    sha256: str
    info: imaging.ImageInfo


class Ingest:
    """Turns S3 `Object Created` events into tasks."""

    def __init__(self, configs: ModelConfigs, images: Bucket, ledger: Ledger, label_studio: LabelStudioClient) -> None:
        self._configs, self._images, self._ledger, self._label_studio = configs, images, ledger, label_studio

    def __call__(self, events: Iterable[tuple[str, dict[str, Any]]]) -> Outcome:
        """Take (message id, event) pairs. What fails for its own reason is refused; what failed for another's comes again."""
        outcome = Outcome()
        by_model: dict[str, list[tuple[str, str]]] = {}
        for message, event in events:
            key = _key(event)
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
            self._ingest(model, messages, outcome)
        return outcome

    def _ingest(self, model: str, messages: list[tuple[str, str]], outcome: Outcome) -> None:
        try:
            project = self._ledger.project(model)
            data_key = self._configs[model].label_config.data_key
        except LabelloopError as error:
            outcome.again.update({message: str(error) for message, _ in messages})
            return
        ours: dict[str, _Image] = {}
        perhaps: dict[str, set[str]] = {}  # SHA-256 → addresses under which a task may exist
        for message, key in messages:
            try:
                image = self._inspect(message, key)
                if image is None:  # deleted meanwhile
                    outcome.refused[key] = "the object is gone"
                    continue
                if image.sha256 in ours:
                    outcome.known.append(key)
                    continue
                claim = self._ledger.claim_image(model, project, image.sha256, image.address)
            except ImageError as error:
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
            outcome.again.update({image.message: str(error) for image in ours.values()})

    def _make_tasks(
        self, model: str, project: int, data_key: str, images: list[_Image], perhaps: dict[str, set[str]], outcome: Outcome
    ) -> None:
        addresses = sorted(set().union(*perhaps.values()))
        exist = self._label_studio.find_images(project, addresses, data_key) if addresses else set()
        known = [image for image in images if exist & perhaps.get(image.sha256, set())]
        missing = [image for image in images if image not in known]
        if missing:
            self._label_studio.import_tasks(project, [_task(image, data_key) for image in missing])
        self._ledger.images_done(model, project, {image.sha256: image.address for image in images})
        outcome.created += [image.key for image in missing]
        outcome.known += [image.key for image in known]

    def _inspect(self, message: str, key: str) -> _Image | None:
        if not is_plain_key(key):
            raise ImageError("its key has an empty or dotted part, or a control character; give it another name")
        size = self._images.size(key)
        if size is None:
            return None
        if size > imaging.MAX_BYTES:
            raise ImageError(f"the file has {size / 2**20:.0f} MB; at most {imaging.MAX_BYTES // 2**20} MB are read")
        data = self._images.get(key)
        if data is None:
            return None
        info = imaging.inspect(data)
        return _Image(message, key, s3_uri(self._images.name, key), hashlib.sha256(data).hexdigest(), info)


def _key(event: dict[str, Any]) -> str:
    """The object's key in an EventBridge event of S3, which percent-encodes nothing; older notifications do."""
    try:
        return str(event["detail"]["object"]["key"])
    except (KeyError, TypeError):
        records = event.get("Records") or [{}]
        return unquote_plus(str(records[0].get("s3", {}).get("object", {}).get("key", "")))


def _task(image: _Image, data_key: str) -> dict[str, Any]:
    meta = {"sha256": image.sha256, "width": image.info.width, "height": image.info.height}
    return {"data": {data_key: image.address}, "meta": meta}
