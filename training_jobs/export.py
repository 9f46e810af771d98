"""A trained network as the ONNX file that serves, and the proof that both say the same."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx
import torch
from torch import Tensor, nn

from labelloop import problem_types
from labelloop.errors import ModelError
from labelloop.inference import CARD_KEY, EMBEDDING, Model
from labelloop.records import ModelCard
from training_jobs import problem
from training_jobs.dataset import Pixels
from training_jobs.heads import Heads, Outputs

MAX_DIFFERENCE = 1e-3  # of an output, relative to its scale
_COMPARED = 256  # images
_COMPARED_SINGLY = 32  # images of a network that takes one at a time
_BATCH = 32


class Served(nn.Module):
    """A network with serving's input: uint8 `[N, height, width, channels]` → the outputs of its heads, then the embedding."""

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self.heads.examine(to_network(image))
        return outputs


def to_network(pixels: Tensor) -> Tensor:
    """uint8 `[N, height, width, channels]` → float32 `[N, channels, height, width]` between 0 and 1."""
    return pixels.permute(0, 3, 1, 2).to(torch.float32) / 255


def export(network: nn.Module, card: ModelCard, pixels: Pixels, file: Path) -> tuple[Model, float]:
    """Write the ONNX file with its card, load it as serving does, and compare it with the network on `pixels`.

    Returns the loaded model and the largest difference of the outputs relative to their scale; raises `ModelError` when that
    is more than `MAX_DIFFERENCE`.
    """
    served = Served(problem.of(card.problem_type).heads(network)).cpu().eval()
    several = served.heads.several
    example = torch.from_numpy(pixels[[0, 0] if several else [0]])  # the exporter would take a batch of one for a constant
    with torch.no_grad():  # inference mode would mark the anchors as its own, and the exporter could not use them
        served(example)  # detectors settle their anchors and scales in the first run, which the exporter cannot follow
    program = torch.onnx.export(
        served,
        (example,),
        input_names=["image"],
        output_names=[*problem_types.of(card.problem_type).outputs, EMBEDDING],
        dynamic_shapes={"image": {0: torch.export.Dim("batch")} if several else None},
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    if program is None:
        raise ModelError("torch exported nothing")
    program.model.metadata_props[CARD_KEY] = msgspec.json.encode(card).decode()
    program.save(str(file), external_data=False)
    model = Model(file.read_bytes())
    difference = parity(served, model, pixels)
    if difference > MAX_DIFFERENCE:
        raise ModelError(
            f"the ONNX file's outputs differ from torch's by {difference:.2g} of their scale; {MAX_DIFFERENCE:.0e} is allowed"
        )
    return model, difference


def stamp(file: Path, card: ModelCard) -> Model:
    """Give a model file another card; the model as serving loads it."""
    model = onnx.load(str(file))
    onnx.helper.set_model_props(model, {CARD_KEY: msgspec.json.encode(card).decode()})
    file.write_bytes(model.SerializeToString())
    return Model(file.read_bytes())


def parity(served: Served, model: Model, pixels: Pixels) -> float:
    """Largest difference of ONNX and torch outputs, relative to each output's scale. Raises `ModelError`."""
    several = served.heads.several
    compared, size = pixels[: _COMPARED if several else _COMPARED_SINGLY], _BATCH if several else 1
    batches = [compared[start : start + size] for start in range(0, len(compared), size)]
    with torch.inference_mode():
        network: list[Outputs] = [[output.numpy() for output in served(torch.from_numpy(batch))] for batch in batches]
    if not all(np.isfinite(output).all() for outputs in network for output in outputs):
        raise ModelError("the network's outputs are not all finite")
    return served.heads.difference(network, [model.run_whole(batch) for batch in batches])
