"""Every detector's ONNX file has to find what torchvision's own detector finds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from labelloop.errors import ConfigError
from labelloop.model_config import ModelConfig
from labelloop.problem_types.detection import FLOOR, iou
from labelloop.records import BoxRules, ManifestRow, ModelCard, Region
from tests.training.models import config_of
from training_jobs import architectures, heads, problem
from training_jobs.export import export, to_network

Network = Any
_MANY = 10_000  # more boxes than there are: what is cut off at a number depends on the order of equal scores


class Backbone(nn.Sequential):
    out_channels: int | list[int] = 32

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.Conv2d(channels, 32, 3, 4, 1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, 4, 1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
        )


class OwnFCOS(FCOS):  # type: ignore[misc]
    """A subclass, for grey images."""


def small_fcos(config: ModelConfig) -> nn.Module:
    classes = len(config.classes) + 1
    return OwnFCOS(
        Backbone(1),
        classes,
        image_mean=[0.5],
        image_std=[0.25],
        anchor_generator=AnchorGenerator(((16,),), ((1.0,),)),
        head=FCOSHead(32, 1, classes, num_convs=1),
        fixed_size=(config.image.width, config.image.height),
    )


def small_ssd(config: ModelConfig) -> nn.Module:
    size = (config.image.width, config.image.height)
    backbone = Backbone(3)
    backbone.out_channels = [32]  # SSD asks for those of each level
    network: nn.Module = SSD(backbone, DefaultBoxGenerator([[2]]), size, len(config.classes) + 1)
    return network


def named(config: ModelConfig) -> nn.Module:
    return architectures.build(config, None)


CASES: list[tuple[str, Callable[[ModelConfig], nn.Module], str, int]] = [
    ("small_fcos", small_fcos, "L", 3),
    ("small_ssd", small_ssd, "RGB", 3),
    *((name, named, "RGB", 3) for name in architectures.suitable("detection")),
    ("small_ssd", small_ssd, "RGB", 1),
]


@pytest.mark.parametrize(
    ("name", "build", "mode", "classes"),
    [pytest.param(*case, id=f"{case[0]}-{case[3]}", marks=[pytest.mark.slow] if "resnet50" in case[0] else []) for case in CASES],
)
def test_onnx_finds_what_torchvision_finds(
    name: str, build: Callable[[ModelConfig], nn.Module], mode: str, classes: int, tmp_path: Path
) -> None:
    config = config_of(
        "detection", architecture=name, width=160, height=136, mode=mode, classes=["red", "green", "blue"][:classes], batch_size=2
    )
    torch.manual_seed(0)
    network: Network = build(config)
    pixels = _pixels(config)
    _learn(network, pixels, config)
    card = _card(config)

    assert card.boxes is not None
    parts = [network.roi_heads] if hasattr(network, "roi_heads") else [network]
    for part in parts:
        part.score_thresh, part.nms_thresh, part.detections_per_img = FLOOR, card.boxes.iou_threshold, _MANY
    network.topk_candidates = _MANY
    network.eval()
    with torch.inference_mode():
        expected = [_regions(network([image])[0], config) for image in to_network(torch.from_numpy(pixels))]

    model, difference = export(network, card, pixels, tmp_path / "model.onnx")
    assert difference < 1e-4
    one, other = (model.examine(pixels[number]).embedding for number in range(2))
    assert one.shape == other.shape
    assert not np.allclose(one, other)
    for number, theirs in enumerate(expected):
        ours = model.candidates(pixels[number])
        assert len(ours) == len(theirs)
        assert len(ours) > 5
        assert all(any(_same(region, other) for other in ours) for region in theirs)


def test_a_detector_that_resizes_is_refused() -> None:
    config = config_of("detection", mode="L", width=96, height=96)
    network: Network = small_fcos(config)
    network.transform.fixed_size = (128, 128)
    with pytest.raises(ConfigError, match="fixed_size"):
        heads.detector(network.eval())(torch.rand(1, 1, 96, 96))


def test_no_image_is_resized_to_learn_the_size_that_it_would_get(monkeypatch: pytest.MonkeyPatch) -> None:
    network: Network = small_ssd(config_of("detection", mode="RGB", width=320, height=320)).eval()
    resize, channels = network.transform.resize, list[int]()

    def resized(image: torch.Tensor) -> Any:
        channels.append(image.shape[0])
        return resize(image)

    monkeypatch.setattr(network.transform, "resize", resized)
    heads.detector(network)(torch.rand(1, 3, 320, 320))
    assert channels == [1], "one tells it"


def test_a_detector_that_prepares_its_images_in_its_own_way_is_refused() -> None:
    class Doubled(GeneralizedRCNNTransform):  # type: ignore[misc]
        def forward(self, images: Any, targets: Any = None) -> Any:
            return super().forward([2 * image for image in images], targets)

    network: Network = small_fcos(config_of("detection", mode="L", width=96, height=96))
    for transform in (Doubled(96, 96, [0.5], [0.25], fixed_size=(96, 96)), nn.Identity()):
        network.transform = transform
        with pytest.raises(ConfigError, match=f"a {type(transform).__name__}, has its own forward or batch_images"):
            heads.detector(network)


def test_a_detector_s_image_is_not_scattered_into_zeros(tmp_path: Path) -> None:
    """As torchvision pads it; onnxruntime takes a third of SSDLite's time for that."""
    config = config_of("detection", mode="L", width=72, height=96)
    network = small_fcos(config).eval()
    _, _ = export(network, _card(config), _pixels(config), tmp_path / "model.onnx")
    assert not [node.name for node in onnx.load(str(tmp_path / "model.onnx")).graph.node if "Scatter" in node.op_type]


def test_another_network_is_refused() -> None:
    with pytest.raises(ConfigError, match="build_model gives a Linear"):
        heads.detector(nn.Linear(1, 1))


def test_proposals_are_compared_without_their_order() -> None:
    """The same rows in another order are no difference; a shifted box is one, and another embedding."""
    compared = heads.Proposals(nn.Identity())
    generator = np.random.default_rng(0)
    boxes, scores = generator.random((1, 40, 2, 4), dtype=np.float32), generator.random((1, 40, 2), dtype=np.float32)
    embedding = generator.random((1, 8), dtype=np.float32)
    order = generator.permutation(40)

    def difference(*theirs: np.ndarray[Any, np.dtype[np.float32]]) -> float:
        return compared.difference([[boxes, scores, embedding]], [list(theirs)])

    assert difference(boxes[:, order], scores[:, order], embedding) == 0
    assert difference(boxes + 0.01, scores, embedding) == pytest.approx(0.01 / boxes.max(), rel=0.01)
    assert difference(boxes, scores * 0, embedding) == 1
    assert difference(boxes, scores, embedding[:, ::-1]) > 0.1
    nothing = [[boxes, scores * 0, embedding]]
    assert compared.difference(nothing, nothing) == 0


def _pixels(config: ModelConfig) -> np.ndarray[Any, np.dtype[np.uint8]]:
    channels = 1 if config.image.mode == "L" else 3
    shape = (2, config.image.height, config.image.width, channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def _learn(network: Network, pixels: np.ndarray[Any, np.dtype[np.uint8]], config: ModelConfig) -> None:
    """Two steps, from weights that tell places apart: among equal scores the last digit would decide which box is best.

    Batch norms follow the steps at once, so that evaluation is not of another network than training.
    """
    one_stage = not hasattr(network, "rpn")  # two do so anyway
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and one_stage:
            nn.init.kaiming_normal_(layer.weight)
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.5
    if hasattr(network, "roi_heads"):
        network.roi_heads.fg_bg_sampler.batch_size_per_image = 32  # time
        network.rpn.score_thresh = 0.0  # as many proposals as there may be
    regions = [Region(label=name, box=(0.1 + 0.2 * n, 0.2, 0.4 + 0.2 * n, 0.7)) for n, name in enumerate(config.classes)]
    rows = [
        ManifestRow(image="", sha256="", group="", regions=some, split="train", annotation="", task=0)
        for some in (regions, regions[:1])
    ]
    loss = problem.of("detection").loss(rows, config, architectures.augmentation(config))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for _ in range(2):
        value = loss(network.train(), to_network(torch.from_numpy(pixels)), torch.tensor([0, 1]))
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert torch.isfinite(value)


def _card(config: ModelConfig) -> ModelCard:
    boxes = BoxRules(score_threshold=0.3, iou_threshold=0.5, max_boxes=_MANY)
    return msgspec.structs.replace(config.card(""), boxes=boxes)


def _regions(found: dict[str, torch.Tensor], config: ModelConfig) -> list[Region]:
    """What torchvision found, without the background that focal losses have a score for, and without boxes of no area."""
    size = torch.tensor([config.image.width, config.image.height] * 2)
    return [
        Region(label=config.classes[label - 1], box=(left, top, right, bottom), score=score)
        for (left, top, right, bottom), label, score in zip(
            (found["boxes"] / size).tolist(), found["labels"].tolist(), found["scores"].tolist(), strict=True
        )
        if label and left < right and top < bottom
    ]


def _same(one: Region, other: Region) -> bool:
    assert one.box is not None
    assert other.box is not None
    assert one.score is not None
    assert other.score is not None
    return one.label == other.label and abs(one.score - other.score) < 1e-3 and iou(one.box, other.box) > 0.99
