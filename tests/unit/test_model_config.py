"""config.yaml: every mistake is an error that names file, key and remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from labelloop import model_config
from labelloop.errors import ConfigError, UnknownModelError
from labelloop.model_config import ModelConfigs, ModelFolder
from labelloop.settings import Settings
from tests import examples

GOOD = (examples.REPOSITORY / "model_configs" / "digits" / "config.yaml").read_text()


@pytest.mark.parametrize("model", examples.CONFIGS.names)
def test_every_model_of_the_repository_is_in_order(model: str) -> None:
    folder = examples.CONFIGS[model]
    assert folder.config.name == model
    assert set(folder.label_config.labels) == set(folder.config.classes)
    assert (examples.REPOSITORY / "model_configs" / model / "model.py").is_file()


def test_the_repository_has_models() -> None:
    assert "digits" in examples.CONFIGS.names


def changed(**sections: Any) -> str:
    """The digits config with keys replaced (dotted paths with `__`); None removes."""
    data = yaml.safe_load(GOOD)
    for path, value in sections.items():
        *parents, last = path.split("__")
        place = data
        for parent in parents:
            place = place[parent]
        if value is None:
            del place[last]
        else:
            place[last] = value
    return yaml.safe_dump(data)


WRONG: dict[str, tuple[str, str, str]] = {
    # what is wrong → text, key, remedy
    "unknown key": (changed(colour="red"), "", "unknown key 'colour'"),
    "misspelt key": (changed(hyperparameters__epoch=3), "hyperparameters", "did you mean 'epochs'?"),
    "misspelt section": (changed(retrian={}), "", "did you mean 'retrain'?"),
    "missing key": (changed(hyperparameters__epochs=None), "hyperparameters", "'epochs' is missing; add it"),
    "missing section": (changed(retrain=None), "", "'retrain' is missing; add it"),
    "text for a number": (changed(hyperparameters__epochs="many"), "hyperparameters.epochs", "Expected `int`"),
    "fraction for a whole number": (changed(image__width=16.5), "image.width", "Expected `int`"),
    "truth for a number": (changed(hyperparameters__epochs=True), "hyperparameters.epochs", "Expected `int`"),
    "no epochs": (changed(hyperparameters__epochs=0), "hyperparameters.epochs", ">= 1"),
    "tiny image": (changed(image__width=4), "image.width", ">= 8"),
    "no learning": (changed(hyperparameters__learning_rate=0), "hyperparameters.learning_rate", "> 0"),
    "endless learning rate": (changed(hyperparameters__learning_rate=float("inf")), "hyperparameters.learning_rate", "<= 100"),
    "no learning rate": (changed(hyperparameters__learning_rate=float("nan")), "hyperparameters.learning_rate", "> 0"),
    "endless factor": (changed(retrain__factor=float("inf")), "retrain.factor", "<= 1000"),
    "no factor": (changed(retrain__factor=float("nan")), "retrain.factor", "> 1"),
    "factor of one": (changed(retrain__factor=1), "retrain.factor", "> 1"),
    "endless cooldown": (changed(retrain__cooldown_minutes=float("inf")), "retrain.cooldown_minutes", "<= 525600"),
    "negative cooldown": (changed(retrain__cooldown_minutes=-1), "retrain.cooldown_minutes", ">= 0"),
    "falling counts": (changed(retrain__at=[100, 50]), "retrain", "rising order"),
    "equal counts": (changed(retrain__at=[100, 100]), "retrain", "rising order"),
    "no counts": (changed(retrain__at=[]), "retrain.at", "length >= 1"),
    "no holdout": (changed(splits__test=0), "splits.test", "> 0"),
    "nothing to train on": (changed(splits={"test": 0.6, "validation": 0.4}), "splits", "make their sum smaller than 1"),
    "one class": (changed(classes=["0"]), "classes", "at least two classes; add one, or use multilabel"),
    "class twice": (changed(classes=["0", "1", "1"]), "classes", "name 1 more than once; remove the doubles"),
    "unquoted digit classes": (changed(classes=[0, 1]), "classes[0]", "put it in quotes"),
    "unquoted yes": (changed(classes=[True, False]), "classes[0]", "put it in quotes"),
    "no class": (changed(problem_type="multilabel", classes=[]), "classes", "length >= 1"),
    "boxes of no detector": (changed(detection={}), "detection", "has no boxes; remove the section"),
    "coco of no detector": (changed(architecture__weights="coco"), "architecture.weights", "use imagenet, none or"),
    "unknown weights": (changed(architecture__weights="mine.pt"), "architecture", "none of: none, imagenet, coco, s3://"),
    "weights that are no state dict": (changed(architecture__weights="s3://b/k.onnx"), "architecture", "s3://bucket/key.pt"),
    "no weights": (changed(architecture__weights=None), "architecture", "'weights' is missing; add it"),
    "no name of the network": (changed(architecture__name=""), "architecture.name", "length >= 1"),
    "smoothed boxes": (changed(problem_type="detection"), "hyperparameters.label_smoothing", "remove the key"),
    "every box shown": (
        changed(problem_type="detection", detection={"score_threshold": 0}),
        "detection.score_threshold",
        "> 0",
    ),
    "other problem": (changed(problem_type="poetry"), "problem_type", "Invalid enum value 'poetry'"),
    "other mode": (changed(image__mode="CMYK"), "image.mode", "Invalid enum value 'CMYK'"),
    "bad name": (changed(name="Digits!"), "name", "matching regex"),
    "short title": (changed(label_studio__title="ab"), "label_studio.title", "length >= 3"),
    "no instance of SageMaker": (changed(training__instance_type="g5.xlarge"), "training.instance_type", "matching regex"),
    "little memory": (changed(serving__memory_mb=128), "serving.memory_mb", ">= 512"),
    "int8 whatever it costs": (changed(serving__int8="always"), "serving.int8", "Invalid enum value 'always'"),
    "list for a section": (changed(image=[16, 16]), "image", "Expected `object`"),
    "empty file": ("", "", "is empty"),
    "number as key": (GOOD + "\n1: x\n", "", "Expected `str`"),
    "no YAML": ("name: [digits", "", "is not valid YAML"),
    "braces without quotes": ("label_studio: {title: {{ project }}}", "", "a mapping or a list cannot be a key"),
    "key twice": (GOOD + "\nname: digits\n", "", "the key 'name' stands twice"),
    "key twice, as JSON": ('{"name": "pets", "name": "digits"}', "", "the key 'name' stands twice"),
    "nested key twice": (
        GOOD.replace("hyperparameters:\n", "hyperparameters:\n  epochs: 1\n"),
        "",
        "the key 'epochs' stands twice",
    ),
    "a tag that runs code": ("name: !!python/object/apply:os.getcwd []", "", "is not valid YAML"),
}


@pytest.mark.parametrize(("text", "key", "remedy"), WRONG.values(), ids=WRONG.keys())
def test_a_mistake_names_file_key_and_remedy(text: str, key: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        model_config.parse(text, where="model_configs/digits/config.yaml")
    assert caught.value.where == "model_configs/digits/config.yaml"
    assert caught.value.key == key
    assert remedy in str(caught.value)
    assert str(caught.value).startswith("model_configs/digits/config.yaml: ")


def test_defaults_fill_what_may_be_left_out() -> None:
    config = model_config.parse(changed(splits=None, training=None, serving=None), where="f")
    assert (config.splits.test, config.splits.validation, config.serving.memory_mb) == (0.2, 0.1, 1769)
    assert config.serving.int8 == "auto"
    assert config.images_prefix == "images/digits/"


def test_a_config_is_the_same_to_the_letter_after_it_has_been_json() -> None:
    """As functions read it: a default of another type than its key's would have another digest there."""
    config = changed(retrain={"at": [60], "factor": 10}, splits=None, serving=None, auto_accept={"precision": 0.99})
    text = msgspec.json.encode(model_config.parse(config, where="f")).decode()
    assert msgspec.json.encode(model_config.parse(text, where="f")).decode() == text


def test_the_schema_for_editors_knows_every_section() -> None:
    assert {"ModelConfig", "Retrain", "Splits", "Training"} <= model_config.schema()["$defs"].keys()


def folder(tmp_path: Path, *, name: str = "digits", config: str = GOOD, template: str | None = examples.TEMPLATE) -> ModelFolder:
    place = tmp_path / name
    place.mkdir()
    (place / "config.yaml").write_text(config)
    if template is not None:
        (place / "labeling_template.xml").write_text(template)
    return ModelConfigs(tmp_path)[name]


def test_name_and_folder_must_agree(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'digits' but the folder is 'numbers'; make them equal") as caught:
        _ = folder(tmp_path, name="numbers").config
    assert caught.value.key == "name"


def test_a_missing_template_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"labeling_template\.xml: no such file"):
        _ = folder(tmp_path, template=None).label_config


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    found = folder(tmp_path)
    (tmp_path / "digits" / "config.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        _ = found.config


IMAGE = '<Image name="image" value="$image"/>'
CHOICES = '<Choices name="digit" toName="image"><Choice value="0"/><Choice value="1"/></Choices>'
WRONG_TEMPLATES = {
    "missing and unknown classes": (f"<View>{IMAGE}{CHOICES.replace('1', 'one')}</View>", "missing: 1, 2.*unknown: one"),
    "no XML": ("<View>", "is not valid XML"),
    "no image": (f"<View>{CHOICES}</View>", "exactly one <Image> tag, has 0"),
    "two images": (f"<View>{IMAGE}{IMAGE}{CHOICES}</View>", "exactly one <Image> tag, has 2"),
    "no choices": (f"<View>{IMAGE}</View>", "exactly one <Choices> tag, has 0"),
    "several at once": (
        f"<View>{IMAGE}{CHOICES.replace('<Choices', "<Choices choice='multiple'")}</View>",
        'write choice="single"',
    ),
    "other target": (
        f"<View>{IMAGE}{CHOICES.replace("toName='image'", '')}</View>".replace('toName="image"', 'toName="x"'),
        "toName",
    ),
    "no task key": (f'<View><Image name="image" value="image.png"/>{CHOICES}</View>', "does not name a task key"),
    "no value": (f'<View><Image name="image"/>{CHOICES}</View>', "does not name a task key"),
    "no control name": (f"<View>{IMAGE}{CHOICES.replace('name=', 'title=', 1)}</View>", "<Choices> has no name"),
    "choice twice": (f"<View>{IMAGE}{CHOICES.replace('"1"', '"0"')}</View>", "a value of its own"),
    "a choice without a value": (f"<View>{IMAGE}{CHOICES.replace('value="1"', '')}</View>", "a value of its own"),
}


@pytest.mark.parametrize(("template", "message"), WRONG_TEMPLATES.values(), ids=WRONG_TEMPLATES.keys())
def test_a_template_that_does_not_fit_is_an_error(tmp_path: Path, template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        _ = folder(tmp_path, template=template).label_config
    assert caught.value.where.endswith("labeling_template.xml")


def test_an_unknown_model_suggests_the_nearest() -> None:
    with pytest.raises(UnknownModelError, match="did you mean 'digits'"):
        examples.CONFIGS["digit"]
    with pytest.raises(UnknownModelError, match=r"there are: .*digits"):
        examples.CONFIGS["xyz"]


def test_a_folder_without_models_is_no_error_and_a_missing_one_is(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    assert ModelConfigs(tmp_path).names == []
    with pytest.raises(ConfigError, match="no such folder"):
        _ = ModelConfigs(tmp_path / "missing").names


def test_a_config_of_another_ending_is_not_passed_over(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "pets").mkdir()
    (tmp_path / "pets" / "config.yml").write_text(GOOD)
    with pytest.raises(ConfigError, match=r"pets/config\.yml: .* call it config\.yaml"):
        _ = ModelConfigs(tmp_path).names


def test_the_environment_names_another_folder(tmp_path: Path) -> None:
    folder(tmp_path)
    found = ModelConfigs.find(Settings({"LABELLOOP_MODEL_CONFIGS": str(tmp_path)}))
    assert found.names == ["digits"]
    assert found.root == tmp_path


def test_without_it_the_packaged_folder_is_found() -> None:
    assert ModelConfigs.find(Settings({}))["digits"].config == examples.DIGITS
