"""Lineage on the real stack: from what Label Studio shows back to the annotations, and a snapshot that can be built again."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner

from cli.main import app
from labelloop.records import Promotion, version_number
from tests.laptop import FIRST, Loop, wait_for


def test_a_prediction_leads_back_to_its_annotations(loop: Loop, first_version: Promotion) -> None:
    _, task = loop.annotator.tasks[-1]
    prediction, version = wait_for(lambda: _predicted(loop, task), 90, "a version has predicted the task")
    found = _lineage(loop, "--prediction", str(prediction))
    assert (found["task"], found["made_by"]) == (task, f"digits v{version}")
    promotion = next(p for p in loop.deployment.ledger.promotions("digits").values() if p.version == version)
    assert (found["version"]["version"], found["version"]["job_name"]) == (version, promotion.job_name)
    assert len(set(found["version"]["dataset"]["annotations"])) == promotion.n_annotations
    assert version in {takeover["version"] for takeover in found["version"]["takeovers"]}


def test_an_image_leads_to_the_versions_that_saw_it(loop: Loop, first_version: Promotion) -> None:
    image, task = loop.annotator.tasks[0]
    by_task = _lineage(loop, "--task", str(task))
    assert by_task["image"] == image
    assert by_task["uses"][0]["version"] == 1
    assert task in {use["task"] for use in by_task["uses"]}
    assert _lineage(loop, "--image", image) == by_task


def test_a_snapshot_can_be_built_again(loop: Loop, first_version: Promotion) -> None:
    found = _lineage(loop, "--version", "1", "--rebuild")
    assert (found["same"], found["annotations"], found["changes"]) == (True, FIRST, [])
    assert found["digest"] == found["rebuilt"] == found["stored"]


def _lineage(loop: Loop, *words: str) -> Any:
    shown = CliRunner().invoke(app, ["lineage", "digits", *words, "--home", str(loop.stack.home), "--json"])
    assert shown.exit_code == 0, shown.output
    return json.loads(shown.stdout)


def _predicted(loop: Loop, task: int) -> tuple[int, int] | None:
    """The id of the task's prediction and the version that made it, once one has."""
    answer = loop.http.request(
        "GET",
        f"{loop.deployment.label_studio_url}/api/predictions/?task={task}",
        headers={"Authorization": f"Token {loop.deployment.label_studio_token}"},
    )
    assert answer.status == 200, answer.data
    made = [(int(prediction["id"]), version_number("digits", prediction["model_version"])) for prediction in answer.json()]
    return next(((prediction, version) for prediction, version in made if version), None)
