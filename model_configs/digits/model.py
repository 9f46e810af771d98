"""The network for scanned digits, and the augmentation that it is trained with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from labelloop.errors import ConfigError
from labelloop.model_config import ModelConfig

_WIDTHS = (16, 32, 64)  # channels of the convolutions
_ALIKE = 8  # images that are moved alike: a transform draws once for all that it is given


def build_model(config: ModelConfig, weights: Path | None) -> nn.Module:
    """A small CNN: float32 `[N, channels, height, width]` between 0 and 1 → logits `[N, classes]`."""
    if weights is not None:
        raise ConfigError("config.yaml", "this network starts from nothing; write none", "architecture.weights")
    narrow, middle, wide = _WIDTHS
    return nn.Sequential(
        *_convolution(1 if config.image.mode == "L" else 3, narrow),
        *_convolution(narrow, middle),
        nn.MaxPool2d(2),
        *_convolution(middle, wide),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(wide * (config.image.height // 2) * (config.image.width // 2), len(config.classes)),
    )


def augmentation(config: ModelConfig) -> Callable[[Tensor], Tensor]:  # noqa: ARG001 - other models' depend on it
    """Digits written a little elsewhere, larger or smaller, turned or slanted, fainter or bolder, with noise; never mirrored.

    Takes and returns a batch as `build_model`'s network takes it.
    """
    move = v2.RandomAffine(
        degrees=15,
        translate=(0.12, 0.12),
        scale=(0.8, 1.2),
        shear=(-15, 15, -5, 5),
        interpolation=v2.InterpolationMode.BILINEAR,
    )

    def augment(images: Tensor) -> Tensor:
        moved = torch.cat([move(some) for some in torch.split(images, _ALIKE)]).clamp(0, 1)
        exponent = 2 ** torch.empty(len(moved), 1, 1, 1, device=moved.device).uniform_(-0.7, 0.7)
        return moved**exponent + 0.05 * torch.randn_like(moved)

    return augment


def _convolution(channels: int, width: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
