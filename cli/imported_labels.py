"""Classes that people have given to images before, brought in as annotations once the images have become tasks.

A task that has an annotation already, a skipped one too, is left alone: so running it again goes on where it stopped, and what
an annotator has said stays.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cli.upload import in_parallel
from labelloop import problem_types
from labelloop.errors import LabelStudioError
from labelloop.label_studio.client import KnownTask, LabelStudioClient
from labelloop.model_config import ModelFolder
from labelloop.records import Region

_AT_ONCE = 2  # Label Studio on SQLite writes one at a time anyway
_PAGE = 100  # tasks; few, so that a task is annotated seconds after it was seen without an annotation
_LOOK_SECONDS = 1.0
_AGAIN_SECONDS = 30  # then from the first task on: ids of transactions that overlap appear out of order
_STALLED_SECONDS = 300  # without a new task


@dataclass
class Annotated:
    """How many tasks were annotated now, and how many had an annotation already."""

    now: int = 0
    before: int = 0


def annotate(
    label_studio: LabelStudioClient,
    project: int,
    folder: ModelFolder,
    labels: Mapping[str, tuple[str, ...]],
    done: Callable[[], None],
    *,
    stalled_s: float = _STALLED_SECONDS,
) -> Annotated:
    """Annotate the tasks of images, SHA-256 → classes, as they appear; `done` hears of each.

    Raises `LabelStudioError` when for `stalled_s` seconds none of the missing tasks has appeared.
    """
    result, waiting = Annotated(), dict(labels)
    kind, label_config = problem_types.of(folder.config.problem_type), folder.label_config
    last, progressed = 0, time.monotonic()
    restarted = progressed

    def one(known: tuple[KnownTask, tuple[str, ...]]) -> None:
        task, classes = known
        if not task.annotations:
            regions = [Region(label=label) for label in classes]
            label_studio.annotate(task.id, kind.result(regions, label_config, task.size), seconds=0)
        done()

    while waiting:
        page = label_studio.tasks_after(project, last, label_config.data_key, limit=_PAGE)
        found = [(task, waiting.pop(task.sha256)) for task in page if task.sha256 in waiting]
        in_parallel(one, found, _AT_ONCE)
        result.now += sum(not task.annotations for task, _ in found)
        result.before += sum(task.annotations > 0 for task, _ in found)
        moment = time.monotonic()
        if found:
            progressed = moment
        if page:
            last = page[-1].id
        elif moment - progressed > stalled_s:
            raise LabelStudioError(_stalled(len(waiting), stalled_s))
        elif waiting:
            if moment - restarted > _AGAIN_SECONDS:
                last, restarted = 0, moment
            time.sleep(_LOOK_SECONDS)
    return result


def _stalled(missing: int, seconds: float) -> str:
    return (
        f"{missing:,} images have become no task, and none has for {seconds:.0f} s; look at the log of the function ingest and "
        "its queue's dead letters. Then run the same command again: it goes on where it stopped"
    )
