"""A trained network as the ONNX file that serves, and the proof that both say the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from labelloop.errors import ModelError
from labelloop.inference import CARD_KEY, Model
from labelloop.records import ModelCard
from training_jobs.dataset import Pixels

MAX_DIFFERENCE = 1e-3  # of the logits, relative to their scale
_COMPARED = 256  # images
_BATCH = 32


class Served(nn.Module):
    """A network with serving's input: uint8 `[N, height, width, channels]` → logits float32 `[N, classes]`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.network(to_network(image))
        return logits


def to_network(pixels: Tensor) -> Tensor:
    """uint8 `[N, height, width, channels]` → float32 `[N, channels, height, width]` between 0 and 1."""
    return pixels.permute(0, 3, 1, 2).to(torch.float32) / 255


def export(network: nn.Module, card: ModelCard, pixels: Pixels, file: Path) -> tuple[Model, float]:
    """Write the ONNX file with its card, load it as serving does, and compare it with the network on `pixels`.

    Returns the loaded model and the largest difference of the logits relative to their scale; raises `ModelError` when that
    is more than `MAX_DIFFERENCE`.
    """
    served = Served(network).cpu().eval()
    example = torch.from_numpy(pixels[[0, 0]])  # two images: the exporter would take a batch of one for a constant
    program = torch.onnx.export(
        served,
        (example,),
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    if program is None:
        raise ModelError("torch exported nothing")
    program.model.metadata_props[CARD_KEY] = msgspec.json.encode(card).decode()
    program.save(str(file), external_data=False)
    model = Model(file.read_bytes())
    difference = parity(served, model, pixels[:_COMPARED])
    if difference > MAX_DIFFERENCE:
        raise ModelError(
            f"the ONNX file's logits differ from torch's by {difference:.2g} of their scale; {MAX_DIFFERENCE:.0e} is allowed"
        )
    return model, difference


def parity(served: Served, model: Model, pixels: Pixels) -> float:
    """Largest absolute difference of ONNX and torch logits, relative to the largest absolute logit. Raises `ModelError`."""
    batches = [pixels[start : start + _BATCH] for start in range(0, len(pixels), _BATCH)]
    onnx = np.concatenate([model.logits(batch) for batch in batches])
    with torch.inference_mode():
        network: np.ndarray[Any, Any] = torch.cat([served(torch.from_numpy(batch)) for batch in batches]).numpy()
    if not (np.isfinite(onnx).all() and np.isfinite(network).all()):
        raise ModelError("the network's logits are not all finite")
    return float(np.abs(onnx - network).max() / np.abs(network).max().clip(min=1e-12))
