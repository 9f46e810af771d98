"""A look at a model's webhook: Label Studio switches off one that fails, and training then waits for the schedule."""

from __future__ import annotations

from urllib.parse import urlsplit

from labelloop.label_studio.client import LabelStudioClient
from labelloop.ledger import Ledger


class Watchdog:
    """Watches over the webhooks of one Label Studio."""

    def __init__(self, ledger: Ledger, label_studio: LabelStudioClient) -> None:
        self._ledger, self._label_studio = ledger, label_studio

    def __call__(self, model: str) -> str | None:
        """Switch the model's webhook on where it is off; what a person should know, None when all is well.

        One that is missing is not made: it carries the backend's password. Raises `NotSetUpError`, `ServiceError`.
        """
        found = self._label_studio.webhooks(self._ledger.project(model))
        ours = [hook for hook in found if urlsplit(hook.url).path.endswith(f"/{model}/webhook")]
        if not ours:
            return f"Label Studio has no webhook for {model}; run: labelloop setup-label-studio-project {model}"
        off = [hook for hook in ours if not hook.is_active]
        for hook in off:
            self._label_studio.switch_on(hook)
        return f"the webhook was switched off and is on again: {', '.join(hook.url for hook in off)}" if off else None
