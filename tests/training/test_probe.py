"""The linear probe: digits 5 to 9 told apart by what a network has learnt from 0 to 4."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient
from torch import nn

from cli.examples import Example, digits
from labelloop import imaging
from labelloop.artifacts import Bucket
from labelloop.model_config import ModelFolder
from labelloop.records import ManifestRow
from tests.training.opt_ml import OptMl, manifest_rows
from training_jobs import network, probe
from training_jobs.dataset import Dataset, Examples
from training_jobs.fit import fit, score
from training_jobs.probe import Seen

EARLY, LATE = ["0", "1", "2", "3", "4"], ["5", "6", "7", "8", "9"]
CONFIG = """
name: {name}
problem_type: classification
classes: {classes}
architecture: {{name: small, weights: {weights}}}
image: {{width: 8, height: 8, mode: L}}
hyperparameters: {{epochs: {epochs}, batch_size: 32, learning_rate: 0.004}}
label_studio: {{title: labelloop {name}}}
retrain: {{at: [10]}}
splits: {{test: 0.3, validation: 0.2}}
"""
MODEL = """
import torch
from torch import nn


def build_model(config, weights):
    network = nn.Sequential(
        nn.Conv2d(1, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 1, 1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, len(config.classes)),
    )
    if weights is not None:
        state = torch.load(weights, weights_only=True)
        network.load_state_dict({key: value for key, value in state.items() if not key.startswith("8.")}, strict=False)
    return network


def augmentation(config):
    return lambda images: images
"""


def model_folder(root: Path, name: str, classes: list[str], weights: str, epochs: int) -> ModelFolder:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG.format(name=name, classes=classes, weights=weights, epochs=epochs))
    (folder / "model.py").write_text(MODEL)
    choices = "".join(f'<Choice value="{label}"/>' for label in classes)
    tag = f'<Choices name="digit" toName="image" choice="single">{choices}</Choices>'
    (folder / "labeling_template.xml").write_text(f'<View><Image name="image" value="$image"/>{tag}</View>')
    return ModelFolder(folder)


def of_classes(classes: list[str]) -> list[Example]:
    return [image for image in digits.load() if image.truth[0].label in classes]


def examples(images: list[Example], folder: ModelFolder) -> Examples:
    pixels = [np.asarray(imaging.decode(image.image, width=8, height=8, mode="L")).reshape(8, 8, 1) for image in images]
    by_hash = {image.sha256: one for image, one in zip(images, pixels, strict=True)}
    rows = manifest_rows(images, folder.config)
    return Examples(rows, np.stack([by_hash[row.sha256] for row in rows]))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a network knows that has learnt the digits 0 to 4."""
    root = tmp_path_factory.mktemp("pretrained")
    folder = model_folder(root, "early", EARLY, "none", 4)
    some = examples(of_classes(EARLY), folder)
    fresh, augment = network.build(folder, None)
    nothing = Examples([], some.pixels[:0])
    trained = fit(
        fresh, Dataset(some, nothing, nothing), folder.config, folder.config.card(""), augment, root / "state", lambda _: None
    )
    file = root / "state.pt"
    torch.save(trained.state_dict(), file)
    return file


@pytest.fixture(scope="module")
def late(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return model_folder(tmp_path_factory.mktemp("late"), "late", LATE, "s3://weights/state.pt", 2)


@pytest.fixture(scope="module")
def images() -> list[Example]:
    """Ten of each class to learn from come first."""
    found = random.Random(0).sample(of_classes(LATE), 600)
    first = [image for label in LATE for image in [one for one in found if one.truth[0].label == label][:10]]
    return [*first, *(image for image in found if image not in first)]


def probed(folder: ModelFolder, file: Path, train: Examples) -> tuple[nn.Module, Seen]:
    fresh, _ = network.build(folder, file)
    seen = probe.look(fresh, folder, folder.config.card(""), train, None)
    assert seen is not None
    return probe.start(fresh, folder, train, seen.features), seen


def test_few_labels_suffice_where_the_features_are_there(late: ModelFolder, weights: Path, images: list[Example]) -> None:
    train, others = examples(images[:50], late), examples(images[50:], late)
    right = score(probed(late, weights, train)[0], others, late.config, late.config.card(""))
    assert right > 0.9


def test_the_fit_begins_where_the_probe_ended(late: ModelFolder, weights: Path, images: list[Example]) -> None:
    train = examples(images[:50], late)
    fresh, _ = network.build(late, weights)
    seen = probe.look(fresh, late, late.config.card(""), train, None)
    assert seen is not None
    copied = probe.start(fresh, late, train, seen.features)
    some = torch.from_numpy(train.pixels[:5]).permute(0, 3, 1, 2).float() / 255
    assert torch.equal(fresh.eval()(some), copied(some))
    with torch.no_grad():
        next(fresh.parameters()).zero_()
    assert not torch.equal(fresh(some), copied(some)), "the fit would change the probe, too"


def test_features_are_seen_once(
    late: ModelFolder,
    weights: Path,
    images: list[Example],
    new_bucket: Callable[[], Bucket],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bucket = new_bucket()
    cache = f"s3://{bucket.name}/cache/late/"
    few, more = examples(images[:30], late), examples(images[:40], late)

    def look(some: Examples, file: Path = weights) -> Seen:
        seen = probe.look(network.build(late, file)[0], late, late.config.card(""), some, cache)
        assert seen is not None
        return seen

    monkeypatch.setattr(probe, "_IN_MEMORY", 3)  # in several goes
    assert look(few).kept == 0
    before = look(more)
    assert before.kept == 30
    again = look(replace(more, mapped=np.zeros_like(more.mapped)))  # nobody looks at these
    assert again.kept == 40
    assert np.array_equal(before.features, again.features)
    assert all(key.startswith("cache/late/features/") for key in bucket.keys("cache/"))

    state = torch.load(weights, weights_only=True)
    torch.save({**state, "0.bias": state["0.bias"] + 1}, tmp_path / "other.pt")
    assert look(more, tmp_path / "other.pt").kept == 0, "another network sees other things"


def test_a_network_without_a_last_linear_layer_is_not_probed(late: ModelFolder, images: list[Example]) -> None:
    train = examples(images[:5], late)
    with_softmax = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Softmax(dim=1))
    assert probe.look(with_softmax, late, late.config.card(""), train, None) is None
    without_bias = nn.Sequential(nn.Flatten(), nn.Linear(64, 5, bias=False))
    assert probe.look(without_bias, late, late.config.card(""), train, None) is None


def test_the_validation_split_says_which_one_serves(late: ModelFolder, weights: Path, images: list[Example]) -> None:
    train, validation = examples(images[:50], late), examples(images[50:100], late)
    linear, seen = probed(late, weights, train)
    poor, _ = network.build(late, weights)
    none = Examples([], train.pixels[:0])
    data = Dataset(train, validation, none)
    serves, told = probe.better(linear, poor, data, late.config, late.config.card(""), seen)
    assert serves is linear
    assert told.chosen
    assert told.value is not None
    assert told.fitted is not None
    assert told.value > told.fitted
    serves, told = probe.better(poor, linear, data, late.config, late.config.card(""), seen)
    assert (serves, told.chosen) == (linear, False)
    serves, told = probe.better(linear, poor, Dataset(train, none, none), late.config, late.config.card(""), seen)
    assert (serves, told.chosen, told.value) == (poor, False, None)


def test_a_class_without_examples_is_not_what_is_predicted(late: ModelFolder, weights: Path, images: list[Example]) -> None:
    train = examples([image for image in images[:50] if image.truth[0].label != "9"], late)
    linear, _ = probed(late, weights, train)
    some = examples(images[50:], late)
    with torch.no_grad():
        guesses = linear(torch.from_numpy(some.pixels).permute(0, 3, 1, 2).float() / 255).argmax(1)
    assert not (guesses == LATE.index("9")).any()


def test_a_whole_job_begins_with_it(
    late: ModelFolder,
    weights: Path,
    images: list[Example],
    run_here: Callable[[OptMl], int],
    mlflow: MlflowClient,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("LABELLOOP_MODEL_CONFIGS", str(late.folder.parent))
    rows: list[ManifestRow] = manifest_rows(images[:150], late.config)
    job = OptMl(tmp_path / "job").lay_out(
        images[:150], rows, job_name="job-late", model="late", weights=("state.pt", weights.read_bytes())
    )
    assert run_here(job) == 0
    report = job.evaluation
    assert report.probe is not None
    assert report.probe.value is not None
    assert report.probe.value > 0.9
    assert report.timing is not None
    assert report.timing.seconds.keys() >= {"probe", "fit"}
    version = mlflow.get_model_version("late", str(report.challenger.version))
    assert version.tags["linear_probe"] in ("serves", "the fit began with it")
