"""torchvision's networks by name, for the classes of a config, starting from random, ImageNet's, COCO's or one's own weights.

What is not the head, which depends on the number of classes, has to fit by name and shape: nothing stays random unsaid.
"""

from __future__ import annotations

import difflib
import pickle
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.transforms import v2

from labelloop.errors import ConfigError
from labelloop.model_config import ModelConfig
from labelloop.records import ProblemTypeName
from labelloop.wording import counted

DEFAULTS: dict[ProblemTypeName, str] = {
    "classification": "mobilenet_v3_large",
    "multilabel": "mobilenet_v3_large",
    "detection": "ssdlite320_mobilenet_v3_large",
}

# Detectors with the classifier that is their backbone.
_BACKBONES = {
    "ssdlite320_mobilenet_v3_large": "mobilenet_v3_large",
    "fasterrcnn_mobilenet_v3_large_320_fpn": "mobilenet_v3_large",
    "retinanet_resnet50_fpn_v2": "resnet50",
    "fcos_resnet50_fpn": "resnet50",
}
_UNSUITABLE = dict.fromkeys(
    ("googlenet", "inception_v3"), "gives the outputs of its auxiliary classifiers, too, while it is trained"
)
_ALIKE = 4  # images that are changed alike: a transform draws once for all that it is given
_LISTED = 3  # misfits named; the rest is counted


def suitable(problem_type: ProblemTypeName) -> list[str]:
    """torchvision's names for a problem type."""
    if problem_type == "detection":
        return sorted(_BACKBONES)
    return sorted(set(models.list_models(module=models)) - set(_UNSUITABLE))


def known(name: str) -> bool:
    """Whether torchvision has a network of that name, suitable or not."""
    return name in models.list_models()


def check(config: ModelConfig) -> None:
    """Raises `ConfigError` when torchvision has no such network for the problem type, or its images or weights do not suit it."""
    name, image = config.architecture.name, config.image
    names = suitable(config.problem_type)
    if name not in names:
        reason = _UNSUITABLE.get(name, f"is none of torchvision's networks for {config.problem_type}")
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise _config_error(f"{name!r} {reason}; {hint}suitable are: {', '.join(names)}", "architecture.name")
    if image.mode != "RGB":
        raise _config_error(f"{name} takes colour images; write RGB, grey images are then converted", "image.mode")
    _try(config)


def fetch(config: ModelConfig, channel_file: Path | None) -> Path | None:
    """The file of weights that the config asks for; None where it asks for none.

    `channel_file` is where the job's weights channel puts a file of S3; others come from torchvision's server, checked
    against the hash in their name, and are kept in torch's cache. Raises `ConfigError`.
    """
    weights = config.architecture.weights
    if weights == "none":
        return None
    if config.architecture.weights_uri is not None:
        if channel_file is None or not channel_file.is_file():
            raise _weights_error(f"{weights} is not in the job's weights channel; look whether it lies there")
        return channel_file
    url = _published(config).url
    name = _file_name(url)
    file = Path(torch.hub.get_dir(), "checkpoints", name)
    expected = re.search(r"-([a-f0-9]{8,})\.", name)
    if expected is None:
        raise _weights_error(f"{url} has no hash in its name; put the file into S3 and write weights: s3://bucket/{name}")
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(file), hash_prefix=expected[1], progress=False)
        except (OSError, RuntimeError) as error:  # RuntimeError: another hash
            raise _weights_error(
                f"{url} cannot be downloaded ({error}); where the training job has no way to it, put the file {name} into S3 "
                f"and write weights: s3://bucket/{name}"
            ) from error
    return file


def build(config: ModelConfig, weights: Path | None) -> nn.Module:
    """torchvision's network of the config's name with a head for its classes.

    classification and multilabel: float32 `[N, 3, height, width]` between 0 and 1 → logits `[N, classes]`; detection: one of
    torchvision's detectors, which takes images of the config's size as they are. `weights` is what `fetch` gave. Raises
    `ConfigError`.
    """
    check(config)
    if (weights is None) != (config.architecture.weights == "none"):
        raise _weights_error(f"{config.architecture.weights!r}, but build_model is given {weights or 'no file'}")
    state = _load(weights) if weights else None
    return _detector(config, state) if config.problem_type == "detection" else _classifier(config, state)


def augmentation(config: ModelConfig) -> Callable[..., Any]:
    """Mirrored, a little turned (boxes are not), moved, larger or smaller, brighter or darker.

    classification and multilabel: takes and returns a batch float32 `[N, channels, height, width]` between 0 and 1;
    detection: an image and its target, as torchvision.transforms.v2 does.
    """
    change: Callable[..., Any] = v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomAffine(
                degrees=0 if config.problem_type == "detection" else 10,
                translate=(0.1, 0.1),
                scale=(0.8, 1.25),
                interpolation=v2.InterpolationMode.BILINEAR,
            ),
            v2.ColorJitter(brightness=0.3, contrast=0.3),
        ]
    )
    if config.problem_type == "detection":
        return change
    return lambda images: torch.cat([change(some) for some in torch.split(images, _ALIKE)])


class Normalised(nn.Module):
    """Images between 0 and 1 as a network was pretrained on them."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


def _classifier(config: ModelConfig, state: dict[str, Tensor] | None) -> nn.Module:
    name = config.architecture.name
    network = models.get_model(name, weights=None, num_classes=len(config.classes))
    if state is not None:
        _fill(network, _modern(state), head=_last_layer(network))
    published = models.get_model_weights(name).DEFAULT.transforms()
    return nn.Sequential(Normalised(published.mean, published.std), network)


def _detector(config: ModelConfig, state: dict[str, Tensor] | None) -> nn.Module:
    name, classes = config.architecture.name, len(config.classes) + 1  # torchvision's label 0 is the background
    whole = state is not None and any(key.startswith("backbone.") for key in state)
    if state is None:
        network = _plain_detector(name, classes)
    elif whole:
        network = _like_published(name, classes)
        _fill(network, state, head=_detector_head(name))
    else:
        backbone = models.get_model(_BACKBONES[name], weights=None)
        _fill(backbone, state, head=_last_layer(backbone))
        network = _on_backbone(name, classes, backbone.state_dict())
    transform: Any = network.transform
    if state is not None and not whole:
        published = _backbone_weights(name).transforms()
        transform.image_mean, transform.image_std = published.mean, published.std
    transform.fixed_size = (config.image.width, config.image.height)
    return network


def _plain_detector(name: str, classes: int) -> nn.Module:
    network: nn.Module = models.get_model(name, weights=None, weights_backbone=None, num_classes=classes)
    return network


def _like_published(name: str, classes: int) -> nn.Module:
    """Built as torchvision builds it for its COCO weights, with random ones; frozen where those are frozen."""
    if name == "ssdlite320_mobilenet_v3_large":  # the one that was trained from nothing: with a smaller tail, nothing frozen
        return _plain_detector(name, classes)
    return _on_backbone(name, classes, models.get_model(_BACKBONES[name], weights=None).state_dict())


def _on_backbone(name: str, classes: int, state: dict[str, Tensor]) -> nn.Module:
    """Built as torchvision builds it on a pretrained classifier, which it looks for among torch's downloads.

    So what torchvision does with pretrained backbones applies: their batch norm and first layers are frozen.
    """
    weights = _backbone_weights(name)
    with tempfile.TemporaryDirectory() as folder, _downloads_in(folder) as downloads:
        torch.save(state, downloads / _file_name(weights.url))
        network: nn.Module = models.get_model(name, weights=None, weights_backbone=weights, num_classes=classes)
    return network


@contextmanager
def _downloads_in(folder: str) -> Iterator[Path]:
    before = torch.hub.get_dir()
    downloads = Path(folder, "checkpoints")
    downloads.mkdir()
    torch.hub.set_dir(folder)
    try:
        yield downloads
    finally:
        torch.hub.set_dir(before)


def _backbone_weights(name: str) -> Any:
    """ImageNet's weights that torchvision's own pretrained detectors began with."""
    return models.get_model_weights(_BACKBONES[name]).IMAGENET1K_V1


def _published(config: ModelConfig) -> Any:
    name = config.architecture.name
    if name not in suitable(config.problem_type):
        raise _weights_error(
            f"{config.architecture.weights}'s weights are published for torchvision's networks, and {name!r} is none for "
            f"{config.problem_type}; write none, or the address of a file in S3"
        )
    if config.architecture.weights == "imagenet" and config.problem_type == "detection":
        return _backbone_weights(name)
    return models.get_model_weights(name).DEFAULT


def _load(file: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise _weights_error(
            f"{file.name} cannot be loaded safely: {reason}; save it with torch.save(network.state_dict())"
        ) from error
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise _weights_error(f"{file.name} holds no state dict; save it with torch.save(network.state_dict())")
    return state


def _modern(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the names that DenseNet's layers have had since torchvision published its weights."""
    for key in list(state):
        new = re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", key)
        if new != key:
            state[new] = state.pop(key)
    return state


def _fill(network: nn.Module, state: dict[str, Tensor], head: set[str]) -> None:
    """Load all but the head. Raises `ConfigError` with what does not fit."""
    own = network.state_dict()
    for key in head:
        state.pop(key, None)  # in place: the state carries its layers' versions
    misfits = [
        f"{key} is {list(value.shape)} instead of {list(own[key].shape)}"
        for key, value in state.items()
        if key in own and value.shape != own[key].shape
    ]
    if not misfits:
        result = network.load_state_dict(state, strict=False)
        misfits += [f"{key} is missing" for key in result.missing_keys if key not in head]
        misfits += [f"{key} is not known" for key in result.unexpected_keys]
    if misfits:
        more = f"; and {len(misfits) - _LISTED} more" if len(misfits) > _LISTED else ""
        raise _weights_error(f"the file does not fit the network: {'; '.join(misfits[:_LISTED])}{more}")


def _last_layer(network: nn.Module) -> set[str]:
    """The names of a classifier's last parameters, which give the classes."""
    name = [name for name, layer in network.named_modules() if next(layer.parameters(recurse=False), None) is not None][-1]
    return {f"{name}.{parameter}" for parameter, _ in network.get_submodule(name).named_parameters()}


@cache
def _detector_head(name: str) -> set[str]:
    """The names of a detector's parameters whose shape goes by the number of classes."""
    with torch.device("meta"):
        one, other = (_plain_detector(name, classes).state_dict() for classes in (2, 3))
    return {key for key in one if one[key].shape != other[key].shape}


def _try(config: ModelConfig) -> None:
    """A batch of no numbers through the network tells whether it takes such images."""
    name, image, size = config.architecture.name, config.image, config.hyperparameters.batch_size
    if name.startswith("regnet"):
        return  # they take any size, and cannot be built without numbers
    with torch.device("meta"):
        images = torch.empty(size, 3, image.height, image.width)
        try:
            if config.problem_type == "detection":
                _plain_detector(name, len(config.classes) + 1).get_submodule("backbone")(images)
            else:
                models.get_model(name, weights=None, num_classes=len(config.classes))(images)
        except (RuntimeError, ValueError, AssertionError) as error:
            raise _config_error(
                f"{name} cannot be trained on batches of {counted(size, 'image')} of {image.width} × {image.height} pixels: "
                f"{str(error).strip().partition('\n')[0]}",
                "image",
            ) from error


def _file_name(url: str) -> str:
    return PurePosixPath(urlsplit(url).path).name


def _config_error(message: str, key: str) -> ConfigError:
    return ConfigError("config.yaml", message, key)


def _weights_error(message: str) -> ConfigError:
    return _config_error(message, "architecture.weights")
