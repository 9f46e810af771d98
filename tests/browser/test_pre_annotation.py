"""What an annotator sees, in a real browser: the predicted class is chosen already, and a submit reaches the loop."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from labelloop.records import Promotion, version_string
from tests.browser.sign_in import signed_in
from tests.laptop import Loop, wait_for

ARTIFACTS = Path("test-artifacts")


@pytest.fixture
def page(loop: Loop) -> Iterator[Page]:
    addresses = loop.deployment.laptop
    assert addresses is not None
    with signed_in(addresses) as page:
        yield page


def test_a_task_opens_with_the_predicted_class_and_a_submit_arrives(loop: Loop, first_version: Promotion, page: Page) -> None:
    label_studio = loop.deployment.label_studio
    champion = loop.deployment.champions.read("digits")
    assert champion is not None
    version = version_string("digits", champion.version)
    wait_for(lambda: label_studio.model_version(loop.project) == version, 60, f"Label Studio knows {version}")
    _, task = loop.annotator.tasks[-1]  # nobody gets there
    page.goto(f"{loop.deployment.label_studio_url}/projects/{loop.project}/data?task={task}")
    submit = page.get_by_role("button", name="Submit current annotation")
    expect(submit).to_be_visible(timeout=30_000)

    # By the choices' own names, "6[6]": the Data Manager's rows beside the editor have checked boxes of their own.
    chosen = page.get_by_role("checkbox", name=re.compile(r"^\d\[\d\]$"), checked=True)
    expect(chosen).to_have_count(1, timeout=15_000)
    expect(page.get_by_text(version).first).to_be_visible()
    # The image itself came by a presigned address, through the bucket's CORS.
    expect(page.locator("img[alt='LS'], .lsf-image img, canvas").first).to_be_visible()
    ARTIFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTIFACTS / "pre-annotation.png")

    before = loop.annotated
    with page.expect_response(lambda r: r.request.method == "POST" and f"/api/tasks/{task}/annotations" in r.url) as answer:
        submit.click()
    assert answer.value.status == 201
    sent = answer.value.request.post_data_json
    assert sent, "nothing was sent"
    assert sent["parent_prediction"], "the annotation does not say which prediction it came from"
    assert loop.annotated == before + 1
    # The webhook went API Gateway → queue → retrain: its log has a look at exactly this count.
    wait_for(lambda: f"{before + 1} annotations" in loop.function_log("retrain"), 60, "the webhook's effect in retrain's log")
