"""An in-memory Label Studio with the client's methods, for tests in which it is not the point; it can fail on demand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from labelloop.errors import LabelStudioError
from labelloop.label_studio.client import Webhook
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

    def _begin(self, method: str) -> None:
        self.asked.append(method)
        if method in self.down or "all" in self.down:
            raise LabelStudioError("Label Studio does not answer")

    def _end(self, method: str) -> None:
        if method in self.dies_after:
            raise LabelStudioError("the connection broke before the answer")

    def count_annotated(self, project: int) -> int:
        self._begin("count_annotated")
        return sum(task.latest is not None for task in self.annotated)

    def annotated_tasks(self, project: int) -> list[AnnotatedTask]:
        self._begin("annotated_tasks")
        return list(self.annotated)

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
                known["title"] = title
