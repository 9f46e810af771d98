"""`labelloop report`: what stands on the page and in the facts, of each problem type, against a deployed stage."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from cli.main import app
from cli.report import Report
from labelloop import artifacts
from labelloop.model_config import ModelFolder
from labelloop.records import HoldoutImage, ProblemTypeName
from tests import examples
from tests.deployed import Stage, deployed
from tests.training.test_evaluation_page import Page

SECTIONS = ["learning-curve", "confusion", "calibration", "queue", "label-savings", "acceptance", "turnaround", "cost"]
HOSTILE = ["<script>1</script>", "$x_{", '"&amp;', "größer"]

type Deploy = Callable[[ModelFolder], Stage]


@pytest.fixture
def deploy(aws: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Deploy]:
    """Deploys a stage with one model, whose folder the commands then find."""
    with ExitStack() as stack:

        def make(folder: ModelFolder) -> Stage:
            monkeypatch.setenv("LABELLOOP_MODEL_CONFIGS", str(Path(str(folder.folder)).parent))
            return stack.enter_context(deployed(folder, monkeypatch))

        yield make


def own(root: Path, kind: ProblemTypeName, classes: list[str]) -> ModelFolder:
    return examples.make_model_folder(root, "own", kind, classes)


def facts(stage: Stage) -> Report:
    done = CliRunner().invoke(app, ["report", stage.model, "--stage", stage.name, "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    return msgspec.json.decode(done.stdout, type=Report)


def page(stage: Stage, folder: Path) -> tuple[Page, str]:
    file = folder / "page.html"
    command = ["report", stage.model, "--stage", stage.name, "--output", str(file)]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert (done.exit_code, "page.html" in done.stdout) == (0, True)
    text = file.read_text(encoding="utf-8")
    return Page(text), text


def test_the_facts_are_what_was_recorded_with_intervals(deploy: Deploy) -> None:
    stage = deploy(examples.CONFIGS["digits"])
    verdicts = [stage.train(100, 0.85).verdict, stage.train(500, 0.96).verdict, stage.train(1000, 0.60).verdict]
    assert verdicts == ["promote", "promote", "keep"]
    stage.annotate(40, kept=0.7, version=2)
    stage.label_studio.predicted = 1500
    found = facts(stage)
    assert [its.version for its in found.versions] == [1, 2, 3]
    for its, report in zip(found.versions, stage.reports, strict=True):
        assert its.metric is not None
        assert its.metric.value == report.challenger.value
        assert its.metric.low < its.metric.value < its.metric.high
    few, many = (its.metric for its in found.versions[:2])
    assert few is not None
    assert many is not None
    assert many.high - many.low < few.high - few.low  # 100 holdout images instead of 20
    assert found.champion is not None
    assert (found.champion.version, found.champion.confusion) == (2, stage.reports[1].challenger.confusion)
    assert sum(its.images for its in found.champion.classes) == found.champion.holdout_images == 100
    bins = found.champion.reliability
    assert sum(its.count for its in bins) == 100
    assert sum(its.count * its.right.value for its in bins) == pytest.approx(100 * stage.reports[1].challenger.value)
    acceptance = found.versions[1].acceptance
    assert acceptance is not None
    assert 0 < acceptance.low < acceptance.value < acceptance.high < 1
    assert (found.status.tasks, found.status.annotations, found.status.predicted) == (1797, 40, 1500)
    assert found.turnaround is not None
    assert (found.turnaround.version, found.turnaround.seconds["upload of the model"]) == (3, 6.0)
    assert sum(found.turnaround.seconds.values()) == pytest.approx(181)
    assert found.cost is not None
    assert 0 < found.cost.idle < 2 < found.cost.always_on
    assert found.problems == []


@pytest.mark.parametrize("kind", ["classification", "multilabel", "detection"])
def test_every_problem_type_has_every_section(deploy: Deploy, tmp_path: Path, kind: ProblemTypeName) -> None:
    stage = deploy(own(tmp_path / "models", kind, ["cat", "dog", "bird"]))
    stage.train(100, 0.8)
    stage.train(300, 0.95)
    stage.annotate(30, kept=0.5, version=2)
    found, text = page(stage, tmp_path)
    assert [name for name in re.findall(r'<section id="([^"]+)"', text) if name != "now"] == SECTIONS
    title = {"classification": "accuracy", "multilabel": "F1", "detection": "mAP@0.5"}[kind]
    assert f"{title} {stage.reports[1].challenger.value:.1%}" in found.text
    assert "2 300 " in found.text
    assert "promote · champion" in found.text
    assert re.search(r"2 30 15 50% 3\d\.\d to 6\d\.\d %", found.text), found.text
    assert found.tags.count("svg") == (3 if kind == "classification" else 2)
    assert "fit 48.0" in found.text
    assert "an idle month" in found.text


def test_the_page_needs_nothing_else_and_names_are_text(deploy: Deploy, tmp_path: Path) -> None:
    stage = deploy(own(tmp_path / "models", "classification", HOSTILE))
    stage.train(100, 0.8)
    found, text = page(stage, tmp_path)
    assert [address for address in found.fetched if not address.startswith(("#", "data:"))] == []
    assert not {"script", "link", "iframe", "img"} & set(found.tags)
    assert not re.search(r"url\((?!#)|@import", text)
    for name in HOSTILE:
        assert found.text.count(name) >= 2, name  # the matrix and the table


def test_without_a_version_it_says_what_is_waited_for(deploy: Deploy, tmp_path: Path) -> None:
    stage = deploy(examples.CONFIGS["digits"])
    stage.annotate(37)
    found, text = page(stage, tmp_path)
    assert re.findall(r'<section id="([^"]+)"', text) == SECTIONS
    assert "No version yet; the first training starts at 100 annotations." in found.text
    assert "annotated 37" in found.text
    assert "tasks 1,797" in found.text
    assert "svg" not in found.tags
    stage.run(100)
    stage.services.epoch = 7
    assert "the first training runs" in page(stage, tmp_path)[0].text
    assert re.search(r"training, epoch 7 of \d+", page(stage, tmp_path)[0].text)


def test_services_that_are_away_cost_their_own_figures(deploy: Deploy, tmp_path: Path) -> None:
    stage = deploy(examples.CONFIGS["digits"])
    stage.train(100, 0.85)
    stage.train(500, 0.95)
    stage.label_studio.down = True
    stage.bucket.put(artifacts.evaluation_key("digits", 1), b"{")
    stage.services.gone = True
    found, _ = page(stage, tmp_path)
    for said in ("Label Studio answered", "the evaluation report of digits version 1 is damaged", "Label Studio does not say"):
        assert said in found.text, said
    assert "2 500" in found.text
    assert "fit 48.0" in found.text  # what the job noted itself


def test_an_image_that_was_erased_changes_no_recorded_value(deploy: Deploy) -> None:
    stage = deploy(examples.CONFIGS["digits"])
    stage.train(100, 0.85)
    whole = stage.reports[0]
    emptied: list[HoldoutImage] = []
    for holdout in (whole.holdout[:3], emptied):
        rest = msgspec.structs.replace(whole, holdout=holdout)
        stage.bucket.put(artifacts.evaluation_key("digits", 1), msgspec.json.encode(rest))
        metric = facts(stage).versions[0].metric
        assert metric is None if not holdout else metric is not None and metric.value == whole.challenger.value


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--json", "--open"], "writes no page"),
        (["--output", "/nowhere/at/all.html"], "there is no folder"),
    ],
)
def test_a_mistake_is_said(words: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["report", "digits", *words])
    assert done.exit_code == 2
    assert said in " ".join(done.output.replace("│", " ").split())
