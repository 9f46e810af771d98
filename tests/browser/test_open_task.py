"""A task that is open in a browser while a version takes over: the annotator submits as if nothing had happened."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import boto3
import msgspec
from playwright.sync_api import expect

from labelloop.messages import announce
from labelloop.records import Champion, Promotion, VersionJudged
from tests.browser.sign_in import signed_in
from tests.laptop import Loop

LATER = 1001  # a version that no training of these tests reaches


def take_over(loop: Loop, champion: Champion) -> None:
    """Let a version serve and tell everybody, as the gate does; wait for its predictions."""
    champions = loop.deployment.champions
    champions.swap(champion, tag=champions.read_tagged(loop.model)[1])
    judged = VersionJudged(model=loop.model, version=champion.version)
    announce(boto3.client("events"), loop.deployment.outputs["EventBus"], "ModelPromoted", judged)
    loop.wait_until_predicted(champion.version)


@contextmanager
def another_champion(loop: Loop, version: int) -> Iterator[None]:
    """The champion's own model under another number, for a while."""
    champion = loop.champion
    take_over(loop, msgspec.structs.replace(champion, version=version))
    try:
        yield
    finally:
        take_over(loop, champion)


def test_a_task_that_is_open_during_a_promotion_can_be_submitted(loop: Loop, first_version: Promotion) -> None:
    loop.wait_until_predicted(loop.champion.version)
    waiting = {task.id: task for task in loop.listed() if not task.labelled}
    task = next(task for _, task in reversed(loop.annotator.tasks[:-4]) if task in waiting)  # nobody gets there
    addresses = loop.deployment.laptop
    assert addresses is not None
    with signed_in(addresses) as page:
        page.goto(f"{loop.deployment.label_studio_url}/projects/{loop.project}/data?task={task}")
        submit = page.get_by_role("button", name="Submit current annotation")
        expect(submit).to_be_visible(timeout=30_000)
        chosen = page.get_by_role("checkbox", name=re.compile(r"^\d\[\d\]$"), checked=True)
        expect(chosen).to_have_count(1, timeout=15_000)
        before = loop.annotated
        with (
            another_champion(loop, LATER),
            page.expect_response(lambda r: r.request.method == "POST" and f"/api/tasks/{task}/annotations" in r.url) as answer,
        ):
            submit.click()
        assert answer.value.status == 201
        sent = answer.value.request.post_data_json
    assert sent
    assert sent["parent_prediction"] == waiting[task].predictions[0]["id"]
    assert loop.annotated == before + 1
