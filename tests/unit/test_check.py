"""check: every wrong key, type, contradiction, template and network of a model gives file, key and remedy; all are listed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner, Result

from cli.create import NewModel, create
from cli.main import app
from labelloop.errors import ConfigError
from labelloop.model_config import ModelConfigs
from labelloop.problem_types import PROBLEM_TYPES
from tests import examples
from tests.unit.test_main import labelloop
from training_jobs.export import export
from training_jobs.network import untrained


def invoke(root: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["check", *words], env={"LABELLOOP_MODEL_CONFIGS": str(root)})


def problems(root: Path, *words: str) -> list[tuple[str, str, str]]:
    """(file, key, message) of all problems; the exit code agrees."""
    done = invoke(root, "--json", *words)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    found = [
        (Path(problem["file"]).name, problem["key"], problem["message"])
        for of_model in json.loads(done.stdout).values()
        for problem in of_model
    ]
    assert done.exit_code == (2 if found else 0)
    return found


@pytest.fixture(scope="session")
def sound_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each problem type, as create-new-model writes it with a network of one's own."""
    root = tmp_path_factory.mktemp("sound")
    for kind in PROBLEM_TYPES:
        create(root, NewModel(name=kind, problem_type=kind, classes=("Cat", "Dog"), architecture="custom", image_size=(32,)))
    return root


@pytest.fixture
def models(sound_models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound_models, tmp_path / "models"))


def change(root: Path, model: str, **changes: Any) -> None:
    """Rewrite keys of a config, nested ones as `a__b`; `...` removes the key."""
    file = root / model / "config.yaml"
    data = yaml.safe_load(file.read_text())
    for path, value in changes.items():
        place = data
        *sections, last = path.split("__")
        for section in sections:
            place = place[section]
        if value is ...:
            del place[last]
        else:
            place[last] = value
    file.write_text(yaml.safe_dump(data))


@pytest.mark.parametrize("model", examples.CONFIGS.names)
def test_every_model_of_the_repository_is_in_order(model: str) -> None:
    assert problems(examples.REPOSITORY / "model_configs", model) == []


def test_what_create_new_model_writes_is_in_order(sound_models: Path) -> None:
    done = invoke(sound_models)
    assert done.exit_code == 0, done.output
    assert [line.split() for line in done.stdout.splitlines()] == [["ok", name] for name in sorted(PROBLEM_TYPES)]


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("kind", PROBLEM_TYPES)
@pytest.mark.parametrize("size", [(8, 8), (9, 31), (200, 60)])
def test_ones_own_network_takes_any_size_and_mode(tmp_path: Path, kind: str, mode: str, size: tuple[int, int]) -> None:
    create(tmp_path, NewModel(name="own", problem_type=kind, classes=("a", "b", "c"), architecture="custom", image_size=size))
    change(tmp_path, "own", image__mode=mode)
    assert problems(tmp_path) == []


@pytest.mark.parametrize(
    ("kind", "weights"),
    [*((kind, None) for kind in PROBLEM_TYPES), ("multilabel", "none"), ("detection", "s3://weights/network.pt")],
)
def test_the_default_torchvision_network_is_in_order(tmp_path: Path, kind: str, weights: str | None) -> None:
    create(tmp_path, NewModel(name="bought", problem_type=kind, classes=("a", "b"), weights=weights))
    assert problems(tmp_path) == []


WRONG: dict[str, tuple[str, dict[str, Any], str, str]] = {
    # what is wrong → model, changes, key, remedy
    "unknown key": ("classification", {"colour": "red"}, "", "unknown key 'colour'"),
    "misspelt key": ("classification", {"hyperparameters__epoch": 3}, "hyperparameters", "did you mean 'epochs'?"),
    "misspelt section": ("multilabel", {"retrian": {}}, "", "did you mean 'retrain'?"),
    "missing key": ("detection", {"hyperparameters__epochs": ...}, "hyperparameters", "'epochs' is missing; add it"),
    "missing section": ("classification", {"architecture": ...}, "", "'architecture' is missing; add it"),
    "text for a number": ("classification", {"hyperparameters__epochs": "many"}, "hyperparameters.epochs", "Expected `int`"),
    "list for a section": ("classification", {"image": [16, 16]}, "image", "Expected `object`"),
    "no epochs": ("classification", {"hyperparameters__epochs": 0}, "hyperparameters.epochs", ">= 1"),
    "unquoted classes": ("classification", {"classes": [0, 1]}, "classes[0]", "put it in quotes"),
    "other problem": ("classification", {"problem_type": "poetry"}, "problem_type", "Invalid enum value 'poetry'"),
    "other mode": ("classification", {"image__mode": "CMYK"}, "image.mode", "Invalid enum value 'CMYK'"),
    "other folder": ("classification", {"name": "elsewhere"}, "name", "make them equal"),
    "long title": ("classification", {"label_studio__title": "t" * 51}, "label_studio.title", "length <= 50"),
    "weights of elsewhere": ("classification", {"architecture__weights": "http://x/y.pt"}, "architecture", "s3://bucket/key.pt"),
    # contradictions
    "class twice": ("multilabel", {"classes": ["Cat", "Dog", "Cat"]}, "classes", "Cat more than once; remove the doubles"),
    "one class to choose from": ("classification", {"classes": ["Cat"]}, "classes", "at least two classes; add one"),
    "boxes without detection": ("multilabel", {"detection": {}}, "detection", "multilabel has no boxes; remove the section"),
    "a detector's weights": ("classification", {"architecture__weights": "coco"}, "architecture.weights", "use imagenet, none"),
    "smoothed boxes": (
        "detection",
        {"hyperparameters__label_smoothing": 0.1},
        "hyperparameters.label_smoothing",
        "remove the key",
    ),
    "nothing to train on": ("classification", {"splits": {"test": 0.6, "validation": 0.4}}, "splits", "smaller than 1"),
    "falling counts": ("classification", {"retrain__at": [100, 50]}, "retrain", "rising order"),
    "first training without holdout": ("classification", {"retrain__at": [4, 50]}, "retrain.at", "held out; begin with 5"),
    "first training without images": (
        "classification",
        {"retrain__at": [4], "splits": {"test": 0.5, "validation": 0.4}},
        "retrain.at",
        "trained on; begin with 10",
    ),
    # networks
    "unknown network": ("detection", {"architecture__name": "resnet18"}, "architecture.name", "ssdlite320_mobilenet_v3_large"),
    "a classifier's detector": ("classification", {"architecture__name": "fcos_resnet50_fpn"}, "architecture.name", "resnet18"),
    "grey for a pretrained network": (
        "classification",
        {"architecture": {"name": "resnet18", "weights": "imagenet"}, "image__mode": "L"},
        "image.mode",
        "RGB",
    ),
    "grey for a pretrained detector": (
        "detection",
        {"architecture": {"name": "fcos_resnet50_fpn", "weights": "coco"}, "image__mode": "L"},
        "image.mode",
        "RGB",
    ),
    "weights for one's own network": (
        "classification",
        {"architecture__weights": "imagenet"},
        "architecture.weights",
        "write none",
    ),
}


@pytest.mark.parametrize(("model", "changes", "key", "remedy"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_config_gives_file_key_and_remedy(
    models: Path, model: str, changes: dict[str, Any], key: str, remedy: str
) -> None:
    change(models, model, **changes)
    found = problems(models, model)
    assert len(found) == 1, found
    file, found_key, message = found[0]
    assert (file, found_key) == ("config.yaml", key)
    assert remedy in message

    said = invoke(models, model).stdout
    assert f"{models / model / 'config.yaml'}: {f'{key}: ' if key else ''}{message}" in said


def test_all_problems_of_all_models_are_listed(models: Path) -> None:
    change(
        models,
        "classification",
        colour="red",
        hyperparameters__epochs=0,
        hyperparameters__seeds=1,
        hyperparameters__learning_rate=...,
        image__width="wide",
        splits__test=0.9,
        splits__validation=0.5,
        retrain__at=[3, 2],
        label_studio__title="x",
        classes=["one"],
    )
    (models / "classification" / "labeling_template.xml").write_text("<View>")
    change(models, "detection", detection__max_boxes=0, problem_type="detektion")
    (models / "multilabel" / "labeling_template.xml").unlink()
    found = problems(models)
    assert {(name, key) for name, key, _ in found} == {
        *[("config.yaml", key) for key in ("", "hyperparameters.epochs", "hyperparameters", "image.width", "splits", "retrain")],
        *[("config.yaml", key) for key in ("label_studio.title", "classes", "detection.max_boxes", "problem_type")],
        ("labeling_template.xml", ""),
    }
    assert len(set(found)) == len(found) == 13
    of_section = [message for _, key, message in found if key == "hyperparameters"]
    assert [name in message for name, message in zip(("seeds", "learning_rate"), of_section, strict=True)] == [True, True]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: [a", "is not valid YAML"),
        ("{old}\nname: detection\n", "the key 'name' stands twice"),
        ("", "is empty"),
        ("- a", "Expected `object`"),
    ],
)
def test_a_config_that_is_no_config_is_one_problem(models: Path, text: str, said: str) -> None:
    config = models / "detection" / "config.yaml"
    config.write_text(text.replace("{old}", config.read_text()))
    [(file, key, message)] = problems(models, "detection")
    assert (file, key) == ("config.yaml", "")
    assert said in message


TEMPLATES: dict[str, tuple[str, Callable[[str], str], str]] = {
    # what is wrong → model, change of the template, what is said
    "no XML": ("detection", lambda xml: xml.replace("</View>", ""), "is not valid XML"),
    "other classes": ("multilabel", lambda xml: xml.replace('"Dog"', '"Dogs"'), "missing: Dog; unknown: Dogs"),
    "several at once": ("classification", lambda xml: xml.replace("single", "multiple"), 'write choice="single"'),
    "one at a time": ("multilabel", lambda xml: xml.replace("multiple", "single"), 'write choice="multiple"'),
    "rotation": ("detection", lambda xml: xml.replace(' canRotate="false"', ""), 'write canRotate="false"'),
    "choices for boxes": ("detection", lambda xml: re.sub("RectangleLabels", "PolygonLabels", xml), "one <RectangleLabels> tag"),
    "a point's class": (
        "detection",
        lambda xml: "Cow".join(xml.rsplit("Dog", 1)),
        "<KeyPointLabels> offers Cow, <RectangleLabels> does not",
    ),
    # what only Label Studio minds
    "a name twice": ("detection", lambda xml: xml.replace('name="point"', 'name="box"'), "non-unique names"),
    "a target that is not": (
        "detection",
        lambda xml: xml.replace('name="point" toName="image"', 'name="point" toName="picture"'),
        "Label Studio would refuse it",
    ),
}


@pytest.mark.parametrize(("model", "edit", "said"), TEMPLATES.values(), ids=TEMPLATES.keys())
def test_a_wrong_template_gives_file_and_remedy(models: Path, model: str, edit: Callable[[str], str], said: str) -> None:
    file = models / model / "labeling_template.xml"
    before = file.read_text()
    file.write_text(edit(before))
    assert file.read_text() != before
    [(name, _, message)] = problems(models, model)
    assert name == "labeling_template.xml"
    assert said in message


HEAD = """
import torch
from torch import nn

def build_model(config, weights):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, len(config.classes)))

def augmentation(config):
    return lambda images: images
"""
NETWORKS: dict[str, tuple[str, str, str]] = {
    # what is wrong → model, model.py, what is said
    "no Python": ("classification", "def build_model(:", "line 1: SyntaxError"),
    "no such module": ("classification", HEAD + "import no_such_module\n", "line 10: ModuleNotFoundError"),
    "an end of the process": ("classification", HEAD + "import sys\nsys.exit(0)\n", "line 11: SystemExit"),
    "no network": ("classification", HEAD.replace("build_model", "make_model"), "build_model"),
    "no augmentation": ("classification", HEAD.replace("augmentation", "augment"), "augmentation"),
    "an error of its own": ("multilabel", HEAD.replace("len(config.classes)", "config.classes_"), "line 6: AttributeError"),
    "other classes": ("multilabel", HEAD.replace("len(config.classes)", "7"), "gives torch.float32 [2, 7] for 2 images"),
    "other size": ("classification", HEAD.replace("32 * 32", "16"), "RuntimeError"),
    "no finite logits": (
        "classification",
        HEAD.replace("nn.Flatten(),", "nn.Flatten(), nn.Threshold(2, float('nan')),"),
        "not all finite",
    ),
    "no layer whose input stands for an image": (
        "classification",
        HEAD.replace("nn.Linear(3 * 32 * 32, len(config.classes))", "nn.AdaptiveAvgPool1d(len(config.classes))"),
        "does not end in a linear layer",
    ),
    "images of another size": ("classification", HEAD.replace("images: images", "images: images[:, :, ::2]"), "keep their form"),
    "images of another type": ("classification", HEAD.replace("images: images", "images: images.double()"), "keep their form"),
    "a classifier for a detector": ("detection", HEAD, "it has to be torchvision's SSD"),
}


@pytest.mark.parametrize(("model", "source", "said"), NETWORKS.values(), ids=NETWORKS.keys())
def test_a_wrong_network_gives_file_and_remedy(models: Path, model: str, source: str, said: str) -> None:
    (models / model / "model.py").write_text(source)
    [(file, _, message)] = problems(models, model)
    assert file == "model.py"
    assert said in message


def test_the_network_that_those_are_made_from_is_right(models: Path) -> None:
    (models / "classification" / "model.py").write_text(HEAD)
    assert problems(models, "classification") == []


def test_what_a_network_prints_is_no_part_of_the_json(models: Path) -> None:
    source = f"print('loaded')\n{HEAD.replace('    return nn', '    print(config)\n    return nn')}"
    (models / "classification" / "model.py").write_text(
        source.replace("lambda images: images", "lambda images: print(9) or images")
    )
    assert problems(models, "classification") == []


def test_a_detector_of_other_classes_is_found(models: Path) -> None:
    file = models / "detection" / "model.py"
    for wrong in ("len(config.classes)", "len(config.classes) + 2"):
        file.write_text(file.read_text().replace("len(config.classes) + 1", wrong))
        assert [name for name, _, _ in problems(models, "detection")] == ["model.py"], wrong
        file.write_text(file.read_text().replace(wrong, "len(config.classes) + 1"))


def test_a_missing_network_is_named(models: Path) -> None:
    (models / "classification" / "model.py").unlink()
    [(file, _, message)] = problems(models, "classification")
    assert file == "model.py"
    assert "no such file" in message


def test_two_models_may_not_share_a_title(models: Path) -> None:
    for name in ("classification", "detection"):
        change(models, name, label_studio__title="the same")
    found = problems(models)
    assert [(file, key) for file, key, _ in found] == [("config.yaml", "label_studio.title")] * 2
    assert ["detection has it too" in found[0][2], "classification has it too" in found[1][2]] == [True, True]


def test_a_name_may_be_too_long_for_one_stage_and_not_for_another(models: Path) -> None:
    name = "n" * 31
    (models / "multilabel").rename(models / name)
    change(models, name, name=name)
    assert problems(models, name, "--stage", "prod") == []
    [(_, key, message)] = problems(models, name, "--stage", "local")
    assert (key, "too long for a training job's name in the stage 'local'" in message) == ("name", True)


def test_a_wrong_stage_is_no_models_fault(models: Path) -> None:
    done = invoke(models, "--stage", "My-Stage")
    assert isinstance(done.exception, ConfigError)
    assert (done.exception.key, done.stdout) == ("stage", "")
    assert "'My-Stage' is no stage name; use up to 16" in str(done.exception)


def test_a_model_that_is_not_there_is_said(models: Path, tmp_path: Path) -> None:
    done = labelloop("check", "detections", folder=models, LABELLOOP_MODEL_CONFIGS=str(models))
    assert (done.returncode, "did you mean 'detection'?" in done.stderr) == (2, True)
    (tmp_path / "empty").mkdir()
    done = labelloop("check", folder=models, LABELLOOP_MODEL_CONFIGS=str(tmp_path / "empty"))
    assert (done.returncode, "holds no model; make one with: labelloop create-new-model" in done.stderr) == (2, True)


@pytest.mark.parametrize("kind", PROBLEM_TYPES)
def test_ones_own_network_can_be_served(sound_models: Path, tmp_path: Path, kind: str) -> None:
    """The network of the template, as the training job exports it: onnxruntime gives what torch gives."""
    folder = ModelConfigs(sound_models)[kind]
    config = folder.config
    card = config.card("0" * 64)
    pixels = np.random.default_rng(0).integers(0, 256, (5, config.image.height, config.image.width, 3), dtype=np.uint8)
    network, _ = untrained(folder)
    _, difference = export(network, card, pixels, tmp_path / "model.onnx")
    assert difference < 1e-3
