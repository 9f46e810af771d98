"""The network and the augmentation of a model folder's own model.py."""

from __future__ import annotations

import importlib.resources
import importlib.util
from pathlib import Path
from types import ModuleType

import msgspec
from torch import nn

from labelloop.errors import ConfigError
from labelloop.model_config import ModelConfig, ModelFolder
from training_jobs import architectures
from training_jobs.problem import Augment

_FUNCTIONS = ("build_model(config, weights)", "augmentation(config)")


def build(folder: ModelFolder, weights: Path | None) -> tuple[nn.Module, Augment]:
    """What the training job trains. `weights` is what `architectures.fetch` gave. Raises `ConfigError`."""
    return _built(folder, folder.config, weights)


def untrained(folder: ModelFolder) -> tuple[nn.Module, Augment]:
    """As `build`, but as if the config asked for no weights: for trying out, without a download. Raises `ConfigError`."""
    check(folder)
    architecture = msgspec.structs.replace(folder.config.architecture, weights="none")
    return _built(folder, msgspec.structs.replace(folder.config, architecture=architecture), None)


def check(folder: ModelFolder) -> None:
    """Whether torchvision has the network and the weights of the config. Raises `ConfigError`.

    A name that torchvision does not know is a network of model.py's own.
    """
    architecture = folder.config.architecture
    if architectures.known(architecture.name):
        architectures.check(folder.config)
    elif architecture.weights in ("imagenet", "coco"):
        raise ConfigError(
            "config.yaml",
            f"{architecture.weights}'s weights are published for torchvision's networks, and {architecture.name!r} is none; "
            "write none, or the address of a file in S3",
            "architecture.weights",
        )


def _built(folder: ModelFolder, config: ModelConfig, weights: Path | None) -> tuple[nn.Module, Augment]:
    module = _module(folder)
    return module.build_model(config, weights), module.augmentation(config)


def _module(folder: ModelFolder) -> ModuleType:
    """model.py, loaded. Raises `ConfigError` when it lacks a function."""
    with importlib.resources.as_file(folder.folder / "model.py") as file:
        spec = importlib.util.spec_from_file_location(f"model_configs.{folder.config.name}.model", file)
        if spec is None or spec.loader is None or not file.is_file():
            raise ConfigError(file, f"no such file; it defines {' and '.join(_FUNCTIONS)}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    for function in _FUNCTIONS:
        if not callable(getattr(module, function.partition("(")[0], None)):
            raise ConfigError(file, f"defines no function {function}")
    return module
