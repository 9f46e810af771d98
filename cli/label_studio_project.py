"""Set up a model's Label Studio project from its config: project, image storage, webhook, ML backend.

Everything is compared first, so that a second run changes nothing. The webhook comes before the backend: connecting a backend
makes Label Studio create a webhook of its own, without credentials, unless one with exactly that address exists.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import boto3
from label_studio_sdk import LabelStudio
from label_studio_sdk.core.api_error import ApiError

from cli.deployment import Deployment
from labelloop.errors import LabelStudioError, NotSetUpError
from labelloop.model_config import ModelFolder
from labelloop.records import version_string

WEBHOOK_ACTIONS = ["ANNOTATION_CREATED", "ANNOTATION_UPDATED", "ANNOTATIONS_CREATED", "ANNOTATIONS_DELETED"]
_PRESIGN_MINUTES = 60


@dataclass
class Setup:
    """What was found and done: the project's id and a line for each change."""

    project: int = 0
    changes: list[str] = field(default_factory=list)


def set_up_project(deployment: Deployment, folder: ModelFolder) -> Setup:
    """Bring the project in line with the config. Raises `LabelStudioError`."""
    try:
        return _Project(deployment, folder).set_up()
    except ApiError as error:
        raise LabelStudioError(f"Label Studio refused: {error.status_code} {error.body}", status=error.status_code) from error


class _Project:
    def __init__(self, deployment: Deployment, folder: ModelFolder) -> None:
        self._deployment, self._folder = deployment, folder
        self._sdk = LabelStudio(  # type: ignore[no-untyped-call]
            base_url=deployment.label_studio_url, api_key=deployment.label_studio_token
        )
        self._done = Setup()

    def set_up(self) -> Setup:
        self._done.project = self._project()
        self._storage()
        self._webhook()
        self._backend()
        self._deployment.ledger.set_project(self._folder.config.name, self._done.project)
        return self._done

    def _project(self) -> int:
        config = self._folder.config
        _ = self._folder.label_config  # its errors come before anything is made
        wanted: dict[str, Any] = {
            "title": config.label_studio.title,
            "label_config": self._folder.template.strip(),  # as Label Studio keeps it
            "expert_instruction": config.label_studio.instructions.strip(),
            "show_instruction": bool(config.label_studio.instructions),
            "sampling": config.label_studio.sampling,
        }
        known = self._known_project()
        if known is None:
            number = self._sdk.projects.create(**wanted).id
            if number is None:
                raise LabelStudioError("Label Studio created a project without an id")
            self._done.changes.append(f"created project {number}, {config.label_studio.title!r}")
            return number
        changed = {key: value for key, value in wanted.items() if getattr(known, key, None) != value}
        if changed:
            self._sdk.projects.update(known.id, **changed)
            self._done.changes.append(f"updated the project: {', '.join(changed)}")
        return int(known.id)

    def _known_project(self) -> Any:
        """The project the ledger names, or one with the config's title."""
        try:
            return self._sdk.projects.get(self._deployment.ledger.project(self._folder.config.name))
        except NotSetUpError:
            pass
        except ApiError as error:
            if error.status_code != 404:
                raise
        title = self._folder.config.label_studio.title
        projects: list[Any] = list(self._sdk.projects.list(title=title))  # by part of the title
        return next((project for project in projects if project.title == title), None)

    def _storage(self) -> None:
        """An S3 storage lets the browser see images by presigned addresses; it imports nothing."""
        laptop = self._deployment.laptop
        wanted: dict[str, Any] = {
            "bucket": self._deployment.images.name,
            "prefix": self._folder.config.images_prefix,
            "presign": True,
            "presign_ttl": _PRESIGN_MINUTES,
            "use_blob_urls": True,
            "title": "labelloop images",
            "synchronizable": False,
        }
        if laptop:  # on AWS Label Studio's own role signs
            keys = laptop.aws_environment()
            wanted |= {
                "s3endpoint": laptop.emulator,
                "region_name": laptop.region,
                "aws_access_key_id": keys["AWS_ACCESS_KEY_ID"],
                "aws_secret_access_key": keys["AWS_SECRET_ACCESS_KEY"],
            }
        storages = self._sdk.import_storage.s3.list(project=self._done.project)
        same = [storage for storage in storages if (storage.bucket, storage.prefix) == (wanted["bucket"], wanted["prefix"])]
        if not same:
            # Label Studio refuses a prefix under which nothing lies; the marker is what S3's console makes for a folder.
            boto3.client("s3").put_object(Bucket=wanted["bucket"], Key=wanted["prefix"])
            self._sdk.import_storage.s3.create(project=self._done.project, **wanted)
            self._done.changes.append(f"added the image storage s3://{wanted['bucket']}/{wanted['prefix']}")

    def _webhook(self) -> None:
        backend = self._deployment.backend(self._folder.config.name)
        url = f"{backend.url}/webhook"
        wanted: dict[str, Any] = {
            "url": url,
            "send_payload": True,
            "send_for_all_actions": False,
            "actions": WEBHOOK_ACTIONS,
            "headers": {"Authorization": backend.authorization},
            "is_active": True,
        }
        ours = [hook for hook in self._sdk.webhooks.list(project=self._done.project) if hook.url.endswith("/webhook")]
        right = [hook for hook in ours if all(_same(getattr(hook, key, None), value) for key, value in wanted.items())]
        if not right:
            self._sdk.webhooks.create(project=self._done.project, **wanted)
            self._done.changes.append(f"added the webhook {url}")
        for hook in ours:
            if hook not in right[:1]:
                self._sdk.webhooks.delete(hook.id)
                self._done.changes.append(f"removed the webhook {hook.url}")

    def _backend(self) -> None:
        name = self._folder.config.name
        access = self._deployment.backend(name)
        champion = self._deployment.champions.read(name)
        wanted: dict[str, Any] = {
            "url": access.url,
            "title": version_string(name, champion.version if champion else None),
            "auth_method": "BASIC_AUTH",
            "basic_auth_user": access.user,
            "timeout": 100.0,
        }
        ours = [backend for backend in self._sdk.ml.list(project=self._done.project) if backend.url.endswith(f"/{name}")]
        if not ours:
            self._sdk.ml.create(project=self._done.project, basic_auth_pass=access.password, **wanted)
            self._done.changes.append(f"connected the ML backend {access.url}")
        elif any(getattr(ours[0], key, None) != value for key, value in wanted.items() if key != "timeout"):
            self._sdk.ml.update(ours[0].id, project=self._done.project, basic_auth_pass=access.password, **wanted)
            self._done.changes.append(f"updated the ML backend {access.url}")


def _same(found: Any, wanted: Any) -> bool:
    return sorted(map(str, found or [])) == sorted(wanted) if isinstance(wanted, list) else bool(found == wanted)
