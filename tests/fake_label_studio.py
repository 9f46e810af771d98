"""An in-memory Label Studio with the client's methods, for tests in which it is not the point; it can fail on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import batched
from typing import Any

from labelloop.errors import LabelStudioError
from labelloop.label_studio.client import Tally, Webhook
from labelloop.label_studio.payloads import AnnotatedTask


@dataclass
class FakeLabelStudio:
    """One project. `down` names methods that fail before they act, `dies_after` those that fail once they have acted."""

    annotated: list[AnnotatedTask] = field(default_factory=list)
    tasks: list[dict[str, Any]] = field(default_factory=list)
    backends_: list[dict[str, Any]] = field(default_factory=list)
    webhooks_: dict[int, Webhook] = field(default_factory=dict)
    down: set[str] = field(default_factory=set)
    dies_after: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    titles_lost: int = 0  # renames that another save undoes
    page: int = 3  # tasks
    clock: Callable[[], datetime] | None = None
    _seen: dict[int, tuple[AnnotatedTask, datetime]] = field(default_factory=dict)
    _hours: int = 0

    def _begin(self, method: str) -> None:
        self.asked.append(method)
        if method in self.down or "all" in self.down:
            raise LabelStudioError("Label Studio does not answer")

    def _end(self, method: str) -> None:
        if method in self.dies_after:
            raise LabelStudioError("the connection broke before the answer")

    def tally(self, project: int) -> Tally:
        self._begin("tally")
        return self._tally

    def annotated_tasks(self, project: int, *, since: datetime | None = None, after: int = 0) -> Iterator[list[AnnotatedTask]]:
        self._begin("annotated_tasks")
        there = sorted((task for task in self.annotated if task.latest is not None), key=lambda task: task.id)
        changed = [task for task in there if task.id > after and (since is None or self._changed_at(task) > since)]
        yield from (list(page) for page in batched(changed, self.page, strict=False))

    @property
    def _tally(self) -> Tally:
        there = [task for task in self.annotated if task.latest is not None]
        numbers = {task.id for task in there}  # what comes again, even the same, is new
        self._seen = {number: seen for number, seen in self._seen.items() if number in numbers}
        annotations = sum(not one.was_cancelled for task in there for one in task.annotations)
        newest = max((self._changed_at(task).isoformat() for task in there), default=None)
        return Tally(len(there), annotations, newest)

    def _changed_at(self, task: AnnotatedTask) -> datetime:
        """When a task was first seen as it is: an hour after whatever was seen before, or as the clock says."""
        if task.id not in self._seen or self._seen[task.id][0] != task:
            self._hours += 1
            seen = self.clock() if self.clock else datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=self._hours)
            self._seen[task.id] = task, seen
        return self._seen[task.id][1]

    def find_images(self, project: int, addresses: Sequence[str], data_key: str) -> dict[str, int]:
        self._begin("find_images")
        addressed = {task["data"][data_key]: number for number, task in enumerate(self.tasks, start=1)}
        return {address: addressed[address] for address in addresses if address in addressed}

    def import_tasks(self, project: int, tasks: Iterable[dict[str, Any]]) -> list[int]:
        self._begin("import_tasks")
        first = len(self.tasks) + 1
        self.tasks += tasks
        self._end("import_tasks")
        return list(range(first, len(self.tasks) + 1))

    def backends(self, project: int) -> list[dict[str, Any]]:
        self._begin("backends")
        return [dict(backend) for backend in self.backends_]

    def webhooks(self, project: int) -> list[Webhook]:
        self._begin("webhooks")
        return list(self.webhooks_.values())

    def switch_on(self, webhook: Webhook) -> None:
        self._begin("switch_on")
        self.webhooks_[webhook.id] = replace(webhook, is_active=True)

    def rename_backend(self, backend: dict[str, Any], title: str, password: str) -> None:
        self._begin("rename_backend")
        if self.titles_lost:
            self.titles_lost -= 1
            return
        for known in self.backends_:
            if known["id"] == backend["id"]:
                known |= {"title": title, "basic_auth_pass": password}
