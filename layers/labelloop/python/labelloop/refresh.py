"""After a promotion: Label Studio learns which version serves, so that it asks for its predictions and orders tasks by them."""

from __future__ import annotations

from labelloop.artifacts import Champions
from labelloop.errors import NotSetUpError
from labelloop.label_studio.client import LabelStudioClient
from labelloop.ledger import Ledger
from labelloop.records import version_string


def refresh(model: str, champions: Champions, ledger: Ledger, label_studio: LabelStudioClient) -> str:
    """Make the backend's title the version that serves now; the title. Raises `NotSetUpError`, `ServiceError`.

    It reads the pointer rather than believing the event, so events in the wrong order end in the right title.
    """
    champion = champions.read(model)
    title = version_string(model, champion.version if champion else None)
    ours = [b for b in label_studio.backends(ledger.project(model)) if str(b["url"]).rstrip("/").endswith(f"/{model}")]
    if not ours:
        raise NotSetUpError(f"{model} has no ML backend in Label Studio; run: labelloop setup-label-studio-project {model}")
    for backend in ours:
        if backend["title"] != title:
            label_studio.rename_backend(backend, title)
    return title
