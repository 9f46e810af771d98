"""Labels are checked too: wrong annotations come up again in Label Studio, and the model's own are known as such."""

from __future__ import annotations

from itertools import chain
from typing import Any
from urllib.parse import urlencode

import msgspec

from labelloop import problem_types, review
from labelloop.dataset import split_of
from labelloop.label_studio.payloads import AnnotatedTask, model_annotation_id
from labelloop.records import Promotion, Region
from tests.laptop import Loop, wait_for, wait_until_idle

ANNOTATED, FLIPPED = 110, 6  # so many that models which never saw a flipped label contradict most of them


def _tab(loop: Loop) -> int | None:
    tabs = loop.deployment.label_studio.tabs(loop.project)
    return next((tab for title, tab in tabs.items() if title.startswith("Review (")), None)


def _listed(loop: Loop) -> list[int]:
    """The tasks of the Review tab, in its order, as Label Studio shows them."""
    query = urlencode({"project": loop.project, "view": _tab(loop), "include": "id", "page_size": 100})
    return [task["id"] for task in _call(loop, "GET", f"/api/tasks?{query}")["tasks"]]


def _call(loop: Loop, method: str, path: str, body: Any = None) -> Any:
    addresses = loop.deployment.laptop
    assert addresses is not None
    headers = {"Authorization": f"Token {addresses.label_studio_token}"}
    answer = loop.http.request(method, addresses.label_studio + path, json=body, headers=headers)
    assert answer.status < 300, (path, answer.status, answer.data)
    return answer.json() if answer.data else None


def _training_images(loop: Loop) -> list[AnnotatedTask]:
    tasks = chain.from_iterable(loop.deployment.label_studio.annotated_tasks(loop.project))
    splits = loop.folder.config.splits
    return [task for task in tasks if task.latest and split_of(task.content[1], splits) == "train"]


def _say(loop: Loop, task: AnnotatedTask, regions: list[Region]) -> None:
    assert task.latest is not None
    result = problem_types.of("classification").result(regions, loop.folder.label_config, (8, 8))
    _call(loop, "PATCH", f"/api/annotations/{task.latest.id}", {"result": result})


def test_wrong_annotations_come_up_again_until_somebody_answers(loop: Loop, first_version: Promotion) -> None:
    kind, labels = problem_types.of("classification"), loop.folder.label_config
    loop.annotate_more(max(0, ANNOTATED - loop.annotated))
    flipped = {}
    for task in _training_images(loop)[:FLIPPED]:
        assert task.latest is not None
        (truth,) = kind.annotated(task.latest, labels)
        flipped[task.id] = truth
        _say(loop, task, [Region(label=str((int(truth.label) + 5) % 10))])
    before = set(loop.deployment.ledger.promotions(loop.model))
    assert loop.webhook("START_TRAINING") == 201
    wait_for(lambda: set(loop.deployment.ledger.promotions(loop.model)) - before, 240, "a verdict about the flipped labels")
    # An earlier version's tab may be there: it is this version's once it shows one of its cases.
    wait_for(lambda: _tab(loop) and set(_listed(loop)) & set(flipped), 120, "a flipped label in the tab")
    wait_until_idle(loop, "RefreshQueue")

    listed = _listed(loop)
    found = [task for task in listed if task in flipped]
    cases = {case.task: case for case in loop.deployment.ledger.review_cases(loop.model, loop.project)}
    assert sorted(listed, key=lambda task: cases[task].quality) == listed, "the worst are not first"

    tasks = {task.id: task for task in _training_images(loop)}
    for number, truth in flipped.items():  # the cases are answered, and what did not come up is put right
        _say(loop, tasks[number], [truth])
    assert not set(_listed(loop)) & set(flipped)

    evaluation = loop.deployment.champions.evaluation(loop.model, max(case.version for case in cases.values()))
    assert evaluation is not None
    again = [
        msgspec.structs.replace(suspect, given=[flipped.get(suspect.task, suspect.given[0])]) for suspect in evaluation.suspects
    ]
    label_studio, ledger = loop.deployment.label_studio, loop.deployment.ledger
    review.offer(loop.folder, loop.project, evaluation.challenger.version, again, ledger, label_studio)
    assert not set(_listed(loop) if _tab(loop) else []) & set(found), "an answered case came up again"
    assert {case.task for case in ledger.review_cases(loop.model, loop.project) if case.settled_at} >= set(found)


def test_the_models_own_annotation_is_made_once_and_known_again(loop: Loop, first_version: Promotion) -> None:
    label_studio = loop.deployment.label_studio
    task = next(task for task in label_studio.tasks(loop.project, "image") if not task.annotations)
    own = model_annotation_id(loop.project, task.sha256 or "")
    assert label_studio.annotate_once(task.id, [], own)
    assert not label_studio.annotate_once(task.id, [], own)
    (made,) = label_studio.annotations_of(loop.project, [task.id])
    (annotation,) = made.annotations
    assert (annotation.unique_id, annotation.by_model) == (own, True)
    _call(loop, "PATCH", f"/api/annotations/{annotation.id}", {"result": []})
    (confirmed,) = label_studio.annotations_of(loop.project, [task.id])
    _call(loop, "DELETE", f"/api/annotations/{annotation.id}")
    assert confirmed.annotations[0].unique_id == own
