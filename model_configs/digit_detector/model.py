"""A small detector that learns from nothing, and the augmentation that it is trained with."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.transforms import v2

from labelloop.model_config import ModelConfig

_WIDTHS = (24, 48, 96)  # channels; before each the image is halved
_STRIDE = 2 ** len(_WIDTHS)  # pixels between two places at which an object may be found; objects should be twice that or more
_BLOCKS = 2  # behind the last of the widths
_HEAD_CONVOLUTIONS = 1  # before the classes, and as many before the boxes


def build_model(config: ModelConfig, weights: Path | None) -> nn.Module:  # noqa: ARG001 - there are none for this network
    """FCOS (Tian et al. 2019) with one level of features from a small backbone."""
    image = config.image
    channels = 1 if image.mode == "L" else 3
    classes = len(config.classes) + 1  # torchvision's label 0 is the background
    detector: nn.Module = FCOS(
        _Backbone(channels),
        classes,
        image_mean=[0.5] * channels,
        image_std=[0.25] * channels,
        fixed_size=(image.width, image.height),
        anchor_generator=AnchorGenerator(sizes=((_STRIDE,),), aspect_ratios=((1.0,),)),
        head=FCOSHead(_WIDTHS[-1], 1, classes, num_convs=_HEAD_CONVOLUTIONS),
    )
    return detector


def augmentation(config: ModelConfig) -> v2.Transform:  # noqa: ARG001 - other models' depend on it
    """Objects a little elsewhere, smaller or larger, and in the opposite colours; never mirrored.

    Takes and returns an image and its target as torchvision's detectors take them.
    """
    return v2.Compose(
        [
            v2.RandomAffine(degrees=0, translate=(0.1, 0.1), scale=(0.85, 1.15), interpolation=v2.InterpolationMode.BILINEAR),
            v2.RandomInvert(),
            v2.SanitizeBoundingBoxes(min_size=4),  # what has been moved out of the image
        ]
    )


class _Backbone(nn.Module):
    """Images `[N, channels, height, width]` → features `[N, out_channels, height / 8, width / 8]`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = (channels, *_WIDTHS)
        self.out_channels = widths[-1]  # FCOS asks for it
        self.layers = nn.Sequential(
            *(_convolution(*pair, stride=2) for pair in zip(widths, _WIDTHS, strict=False)),
            *(_Residual(self.out_channels) for _ in range(_BLOCKS)),
        )

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layers(images)
        return features


class _Residual(nn.Module):
    """What two convolutions add to the features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.change = nn.Sequential(_convolution(width, width), _convolution(width, width))

    def forward(self, features: Tensor) -> Tensor:
        changed: Tensor = features + self.change(features)
        return changed


def _convolution(channels: int, width: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
