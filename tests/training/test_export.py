"""The ONNX file has to say what the network says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from labelloop.errors import ConfigError, ModelError
from tests.examples import DIGITS, model_card
from training_jobs import problem
from training_jobs.export import export

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 1), dtype=np.uint8)


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(256, len(DIGITS.classes))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.last(images.flatten(1))
        return logits


class Unordered(nn.Module):
    """Its layers are named in another order than they run in."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(3, len(DIGITS.classes))
        self.first = nn.Linear(256, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.last(self.first(images.flatten(1)))
        return logits


class Patches(nn.Module):
    """Decides from the mean over places of what a linear layer says of each, as transformers may."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(16, len(DIGITS.classes))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.last(images[:, 0]).mean(dim=1)
        return logits


class Convolution(nn.Module):
    """Decides by a convolution, as SqueezeNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(1, len(DIGITS.classes), 1)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.last(images).mean(dim=(2, 3))
        return logits


class Wide(nn.Module):
    """Flattens 43 maps of 16 × 16."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(256 * 43, len(DIGITS.classes))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.last(images.expand(-1, 43, -1, -1).flatten(1))
        return logits


class Bare(nn.Module):
    """Has no layer at all."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, : len(DIGITS.classes)]


class Differing(Linear):
    """Says something else once it is exported."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + (0.01 if torch.compiler.is_exporting() else 0.0)


class Unbounded(Linear):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) / 0


def test_parity_is_relative_to_the_scale(tmp_path: Path) -> None:
    _, difference = export(Linear(), model_card(), PIXELS, tmp_path / "model.onnx")
    assert difference < 1e-5


IMAGES = PIXELS[..., 0].astype(np.float32) / 255
FLAT = IMAGES.reshape(4, -1)
THREE_BY_THREE = np.pad(np.tile(FLAT, 43), ((0, 0), (0, 2))).reshape(4, -1, 3).mean(axis=2)  # more than 4096 are too many


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (Linear, FLAT),
        (Patches, IMAGES.mean(axis=1)),
        (Convolution, IMAGES.mean(axis=(1, 2))[:, np.newaxis]),
        (Wide, THREE_BY_THREE),
    ],
)
def test_the_embedding_is_what_the_last_layer_is_given(
    build: type[nn.Module], expected: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    model, difference = export(build().eval(), model_card(), PIXELS, tmp_path / "model.onnx")
    logits, embeddings = model.run_whole(PIXELS)
    assert logits.shape == (4, len(DIGITS.classes))
    np.testing.assert_allclose(embeddings, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(model.run(PIXELS)[0], logits)
    assert difference < 1e-5


def test_the_last_layer_is_the_one_that_runs_last(tmp_path: Path) -> None:
    network = Unordered().eval()
    model, _ = export(network, model_card(), PIXELS, tmp_path / "model.onnx")
    with torch.no_grad():
        np.testing.assert_allclose(model.run_whole(PIXELS)[1], network.first(torch.from_numpy(FLAT)), rtol=1e-4, atol=1e-5)


def test_looking_leaves_nothing_on_the_network() -> None:
    network = Linear().eval()
    problem.of("classification").heads(network).examine(torch.zeros(1, 1, 16, 16))
    assert not network.last._forward_pre_hooks


def test_a_network_without_a_last_layer_says_what_to_do() -> None:
    heads = problem.of("classification").heads(Bare())
    with pytest.raises(ConfigError, match="last layer be nn"):
        heads.examine(torch.zeros(1, 1, 16, 16))


@pytest.mark.parametrize(("network", "reason"), [(Differing, "differ from torch's"), (Unbounded, "not all finite")])
def test_another_answer_is_an_error(network: type[nn.Module], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=reason):
        export(network(), model_card(), PIXELS, tmp_path / "model.onnx")
