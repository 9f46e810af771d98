"""Set up a model's Label Studio project from its config: project, image storage, webhook, ML backend.

Everything is compared first, so that a second run changes nothing. The webhook comes before the backend: connecting a backend
makes Label Studio create a webhook of its own, without credentials, unless one with exactly that address exists.

What of a project is ours, and therefore updated and removed:

- storages with our title, or of exactly the model's bucket and prefix;
- backends below the stage's own API, or with an address that ends in the model's name and the model as the user;
- webhooks below the stage's own API, those of our backends, and those that sign in as the model to `…/{model}/webhook`.

The tab "Queue" of the Data Manager is made when there is none, and left as people like it.

Everything else is somebody else's and stays.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

import boto3
import httpx
import urllib3
from label_studio_sdk import LabelStudio
from label_studio_sdk.core.api_error import ApiError
from label_studio_sdk.core.parse_error import ParsingError

from cli.deployment import Deployment
from labelloop.artifacts import s3_uri
from labelloop.errors import ConfigError, LabelStudioError, NotSetUpError
from labelloop.label_studio.client import CONNECTED
from labelloop.model_config import ModelFolder
from labelloop.records import version_string

WEBHOOK_ACTIONS = ["ANNOTATION_CREATED", "ANNOTATION_UPDATED", "ANNOTATIONS_CREATED", "ANNOTATIONS_DELETED"]
STORAGE_TITLE = "labelloop images"
QUEUE_TAB = "Queue"
FIRST_TAB = "Default"  # what Label Studio shows by itself as long as a project has no tab
_PRESIGN_MINUTES = 60
_PREDICT_SECONDS = 100.0
_STORAGE_SECRETS = ("aws_access_key_id", "aws_secret_access_key")  # Label Studio takes them and never shows them again
_TIMEOUT = urllib3.Timeout(connect=3, read=20)  # s
_HIDDEN_COLUMNS = [  # of the tab with the queue
    "inner_id", "completed_at", "total_annotations", "cancelled_annotations", "total_predictions", "annotators",
    "annotations_results", "annotations_ids", "predictions_results", "file_upload", "storage_filename", "created_at",
    "updated_at", "updated_by", "avg_lead_time", "draft_exists",
]  # fmt: skip


@dataclass
class Setup:
    """What was found and done: the project's id and a line for each change."""

    project: int = 0
    changes: list[str] = field(default_factory=list)


def set_up_project(deployment: Deployment, folder: ModelFolder) -> Setup:
    """Bring the project in line with the config. Raises `ConfigError`, `LabelStudioError`."""
    with label_studio_errors():
        return _SetUp(deployment, folder).run()


def give_credentials(deployment: Deployment, folder: ModelFolder) -> int | None:
    """Let Label Studio sign in with the secret's password of now, to the webhook and to the backend; the project.

    None where there is no project yet. Raises `ConfigError`, `LabelStudioError`.
    """
    with label_studio_errors():
        return _SetUp(deployment, folder).give_credentials()


def is_signed_in(deployment: Deployment, folder: ModelFolder, project: int) -> bool:
    """Whether Label Studio gets into the model's backend, which it tries now. Raises `LabelStudioError`."""
    with label_studio_errors():
        return all(backend.state == CONNECTED for backend in ModelProject(deployment, folder).backends(project)[:1])


@contextmanager
def label_studio_errors() -> Iterator[None]:
    """Turn the SDK's errors into `LabelStudioError`."""
    try:
        yield
    except ApiError as error:
        raise LabelStudioError(
            f"Label Studio refused ({error.status_code}): {_said(error.body)}", status=error.status_code
        ) from error
    except ParsingError as error:
        raise LabelStudioError(f"Label Studio answered what this version does not understand: {error}") from error
    except httpx.HTTPError as error:
        raise LabelStudioError(f"Label Studio does not answer: {error}") from error


class ModelProject:
    """A model's project as it should be (`wanted_…`) and as it is. The SDK's objects go in and out."""

    def __init__(self, deployment: Deployment, folder: ModelFolder) -> None:
        self.deployment, self.folder = deployment, folder
        self.model = folder.config.name
        self.sdk = LabelStudio(  # type: ignore[no-untyped-call]
            base_url=deployment.label_studio_url, api_key=deployment.label_studio_token
        )

    # The project itself

    def wanted_project(self) -> dict[str, Any]:
        _ = self.folder.label_config  # its errors come before anything is made
        settings = self.folder.config.label_studio
        return {
            "title": settings.title,
            "label_config": self.folder.template.strip(),  # as Label Studio keeps it
            "expert_instruction": settings.instructions.strip(),
            "show_instruction": bool(settings.instructions.strip()),
            "sampling": settings.sampling,
            "show_collab_predictions": True,  # without it annotators see no pre-annotation
        }

    def known(self) -> Any:
        """The project that the ledger names, or one with the config's title; None when there is none.

        Raises `ConfigError` when the title is that of another model's project.
        """
        try:
            return self.sdk.projects.get(self.deployment.ledger.project(self.model))
        except NotSetUpError:
            pass
        except ApiError as error:
            if error.status_code != 404:
                raise
        title = self.folder.config.label_studio.title
        projects: list[Any] = list(self.sdk.projects.list(title=title))  # by part of the title
        found = next((project for project in projects if project.title == title), None)
        if found is not None:
            self._demand_no_other_model(found)
        return found

    def _demand_no_other_model(self, project: Any) -> None:
        below = self._api + "/"
        for backend in self.sdk.ml.list(project=project.id):
            if backend.url.startswith(below) and backend.url != below + self.model:
                other = backend.url.removeprefix(below)
                raise ConfigError(
                    str(self.folder.folder / "config.yaml"),
                    f"project {project.id} has this title and is {other}'s; choose another title",
                    "label_studio.title",
                )

    # The image storage

    def wanted_storage(self) -> dict[str, Any]:
        """An S3 storage lets the browser see images by presigned addresses; it imports nothing.

        On AWS Label Studio's own role signs; on the laptop it needs keys.
        """
        laptop = self.deployment.laptop
        wanted: dict[str, Any] = {
            "bucket": self.deployment.images.name,
            "prefix": self.folder.config.images_prefix,
            "presign": True,
            "presign_ttl": _PRESIGN_MINUTES,
            "use_blob_urls": True,
            "title": STORAGE_TITLE,
            "synchronizable": False,
            "region_name": boto3.client("s3").meta.region_name,  # or Label Studio signs for us-east-1
        }
        if laptop:
            keys = laptop.aws_environment()
            wanted |= {
                "s3endpoint": laptop.emulator,
                "aws_access_key_id": keys["AWS_ACCESS_KEY_ID"],
                "aws_secret_access_key": keys["AWS_SECRET_ACCESS_KEY"],
            }
        return wanted

    def storages(self, project: int) -> tuple[Any, list[Any]]:
        """Our storage of the model's images, and what else is ours but should not be there."""
        place = (self.deployment.images.name, self.folder.config.images_prefix)
        all_of_them = self.sdk.import_storage.s3.list(project=project)
        right = [storage for storage in all_of_them if (storage.bucket, storage.prefix) == place]
        stale = [storage for storage in all_of_them if storage.title == STORAGE_TITLE and storage not in right]
        return (right[0] if right else None), right[1:] + stale

    def marker_problem(self, project: int) -> str | None:
        """Why the storage shows no image, tried with the marker of the model's prefix; None when it does."""
        address = s3_uri(self.deployment.images.name, self.folder.config.images_prefix)
        presigned = self.deployment.label_studio.presigned_address(f"projects/{project}", address)
        key = self.wanted_storage().get("aws_access_key_id")
        signer = parse_qs(urlsplit(presigned).query).get("X-Amz-Credential", [""])[0].partition("/")[0]
        if key and signer != key:
            return f"signs as {signer}, not as {key}"
        try:
            status = urllib3.request("GET", presigned, timeout=_TIMEOUT, retries=False).status
        except urllib3.exceptions.HTTPError as error:
            return f"signs addresses that do not answer: {error}"
        return None if status in (200, 404) else f"signs addresses that S3 refuses ({status})"  # 404: nobody needs the marker

    # The webhook

    def wanted_webhook(self) -> dict[str, Any]:
        backend = self.deployment.backend(self.model)
        return {
            "url": f"{backend.url}/webhook",
            "send_payload": True,
            "send_for_all_actions": False,
            "actions": WEBHOOK_ACTIONS,
            "headers": {"Authorization": backend.authorization},
            "is_active": True,
        }

    def webhooks(self, project: int) -> list[Any]:
        """Our webhooks, that with the wanted address and settings first."""
        wanted, backends = self.wanted_webhook(), {backend.url.rstrip("/") for backend in self.backends(project)}
        ours = [hook for hook in self.sdk.webhooks.list(project=str(project)) if self._is_ours(hook, backends)]
        return sorted(ours, key=lambda hook: (hook.url != wanted["url"], len(differences(hook, wanted))))

    def _is_ours(self, hook: Any, backends: set[str]) -> bool:
        base, _, last = hook.url.rpartition("/")
        if last != "webhook":
            return False
        signs_in = _basic_user((hook.headers or {}).get("Authorization")) == self.model and base.endswith(f"/{self.model}")
        return base.startswith(f"{self._api}/") or base in backends or signs_in

    # The ML backend

    def wanted_backend(self) -> dict[str, Any]:
        access = self.deployment.backend(self.model)
        champion = self.deployment.champions.read(self.model)
        return {
            "url": access.url,
            "title": version_string(self.model, champion.version if champion else None),
            "auth_method": "BASIC_AUTH",
            "basic_auth_user": access.user,
            "is_interactive": self.folder.config.problem_type == "detection",  # smart tools
            "timeout": _PREDICT_SECONDS,
        }

    def backends(self, project: int) -> list[Any]:
        """Our backends, that with the wanted address first. Label Studio signs in to each of the project's meanwhile."""
        url = self.deployment.backend(self.model).url
        ours = [
            backend
            for backend in self.sdk.ml.list(project=project)
            if backend.url.startswith(f"{self._api}/")
            or (backend.url.endswith(f"/{self.model}") and backend.basic_auth_user == self.model)
        ]
        return sorted(ours, key=lambda backend: backend.url != url)

    # The Data Manager's tab with the queue

    def wanted_tab(self) -> dict[str, Any]:
        """Unlabelled tasks as uncertainty sampling hands them out, but for taking turns; with the score to be seen."""
        unlabelled = [
            {"filter": f"filter:tasks:{count}", "operator": "equal", "type": "Number", "value": 0}
            for count in ("total_annotations", "cancelled_annotations")
        ]
        hidden = [f"tasks:{column}" for column in _HIDDEN_COLUMNS]
        return {
            "title": QUEUE_TAB,
            "type": "list",
            "target": "tasks",
            "filters": {"conjunction": "and", "items": unlabelled},
            "ordering": ["tasks:predictions_score"],
            "hiddenColumns": {"explore": hidden, "labeling": hidden},
        }

    def has_tab(self, project: int) -> bool:
        """Whether there is a tab of that title. What people have made of it is theirs."""
        return QUEUE_TAB in self.deployment.label_studio.tabs(project)

    @property
    def _api(self) -> str:
        return self.deployment.backend(self.model).url.rpartition("/")[0]


class _SetUp:
    """One run: compares part by part, and changes what differs."""

    def __init__(self, deployment: Deployment, folder: ModelFolder) -> None:
        self._project = ModelProject(deployment, folder)
        self._sdk, self._deployment = self._project.sdk, deployment
        self._done = Setup()

    def run(self) -> Setup:
        self._deployment.backend(self._project.model)  # of a model that is not deployed nothing is made
        self._settings()
        self._storage()
        self._webhook()
        self._backend()
        self._shown_version()
        self._tab()
        if self._recorded() != self._done.project:
            self._deployment.ledger.set_project(self._project.model, self._done.project)
        return self._done

    def give_credentials(self) -> int | None:
        known = self._project.known()
        if known is None:
            return None
        self._done.project = int(known.id)
        self._webhook()
        self._backend(new_password=True)
        return self._done.project

    def _recorded(self) -> int | None:
        try:
            return self._deployment.ledger.project(self._project.model)
        except NotSetUpError:
            return None

    def _note(self, change: str) -> None:
        self._done.changes.append(change)

    def _settings(self) -> None:
        wanted, known = self._project.wanted_project(), self._project.known()
        if known is None:
            number = self._sdk.projects.create(**wanted).id
            if number is None:
                raise LabelStudioError("Label Studio created a project without an id")
            self._note(f"created project {number}, {wanted['title']!r}")
            self._done.project = number
            return
        self._done.project = int(known.id)
        changed = differences(known, wanted)
        if changed:
            kept = self._sdk.projects.update(known.id, **{key: wanted[key] for key in changed})
            refused = differences(kept, {key: wanted[key] for key in changed})
            if refused:
                raise LabelStudioError(f"Label Studio keeps another {', '.join(refused)} than the config has; write plainer HTML")
            self._note(f"updated the project: {', '.join(changed)}")

    def _storage(self) -> None:
        wanted, project = self._project.wanted_storage(), self._done.project
        found, others = self._project.storages(project)
        place = f"s3://{wanted['bucket']}/{wanted['prefix']}"
        changed = differences(found, wanted, unseen=_STORAGE_SECRETS) if found else []
        if found is None or changed:
            # Label Studio refuses a prefix under which nothing lies; the marker is what S3's console makes for a folder.
            boto3.client("s3").put_object(Bucket=wanted["bucket"], Key=wanted["prefix"])
        if found is None:
            self._sdk.import_storage.s3.create(project=project, **wanted)
            self._note(f"added the image storage {place}")
        elif changed:
            self._sdk.import_storage.s3.update(found.id, project=project, **wanted)
            self._note(f"updated the image storage {place}: {', '.join(changed)}")
        for other in others:
            self._sdk.import_storage.s3.delete(other.id)
            self._note(f"removed the image storage s3://{other.bucket}/{other.prefix}")
        problem = self._project.marker_problem(project)
        if problem and "aws_access_key_id" in wanted:
            storage, _ = self._project.storages(project)
            self._sdk.import_storage.s3.update(storage.id, project=project, **wanted)
            remaining = self._project.marker_problem(project)
            if remaining:
                raise LabelStudioError(f"the image storage {place} {remaining}; does another storage of the project come first?")
            self._note(f"updated the image storage {place}: keys (it {problem})")

    def _webhook(self) -> None:
        wanted, project = self._project.wanted_webhook(), self._done.project
        ours = self._project.webhooks(project)
        keep = ours[0] if ours and ours[0].url == wanted["url"] else None
        if keep is None:
            self._sdk.webhooks.create(project=project, **wanted)
            self._note(f"added the webhook {wanted['url']}")
        elif changed := differences(keep, wanted):
            self._sdk.webhooks.update(keep.id, **wanted)  # whole: a change without actions would clear them
            self._note(f"updated the webhook {wanted['url']}: {', '.join(changed)}")
        for hook in ours:
            if hook is not keep:
                self._sdk.webhooks.delete(hook.id)
                self._note(f"removed the webhook {hook.url}")

    def _backend(self, *, new_password: bool = False) -> None:
        wanted, project = self._project.wanted_backend(), self._done.project
        password = self._deployment.backend(self._project.model).password
        ours = self._project.backends(project)
        for other in ours[1:]:
            self._sdk.ml.delete(other.id)
            self._note(f"removed the ML backend {other.url}")
        if not ours:
            self._sdk.ml.create(project=project, basic_auth_pass=password, **wanted)
            self._note(f"connected the ML backend {wanted['url']}")
            return
        changed = differences(ours[0], wanted)
        if not changed and (new_password or ours[0].state != CONNECTED):
            changed = ["password"]  # Label Studio never shows it; but it has just tried the one it has
        if changed:
            self._sdk.ml.update(ours[0].id, project=project, basic_auth_pass=password, **wanted)
            self._note(f"updated the ML backend {wanted['url']}: {', '.join(changed)}")

    def _shown_version(self) -> None:
        """Let the project show the backend's predictions, and order tasks by them: it compares the backend's title."""
        title, project = self._project.wanted_backend()["title"], self._done.project
        if self._deployment.label_studio.model_version(project) != title:
            self._sdk.projects.update(project, model_version=title)
            self._note(f"the project shows the predictions of {title}")

    def _tab(self) -> None:
        label_studio, project = self._deployment.label_studio, self._done.project
        if self._project.has_tab(project):
            return
        if not label_studio.tabs(project):
            label_studio.add_tab(project, {"title": FIRST_TAB})
        label_studio.add_tab(project, self._project.wanted_tab())
        self._note(f"added the tab {QUEUE_TAB!r}")


def differences(found: Any, wanted: Mapping[str, Any], unseen: Sequence[str] = ()) -> list[str]:
    """The settings that are not as wanted, but for those that Label Studio never shows."""
    return [key for key, value in wanted.items() if key not in unseen and not _same(getattr(found, key, None), value)]


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, list):
        return sorted(map(str, found or [])) == sorted(wanted)
    if isinstance(wanted, str):  # Label Studio escapes what stands in HTML
        return html.unescape(found or "") == html.unescape(wanted)
    return bool(found == wanted)


def _basic_user(authorization: Any) -> str | None:
    """The user name of a Basic Authorization header."""
    try:
        scheme, _, encoded = str(authorization).partition(" ")
        user, colon, _ = base64.b64decode(encoded, validate=True).decode().partition(":")
    except ValueError:
        return None
    return user if scheme == "Basic" and colon else None


def _said(body: Any) -> str:
    """What Label Studio says about a refusal, without its bookkeeping."""
    if not isinstance(body, dict):
        return str(body)[:500]
    details = body.get("validation_errors") or body.get("detail") or body
    return str(details)[:500]
