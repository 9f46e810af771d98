"""The int8 form of a model serves only where the clock and the promotion gate's test agree to it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from mlflow.tracking import MlflowClient
from torch import nn

from labelloop import proportions
from labelloop.inference import Model
from labelloop.model_config import ModelConfig, Promotion, Serving
from labelloop.records import Evaluation, Int8, ManifestRow, ProblemTypeName, Region, Split
from tests import examples
from tests.training.models import COLOURS, config_of, rectangles, write_folder
from tests.training.opt_ml import OptMl, manifest_rows
from training_jobs import architectures, network, paired, quantization
from training_jobs.dataset import Dataset, Examples, Pixels
from training_jobs.embeddings import embed, embeddings_of
from training_jobs.export import export
from training_jobs.train import predict

NAMES = list(COLOURS)
SIZE = 16
FASTER, SLOWER = (5.0, 4.4), (5.0, 4.6)  # float's and int8's milliseconds: a tenth has to be saved


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], None]:
    """Says how long float and int8 take; both run all the same."""

    def set_to(before: float, after: float) -> None:
        def race(models: Sequence[Model], pixels: Pixels, rounds: int) -> list[float]:
            for model in models:
                model.run_whole(pixels[:1])
            return [before, after][: len(models)]

        monkeypatch.setattr(quantization, "race", race)

    return set_to


def brightest() -> nn.Sequential:
    """Tells the brightest of three channels: three layers, of which the last one stays float."""
    first, second, last = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 3)
    for layer in (first, second, last):
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
    nn.init.dirac_(first.weight)
    nn.init.dirac_(second.weight)
    nn.init.eye_(last.weight)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), last).eval()


def row(split: Split, *regions: Region) -> ManifestRow:
    return ManifestRow(image="", sha256="", group="", regions=list(regions), split=split, annotation="", task=0)


def coloured(count: int, split: Split, seed: int = 0) -> Examples:
    """Noise in which one of three channels is a little brighter."""
    chance = np.random.default_rng(seed)
    labels = chance.integers(0, 3, count)
    pixels = chance.integers(0, 200, (count, SIZE, SIZE, 3), dtype=np.uint8)
    pixels[np.arange(count), :, :, labels] += 50
    return Examples([row(split, Region(label=NAMES[label])) for label in labels], pixels)


def data(validation: int = 150) -> Dataset:
    return Dataset(coloured(40, "train", 1), coloured(validation, "validation", 2), coloured(10, "test", 3))


def a_config(*, int8: str = "auto", margin: float = 0.02, problem_type: ProblemTypeName = "classification") -> ModelConfig:
    serving = msgspec.convert({"int8": int8}, Serving)
    plain = config_of(problem_type, width=SIZE, height=SIZE)
    return msgspec.structs.replace(plain, serving=serving, promotion=Promotion(margin=margin))


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Model, Path]:
    file = tmp_path / "model/model.onnx"
    file.parent.mkdir()
    return export(brightest(), a_config().card(""), data().test.pixels, file)[0], file


def quantized(file: Path) -> bool:
    return any(node.op_type == "QuantizeLinear" for node in onnx.load(str(file)).graph.node)


def test_int8_serves_when_it_is_faster_and_as_good(
    exported: tuple[Model, Path], clock: Callable[[float, float], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    clock(*FASTER)
    model, file = exported
    images = data()
    served, found = quantization.choose(model, file, images, a_config(), predict)
    assert (found.chosen, found.ms_float, found.ms_int8, found.cpu) == (True, *FASTER, quantization.cpu())
    assert found.reason.startswith(f"4.4 ms a run instead of 5.0 on {found.cpu}; accuracy +0.0 points (-1.8 to +1.8) on 150 ")
    assert found.difference is not None
    assert quantized(file)
    assert served.card == model.card == Model(file.read_bytes()).card
    shown = [image[0].label for image in predict(served, images.test.pixels)]
    assert shown == [one.regions[0].label for one in images.test.rows]
    assert [path.name for path in file.parent.iterdir()] == ["model.onnx"]
    assert not list((tmp_path / "scratch").iterdir())


def test_the_same_images_give_the_same_file(exported: tuple[Model, Path], tmp_path: Path) -> None:
    model, file = exported
    made = [tmp_path / "one", tmp_path / "other"]
    for each in made:
        quantization.quantize(file, data().train.pixels, each, model.card)
    assert made[0].read_bytes() == made[1].read_bytes()


def test_embeddings_and_last_layer_stay_float_and_comparable(exported: tuple[Model, Path], tmp_path: Path) -> None:
    model, file = exported
    quantization.quantize(file, data().train.pixels, tmp_path / "int8", model.card)
    pixels = data().validation.pixels
    ours = embeddings_of(Model((tmp_path / "int8").read_bytes()), pixels)
    theirs = embed(brightest(), "classification", pixels)
    assert ours.dtype == np.dtype(np.float32)
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, atol=0.01)
    assert not np.array_equal(ours, theirs)
    graph = onnx.load(str(tmp_path / "int8")).graph
    (last,) = (node for node in graph.node if node.op_type == "Gemm")
    assert last.input[0] == "embedding"
    assert len([node for node in graph.node if node.op_type == "Conv"]) == 2


@pytest.mark.parametrize(
    ("validation", "config", "times", "reason"),
    [
        (150, a_config(int8="never"), FASTER, "serving.int8 is never"),
        (132, a_config(), FASTER, "132 validation images cannot show that int8 is not worse by 2 points; it takes 133"),
        (150, a_config(margin=0), FASTER, "150 validation images cannot show that int8 is not worse by 0 points; nothing can"),
        (150, a_config(), (0.9, 0.1), "a run takes less than 1 ms"),
        (150, a_config(), SLOWER, "int8 saves less than 10% of the time: 4.6 ms a run instead of 5.0 on "),
    ],
)
def test_float_serves_otherwise(
    validation: int,
    config: ModelConfig,
    times: tuple[float, float],
    reason: str,
    exported: tuple[Model, Path],
    clock: Callable[[float, float], None],
) -> None:
    clock(*times)
    model, file = exported
    before = file.read_bytes()
    served, found = quantization.choose(model, file, data(validation), config, predict)
    assert not found.chosen
    assert found.reason.startswith(reason)
    assert served is model
    assert file.read_bytes() == before


def test_float_serves_where_int8_is_worse(exported: tuple[Model, Path], clock: Callable[[float, float], None]) -> None:
    """Its ranges were measured on all but black images, so that all others look alike to it."""
    clock(*FASTER)
    model, file = exported
    whole = data()
    black = Dataset(Examples(whole.train.rows, np.ones_like(whole.train.pixels)), whole.validation, whole.test)
    served, found = quantization.choose(model, file, black, a_config(), predict)
    assert (served, found.chosen) == (model, False)
    assert found.reason.startswith("int8 is worse, or may be: accuracy -")
    assert found.difference is not None
    assert found.difference.high < 0
    assert not quantized(file)


def test_the_image_is_normalised_channel_by_channel(tmp_path: Path) -> None:
    """onnxruntime's optimizer would do it with channels last, as the convolutions after it want them, which takes longer."""
    made, optimized = tmp_path / "int8.onnx", tmp_path / "optimized.onnx"
    network = nn.Sequential(architectures.Normalised([0.4, 0.5, 0.6], [0.2, 0.3, 0.4]), brightest()).eval()
    model, _ = export(network, a_config().card(""), data().test.pixels, tmp_path / "float.onnx")
    quantization.quantize(tmp_path / "float.onnx", data().train.pixels, made, model.card)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(optimized)
    onnxruntime.InferenceSession(made, options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load(str(optimized)).graph.node]
    assert operators.index("Transpose") < operators.index("Sub") < operators.index("Reshape") < operators.index("QLinearConv")


def test_a_network_without_inner_layers_stays_float(clock: Callable[[float, float], None], tmp_path: Path) -> None:
    clock(*FASTER)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 3)).eval()
    file = tmp_path / "model.onnx"
    model, _ = export(network, a_config().card(""), data().test.pixels, file)
    served, found = quantization.choose(model, file, data(), a_config(), predict)
    assert (served, found.reason) == (model, "int8 does not run: no layer follows another one")


def test_a_detector_s_boxes_stay_float(clock: Callable[[float, float], None], tmp_path: Path) -> None:
    clock(*FASTER)
    config = msgspec.structs.replace(config_of("detection"), promotion=Promotion(margin=0.3))
    folder = write_folder(tmp_path / "configs", "detection")["tiny_detection"]
    torch.manual_seed(0)
    detector, _ = network.build(folder, None)
    chance = np.random.default_rng(0)
    truth = Region(label="red", box=(0.1, 0.1, 0.5, 0.5))
    pixels = chance.integers(0, 256, (12, 48, 64, 3), dtype=np.uint8)
    train, validation = (Examples([row(split, truth)] * 12, pixels) for split in ("train", "validation"))
    file = tmp_path / "model.onnx"
    model, _ = export(detector, config.card(""), pixels, file)
    served, found = quantization.choose(model, file, Dataset(train, validation, validation), config, predict)
    assert found.chosen, found.reason
    assert "mAP@0.5 " in found.reason
    for image in pixels[:2]:
        (boxes, scores, embedding), expected = served.run_whole(image[np.newaxis]), model.run_whole(image[np.newaxis])
        np.testing.assert_allclose(boxes, expected[0], atol=0.02)
        np.testing.assert_allclose(scores, expected[1], atol=0.02)
        np.testing.assert_allclose(embedding, expected[2], atol=0.05 * float(np.abs(expected[2]).max()))


class Runner:
    """A model whose runs take the given seconds of a clock that stands still otherwise."""

    def __init__(self, times: Sequence[float], said: list[str], name: str) -> None:
        self._times, self._said, self._name = iter(times), said, name

    def run_whole(self, pixels: Pixels) -> list[Any]:
        self._said.append(self._name)
        Runner.now += next(self._times)
        return [pixels]

    now = 0.0


def test_the_race_takes_turns_and_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "thread_time", lambda: Runner.now)
    said: list[str] = []
    one, other = Runner([9, 1, 1, 5], said, "float"), Runner([9, 2, 3, 4], said, "int8")
    models: Any = [one, other]
    assert quantization.race(models, data().test.pixels, 3) == pytest.approx([1000, 3000])
    assert said == ["float", "int8"] * 4


def test_a_network_that_takes_long_runs_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "thread_time", lambda: Runner.now)
    monkeypatch.setattr(time, "monotonic", lambda: Runner.now)
    said: list[str] = []
    models: Any = [Runner([20.0] * 200, said, "float")]
    assert quantization.race(models, data().test.pixels, 100) == [20_000]
    assert len(said) == 1 + 9


@pytest.mark.parametrize("margin", [0.001, 0.02, 0.1, 0.5])
def test_so_many_images_are_needed_where_none_differs(margin: float) -> None:
    fewest = paired.fewest(margin, 0.95)
    assert fewest is not None
    assert proportions.proportion(0, 0, fewest, 0.95).low > -margin >= proportions.proportion(0, 0, fewest - 1, 0.95).low


def test_a_job_serves_int8_and_says_so(
    run_here: Callable[[OptMl], int],
    mlflow: MlflowClient,
    clock: Callable[[float, float], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock(*FASTER)
    models = write_folder(tmp_path / "configs", "multilabel", epochs=8)
    with (tmp_path / "configs/tiny_multilabel/config.yaml").open("a") as file:
        file.write("promotion: {margin: 0.4}\n")
    monkeypatch.setenv("LABELLOOP_MODEL_CONFIGS", str(tmp_path / "configs"))
    images = rectangles(60, "multilabel")
    job = OptMl(tmp_path / "job").lay_out(
        images, manifest_rows(images, models["tiny_multilabel"].config), job_name="job-int8", model="tiny_multilabel"
    )
    assert run_here(job) == 0, job.failure
    report, model = job.evaluation, Model(job.onnx)
    assert report.int8 is not None
    assert report.int8.chosen, report.int8.reason
    assert quantized(job.folder / "model/model.onnx")
    assert report.onnx_sha256 == examples.sha256(job.onnx)
    assert 0 <= report.parity <= 1e-3  # of the float file that it was made from
    files = {image.sha256: image.image for image in images}
    pixels = {sha256: model.pixels(file) for sha256, file in files.items()}
    assert [image.challenger for image in report.holdout] == predict(model, np.stack([pixels[i.sha256] for i in report.holdout]))
    assert model.card.certainties
    trained_on = [pixels[one.sha256] for one in manifest_rows(images, models["tiny_multilabel"].config) if one.split == "train"]
    embeddings = embeddings_of(model, np.stack(trained_on))
    centres = np.frombuffer(model.card.centroids, dtype=np.float16).reshape(-1, embeddings.shape[1])
    assert centres.min() >= embeddings.min() - 1e-2
    assert centres.max() <= embeddings.max() + 1e-2

    metrics = mlflow.get_run(report.run_id).data.metrics
    difference = report.int8.difference
    assert difference is not None
    assert (metrics["int8"], metrics["ms_float"], metrics["ms_int8"]) == (1, *FASTER)
    assert metrics["int8_difference"] == pytest.approx(difference.value)
    assert metrics["int8_difference_low"] == pytest.approx(difference.low)
    assert metrics["int8_difference_high"] == pytest.approx(difference.high)
    tags = mlflow.get_model_version("tiny_multilabel", str(report.challenger.version)).tags
    assert (tags["precision"], tags["precision_reason"]) == ("int8", report.int8.reason)


def test_a_report_from_before_int8_stays_readable() -> None:
    recorded = msgspec.to_builtins(msgspec.structs.replace(examples.evaluation(), int8=Int8(chosen=False, reason="")))
    del recorded["int8"]
    assert msgspec.convert(recorded, Evaluation).int8 is None
