"""The outputs that serve, taken from a network: float32 `[N, channels, height, width]` between 0 and 1 → ONNX outputs.

torchvision's detectors end in a non-maximum suppression of their own and in lists of boxes; here their own parts are put
together up to the boxes and scores before it, which labelloop.problem_types.detection sifts.

Each gives an embedding, too, which stands for what the network sees in an image: a classifier's is what its last layer
decides from, a detector's the mean of its backbone's last and coarsest features.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import clip_boxes_to_image, nms

from labelloop.errors import ConfigError

type Outputs = list[np.ndarray[Any, np.dtype[np.float32]]]

_ALIKE = 95  # percent of the proposals that have to be the same
_AT_ONCE = 256  # images that are measured in a run
_PIXELS_AT_ONCE = 256 * 224 * 224  # of all of them: a network's layers take memory by these
_WIDEST = 4096  # numbers in an embedding: as many as any of torchvision's classifiers has


class Heads(nn.Module):
    """Images → the problem type's outputs. `several`: whether a run takes more than one."""

    several = True

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.examine(images)[:-1]

    @abstractmethod
    def examine(self, images: Tensor) -> tuple[Tensor, ...]:
        """The problem type's outputs, then the embeddings `[N, D]`. Raises `ConfigError` when the network has none to give."""

    def batches(
        self, pixels: np.ndarray[Any, np.dtype[np.uint8]], numbers: np.ndarray[Any, np.dtype[np.int64]] | None = None
    ) -> Iterator[Tensor]:
        """Images `[N, height, width, channels]` in as many runs as memory asks for: the larger they are, the fewer at once.

        `numbers`: of the images in question, if not all are; they are gathered run by run.
        """
        _, height, width, _ = pixels.shape
        at_once = min(_AT_ONCE, max(1, _PIXELS_AT_ONCE // (height * width))) if self.several else 1
        if numbers is None:
            yield from torch.split(torch.from_numpy(pixels), at_once)
        else:
            yield from (torch.from_numpy(pixels[numbers[n : n + at_once]]) for n in range(0, len(numbers), at_once))

    def difference(self, ours: Sequence[Outputs], theirs: Sequence[Outputs]) -> float:
        """Largest difference between two sets of runs, relative to the largest value of each output."""
        pairs = zip(_by_output(ours), _by_output(theirs), strict=True)
        return max(float(np.abs(one - other).max() / _scale(one)) for one, other in pairs)


class Logits(Heads):
    """→ logits `[N, classes]`"""

    def examine(self, images: Tensor) -> tuple[Tensor, Tensor]:
        last = _LastGiven()
        with last.watching(self.network):
            logits = self.network(images)
        return logits, last.embedding(images.shape[0])

    def last_layer(self, images: Tensor) -> nn.Linear | None:
        """The layer that makes logits of embeddings, where nothing but it stands between them; tried out on these images."""
        last = _LastGiven()
        with torch.no_grad(), last.watching(self.network):
            logits = self.network(images)
            layer, embedding = last.layer, last.embedding(images.shape[0])
            if not isinstance(layer, nn.Linear) or layer.bias is None or embedding.shape[1] != layer.in_features:
                return None
            return layer if torch.equal(layer(embedding), logits) else None


class _LastGiven:
    """What the last linear layer to run was given, in the order of the runs, which that of the layers' names need not be."""

    def __init__(self) -> None:
        self._last: tuple[nn.Module, Tensor] | None = None

    @contextmanager
    def watching(self, network: nn.Module) -> Iterator[None]:
        with ExitStack() as hooks:
            for layer in network.modules():
                if isinstance(layer, nn.Linear | nn.Conv2d):
                    hooks.enter_context(layer.register_forward_pre_hook(self._note))
            yield

    def _note(self, layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        self._last = layer, given[0]

    @property
    def layer(self) -> nn.Module | None:
        return self._last[0] if self._last else None

    def embedding(self, images: int) -> Tensor:
        """`[images, D]`: the mean over the image's places. A wide one has neighbours averaged: in flattened maps, places."""
        if self._last is None or self._last[1].shape[0] != images:
            raise ConfigError(
                "model.py",
                "the network does not end in a linear layer, whose input stands for an image where images are compared; let "
                "build_model's last layer be nn.Linear(features, len(config.classes))",
            )
        layer, features = self._last
        if isinstance(layer, nn.Conv2d):
            features = features.mean(dim=(2, 3))
        elif features.dim() > 2:  # [N, places, D]
            features = features.flatten(1, -2).mean(dim=1)
        together = math.ceil(features.shape[1] / _WIDEST)
        if together == 1:
            return features
        return functional.pad(features, (0, -features.shape[1] % together)).view(images, -1, together).mean(dim=2)


class Anchors(Heads):
    """SSD, RetinaNet or FCOS: one image → boxes `[1, anchors, 1, 4]`, scores `[1, anchors, classes]`."""

    several = False

    def examine(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        detector: Any = self.network
        batch, size = _prepared(detector, images)
        features = list(_features(detector, batch).values())
        found = detector.head(features)
        anchors = detector.anchor_generator(batch, features)[0]
        boxes = self._decode(found["bbox_regression"][0], anchors)
        scores = self._scores({name: output[0] for name, output in found.items()})
        boxes = _shares(clip_boxes_to_image(boxes, size), size)
        return boxes[None, :, None], scores[None, :, 1:], features[-1].mean(dim=(2, 3))

    def _decode(self, codes: Tensor, anchors: Tensor) -> Tensor:
        detector: Any = self.network
        decode = detector.box_coder.decode if isinstance(detector, FCOS) else detector.box_coder.decode_single
        boxes: Tensor = decode(codes, anchors)
        return boxes

    def _scores(self, found: dict[str, Tensor]) -> Tensor:
        """`[anchors, classes + 1]`, the first of them the background's, as their own postprocessing reckons them."""
        logits = found["cls_logits"]
        if isinstance(self.network, SSD):
            return functional.softmax(logits, dim=-1)
        if isinstance(self.network, FCOS):
            return torch.sqrt(torch.sigmoid(logits) * torch.sigmoid(found["bbox_ctrness"]))
        return torch.sigmoid(logits)


class Proposals(Heads):
    """Faster R-CNN: one image → boxes `[1, proposals, classes, 4]`, scores `[1, proposals, classes]`.

    The suppression among the proposals stays in the graph. There are always as many: those that it takes away score nothing.
    """

    several = False

    def examine(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        detector: Any = self.network
        batch, size = _prepared(detector, images)
        features = _features(detector, batch)
        proposals, real = self._proposals(batch, features, size)
        regions = detector.roi_heads
        logits, codes = regions.box_predictor(regions.box_head(regions.box_roi_pool(features, [proposals], [size])))
        boxes = clip_boxes_to_image(regions.box_coder.decode(codes, [proposals]), size)
        scores = functional.softmax(logits, dim=-1) * real[:, None].to(logits.dtype)
        embedding = list(features.values())[-1].mean(dim=(2, 3))
        return _shares(boxes, size)[None, :, 1:], scores[None, :, 1:], embedding

    def _proposals(self, batch: ImageList, features: dict[str, Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The best boxes of the first stage `[proposals, 4]`, and which of them its suppression leaves."""
        stage: Any = self.network.rpn
        maps = list(features.values())
        levels, codes = stage.head(maps)
        sizes = [level[0].numel() for level in levels]
        objectness, codes = concat_box_prediction_layers(levels, codes)
        boxes = stage.box_coder.decode(codes, stage.anchor_generator(batch, maps)).view(-1, 4).split(sizes)
        probabilities = torch.split(torch.sigmoid(objectness).view(-1), sizes)
        best = [level.topk(min(stage.pre_nms_top_n(), len(level))) for level in probabilities]
        proposals = clip_boxes_to_image(torch.cat([box[top.indices] for box, top in zip(boxes, best, strict=True)]), size)
        scores = torch.cat([top.values for top in best])
        apart = torch.cat([torch.full_like(top.values, number) for number, top in enumerate(best)]) * (max(size) + 1)

        least = torch.tensor(stage.min_size, dtype=proposals.dtype, device=proposals.device)
        possible = ((proposals[:, 2:] - proposals[:, :2]) >= least).all(dim=1) & (scores >= stage.score_thresh)
        scores = torch.where(possible, scores, -1.0)  # they come last, and so suppress none of the others
        left = nms(proposals + apart[:, None], scores, stage.nms_thresh)  # one level's do not touch another's
        scores = torch.where(torch.zeros_like(scores).index_fill(0, left, 1.0) > 0, scores, -1.0)
        first = scores.topk(min(stage.post_nms_top_n(), len(scores)))
        return proposals[first.indices], first.values >= 0

    def difference(self, ours: Sequence[Outputs], theirs: Sequence[Outputs]) -> float:
        """How far each proposal of ours is from the nearest of theirs, with all of its boxes and scores; the 95th percentile.

        Proposals come in the order of their scores, and two that overlap by just the threshold may keep or lose one of them
        to the last digit of a float: that is no difference of the networks. Embeddings have to be the same one by one.
        """
        scales = [_scale(output) for output in _by_output(ours)]
        distances = np.concatenate([_distances(one, other, scales) for one, other in zip(ours, theirs, strict=True)])
        proposals = float(np.percentile(distances, _ALIKE)) if len(distances) else 0.0
        return max(proposals, super().difference([outputs[2:] for outputs in ours], [outputs[2:] for outputs in theirs]))


def detector(network: nn.Module) -> Heads:
    """The heads of one of torchvision's detectors. Raises `ConfigError` for any other network, and for another transform."""
    if not isinstance(network, SSD | RetinaNet | FCOS | FasterRCNN):
        raise ConfigError(
            "model.py",
            f"build_model gives a {type(network).__name__}; for detection it has to be torchvision's SSD, RetinaNet, FCOS or "
            "FasterRCNN, or a class made from one of them",
        )
    transform = type(network.transform)
    if any(getattr(transform, name, None) is not getattr(GeneralizedRCNNTransform, name) for name in ("forward", "batch_images")):
        raise ConfigError(
            "model.py",
            f"the detector's transform, a {transform.__name__}, has its own forward or batch_images; override normalize instead",
        )
    return Proposals(network) if isinstance(network, FasterRCNN) else Anchors(network)


def _prepared(detector: Any, images: Tensor) -> tuple[ImageList, tuple[int, int]]:
    """The image as the detector's own transform normalises and pads it, with its height and width before padding.

    The transform pads by copying into zeros, which as an ONNX graph is a third of SSDLite's run, also where nothing is padded.
    """
    transform, size = detector.transform, (int(images.shape[2]), int(images.shape[3]))
    normalised = transform.normalize(images[0])
    if tuple(transform.resize(normalised[:1])[0].shape[1:]) != size:  # one channel tells the size that all would get
        raise ConfigError(
            "model.py",
            "the detector resizes its images; pin its transform to the config's size with "
            "fixed_size=(config.image.width, config.image.height)",
        )
    below, right = (-side % transform.size_divisible for side in size)
    padded = functional.pad(normalised, (0, right, 0, below)) if below or right else normalised
    return ImageList(padded[None], [size]), size


def _features(detector: Any, batch: ImageList) -> dict[str, Tensor]:
    features = detector.backbone(batch.tensors)
    return {"0": features} if isinstance(features, Tensor) else features


def _shares(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes `[…, 4]` in pixels as shares of the image."""
    height, width = size
    return boxes / torch.tensor([width, height, width, height], dtype=boxes.dtype, device=boxes.device)


def _by_output(runs: Sequence[Outputs]) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    return [np.concatenate(outputs) for outputs in zip(*runs, strict=True)]


def _scale(output: np.ndarray[Any, Any]) -> float:
    return float(np.abs(output).max().clip(min=1e-12))


def _distances(ours: Outputs, theirs: Outputs, scales: Sequence[float]) -> np.ndarray[Any, Any]:
    """For each row of ours that scores at all the largest difference to the nearest row of theirs."""

    def rows(outputs: Outputs) -> np.ndarray[Any, Any]:
        scoring = outputs[1][0].max(axis=1) > 0
        parts = zip(outputs[:2], scales, strict=False)
        return np.concatenate([(output[0] / scale).reshape(len(scoring), -1)[scoring] for output, scale in parts], axis=1)

    one, other = rows(ours), rows(theirs)
    if not len(other):
        return np.ones(len(one))
    return np.array([np.abs(other - row).max(axis=1).min() for row in one])
