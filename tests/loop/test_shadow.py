"""A version in shadow on the real stack: worse on live corrections, it is found out, and no annotator has seen it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import msgspec
import onnx
import pytest
import urllib3
from typer.testing import CliRunner

from cli import examples as data_sets
from cli.demo import Annotator
from cli.examples import Example
from cli.label_studio_project import set_up_project
from cli.main import app
from cli.upload import upload
from labelloop import artifacts, imaging, problem_types
from labelloop.dataset import split_of
from labelloop.inference import CARD_KEY, Model
from labelloop.model_config import ModelConfigs
from labelloop.records import Evaluation, GateRules, Promotion, ShadowPair
from tests import examples
from tests.laptop import IMAGES, ListedTask, Loop, wait_for

MODEL = "ciphers"
SWAPPED = ("3", "8")  # what the second version takes for each other
HELD_OUT, OTHERS = 26, 10  # images
TASKS = 24  # that decide; fewer than a training starts with
RULES = GateRules(margin=0.02, class_floor=0.5, confidence=0.95, shadow=TASKS)


@pytest.fixture
def ciphers(loop: Loop, model_configs: Path, monkeypatch: pytest.MonkeyPatch) -> Loop:
    """A project of its own on the same stack, with images that no version has learnt from, a third of them 3 or 8."""
    monkeypatch.setenv("LABELLOOP_MODEL_CONFIGS", str(model_configs))
    deployment, folder = loop.deployment, ModelConfigs(model_configs)[MODEL]
    project = set_up_project(deployment, folder).project
    chosen = _choose(data_sets.load("digits")[IMAGES + 1 :], folder.config.splits)
    refused: dict[str, str] = {}
    upload(
        deployment.images,
        folder.config.images_prefix,
        [(example.name, partial(bytes, example.image)) for example in chosen],
        lambda name, refusal: refused.update({name: refusal} if refusal else {}),
    )
    assert refused == {}
    wait_for(lambda: deployment.label_studio.counts(project)["tasks"] >= len(chosen), 120, "every image becomes a task")
    return Loop(loop.stack, deployment, folder, project, chosen, Annotator(deployment, folder, project, chosen))


def test_a_version_that_is_worse_on_live_corrections_is_found_out_and_was_never_seen(
    loop: Loop, first_version: Promotion, ciphers: Loop
) -> None:
    ledger, first_file = ciphers.deployment.ledger, loop.deployment.champions.onnx(loop.champion)
    good, classes = _with(first_file, _classes(first_file)), _classes(first_file)
    swapped = [dict(zip(SWAPPED, reversed(SWAPPED), strict=True)).get(name, name) for name in classes]
    bad = _with(first_file, swapped)
    _train(ciphers, examples.evaluation(1, 0.95, model=MODEL, job_name="ciphers-1", onnx_file=good), good)
    ciphers.wait_until_predicted(1)
    shown = {task.id: task.predictions[0] for task in ciphers.listed()}

    report = examples.evaluation(2, 0.97, champion=examples.scores(1, 0.95), model=MODEL, job_name="ciphers-2", onnx_file=bad)
    _train(ciphers, msgspec.structs.replace(report, gate=RULES), bad)
    begun = wait_for(lambda: ledger.promotion(MODEL, "ciphers-2"), 60, "the gate decides")
    assert (begun.verdict, ciphers.champion.version) == ("shadow", 1), "it passes the offline gate"

    held_out = [task for task in ciphers.listed() if split_of(task.group, ciphers.folder.config.splits) == "test"]
    assert len(held_out) >= TASKS
    pairs = wait_for(partial(_all_pairs, ciphers, held_out), 120, "both predictions of each task of the holdout are recorded")
    assert {(pair.version, pair.champion) for pair in pairs.values()} == {(2, 1)}
    differ = [pair for pair in pairs.values() if pair.says[0].label != pair.champion_says[0].label]
    assert {pair.champion_says[0].label for pair in differ} == set(SWAPPED)
    _demand_that_only_the_champion_is_seen(ciphers, pairs, held_out, shown)

    truth = {ciphers.address(example): example for example in ciphers.data}
    for task in held_out[:TASKS]:
        ciphers.api("GET", f"/api/tasks/{task.id}?project={ciphers.project}")  # as an annotator's page does
        _annotate(ciphers, task, truth[task.image])

    def judged() -> Promotion | None:
        promotion = ledger.promotion(MODEL, "ciphers-2")
        return promotion if promotion and promotion.verdict != "shadow" else None

    ended = wait_for(judged, 120, "annotators' answers decide")
    assert (ended.verdict, ended.version) == ("keep", 2)
    assert ended.reason.startswith("worse: in shadow right about"), ended.reason
    assert ended.live is not None
    wrong = [pair for pair in ledger.pairs(MODEL, 2) if pair.scored and pair.scored.champion and not pair.scored.challenger]
    assert (ended.live.images, ended.live.won, ended.live.lost) == (TASKS, 0, len(wrong))
    assert ended.live.difference.high < 0
    assert all(pair.scored.seen for pair in ledger.pairs(MODEL, 2) if pair.scored), "all had the champion's before them"
    assert ciphers.champion.version == 1
    assert [takeover.version for takeover in ledger.takeovers(MODEL)] == [1]
    _demand_that_only_the_champion_is_seen(ciphers, pairs, held_out, shown)
    annotated = ciphers.deployment.label_studio.annotations_of(ciphers.project, [task.id for task in held_out])
    assert {one.seen(MODEL) for task in annotated for one in task.annotations} == {1}

    told = CliRunner().invoke(app, ["status", MODEL, "--home", str(ciphers.stack.home), "--json"])
    assert told.exit_code == 0, told.output
    assert [version["verdict"] for version in json.loads(told.stdout)["versions"]] == ["promote", "keep"]
    found = _mlflow(ciphers, "GET", "model-versions/get", {"name": MODEL, "version": "2"})["model_version"]
    tags = {tag["key"]: tag["value"] for tag in found["tags"]}
    assert (tags["verdict"], tags["verdict_reason"]) == ("keep", ended.reason)


def _demand_that_only_the_champion_is_seen(
    ciphers: Loop, pairs: dict[int, ShadowPair], tasks: Sequence[ListedTask], shown: dict[int, dict[str, Any]]
) -> None:
    """Neither in Label Studio's predictions nor in their order, nor in what predict answers, nor as the backend's name."""
    stored = {one["id"]: one for task in ciphers.listed() for one in task.predictions}
    assert {one["model_version"] for one in stored.values()} == {f"{MODEL} v1"}
    for number, before in shown.items():
        now = stored[before["id"]]
        assert (now["task"], now["result"], now["score"]) == (number, before["result"], before["score"])
    headers = {"Authorization": ciphers.backend.authorization}
    body = {"tasks": [{"id": t.id, "data": {"image": t.image}, "meta": {"group": t.group}} for t in tasks]}
    answer = ciphers.http.request("POST", f"{ciphers.backend.url}/predict", json=body, headers=headers).json()
    assert {result["model_version"] for result in answer["results"]} == {f"{MODEL} v1"}
    for task, result in zip(tasks, answer["results"], strict=True):
        assert result["result"][0]["value"]["choices"] == [pairs[task.id].champion_says[0].label]
    versions = ciphers.http.request("GET", f"{ciphers.backend.url}/versions", headers=headers).json()
    assert versions["versions"] == [f"{MODEL} v1"]
    assert ciphers.deployment.label_studio.model_version(ciphers.project) == f"{MODEL} v1"


def _choose(data: list[Example], splits: Any) -> list[Example]:
    """Images of the holdout, every third one of those that are taken for each other, and some others."""
    held_out = [example for example in data if split_of(hashlib.sha256(example.image).hexdigest(), splits) == "test"]
    hard = [example for example in held_out if example.truth[0].label in SWAPPED][: HELD_OUT // 3]
    easy = [example for example in held_out if example.truth[0].label not in SWAPPED][: HELD_OUT - len(hard)]
    mixed = sorted([*hard, *easy], key=lambda example: hashlib.sha256(example.image).digest())
    return [*mixed, *[example for example in data if example not in held_out][:OTHERS]]


def _classes(file: bytes) -> list[str]:
    return Model(file).card.classes


def _with(file: bytes, classes: list[str]) -> bytes:
    """The model with these names for its outputs."""
    made = onnx.load_from_string(file)
    card = msgspec.structs.replace(Model(file).card, model=MODEL, classes=classes)
    onnx.helper.set_model_props(made, {CARD_KEY: msgspec.json.encode(card).decode()})
    return bytes(made.SerializeToString())


def _train(ciphers: Loop, report: Evaluation, file: bytes) -> None:
    """Leave what a training job leaves, and report its end."""
    if report.challenger.version == 1:
        _mlflow(ciphers, "POST", "registered-models/create", {"name": MODEL})
    source = f"s3://{ciphers.deployment.artifacts.name}/{report.job_name}"
    made = _mlflow(ciphers, "POST", "model-versions/create", {"name": MODEL, "source": source})["model_version"]
    assert int(made["version"]) == report.challenger.version
    key = artifacts.training_archive_key(MODEL, report.job_name)
    ciphers.deployment.artifacts.put(key, examples.model_archive(report, file))
    message = {"model": MODEL, "job_name": report.job_name}
    sqs: Any = boto3.client("sqs")
    sqs.send_message(QueueUrl=ciphers.deployment.outputs["PromoteQueue"], MessageBody=json.dumps(message))


def _all_pairs(ciphers: Loop, tasks: Sequence[ListedTask]) -> dict[int, ShadowPair] | None:
    pairs = {pair.task: pair for pair in ciphers.deployment.ledger.pairs(MODEL, 2)}
    return pairs if pairs.keys() == {task.id for task in tasks} else None


def _annotate(ciphers: Loop, task: ListedTask, example: Example) -> None:
    size = imaging.upright_size(example.image)
    result = problem_types.of("classification").result(example.truth, ciphers.folder.label_config, size)
    ciphers.deployment.label_studio.annotate(task.id, result, seconds=1)


def _mlflow(ciphers: Loop, method: str, path: str, fields: dict[str, str]) -> Any:
    url = f"{ciphers.deployment.mlflow_tracking_uri}/api/2.0/mlflow/{path}"
    sent: dict[str, Any] = {"fields": fields} if method == "GET" else {"json": fields}
    answer = urllib3.request(method, url, **sent)
    assert answer.status == 200, answer.data
    return answer.json()
