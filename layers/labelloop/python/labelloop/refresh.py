"""After a promotion: Label Studio learns which version serves, so that it asks for its predictions and orders tasks by them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from labelloop.artifacts import Champions
from labelloop.errors import LabelStudioError, NotSetUpError
from labelloop.label_studio.client import LabelStudioClient
from labelloop.ledger import Ledger
from labelloop.records import version_string

_ATTEMPTS = 6


def refresh(
    model: str, champions: Champions, ledger: Ledger, label_studio: LabelStudioClient, password_of: Callable[[str], str | None]
) -> str:
    """Make the backend's title the version that serves now; the title. Raises `NotSetUpError`, `ServiceError`.

    It reads the pointer rather than believing the event, so events in the wrong order end in the right title. Label Studio
    writes a backend back whole whenever somebody looks at it, so a title can be lost to one who looked just before: what
    was written is read again.
    """
    champion = champions.read(model)
    title = version_string(model, champion.version if champion else None)
    project = ledger.project(model)
    for attempt in range(_ATTEMPTS):
        ours = [b for b in label_studio.backends(project) if str(b["url"]).rstrip("/").endswith(f"/{model}")]
        if not ours:
            raise NotSetUpError(f"{model} has no ML backend in Label Studio; run: labelloop setup-label-studio-project {model}")
        stale = [backend for backend in ours if backend["title"] != title]
        if not stale:
            return title
        for backend in stale:
            label_studio.rename_backend(backend, title, password_of(model) or "")
        time.sleep(random.uniform(0.2, 0.6) * (attempt + 1))
    raise LabelStudioError(f"Label Studio does not keep the title {title!r}")
