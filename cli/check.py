"""`check`: everything that can be wrong with a model's folder, found before anything is deployed or trained.

What is read, built and asked is what deploying and training read, build and ask; nothing is downloaded and no service is called.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import yaml

from cli.create import NewModel
from infra_cdk.stage_facts import read_facts
from labelloop import model_config
from labelloop.errors import ConfigError
from labelloop.label_studio.label_config import LabelConfig
from labelloop.model_config import ModelConfig, ModelConfigs, ModelFolder
from labelloop.problem_types import PROBLEM_TYPES
from labelloop.records import ProblemTypeName
from labelloop.wording import counted

if TYPE_CHECKING:
    from torch import Tensor, nn

_IMAGES = 2  # in the batch that a network is tried on


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """One thing to mend: the file, the dotted key inside it (or nothing), and what is wrong with the remedy."""

    file: str
    key: str
    message: str

    @classmethod
    def of(cls, error: ConfigError) -> Problem:
        message = str(error).removeprefix(f"{error.where}: ")
        return cls(file=error.where, key=error.key, message=message.removeprefix(f"{error.key}: ") if error.key else message)

    def __str__(self) -> str:
        return f"{self.file}: {f'{self.key}: ' if self.key else ''}{self.message}"


def check(models: ModelConfigs, names: list[str], stage: str) -> dict[str, list[Problem]]:
    """All problems of the models named, by model; a model without any has an empty list.

    `stage` is the one that they would be deployed to. Raises `ConfigError` without models, and when the stage itself is wrong.
    """
    if not models.names:
        raise ConfigError(str(models.root), "holds no model; make one with: labelloop create-new-model")
    titles = _titles(models)
    found: dict[str, list[Problem]] = {}
    for name in names:
        found[name] = [Problem.of(error) for error in _problems(models, name, stage, titles)]
    return found


def _problems(models: ModelConfigs, name: str, stage: str, titles: Mapping[str, str]) -> Iterator[ConfigError]:
    folder = models[name]
    wrong = config_problems(folder)
    yield from wrong
    if wrong:  # there is nothing to measure the rest against
        yield from _template_alone(folder)
        return
    yield from _contradictions(folder, titles)
    wrong = list(_template_problems(folder))
    yield from wrong or _stage_problems(models, name, stage)  # the stage reads the template, too
    yield from _network_problems(folder)


def config_problems(folder: ModelFolder) -> list[ConfigError]:
    """Every wrong key of config.yaml.

    The loader stops at the first, so each key is read once more in the company of keys that are right.
    """
    try:
        _ = folder.config
    except ConfigError as error:
        first = error
    else:
        return []
    data = _given(folder)
    if data is None:
        return [first]
    found = {str(error): error for error in _each_alone(data, _sound(data), first.where)}
    found.setdefault(str(first), first)
    return list(found.values())


def _given(folder: ModelFolder) -> dict[Any, Any] | None:
    """What config.yaml holds; None where that is no mapping."""
    try:
        data = yaml.safe_load((folder.folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return data if isinstance(data, dict) else None


def _likely_type(data: Mapping[Any, Any]) -> ProblemTypeName:
    """The problem type that is most likely meant."""
    near = difflib.get_close_matches(str(data.get("problem_type")), PROBLEM_TYPES, n=1)
    default: ProblemTypeName = "detection" if "detection" in data else "classification"
    return next((kind for kind in PROBLEM_TYPES if kind in near), default)


def _sound(data: Mapping[Any, Any]) -> dict[str, Any]:
    """A config without a mistake, of the problem type that `data` most likely means."""
    kind = _likely_type(data)
    text = NewModel(name="sound", problem_type=kind, classes=("a", "b"), architecture="custom").render()["config.yaml"]
    config: dict[str, Any] = yaml.safe_load(text)
    return config


def _each_alone(data: Mapping[Any, Any], sound: Mapping[str, Any], where: str) -> Iterator[ConfigError]:
    """What the loader says of each key of `data` when the others are those of `sound`."""
    for key in _keys(data, sound):
        given, right = data.get(key), sound.get(key)
        inside = list(_each_inside(key, given, sound, where)) if isinstance(given, dict) and isinstance(right, dict) else []
        yield from inside
        if not inside:  # keys that are each right may contradict each other
            error = _read({**sound, key: given} if key in data else _without(sound, key), where)
            if error:
                yield error


def _each_inside(key: str, given: Mapping[Any, Any], sound: Mapping[str, Any], where: str) -> Iterator[ConfigError]:
    """What the loader says of each key of the section `key`."""
    right = sound[key]
    for inner in _keys(given, right):
        section = {**right, inner: given[inner]} if inner in given else _without(right, inner)
        error = _read({**sound, key: section}, where)
        contradicts = error and error.key == key and inner in given and inner in right  # what is not there but in `sound`
        if error and not contradicts:
            yield error


def _keys(first: Mapping[Any, Any], second: Mapping[Any, Any]) -> list[Any]:
    return list(dict.fromkeys([*first, *second]))


def _without(section: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in section.items() if name != key}


def _read(data: Mapping[Any, Any], where: str) -> ConfigError | None:
    try:
        model_config.parse(yaml.safe_dump(data, allow_unicode=True), where=where)
    except ConfigError as error:
        return error
    return None


def _titles(models: ModelConfigs) -> dict[str, str]:
    """The title of each model whose config can be read."""
    titles = {}
    for name in models.names:
        try:
            titles[name] = models[name].config.label_studio.title
        except ConfigError:
            continue
    return titles


def _contradictions(folder: ModelFolder, titles: Mapping[str, str]) -> Iterator[ConfigError]:
    """What is right by itself and wrong together."""
    file, config = str(folder.folder / "config.yaml"), folder.config
    same = [name for name, title in titles.items() if title == config.label_studio.title and name != config.name]
    if same:
        yield ConfigError(
            file, f"{', '.join(same)} has it too; Label Studio's project is found by it, give each its own", "label_studio.title"
        )
    for share, what in ((config.splits.test, "held out"), (1 - config.splits.test - config.splits.validation, "trained on")):
        least = math.ceil(round(1 / share, 6))
        if config.retrain.at[0] < least:
            yield ConfigError(
                file,
                f"of {counted(config.retrain.at[0], 'annotated image')} none would be {what}; begin with {least} or more",
                "retrain.at",
            )


def _template_problems(folder: ModelFolder) -> Iterator[ConfigError]:
    """What labelloop's loader and Label Studio's own rules say of labeling_template.xml."""
    try:
        _ = folder.label_config
    except ConfigError as error:
        yield error
        return
    from label_studio_sdk._legacy.exceptions import LabelStudioValidationErrorSentryIgnored, LSConfigParseException
    from label_studio_sdk.label_interface.interface import LabelInterface

    try:
        LabelInterface(folder.template).validate()  # type: ignore[no-untyped-call]
    except (LabelStudioValidationErrorSentryIgnored, LSConfigParseException, ValueError) as error:
        yield ConfigError(str(folder.folder / "labeling_template.xml"), f"Label Studio would refuse it: {error}")


def _template_alone(folder: ModelFolder) -> Iterator[ConfigError]:
    """What is wrong with labeling_template.xml whatever the classes are."""
    data = _given(folder)
    if data is None:
        return
    try:
        control = PROBLEM_TYPES[_likely_type(data)].control
        LabelConfig.parse(folder.template, control, where=str(folder.folder / "labeling_template.xml"))
    except ConfigError as error:
        yield error


def _stage_problems(models: ModelConfigs, name: str, stage: str) -> Iterator[ConfigError]:
    """Whether the stage can be deployed with this model."""
    from infra_cdk.stage import Stage

    facts = read_facts(stage)
    try:
        Stage(name=stage, models=_OneModel(models, name), facts=facts)
    except ConfigError as error:
        yield error


class _OneModel(ModelConfigs):
    """A folder of model configs as if it held one model only."""

    def __init__(self, models: ModelConfigs, name: str) -> None:
        super().__init__(models.root)
        self._name = name

    @cached_property
    def names(self) -> list[str]:
        return [self._name]


def _network_problems(folder: ModelFolder) -> Iterator[ConfigError]:
    """Builds the network without its weights, and tries it and the augmentation on images of noise.

    What model.py prints goes to standard error: of facts in JSON it is no part.
    """
    from training_jobs import network

    file, config = str(folder.folder / "model.py"), folder.config
    try:
        with contextlib.redirect_stdout(sys.stderr):
            built, augment = network.untrained(folder)
            if config.problem_type == "detection":
                _try_detector(config, built, augment, file)
            else:
                _try_classifier(config, built, augment, file)
    except ConfigError as error:
        yield ConfigError(str(folder.folder / Path(error.where).name), Problem.of(error).message, error.key)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a person's own code may raise anything
        yield ConfigError(file, f"{_place(error, file)}{type(error).__name__}: {error}; correct it")


def _try_classifier(config: ModelConfig, network: nn.Module, augment: Callable[[Tensor], Tensor], file: str) -> None:
    """Images to logits and embeddings, and images to images. Raises `ConfigError`."""
    import torch

    from training_jobs.heads import Logits

    images = torch.rand(_IMAGES, _channels(config), config.image.height, config.image.width)
    with torch.inference_mode():
        logits, _ = Logits(network).eval().examine(images)
        changed = augment(images.clone())
    wanted = (_IMAGES, len(config.classes))
    if not isinstance(logits, torch.Tensor) or tuple(logits.shape) != wanted:
        raise ConfigError(file, f"the network gives {_form(logits)} for {_IMAGES} images; it must give logits {list(wanted)}")
    if not torch.isfinite(logits).all():
        raise ConfigError(file, "the network's logits are not all finite; look for a division or a logarithm of nothing")
    if not isinstance(changed, torch.Tensor) or changed.shape != images.shape or changed.dtype != images.dtype:
        raise ConfigError(file, f"augmentation makes {_form(changed)} of {_form(images)}; it must keep their form")


def _try_detector(config: ModelConfig, network: nn.Module, augment: Callable[..., Any], file: str) -> None:
    """An image with its target to such, both to losses, and an image to the boxes that serve. Raises `ConfigError`."""
    import torch
    from torchvision import tv_tensors

    from training_jobs import heads

    height, width = config.image.height, config.image.width
    served = heads.detector(network)
    images = [tv_tensors.Image(torch.rand(_channels(config), height, width)) for _ in range(_IMAGES)]
    corners = torch.tensor([[0.25 * width, 0.25 * height, 0.75 * width, 0.75 * height]])
    boxes = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(height, width))
    target = {"boxes": boxes, "labels": torch.tensor([len(config.classes)])}  # the last class; 0 is the background
    image, after = augment(images[0], target)
    if image.shape != images[0].shape or len(after["boxes"]) != len(after["labels"]):
        raise ConfigError(file, f"augmentation must give back an image {_form(images[0])} and a label for each box")
    losses = network.train()(images, [target] * _IMAGES)
    if not all(torch.isfinite(loss).all() for loss in losses.values()):
        raise ConfigError(file, "the network's losses are not all finite; look for a division or a logarithm of nothing")
    with torch.inference_mode():
        _, scores = served.eval()(images[0][None])
    if scores.shape[2] != len(config.classes):
        raise ConfigError(
            file,
            f"the detector tells {counted(scores.shape[2], 'class', 'classes')}; make it one of len(config.classes) + 1, "
            "the background's first",
        )


def _channels(config: ModelConfig) -> int:
    return 1 if config.image.mode == "L" else 3


def _form(value: object) -> str:
    shape = getattr(value, "shape", None)
    return f"{type(value).__name__}" if shape is None else f"{value.dtype} {list(shape)}"  # type: ignore[attr-defined]


def _place(error: BaseException, file: str) -> str:
    """Where in `file` it went wrong."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: "
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"line {lines[-1]}: " if lines else ""
