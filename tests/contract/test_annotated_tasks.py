"""Reading annotated tasks, against what a real Label Studio 1.23.2 answered to these very requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from labelloop.label_studio.client import LabelStudioClient, tasks_exported
from labelloop.snapshot_index import freeze
from tests import examples
from tests.recording_server import Answer, Request, serving

ANSWERS: dict[str, Any] = json.loads((Path(__file__).parent / "annotated_tasks.json").read_text())


def answer(request: Request) -> Answer:
    body = ANSWERS.get(f"{request.method} {request.path}")
    return Answer(404, {"detail": request.path}) if body is None else Answer(body=body)


def test_tally_listing_and_export_are_understood() -> None:
    with serving(answer) as server:
        client = LabelStudioClient(server.url, "token")
        tally, (page,) = client.tally(2), client.annotated_tasks(2, after=5026)
        assert {f"GET {request.path}" for request in server.requests} == ANSWERS.keys()
    assert (tally.tasks, tally.annotations, tally.changed_at) == (27, 29, "2026-11-26T22:25:02.502311Z")
    assert [task.id for task in page] == [5027, 5028, 5029, 5030, 5040]
    assert all(len(annotation.unique_id) == 36 and annotation.updated_at for task in page for annotation in task.annotations)
    snapshot, _ = freeze(page, examples.DIGITS, examples.LABELS)
    assert (snapshot.n_annotations, snapshot.skipped) == (5, {})


def test_the_prediction_that_was_seen_is_a_copy_in_the_annotation() -> None:
    (export,) = (body for request, body in ANSWERS.items() if "/export" in request)
    copies = [annotation["prediction"] for task in export for annotation in task["annotations"]]
    tasks = tasks_exported(json.dumps(export).encode())
    seen = [annotation.seen("digits") for task in tasks for annotation in task.annotations]
    assert seen == [1 if copy.get("model_version") == "digits v1" else None for copy in copies]
