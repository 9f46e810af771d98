"""create-new-model: what it writes is read by the real loader, and nothing half is ever left behind."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from label_studio_sdk.label_interface.interface import LabelInterface
from typer.testing import CliRunner, Result

from cli import create
from cli.create import FILES, NewModel
from cli.main import app
from labelloop import model_config
from labelloop.errors import ConfigError
from labelloop.label_studio.label_config import LabelConfig
from labelloop.model_config import ModelConfigs
from labelloop.problem_types import PROBLEM_TYPES
from tests.examples import REPOSITORY

AWKWARD = ["<b> & \"quoted\" 'too'", "yes", "null", "0", "a: b", "# no comment", "[x]", "Größe", "猫 🐈‍⬛", "$image"]


def invoke(root: Path, *words: str) -> Result:
    return CliRunner().invoke(app, list(words), env={"LABELLOOP_MODEL_CONFIGS": str(root)})


def new_model(root: Path, *words: str, name: str = "pets", kind: str = "classification", classes: str = "Cat,Dog") -> Result:
    """create-new-model with a network that needs no torch to be named."""
    options = ["--model", name, "--problem-type", kind, "--classes", classes]
    return invoke(
        root, "create-new-model", *options, *(() if "--architecture" in words else ("--architecture", "custom")), *words
    )


def files_of(root: Path) -> dict[str, str]:
    return {str(file.relative_to(root)): file.read_text() for file in sorted(root.rglob("*")) if file.is_file()}


def label_studio(template: str) -> Any:
    """A template as Label Studio's own code reads it."""
    return LabelInterface(template)


def keys_of(schema: dict[str, Any], definitions: dict[str, Any]) -> set[str]:
    """Dotted names of all keys that the schema knows."""
    for candidate in (schema, *schema.get("anyOf", [])):
        if "$ref" in candidate:
            return keys_of(definitions[candidate["$ref"].rpartition("/")[2]], definitions)
    found = set()
    for name, inner in schema.get("properties", {}).items():
        found |= {name, *(f"{name}.{key}" for key in keys_of(inner, definitions))}
    return found


@pytest.mark.parametrize("architecture", ["custom", "pretrained"])
@pytest.mark.parametrize("kind", PROBLEM_TYPES)
def test_a_new_model_is_read_by_the_real_loader(tmp_path: Path, kind: str, architecture: str) -> None:
    root = tmp_path / "not" / "yet"
    done = new_model(root, "--architecture", architecture, kind=kind)
    assert done.exit_code == 0, done.output
    assert {file.name for file in (root / "pets").iterdir()} == set(FILES)
    assert {file.name for file in root.iterdir()} == {"pets", "config.schema.json"}

    folder = ModelConfigs(root)["pets"]
    config = folder.config
    assert (config.name, config.problem_type, config.classes) == ("pets", kind, ["Cat", "Dog"])
    assert config.retrain.at == [100, 500, 1000]
    assert config.label_studio.title == "labelloop pets"
    assert folder.label_config.labels == ("Cat", "Dog")
    assert (config.detection is not None) == (kind == "detection")
    if architecture == "custom":
        assert config.architecture.weights == "none"
    else:
        assert config.architecture.weights == ("coco" if kind == "detection" else "imagenet")


@pytest.mark.parametrize("architecture", ["custom", "pretrained"])
@pytest.mark.parametrize("kind", PROBLEM_TYPES)
def test_its_files_keep_to_the_projects_style(tmp_path: Path, kind: str, architecture: str) -> None:
    new_model(tmp_path, "--architecture", architecture, kind=kind)
    for words in (["check"], ["format", "--check"]):
        command = [
            sys.executable,
            "-m",
            "ruff",
            *words,
            "--config",
            str(REPOSITORY / "pyproject.toml"),
            "--no-cache",
            str(tmp_path),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
    for name, text in files_of(tmp_path).items():
        assert text.endswith("\n"), name
        assert not text.endswith("\n\n"), name
        assert all(line == line.rstrip() and len(line) <= 130 for line in text.splitlines()), name


@pytest.mark.parametrize("kind", PROBLEM_TYPES)
def test_its_config_has_every_key_and_explains_it_as_the_schema_does(tmp_path: Path, kind: str) -> None:
    new_model(tmp_path, kind=kind)
    text = (tmp_path / "pets" / "config.yaml").read_text()
    schema = model_config.schema()
    keys = keys_of(schema, schema["$defs"])
    assert "hyperparameters.epochs" in keys
    left_out = (
        {"hyperparameters.label_smoothing"} if kind == "detection" else {key for key in keys if key.startswith("detection")}
    )
    left_out |= {key for key in keys if key.startswith("auto_accept")}  # which is off by default
    data = yaml.safe_load(text)
    for key in keys - left_out:
        section, _, name = key.rpartition(".")
        assert name in (data[section] if section else data), key
        assert f"# {create.describe(key)}" in text, key
    assert text.startswith("# yaml-language-server: $schema=../config.schema.json\n")
    assert json.loads((tmp_path / "pets" / ".." / "config.schema.json").read_text()) == schema


@pytest.mark.parametrize(("kind", "count"), [(kind, n) for kind in PROBLEM_TYPES for n in (1, 2, 10, 11)][1:])
def test_its_template_is_one_that_label_studio_takes(tmp_path: Path, kind: str, count: int) -> None:
    classes = AWKWARD[:count] + ["more"] * (count > 10)
    words = [word for name in classes for word in ("--classes", name)]
    done = invoke(tmp_path, "create-new-model", "--model", "pets", "--problem-type", kind, "--architecture", "custom", *words)
    assert done.exit_code == 0, done.output
    folder = ModelConfigs(tmp_path)["pets"]
    assert folder.config.classes == classes
    assert list(folder.label_config.labels) == classes
    label_studio(folder.template).validate()
    if kind != "detection":
        assert folder.template.count("hotkey=") == min(count, 10)
        # Label Studio scales an image to the page's width: below a high one nobody would see what was predicted.
        assert folder.template.index("</Choices>") < folder.template.index("<Image")


def test_boxes_can_be_asked_for_with_one_click(tmp_path: Path) -> None:
    """Interactive mode needs smart tools, and each class has a colour of its own."""
    new_model(tmp_path, kind="detection", classes=",".join(f"c{number}" for number in range(30)))
    root = label_studio((tmp_path / "pets" / "labeling_template.xml").read_text())
    box, point = root.get_control("box"), root.get_control("point")
    assert (box.attr["smart"], box.attr["canRotate"], point.attr["smart"]) == ("true", "false", "true")
    assert box.labels == point.labels
    assert len({label.attr["background"] for label in box.labels_attrs.values()}) == 30


def test_classes_that_are_keys_are_their_own_hotkeys(tmp_path: Path) -> None:
    new_model(tmp_path, classes="0,1,x")
    template = (tmp_path / "pets" / "labeling_template.xml").read_text()
    assert [f'value="{key}" hotkey="{key}"' in template for key in "01x"] == [True] * 3


@example(["Cat", "Dog"], "00\x85")  # YAML's own line break: it was written as such, and read as a space
@given(st.lists(st.text(min_size=1, max_size=30), min_size=2, max_size=5, unique=True), st.text(min_size=3, max_size=50))
@settings(max_examples=100)
def test_whatever_name_is_taken_is_read_again_the_same(classes: list[str], title: str) -> None:
    try:
        made = NewModel(name="pets", problem_type="classification", classes=classes, architecture="custom", title=title).render()
    except ConfigError:
        return  # a character that nobody can see
    config = model_config.parse(made["config.yaml"], where="config.yaml")
    labels = LabelConfig.parse(made["labeling_template.xml"], PROBLEM_TYPES["classification"].control)
    assert config.classes == classes == list(labels.labels)
    assert config.label_studio.title == title


WRONG: dict[str, tuple[dict[str, str], list[str], str]] = {
    # what is wrong → changed arguments, further options, what is said
    "name with a capital": ({"name": "Pets"}, [], "--model: 'Pets' is no name"),
    "name with a hyphen": ({"name": "my-pets"}, [], "--model: 'my-pets' is no name"),
    "name of one letter": ({"name": "p"}, [], "--model: 'p' is no name"),
    "long name": ({"name": "p" * 33}, [], "is no name of a model; use 2 to 32"),
    "name that leads elsewhere": ({"name": "../pets"}, [], "--model: '../pets' is no name"),
    "unknown problem": ({"kind": "poetry"}, [], "--problem-type: 'poetry' is none; choose classification, multilabel, detection"),
    "class twice": ({"classes": "Cat,Dog,Cat"}, [], "--classes: name Cat more than once"),
    "empty class": ({"classes": "Cat,,Dog"}, [], "--classes: holds an empty name"),
    "no class": ({"classes": ""}, [], "--classes: holds an empty name"),
    "one class": ({"classes": "Cat"}, [], "--classes: classification chooses between at least two"),
    "title with a line break of another kind": ({}, ["--title", "Cats\x85"], "--title: holds a line break"),
    "class with a line break": ({"classes": "Cat\nfish,Dog"}, [], "--classes: holds a line break"),
    "long class": ({"classes": f"Cat,{'D' * 201}"}, [], "--classes: Expected `str` of length <= 200"),
    "unknown network": (
        {},
        ["--architecture", "resnet1800"],
        "--architecture: 'resnet1800' does not suit classification; choose",
    ),
    "a detector that classifies": ({}, ["--architecture", "fcos_resnet50_fpn"], "does not suit classification"),
    "a classifier that detects": ({"kind": "detection"}, ["--architecture", "resnet18"], "ssdlite320_mobilenet_v3_large"),
    "weights of a network of one's own": ({}, ["--weights", "imagenet"], "--weights: a network of your own starts from nothing"),
    "unknown weights": ({}, ["--architecture", "pretrained", "--weights", "places365"], "--weights"),
    "a detector's weights": ({}, ["--architecture", "pretrained", "--weights", "coco"], "--weights"),
    "no size": ({}, ["--image-size", "large"], "--image-size: 'large' is not made of whole numbers"),
    "three sizes": ({}, ["--image-size", "8x8x8"], "--image-size: wants pixels"),
    "tiny size": ({}, ["--image-size", "4"], "--image-size: Expected `int` >= 8"),
    "tiny height": ({}, ["--image-size", "64x4"], "--image-size: Expected `int` >= 8"),
    "no counts": ({}, ["--train-at", "soon"], "--train-at: 'soon' is not made of whole numbers"),
    "falling counts": ({}, ["--train-at", "500,100"], "--train-at: `at` lists annotation counts in rising order"),
    "count of nothing": ({}, ["--train-at", "0"], "--train-at: Expected `int` >= 1"),
    "short title": ({}, ["--title", "ab"], "--title: Expected `str` of length >= 3"),
}


@pytest.mark.parametrize(("changed", "words", "said"), WRONG.values(), ids=WRONG.keys())
def test_a_mistake_names_the_option_and_leaves_nothing(
    tmp_path: Path, changed: dict[str, str], words: list[str], said: str
) -> None:
    done = new_model(tmp_path, *words, **changed)
    assert isinstance(done.exception, ConfigError)
    assert said in str(done.exception)
    assert list(tmp_path.rglob("*")) == []


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    new_model(tmp_path)
    (tmp_path / "pets" / "config.yaml").write_text("mine")
    before = files_of(tmp_path)
    done = new_model(tmp_path)
    assert isinstance(done.exception, ConfigError)
    assert "exists already; choose another name, or add --force" in str(done.exception)
    assert files_of(tmp_path) == before


def test_force_replaces_the_three_files_and_no_other(tmp_path: Path) -> None:
    new_model(tmp_path)
    (tmp_path / "pets" / "config.yaml").write_text("mine")
    (tmp_path / "pets" / "model.py").unlink()
    (tmp_path / "pets" / "notes.txt").write_text("mine too")
    assert new_model(tmp_path, "--force", kind="detection", classes="Bird").exit_code == 0
    folder = ModelConfigs(tmp_path)["pets"]
    assert (folder.config.problem_type, folder.label_config.labels) == ("detection", ("Bird",))
    assert "FCOS" in (tmp_path / "pets" / "model.py").read_text()
    assert (tmp_path / "pets" / "notes.txt").read_text() == "mine too"
    assert {file.name for file in tmp_path.iterdir()} == {"pets", "config.schema.json"}


@pytest.mark.parametrize("at", range(3))
def test_a_failed_replacement_brings_the_old_files_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    new_model(tmp_path)
    (tmp_path / "pets" / "model.py").unlink()
    before = files_of(tmp_path)
    replace, calls = Path.replace, []

    def full(self: Path, target: Path) -> Path:
        if self.parent.parent.name == ".pets.new" and self.parent.name == "pets":
            calls.append(target)
            if len(calls) > at:
                raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    done = new_model(tmp_path, "--force", kind="detection")
    assert isinstance(done.exception, ConfigError)
    assert "cannot be written: No space left on device" in str(done.exception)
    assert files_of(tmp_path) == before


KILLED = """
import os, signal, sys
from cli import create, main
def kill(*given):
    os.kill(os.getpid(), signal.SIGKILL)
setattr(create, sys.argv.pop(1), kill)
main.main()
"""


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("step", ["_validate", "write_schema", "_put_in_place"])
def test_a_killed_run_leaves_nothing_half_and_the_next_one_succeeds(tmp_path: Path, step: str, force: bool) -> None:
    if force:
        new_model(tmp_path)
    before = files_of(tmp_path)
    words = ["create-new-model", "--model", "pets", "--problem-type", "detection", "--classes", "Bird"]
    words += ["--architecture", "custom", *(["--force"] if force else [])]
    environment = {**os.environ, "LABELLOOP_MODEL_CONFIGS": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", KILLED, step, *words], env=environment, capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    assert ModelConfigs(tmp_path).names == (["pets"] if force else [])
    kept = {name: text for name, text in files_of(tmp_path).items() if not name.startswith(".pets.new/")}
    assert {name: text for name, text in kept.items() if name != "config.schema.json"} == {
        name: text for name, text in before.items() if name != "config.schema.json"
    }
    assert invoke(tmp_path, *words).exit_code == 0
    assert {entry.name for entry in tmp_path.iterdir()} == {"pets", "config.schema.json"}
    assert ModelConfigs(tmp_path)["pets"].config.problem_type == "detection"


def test_the_folder_may_not_be_writable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    done = new_model(tmp_path / "file")
    assert isinstance(done.exception, ConfigError)
    assert "cannot be written: Not a directory" in str(done.exception)


def test_options_reach_the_config(tmp_path: Path) -> None:
    words = ["--image-size", "96x64", "--train-at", "20,40", "--title", "Pets: who is it?"]
    assert new_model(tmp_path, *words).exit_code == 0
    config = ModelConfigs(tmp_path)["pets"].config
    assert (config.image.width, config.image.height, config.retrain.at) == (96, 64, [20, 40])
    assert config.label_studio.title == "Pets: who is it?"


@pytest.mark.parametrize(
    ("kind", "name", "weights", "size"),
    [
        ("classification", "resnet18", "imagenet", 224),
        ("classification", "efficientnet_b3", "imagenet", 300),
        ("multilabel", "mobilenet_v3_small", "none", 224),
        ("detection", "fcos_resnet50_fpn", "coco", 512),
        ("detection", "ssdlite320_mobilenet_v3_large", "imagenet", 320),
        ("detection", "fasterrcnn_mobilenet_v3_large_320_fpn", "s3://weights/detector.pt", 320),
    ],
)
def test_any_suitable_torchvision_network_is_taken(tmp_path: Path, kind: str, name: str, weights: str, size: int) -> None:
    done = new_model(tmp_path, "--architecture", name, "--weights", weights, kind=kind)
    assert done.exit_code == 0, done.exception
    config = ModelConfigs(tmp_path)["pets"].config
    assert (config.architecture.name, config.architecture.weights) == (name, weights)
    assert (config.image.width, config.image.height) == (size, size)


def test_it_says_what_comes_next(tmp_path: Path) -> None:
    said = new_model(tmp_path).output
    for command in ("check pets", "up", "setup-label-studio-project pets", "upload-images pets"):
        assert f"labelloop {command}" in said
    facts = json.loads(new_model(tmp_path, "--json", "--force").output)
    assert facts["model"] == "pets"
    assert facts["files"] == [str(tmp_path / "pets" / name) for name in FILES]
    assert facts["next"][0] == "labelloop check pets"


def test_the_repositorys_schema_is_the_codes() -> None:
    assert (REPOSITORY / "model_configs" / "config.schema.json").read_text() == create.schema_text(), (
        "run: labelloop config-schema --write"
    )


def test_the_schema_can_be_printed_and_written(tmp_path: Path) -> None:
    printed = invoke(tmp_path, "config-schema")
    assert json.loads(printed.output) == model_config.schema()
    (tmp_path / "config.schema.json").write_text("old")
    assert invoke(tmp_path, "config-schema", "--write").exit_code == 0
    assert {entry.name for entry in tmp_path.iterdir()} == {"config.schema.json"}
    assert (tmp_path / "config.schema.json").read_text() == printed.output


def test_there_is_one_small_detector(tmp_path: Path) -> None:
    """The template's network is that of the repository's example, which is trained and measured."""

    def network(file: Path) -> dict[str, str]:
        parts = ast.parse(file.read_text()).body
        named = {ast.unparse(part).partition("\n")[0].partition(" = ")[0]: ast.unparse(part) for part in parts}
        return {name: text for name, text in named.items() if not name.startswith(('"', "'", "from", "def augmentation"))}

    new_model(tmp_path, kind="detection")
    made = network(tmp_path / "pets" / "model.py")
    assert {"_WIDTHS", "class _Backbone(nn.Module):"} <= made.keys()
    assert made == network(REPOSITORY / "model_configs" / "digit_detector" / "model.py"), "bring the template up to date"
