"""The ONNX file has to say what the network says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from labelloop.errors import ModelError
from tests.examples import DIGITS, model_card
from training_jobs.export import export

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 1), dtype=np.uint8)


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(256, len(DIGITS.classes))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.last(images.flatten(1))
        return logits


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


@pytest.mark.parametrize(("network", "reason"), [(Differing, "differ from torch's"), (Unbounded, "not all finite")])
def test_another_answer_is_an_error(network: type[nn.Module], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=reason):
        export(network(), model_card(), PIXELS, tmp_path / "model.onnx")
