"""Retrieve Predictions in Label Studio, of more tasks than one invocation predicts: each has the champion's once afterwards."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest

from labelloop.predict import PART
from labelloop.records import Promotion, version_string
from tests.laptop import IMAGES, ListedTask, Loop, wait_for, wait_until_idle

MANY = 2_000


def act(loop: Loop, action: str, tasks: list[int]) -> Any:
    """What a person does to selected tasks in the Data Manager."""
    body = {"selectedItems": {"all": False, "included": tasks}, "ordering": ["tasks:id"]}
    headers = {"Authorization": f"Token {loop.deployment.label_studio_token}"}
    address = f"{loop.deployment.label_studio_url}/api/dm/actions?id={action}&project={loop.project}"
    answer = loop.http.request("POST", address, headers=headers, json=body, timeout=300)  # it writes for long
    assert answer.status == 200, answer.data
    return answer.json()


def predicted(loop: Loop, tasks: list[ListedTask]) -> list[int]:
    """The tasks with the champion's prediction."""
    version = version_string(loop.model, loop.champion.version)
    return [task.id for task in tasks if version in [one["model_version"] for one in task.predictions]]


def listed_when_predicted(loop: Loop) -> list[ListedTask]:
    """All tasks, once a promotion's own predictions have come: later, they would stand beside those that are asked for."""

    def listed() -> list[ListedTask]:
        tasks = loop.listed()
        left = {task.id for task in tasks if not task.labelled} - set(predicted(loop, tasks))
        return [] if left else tasks

    return wait_for(listed, 300, "every unlabelled task is predicted")


def retrieve(loop: Loop, tasks: list[int]) -> tuple[int, float]:
    """Press Retrieve Predictions: how many tasks it answered, in how many seconds. Then wait until all are predicted, once."""
    version = version_string(loop.model, loop.champion.version)
    wait_until_idle(loop, "PrelabelQueue")
    act(loop, "delete_tasks_predictions", tasks)
    asked = set(tasks)
    started = time.monotonic()
    act(loop, "retrieve_tasks_predictions", tasks)
    seconds = time.monotonic() - started
    answered = len(asked & set(predicted(loop, loop.listed())))

    def all_of_them() -> bool:
        found = {task.id: [one["model_version"] for one in task.predictions] for task in loop.listed() if task.id in asked}
        return found.keys() == asked and all(versions == [version] for versions in found.values())

    wait_for(all_of_them, 300, f"{len(tasks)} tasks are predicted by {version}, once; {answered} were at once")
    return answered, seconds


def test_all_tasks_at_once_are_predicted_labelled_ones_too(loop: Loop, first_version: Promotion) -> None:
    listed = listed_when_predicted(loop)
    tasks = [task.id for task in listed]
    assert len(tasks) >= IMAGES > PART
    assert any(task.labelled for task in listed)
    presses = (retrieve(loop, tasks)[0] for _ in range(3))  # functions that start may make the first ones late
    assert any(answered == len(tasks) for answered in presses)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_thousand_tasks_are_answered_or_imported(loop: Loop, first_version: Promotion) -> None:
    there = listed_when_predicted(loop)
    more = [{"data": {"image": task.image}, "meta": {"group": task.group}} for task in there]
    new = loop.deployment.label_studio.import_tasks(loop.project, [more[n % len(more)] for n in range(MANY - len(there))])
    try:
        tasks = [*(task.id for task in there), *new]
        assert len(tasks) == MANY
        started = time.monotonic()
        answered, seconds = retrieve(loop, tasks)
        sys.stderr.write(
            f"\n{MANY} tasks asked for: {answered} answered in {seconds:.1f} s, {MANY - answered} imported by"
            f" {time.monotonic() - started:.0f} s, none missing\n"
        )
    finally:
        act(loop, "delete_tasks", new)
