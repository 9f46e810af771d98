"""The Data Manager's tab "Review": annotations that models which never saw them contradict.

A case is shown by a prediction of its own, `{model} review`, which the editor puts beside the annotation; its score says how
probably the annotation is wrong. The tab filters by that prediction and by the time of the task's last change, so a case
leaves it as soon as somebody answers; and it orders by that time, because Label Studio orders by no number that could be
given to single tasks: the predictions are written one after the other, the worst case's first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from labelloop import problem_types
from labelloop.errors import AnnotationError
from labelloop.label_studio.client import LabelStudioClient, StoredPrediction
from labelloop.label_studio.payloads import AnnotatedTask, Annotation, Prediction, TaskMeta
from labelloop.ledger import Ledger
from labelloop.model_config import ModelFolder
from labelloop.records import ReviewCase, Suspect, now

_TITLE = re.compile(r"Review \(\d+\)")
_HIDDEN = [  # columns that say nothing of a case
    "inner_id", "completed_at", "total_annotations", "cancelled_annotations", "total_predictions", "annotations_results",
    "annotations_ids", "predictions_score", "predictions_model_versions", "predictions_results", "file_upload",
    "storage_filename", "created_at", "updated_at", "updated_by", "avg_lead_time", "draft_exists",
]  # fmt: skip
_FIRST_TAB = "Default"


@dataclass(frozen=True)
class _Shown:
    """An open case, and its image's width and height in pixels."""

    case: ReviewCase
    size: tuple[int, int]


def offer(
    folder: ModelFolder,
    project: int,
    version: int,
    suspects: Sequence[Suspect],
    ledger: Ledger,
    label_studio: LabelStudioClient,
) -> int:
    """Bring the tab in line: settle what was answered, fill up with a version's suspects; how many cases are open.

    Repeating it changes nothing. Raises `ServiceError`.
    """
    config = folder.config
    known = {case.sha256: case for case in ledger.review_cases(config.name, project)}
    open_cases = [case for case in known.values() if case.settled_at is None]
    new = [suspect for suspect in suspects if suspect.sha256 not in known]
    tasks = [*(case.task for case in open_cases), *(suspect.task for suspect in new)]
    annotated = {task.id: task for task in label_studio.annotations_of(project, tasks)}

    still = []
    for case in open_cases:
        if _is_unanswered(case, annotated.get(case.task)):
            still.append(case)
        else:
            ledger.record_review_case(msgspec.structs.replace(case, settled_at=now()))
    raised = [
        _case(config.name, project, version, suspect, annotation)
        for suspect in new
        if (annotation := _suspected(suspect, annotated.get(suspect.task), folder))
    ]
    for case in raised[: max(0, config.review.limit - len(still))]:
        ledger.record_review_case(case)
        still.append(case)
    shown = [_Shown(case, _size(annotated[case.task])) for case in sorted(still, key=lambda case: case.quality)]
    _show(folder, project, shown[: config.review.limit], label_studio)
    return min(len(shown), config.review.limit)


def review_version(model: str) -> str:
    """What Label Studio calls the predictions that show cases; no version of the model has that name."""
    return f"{model} review"


def _is_unanswered(case: ReviewCase, task: AnnotatedTask | None) -> bool:
    """Whether the annotation stands as it did; a changed, confirmed, deleted or replaced one is an answer."""
    annotation = _annotation(task, case.sha256)
    return annotation is not None and (annotation.unique_id, annotation.updated_at) == (case.annotation, case.annotated_at)


def _suspected(suspect: Suspect, task: AnnotatedTask | None, folder: ModelFolder) -> Annotation | None:
    """The annotation that a suspect is about, if it still stands as it was trained on."""
    annotation = _annotation(task, suspect.sha256)
    if annotation is None or annotation.unique_id != suspect.annotation:
        return None
    try:
        said = problem_types.of(folder.config.problem_type).annotated(annotation, folder.label_config)
    except AnnotationError:
        return None
    return annotation if said == suspect.given else None


def _annotation(task: AnnotatedTask | None, sha256: str) -> Annotation | None:
    """The annotation that counts, where the task still shows the image."""
    return task.latest if task is not None and task.shows(sha256) else None


def _size(task: AnnotatedTask) -> tuple[int, int]:
    meta = task.meta or TaskMeta()
    return int(meta.width or 0), int(meta.height or 0)


def _case(model: str, project: int, version: int, suspect: Suspect, annotation: Annotation) -> ReviewCase:
    return ReviewCase(
        model=model,
        project=project,
        sha256=suspect.sha256,
        task=suspect.task,
        annotation=suspect.annotation,
        annotated_at=annotation.updated_at,
        version=version,
        quality=suspect.quality,
        suggested=suspect.suggested,
        raised_at=now(),
    )


def _show(folder: ModelFolder, project: int, cases: Sequence[_Shown], label_studio: LabelStudioClient) -> None:
    by = review_version(folder.config.name)
    there = label_studio.predicted_by(project, by)
    tasks = {shown.case.task for shown in cases}
    for task, (_, prediction) in there.items():
        if task not in tasks:
            label_studio.delete_prediction(prediction.id)
    _write_in_order(folder, project, cases, there, label_studio)

    tabs = label_studio.tabs(project)
    ours = [tab for title, tab in tabs.items() if _TITLE.fullmatch(title)]
    if not cases:
        for tab in ours:
            label_studio.delete_tab(tab)
        return
    there = label_studio.predicted_by(project, by)
    content = _tab(len(cases), by, max(there[task][0] for task in tasks if task in there))
    if ours:
        label_studio.change_tab(project, ours[0], content)
        return
    if not tabs:  # Label Studio shows its own first tab only as long as there is no other
        label_studio.add_tab(project, {"title": _FIRST_TAB})
    label_studio.add_tab(project, content)


def _write_in_order(
    folder: ModelFolder,
    project: int,
    cases: Iterable[_Shown],
    there: dict[int, tuple[str, StoredPrediction]],
    label_studio: LabelStudioClient,
) -> None:
    """Write the cases' predictions so that their tasks are changed in the cases' order, from the first that stands wrong on."""
    problem_type, label_config = problem_types.of(folder.config.problem_type), folder.label_config
    latest, in_order = "", True
    for case, size in ((shown.case, shown.size) for shown in cases):
        changed_at, stored = there.get(case.task, ("", None))
        in_order = in_order and changed_at > latest
        latest = changed_at
        if in_order:
            continue
        result = problem_type.result(case.suggested, label_config, size)
        prediction = Prediction(result, 1 - case.quality, review_version(folder.config.name))
        if stored is None:
            label_studio.add_prediction(project, case.task, prediction, None)
        else:
            label_studio.change_prediction(project, stored, prediction, None)


def _tab(count: int, by: str, last: str) -> dict[str, Any]:
    """The tab's content as Label Studio stores it; `last`: when the newest case's task was changed."""
    filters = [
        {"filter": "filter:tasks:predictions_model_versions", "operator": "contains", "type": "List", "value": [by]},
        {"filter": "filter:tasks:updated_at", "operator": "less_or_equal", "type": "Datetime", "value": last},
    ]
    hidden = [f"tasks:{column}" for column in _HIDDEN]
    return {
        "title": f"Review ({count})",
        "type": "list",
        "target": "tasks",
        "hiddenColumns": {"explore": hidden, "labeling": hidden},
        "filters": {"conjunction": "and", "items": filters},
        "ordering": ["tasks:updated_at"],
    }
