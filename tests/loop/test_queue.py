"""The queue on the real stack: what every unlabelled task's prediction is, which task comes next, and a rollback."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from typer.testing import CliRunner

from cli import examples
from cli.main import app
from labelloop import imaging, problem_types
from labelloop.active_learning import stream_of
from labelloop.records import Promotion, version_string
from tests.laptop import IMAGES, ListedTask, Loop, wait_for


def unlabelled(loop: Loop) -> list[ListedTask]:
    return [task for task in loop.listed() if not task.labelled]


def answers(loop: Loop, *tasks: dict[str, Any]) -> list[dict[str, Any]]:
    """What predict answers about tasks."""
    headers = {"Authorization": loop.backend.authorization}
    answer = loop.http.request("POST", f"{loop.backend.url}/predict", json={"tasks": tasks}, headers=headers)
    return list(answer.json()["results"])


def another_version(loop: Loop) -> int:
    """A trained version that does not serve."""
    if not _others(loop):
        annotated = loop.annotate_more(5)
        loop.webhook("START_TRAINING")
        loop.verdict_about(annotated)
    return max(_others(loop))


def _others(loop: Loop) -> set[int]:
    versions = {promotion.version for promotion in loop.deployment.ledger.promotions(loop.model).values()}
    return versions - {0, loop.champion.version}


def test_after_a_promotion_every_unlabelled_task_has_the_new_versions_prediction(loop: Loop, first_version: Promotion) -> None:
    loop.wait_until_predicted(loop.champion.version)
    assert len(unlabelled(loop)) > IMAGES / 2


def test_the_stored_scores_are_what_predict_answers(loop: Loop, first_version: Promotion) -> None:
    loop.wait_until_predicted(loop.champion.version)
    some = unlabelled(loop)[:20]
    results = answers(loop, *[{"id": t.id, "data": {"image": t.image}, "meta": {"group": t.group}} for t in some])
    for task, result in zip(some, results, strict=True):
        (stored,) = task.predictions
        assert abs(stored["score"] - result["score"]) < 1e-6
        assert stored["result"] == result["result"]
        assert (stored["cluster"] < 4) == (stream_of(task.group, loop.folder.config) == "active")


def test_the_least_certain_task_is_handed_out_first(loop: Loop, first_version: Promotion) -> None:
    """Of the cluster in which the annotator has done the fewest tasks the lowest score, task after task."""
    loop.wait_until_predicted(loop.champion.version)
    truth = {loop.address(example): example for example in loop.data}
    for _ in range(6):
        everything = loop.listed()
        done = Counter(_cluster(task) for task in everything if task.labelled)
        waiting = [task for task in everything if not task.labelled]
        best = min(waiting, key=lambda task: (done[_cluster(task)], task.predictions[0]["score"]))
        handed_out = loop.api("GET", f"/api/projects/{loop.project}/next")
        assert handed_out["id"] == best.id
        (shown,) = handed_out["predictions"]
        assert shown["id"] == best.predictions[0]["id"], "nothing was predicted anew"
        example = truth[best.image]
        size = imaging.upright_size(example.image)
        result = problem_types.of("classification").result(example.truth, loop.folder.label_config, size)
        loop.deployment.label_studio.annotate(best.id, result, seconds=1)


def _cluster(task: ListedTask) -> int | None:
    return max((one["cluster"] for one in task.predictions if one["cluster"] is not None), default=None)


def test_a_new_image_is_predicted_without_anybody_opening_it(loop: Loop, first_version: Promotion) -> None:
    example = examples.load("digits")[IMAGES]
    loop.deployment.images.put(loop.folder.config.images_prefix + "brought later.png", example.image)
    wait_for(lambda: any("brought later" in task.image for task in loop.listed()), 120, "the image becomes a task")
    loop.wait_until_predicted(loop.champion.version)


def test_a_rollback_brings_the_old_version_and_its_predictions_back(loop: Loop, first_version: Promotion) -> None:
    newer = another_version(loop)
    older = loop.champion.version

    def run(*words: str) -> None:
        done = CliRunner().invoke(app, [*words, "--home", str(loop.stack.home), "--json"])
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)

    def serves(version: int) -> bool:
        (answer,) = answers(loop, {"id": 1, "data": {"image": loop.address(loop.data[0])}})
        return bool(answer["model_version"] == version_string(loop.model, version))

    run("promote", loop.model, str(newer), "--reason", "the test wants it")
    wait_for(lambda: serves(newer), 10, "the promoted version answers")
    loop.wait_until_predicted(newer)
    run("rollback", loop.model)
    wait_for(lambda: serves(older), 10, "the old version answers")
    loop.wait_until_predicted(older)
    assert loop.deployment.label_studio.model_version(loop.project) == version_string(loop.model, older)
