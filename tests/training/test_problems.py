"""Multilabel and detection: scores, losses, and whole training jobs, as far as they differ from classification's."""

from __future__ import annotations

import io
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mlflow.tracking import MlflowClient
from torch import Tensor, nn
from torchvision import models, tv_tensors

from cli.examples import Example
from labelloop import problem_types
from labelloop.inference import Model
from labelloop.model_config import ModelConfigs
from labelloop.records import METRIC_TITLES, ManifestRow, ProblemTypeName, Region
from tests.examples import brightness_model
from tests.training.models import config_of, rectangles, write_folder
from tests.training.opt_ml import OptMl, manifest_rows
from training_jobs import dataset, network, problem
from training_jobs.fit import Epoch, fit, make_repeatable
from training_jobs.job import STOPPED, Phases, TrainingJob

Run = Callable[[OptMl], int]
NEW: list[ProblemTypeName] = ["multilabel", "detection"]


def row(*regions: Region) -> ManifestRow:
    return ManifestRow(image="", sha256="", group="", regions=list(regions), split="test", annotation="", task=0)


def labels(*names: str) -> list[Region]:
    return [Region(label=name) for name in names]


def box(label: str, left: float, right: float, score: float | None = None) -> Region:
    return Region(label=label, box=(left, 0.2, right, 0.6), score=score)


# -- scores ------------------------------------------------------------------------------------------------------------


def test_f1_counts_decisions() -> None:
    rows = [row(*labels("a", "b")), row(*labels("a")), row()]
    found = [labels("a"), labels("a", "b"), labels("b")]
    scores = problem.of("multilabel").scores(rows, found, ["a", "b", "c"], version=3)
    assert (scores.metric, scores.version, scores.confusion) == ("f1", 3, None)
    assert scores.value == pytest.approx(2 * 2 / (2 * 2 + 2 + 1))  # 2 right, 2 too many, 1 missed
    assert scores.per_class == {"a": 1.0, "b": 0.0}  # no image has c


def test_a_class_that_is_no_more_is_one_too_many() -> None:
    kind = problem.of("multilabel")
    rows = [row(*labels("a"))]
    assert kind.scores(rows, [labels("a", "old")], ["a"], version=1).value == pytest.approx(2 / 3)
    assert kind.scores(rows, [labels("a")], ["a"], version=1).value == 1


def test_average_precision_is_coco_s() -> None:
    """Of two boxes the better-scored guess hits one, the next is elsewhere, the third hits the other: precision 1 to half the
    recall, 2/3 from there, at 101 recalls."""
    rows = [row(box("a", 0.0, 0.2), box("a", 0.5, 0.7)), row(box("b", 0.1, 0.5))]
    found = [[box("a", 0.0, 0.2, 0.9), box("a", 0.8, 1.0, 0.8), box("a", 0.5, 0.69, 0.7)], [box("b", 0.35, 0.75, 0.9)]]
    scores = problem.of("detection").scores(rows, found, ["a", "b", "c"], version=1)
    assert scores.per_class == {"a": pytest.approx((51 * 1 + 50 * 2 / 3) / 101), "b": 0.0}
    assert scores.value == pytest.approx(sum(scores.per_class.values()) / 2)
    assert (scores.metric, scores.confusion) == ("map_50", None)


@pytest.mark.parametrize("strange", ["c", "old"])
def test_boxes_of_classes_that_the_holdout_has_not_change_nothing(strange: str) -> None:
    rows, kind = [row(box("a", 0.0, 0.2)), row()], problem.of("detection")
    found = [[box("a", 0.0, 0.2, 0.9)], [box(strange, 0.0, 0.2, 0.9)]]
    assert kind.scores(rows, found, ["a", "c"], version=1).value == 1
    assert kind.scores(rows, [[], []], ["a", "c"], version=1).per_class == {"a": 0}


# -- losses ------------------------------------------------------------------------------------------------------------


class Listening(nn.Module):
    """Keeps what a detector would learn from."""

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        self.images, self.targets = images, targets
        return {"one": torch.tensor(1.0), "other": torch.tensor(2.0)}


def test_detectors_learn_from_boxes_in_pixels() -> None:
    """Shares become pixels of the network's input, labels count from 1, and what is left of the image goes."""
    config = config_of("detection", width=100, height=50)
    regions = [Region(label="green", box=(0.1, 0.2, 0.3, 0.6)), Region(label="red", box=(0.6, 0.0, 1.0, 1.0))]

    def shifted(image: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        assert isinstance(image, tv_tensors.Image)
        assert isinstance(target["boxes"], tv_tensors.BoundingBoxes)
        moved = target["boxes"].sub_(torch.tensor([29.5, 0, 29.5, 0]))
        return image, {**target, "boxes": tv_tensors.wrap(moved, like=target["boxes"])}

    loss = problem.of("detection").loss([row(), row(*regions)], config, shifted)
    heard = Listening()
    for _ in range(2):  # the targets are the same each time
        assert loss(heard, torch.rand(2, 3, 50, 100), torch.tensor([1, 0])) == 3
        first, empty = heard.targets
        assert first["labels"].tolist() == [1]  # of the green box half a pixel was left
        assert first["boxes"].flatten().tolist() == pytest.approx([30.5, 0, 70.5, 50])
        assert type(first["boxes"]) is Tensor
        assert (empty["boxes"].shape, empty["labels"].tolist()) == ((0, 4), [])


def test_multilabel_targets_are_smoothed() -> None:
    config = config_of("multilabel")
    smooth = config_of("multilabel", epochs="2, label_smoothing: 0.2")
    logits = torch.tensor([[1.0, -2.0, 0.5]])
    for given, targets in ((config, [0.0, 1.0, 1.0]), (smooth, [0.1, 0.9, 0.9])):
        loss = problem.of("multilabel").loss([row(*labels("green", "blue"))], given, lambda images: images)
        expected = nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor([targets]))
        assert loss(nn.Identity(), logits, torch.tensor([0])) == pytest.approx(expected)


# -- training jobs -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=NEW)
def kind(request: pytest.FixtureRequest) -> ProblemTypeName:
    name: ProblemTypeName = request.param
    return name


@pytest.fixture
def images(kind: ProblemTypeName) -> list[Example]:
    return rectangles(40, kind)


@pytest.fixture
def laid_out(
    kind: ProblemTypeName, images: list[Example], run_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> OptMl:
    models = write_folder(tmp_path / "configs", kind, epochs=8)
    monkeypatch.setenv("LABELLOOP_MODEL_CONFIGS", str(tmp_path / "configs"))
    model = f"tiny_{kind}"
    rows = manifest_rows(images, models[model].config)
    return OptMl(tmp_path / "job").lay_out(images, rows, job_name=f"job-{kind}-{tmp_path.name}", model=model)


def test_a_job_learns_and_reports_what_serving_says(
    kind: ProblemTypeName, images: list[Example], laid_out: OptMl, run_here: Run, mlflow: MlflowClient
) -> None:
    assert run_here(laid_out) == 0, laid_out.failure
    report, model = laid_out.evaluation, Model(laid_out.onnx)
    files = {image.sha256: image for image in images}
    metric = problem_types.of(kind).metric
    assert (report.problem_type, report.challenger.metric) == (kind, metric)
    assert report.challenger.value > 0.5
    assert set(report.challenger.per_class) == {region.label for image in report.holdout for region in image.truth}
    assert any(not image.truth for image in report.holdout)
    for image in report.holdout:
        assert image.truth == files[image.sha256].truth
        candidates = model.candidates(model.pixels(files[image.sha256].image))
        shown = problem_types.of(kind).chosen(candidates, model.card)
        assert image.challenger == (candidates if kind == "detection" else shown)
    assert 0 <= report.parity <= 1e-3
    assert (model.card.boxes is None) == (kind != "detection")

    version = mlflow.get_model_version(f"tiny_{kind}", str(report.challenger.version))
    assert version.tags["metric"] == metric
    assert version.tags[metric] == str(report.challenger.value)
    run = mlflow.get_run(report.run_id)
    assert run.data.metrics[metric] == pytest.approx(report.challenger.value)
    assert len(mlflow.get_metric_history(report.run_id, f"validation_{metric}")) == 8
    assert run.data.params["problem_type"] == kind
    assert {file.path for file in mlflow.list_artifacts(report.run_id)} == {
        "model.onnx",
        "manifest.jsonl",
        "evaluation.json",
        "per_class.json",
        "per_class.png",
        "evaluation.html",
    }


def test_a_champion_is_scored_on_the_same_holdout(
    kind: ProblemTypeName, images: list[Example], laid_out: OptMl, run_here: Run, tmp_path: Path
) -> None:
    assert run_here(laid_out) == 0, laid_out.failure
    rows = manifest_rows(images, config_of(kind))
    again = OptMl(tmp_path / "again").lay_out(
        images, rows, job_name=f"job-champion-{kind}-{tmp_path.name}", model=f"tiny_{kind}", champion=(4, laid_out.onnx)
    )
    assert run_here(again) == 0, again.failure
    assert again.onnx == laid_out.onnx  # the same snapshot, the same network
    champion, challenger = again.evaluation.champion, again.evaluation.challenger
    assert champion is not None
    assert (champion.version, champion.value, champion.per_class) == (4, challenger.value, challenger.per_class)
    assert [image.champion for image in again.evaluation.holdout] == [image.challenger for image in again.evaluation.holdout]


def test_a_champion_of_another_problem_type_is_refused(
    kind: ProblemTypeName, images: list[Example], laid_out: OptMl, run_here: Run, tmp_path: Path
) -> None:
    rows = manifest_rows(images, config_of(kind))
    job = OptMl(tmp_path / "other").lay_out(
        images, rows, job_name="job-other", model=f"tiny_{kind}", champion=(2, brightness_model())
    )
    assert run_here(job) == 1
    assert job.failure is not None
    assert job.failure.startswith(f"config.yaml: problem_type: is {kind}, but version 2 of tiny_{kind}")


@pytest.mark.parametrize(("split", "reason"), [("train", "nothing can be learnt"), ("test", "cannot be measured")])
def test_a_split_without_anything_is_refused(
    split: str, reason: str, kind: ProblemTypeName, images: list[Example], laid_out: OptMl, run_here: Run, tmp_path: Path
) -> None:
    empty = {one.sha256 for one in manifest_rows(images, config_of(kind)) if one.split == split}
    images = [Example(one.name, one.image, [] if one.sha256 in empty else one.truth) for one in images]
    rows = manifest_rows(images, config_of(kind))
    job = OptMl(tmp_path / "empty").lay_out(images, rows, job_name="job-empty", model=f"tiny_{kind}")
    assert run_here(job) == 1
    assert job.failure is not None
    assert re.match(r"nothing is annotated in (the train split|the holdout) \(\d+ images\), so ", job.failure)
    assert reason in job.failure
    assert split == "train" or METRIC_TITLES[problem_types.of(kind).metric] in job.failure


def test_a_stopped_training_goes_on_to_the_same_weights(kind: ProblemTypeName, laid_out: OptMl, tmp_path: Path) -> None:
    expected = _fitted(laid_out, kind, tmp_path / "whole.pt", lambda _: None)
    stopped: list[int] = []

    def stop(epoch: Epoch) -> None:
        stopped.append(epoch.number)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as ended:
        _fitted(laid_out, kind, tmp_path / "checkpoint.pt", stop)
    assert ended.value.code == STOPPED
    assert stopped == [1]
    resumed: list[int] = []
    network = _fitted(laid_out, kind, tmp_path / "checkpoint.pt", lambda epoch: resumed.append(epoch.number))
    assert resumed[0] == 2
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in network.state_dict().items())


def test_without_anything_to_measure_there_is_no_score(kind: ProblemTypeName, laid_out: OptMl, tmp_path: Path) -> None:
    epochs: list[Epoch] = []
    _fitted(laid_out, kind, tmp_path / "checkpoint.pt", epochs.append, validation=False)
    assert epochs
    assert all(epoch.validation is None for epoch in epochs)


@pytest.mark.parametrize("there", [True, False])
def test_weights_of_s3_come_through_their_channel(
    there: bool, run_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = "s3://weights/some/where/state.pth"
    values = {"architecture": "mobilenet_v3_small", "weights": uri, "epochs": 1}
    configs = write_folder(tmp_path / "configs", "multilabel", **values)
    monkeypatch.setenv("LABELLOOP_MODEL_CONFIGS", str(tmp_path / "configs"))
    state = models.mobilenet_v3_small(weights=None).state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    images = rectangles(20, "multilabel")
    job = OptMl(tmp_path / "job").lay_out(
        images,
        manifest_rows(images, configs["tiny_multilabel"].config),
        job_name=f"job-weights-{there}",
        model="tiny_multilabel",
        weights=("state.pth" if there else "state.pth.bak", file.getvalue()),
    )
    assert run_here(job) == (0 if there else 1), job.failure
    if not there:
        assert job.failure is not None
        assert job.failure.startswith(f"config.yaml: architecture.weights: {uri} is not in the job's weights channel")


def _fitted(
    laid_out: OptMl, kind: ProblemTypeName, checkpoint: Path, report: Callable[[Epoch], None], *, validation: bool = True
) -> nn.Module:
    """The job's training alone, of two epochs."""
    job = TrainingJob.read(laid_out.folder)
    config = config_of(kind, epochs=2)
    card = config.card(job.digest)
    data = dataset.load(job, config, card, Phases())
    if not validation:
        nothing = dataset.Examples([row() for _ in data.validation.rows], data.validation.pixels)
        data = dataset.Dataset(data.train, nothing, data.test)
    make_repeatable(config.hyperparameters.seed, exact=problem.of(kind).exact)
    fresh, augment = network.build(ModelConfigs(laid_out.folder.parent / "configs")[config.name], None)
    return fit(fresh, data, config, card, augment, checkpoint, report)
