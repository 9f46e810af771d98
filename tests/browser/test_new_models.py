"""From an empty folder to version 2 in the browser, by the commands of docs/adding-a-model.md, for each problem type.

The three models live in one deployment, so that what one of them may not see of another is tested here as well.
"""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import urllib3
from playwright.sync_api import expect

from cli.deployment import Deployment
from cli.examples import Example
from labelloop import artifacts, problem_types
from labelloop.artifacts import s3_uri
from labelloop.model_config import ModelConfigs, ModelFolder
from labelloop.problem_types.detection import iou
from labelloop.records import ProblemTypeName, Promotion
from tests.browser.sign_in import REGIONS, signed_in
from tests.laptop import connect, wait_for
from tests.training.models import COLOURS, rectangles

MODELS: dict[str, ProblemTypeName] = {"swatches": "classification", "palettes": "multilabel", "patches": "detection"}
EPOCHS = {"swatches": 6, "palettes": 8, "patches": 20}
FIRST, SECOND = 20, 48  # annotations at which each trains
IMAGES = 60
ARTIFACTS = Path("test-artifacts")


@dataclass
class Laptop:
    """A newcomer's laptop: an own stack in `home`, and the folder that began empty."""

    home: Path
    configs: Path
    deployment: Deployment

    def run(self, *words: str) -> dict[str, Any]:
        """A command, as a person types it, with --json."""
        return run(self.configs, *words, "--home", str(self.home), "--json")

    def folder(self, model: str) -> ModelFolder:
        return ModelConfigs(self.configs)[model]

    def project(self, model: str) -> int:
        return self.deployment.ledger.project(model)

    def images(self, model: str) -> dict[str, int]:
        """Image address → task."""
        return {task.image: task.id for task in self.deployment.label_studio.tasks(self.project(model), "image")}

    def address(self, model: str, example: Example) -> str:
        return s3_uri(self.deployment.images.name, f"images/{model}/{example.name}")

    def ask(self, path: str, body: Any, *, user: str, path_model: str) -> tuple[int, Any]:
        """A request to a model's backend with the credentials of `user`'s."""
        access = self.deployment.backend(user)
        url = self.deployment.backend(path_model).url
        answer = urllib3.request("POST", f"{url}/{path}", json=body, headers={"Authorization": access.authorization}, timeout=60)
        return answer.status, json.loads(answer.data) if answer.data else None

    def verdict(self, model: str, annotations: int) -> Promotion:
        def found() -> Promotion | None:
            head = self.deployment.ledger.head(model)
            assert head.failure is None, head.failure
            promotions = self.deployment.ledger.promotions(model).values()
            return next((p for p in promotions if p.n_annotations == annotations), None)

        return wait_for(found, 240, f"{model}'s verdict about {annotations} annotations")


def run(configs: Path, *words: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", *words],
        env={**os.environ, "LABELLOOP_MODEL_CONFIGS": str(configs)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return dict(json.loads(done.stdout)) if "--json" in words else {}


def data_of(model: str) -> list[Example]:
    """Coloured rectangles, no image twice: one an image for classification, any number for the others."""
    one_each = MODELS[model] == "classification"
    drawn = rectangles(4 * IMAGES, "multilabel" if one_each else MODELS[model], seed=len(model))
    wanted = {example.sha256: example for example in drawn if len(example.truth) == 1 or not one_each}
    return list(wanted.values())[:IMAGES]


def write_files(model: str, data: list[Example], folder: Path) -> list[str]:
    """The images as files; the words that `upload-images` takes them by, with what people knew of them before."""
    for example in data:
        file = folder / example.name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(example.image)
    if MODELS[model] != "multilabel":
        return [str(folder)]
    with (folder / "known.csv").open("w", newline="") as table:
        writer = csv.writer(table)
        writer.writerow(["image", "label"])
        known = sorted((one for one in data if one.truth), key=lambda one: one.sha256)[:FIRST]
        writer.writerows([one.name, "|".join(r.label for r in one.truth) if one in known else ""] for one in data)
    return [str(folder / "known.csv")]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laptop]:
    """The five commands for each of the three models, and the annotations that train each of them twice."""
    home, configs = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("configs") / "model_configs"
    for model, problem_type in MODELS.items():
        words = ["--model", model, "--problem-type", problem_type, "--classes", ",".join(COLOURS)]
        run(
            configs,
            "create-new-model",
            *words,
            "--architecture",
            "custom",
            "--image-size",
            "64",
            "--train-at",
            f"{FIRST},{SECOND}",
        )
        # A person would leave these alone; the test has no time, and a holdout too small to decide by the gate's usual margin.
        edits = {
            r"epochs: \d+": f"epochs: {EPOCHS[model]}",
            r"limit: \d+": "limit: 0",
            r"margin: [\d.]+": "margin: 0.9",
            "int8: auto": "int8: never",
        }
        config = configs / model / "config.yaml"
        text = config.read_text()
        for before, after in edits.items():
            text, made = re.subn(before, after, text)
            assert made == 1, before
        config.write_text(text)
    run(configs, "check")
    try:
        run(configs, "up", "--home", str(home))
        with pytest.MonkeyPatch.context() as patch:
            laptop = Laptop(home, configs, connect(home, patch))
            for model in MODELS:
                laptop.run("setup-label-studio-project", model)
            for model in MODELS:
                upload(laptop, model, tmp_path_factory.mktemp(model))
            for count in (FIRST, SECOND):  # the models' trainings run side by side
                for model in MODELS:
                    annotate_up_to(laptop, model, count)
                for model in MODELS:
                    laptop.verdict(model, count)
        yield laptop
    finally:
        run(configs, "down", "--home", str(home), "--erase")


def upload(laptop: Laptop, model: str, folder: Path) -> None:
    """Images, those with a class first where people knew it; then an annotator brings the model to both trainings."""
    data = data_of(model)
    if MODELS[model] == "classification":
        for one in data[:FIRST]:
            write_files(model, [Example(f"{one.truth[0].label}/{one.name}", one.image, one.truth)], folder / "sorted")
        sorted_before = laptop.run("upload-images", model, str(folder / "sorted"), "--labels-from-folders")
        assert sorted_before["annotated"] == FIRST
        data = data[FIRST:]
    done = laptop.run("upload-images", model, *write_files(model, data, folder / "files"))
    assert (done["uploaded"], done["refused"]) == (len(data), {})


@pytest.fixture
def laptop(stack: Laptop, monkeypatch: pytest.MonkeyPatch) -> Laptop:
    connect(stack.home, monkeypatch)
    return stack


def annotate_up_to(laptop: Laptop, model: str, count: int) -> None:
    """An annotator who knows the truth works until `count` tasks are annotated, in an order that ingestion does not decide."""
    label_studio, folder = laptop.deployment.label_studio, laptop.folder(model)
    project = laptop.project(model)
    wait_for(lambda: label_studio.counts(project)["tasks"] >= IMAGES, 120, "every image is a task")
    truth = {example.sha256: example.truth for example in data_of(model)}
    tasks = sorted(label_studio.tasks(project, "image"), key=lambda task: task.sha256 or "")
    missing = count - sum(task.annotations > 0 for task in tasks)
    for task in [task for task in tasks if not task.annotations][: max(missing, 0)]:
        assert task.sha256
        result = problem_types.of(MODELS[model]).result(truth[task.sha256], folder.label_config, task.size)
        label_studio.annotate(task.id, result, seconds=1)


@pytest.mark.parametrize("model", MODELS)
def test_the_second_version_is_what_the_annotator_sees(laptop: Laptop, model: str) -> None:
    promotion = laptop.verdict(model, SECOND)
    assert (promotion.version, promotion.verdict) == (2, "promote"), promotion
    label_studio, project = laptop.deployment.label_studio, laptop.project(model)
    wait_for(lambda: label_studio.model_version(project) == f"{model} v2", 60, "Label Studio knows version 2")
    task = next(task for task in label_studio.tasks(project, "image") if not task.annotations)
    expected = prediction(laptop, model, task.image)

    addresses = laptop.deployment.laptop
    assert addresses is not None
    with signed_in(addresses) as page:
        page.goto(f"{laptop.deployment.label_studio_url}/projects/{project}/data?task={task.id}")
        submit = page.get_by_role("button", name="Submit current annotation")
        expect(submit).to_be_visible(timeout=30_000)
        expect(page.get_by_text(f"{model} v2").first).to_be_visible(timeout=15_000)
        wait_for(lambda: len(page.evaluate(REGIONS)) == len(expected), 15, "the editor has the prediction's regions")
        found = page.evaluate(REGIONS)
        ARTIFACTS.mkdir(exist_ok=True)
        page.screenshot(path=ARTIFACTS / f"{model}.png")
        with page.expect_response(lambda r: r.request.method == "POST" and f"/api/tasks/{task.id}/annotations" in r.url) as sent:
            submit.click()
        assert sent.value.status == 201
        assert (sent.value.request.post_data_json or {}).get("parent_prediction")
    assert [region["type"] for region in found] == [region["type"] for region in expected]
    for shown, answered in zip(found, expected, strict=True):
        for key, value in answered["value"].items():
            assert shown["value"][key] == (pytest.approx(value, abs=0.01) if isinstance(value, float) else value), key


def prediction(laptop: Laptop, model: str, image: str) -> list[dict[str, Any]]:
    status, answer = laptop.ask("predict", {"tasks": [{"id": 1, "data": {"image": image}}]}, user=model, path_model=model)
    assert status == 200
    return list(answer["results"][0]["result"])


def test_a_detectors_boxes_lie_on_what_it_was_shown(laptop: Laptop) -> None:
    """Of the images that nobody has annotated."""
    model = "patches"
    label_studio, project = laptop.deployment.label_studio, laptop.project(model)
    truth = {example.sha256: example.truth for example in data_of(model)}
    tasks = [t for t in label_studio.tasks(project, "image") if not t.annotations and t.sha256 and truth[t.sha256]]
    hits = drawn = 0
    for task in tasks:
        for region in prediction(laptop, model, task.image):
            value = region["value"]
            left, top = value["x"] / 100, value["y"] / 100
            box = (left, top, left + value["width"] / 100, top + value["height"] / 100)
            things = [thing for thing in truth[task.sha256 or ""] if thing.label == value["rectanglelabels"][0]]
            drawn += 1
            hits += any(thing.box is not None and iou(box, thing.box) > 0.5 for thing in things)
    assert drawn
    assert hits / drawn > 0.5, f"{hits} of {drawn}"


def test_a_smart_tool_is_answered_through_label_studio(laptop: Laptop) -> None:
    model = "patches"
    label_studio, project = laptop.deployment.label_studio, laptop.project(model)
    [backend] = label_studio.backends(project)
    assert backend["is_interactive"] is True
    found = ((task, prediction(laptop, model, task.image)) for task in label_studio.tasks(project, "image"))
    task, box = next((task, regions[0]["value"]) for task, regions in found if regions)
    middle = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2, "width": 0.3}
    click = {"type": "keypointlabels", "value": {**middle, "keypointlabels": box["rectanglelabels"]}}
    answer = urllib3.request(
        "POST",
        f"{laptop.deployment.label_studio_url}/api/ml/{backend['id']}/interactive-annotating",
        json={"task": task.id, "context": {"result": [click]}},
        headers={"Authorization": f"Token {laptop.deployment.label_studio_token}"},
        timeout=30,
    )
    [region] = answer.json()["data"]["result"]
    assert region["type"] == "rectanglelabels"
    assert region["value"]["rectanglelabels"] == box["rectanglelabels"]
    assert region["value"]["x"] <= middle["x"] <= region["value"]["x"] + region["value"]["width"]


def test_no_model_gets_at_another(laptop: Laptop) -> None:
    """Data, credentials, predictions: each model has its own path, password, prefix and pointer."""
    for mine, other in (("swatches", "patches"), ("patches", "palettes")):
        for path in ("predict", "setup", "webhook"):
            assert laptop.ask(path, {}, user=mine, path_model=other)[0] == 403
        theirs = next(iter(laptop.images(other)))
        body = {"tasks": [{"id": 1, "data": {"image": theirs}}]}
        status, answer = laptop.ask("predict", body, user=mine, path_model=mine)
        assert (status, "lies outside" in answer["results"][0]["error"]) == (200, True)
        assert theirs not in laptop.images(mine)
        versions = {laptop.ask("setup", {}, user=name, path_model=name)[1]["model_version"] for name in (mine, other)}
        assert len(versions) == 2
    keys = laptop.deployment.artifacts.keys("models/")
    assert {key.split("/")[1] for key in keys} == MODELS.keys()
    for model in MODELS:
        champion = laptop.deployment.champions.read(model)
        assert champion is not None
        assert champion.onnx == artifacts.onnx_key(model, champion.version)
