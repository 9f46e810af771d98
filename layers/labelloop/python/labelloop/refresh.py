"""After the gate's decision, or a person's: Label Studio learns which version serves, and its tasks are predicted anew."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from labelloop import review, shadow
from labelloop.artifacts import Champions
from labelloop.errors import LabelStudioError, NotSetUpError
from labelloop.label_studio.client import LabelStudioClient
from labelloop.ledger import Ledger
from labelloop.messages import PrelabelQueue, unlabelled_ranges
from labelloop.model_config import ModelConfigs
from labelloop.records import Champion, VersionJudged, version_string

_ATTEMPTS = 6


@dataclass(frozen=True)
class Refreshed:
    """The backend's title, how many ranges of tasks are to be predicted anew, and how many annotations are up for review."""

    title: str
    ranges: int
    cases: int


class Refresher:
    """Tells one Label Studio. `password_of` finds the password that it signs in to a model's backend with."""

    def __init__(
        self,
        configs: ModelConfigs,
        champions: Champions,
        ledger: Ledger,
        label_studio: LabelStudioClient,
        queue: PrelabelQueue,
        password_of: Callable[[str], str | None],
    ) -> None:
        self._champions, self._ledger, self._label_studio, self._queue = champions, ledger, label_studio, queue
        self._configs, self._password_of = configs, password_of

    def __call__(self, judged: VersionJudged) -> Refreshed:
        """Bring Label Studio in line with what serves now. Raises `NotSetUpError`, `ServiceError`.

        It reads the pointer rather than believing the event, so events in the wrong order end in the right title; and only
        the event of the version that serves, or runs in shadow, has the tasks predicted: any other was kept, or its successor's
        event comes.
        """
        project = self._ledger.project(judged.model)
        champion, title = self._rename(project, judged.model)
        cases = self._offer_suspects(project, judged)
        ranges = 0
        running = shadow.running(self._ledger.promotions(judged.model).values(), champion)
        if judged.version in (one.version for one in (champion, running) if one):
            # Last: what fails after it would send them all again.
            ranges = self._queue.send(unlabelled_ranges(judged.model, self._label_studio, project))
        return Refreshed(title, ranges, cases)

    def _offer_suspects(self, project: int, judged: VersionJudged) -> int:
        """Show the annotations that the version's training found suspicious, whether it was promoted or kept."""
        evaluation = self._champions.evaluation(judged.model, judged.version)
        suspects = evaluation.suspects if evaluation else []
        folder = self._configs[judged.model]
        return review.offer(folder, project, judged.version, suspects, self._ledger, self._label_studio)

    def _rename(self, project: int, model: str) -> tuple[Champion | None, str]:
        """Make the backend's title the version that serves; both of them.

        Label Studio writes a backend back whole whenever somebody looks at it, so a title can be lost to one who looked just
        before, and the pointer may move meanwhile: after what was written both are read again.
        """
        for attempt in range(_ATTEMPTS):
            champion = self._champions.read(model)
            title = version_string(model, champion.version if champion else None)
            ours = [b for b in self._label_studio.backends(project) if str(b["url"]).rstrip("/").endswith(f"/{model}")]
            if not ours:
                raise NotSetUpError(
                    f"{model} has no ML backend in Label Studio; run: labelloop setup-label-studio-project {model}"
                )
            stale = [backend for backend in ours if backend["title"] != title]
            if not stale:
                return champion, title
            for backend in stale:
                self._label_studio.rename_backend(backend, title, self._password_of(model) or "")
            time.sleep(random.uniform(0.2, 0.6) * (attempt + 1))
        raise LabelStudioError(f"Label Studio does not keep the title {title!r}")
