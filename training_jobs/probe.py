"""A linear probe: the last layer alone, trained on what a pretrained network sees in the images while nothing else of it moves.

It takes seconds, for what is seen in an image is kept for the next training. The fit starts from it: from a random last layer,
the first steps would spoil the features under it (Kumar et al. 2022, linear probing then fine-tuning). Where few images are
annotated it may be the better answer; the validation split says so.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from labelloop.model_config import ModelConfig, ModelFolder
from labelloop.records import ModelCard, Probe
from training_jobs import architectures, embeddings, export, heads, problem
from training_jobs.cache import Cache, recipe
from training_jobs.dataset import Dataset, Examples
from training_jobs.embeddings import Embeddings, embed
from training_jobs.export import to_network
from training_jobs.fit import score
from training_jobs.heads import Logits

log = logging.getLogger(__name__)

_SHRINKAGE = 1.0  # of the weights on features of spread 1, against the summed loss: scikit-learn's C = 1
_STEPS = 200
_IN_MEMORY = 512  # images that are looked at in one go


@dataclass(frozen=True)
class Seen:
    """What a pretrained network sees in the train split's images, float32 `[N, D]`; of `kept` of them an earlier job knew."""

    features: Embeddings
    kept: int


def look(fresh: nn.Module, folder: ModelFolder, card: ModelCard, train: Examples, address: str | None) -> Seen | None:
    """Look at images with a network that knows nothing yet but the weights it starts from.

    None where it does not end in one linear layer. The network is left in evaluation mode.
    """
    heads = problem.of(card.problem_type).heads(fresh)
    if not isinstance(heads, Logits):
        return None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layer = heads.to(device).eval().last_layer(to_network(torch.from_numpy(train.pixels[:1]).to(device)))
    if layer is None:
        log.info("no linear probe: the network does not end in one linear layer with a bias")
        return None
    cache = Cache(address, f"features/{recipe(card)}-{_digest(fresh, layer, folder)}", "features") if address else None
    features = np.empty((len(train), layer.in_features), dtype=np.float32)
    hashes = [row.sha256 for row in train.rows]
    missing = cache.fill(features, hashes) if cache else list(range(len(train)))
    if missing:
        for first in range(0, len(missing), _IN_MEMORY):  # the others stay mapped
            some = missing[first : first + _IN_MEMORY]
            features[some] = embed(fresh, card.problem_type, train.pixels[some])
        if cache:
            cache.keep(features, hashes, missing)
    return Seen(features, len(train) - len(missing))


def start(fresh: nn.Module, folder: ModelFolder, examples: Examples, features: Embeddings) -> nn.Module:
    """Give the network the last layer that tells the examples' classes best from their features, and return a copy of it.

    The problem type's own loss, L-BFGS, weights shrunk: the same every time, with no learning rate to choose.
    """
    heads: Any = problem.of(folder.config.problem_type).heads(fresh)
    device = next(fresh.parameters()).device
    layer = heads.eval().last_layer(to_network(torch.from_numpy(examples.mapped[:1]).to(device)))
    mean, spread = features.mean(axis=0), features.std(axis=0)
    spread[spread < 1e-6 * spread.max(initial=1e-6)] = np.inf  # what is the same in every image says nothing
    given = torch.from_numpy((features - mean) / spread)
    loss = problem.of(folder.config.problem_type).loss(examples.rows, folder.config, lambda images: images)
    numbers = torch.arange(len(examples))
    probe = nn.Linear(layer.in_features, layer.out_features)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    search = torch.optim.LBFGS(probe.parameters(), max_iter=_STEPS, line_search_fn="strong_wolfe")

    def shrunk() -> Tensor:
        search.zero_grad()
        total = loss(probe, given, numbers) + _SHRINKAGE / (2 * len(examples)) * probe.weight.square().sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    search.step(shrunk)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        weight = probe.weight / torch.from_numpy(spread)
        layer.weight.copy_(weight)
        layer.bias.copy_(probe.bias - weight @ torch.from_numpy(mean))
    return copy.deepcopy(fresh)


def better(
    probed: nn.Module, trained: nn.Module, data: Dataset, config: ModelConfig, card: ModelCard, seen: Seen
) -> tuple[nn.Module, Probe]:
    """The network that serves: the fitted one, unless the probe is better on the validation split."""
    if not data.validation.measurable:
        return trained, Probe(kept=seen.kept, value=None, fitted=None, chosen=False)
    value, fitted = (score(network, data.validation, config, card) for network in (probed, trained))
    chosen = value > fitted
    log.info(
        "on the validation split: linear probe %.1f %%, fitted %.1f %%; %s",
        100 * value,
        100 * fitted,
        "the probe" if chosen else "the fitted one",
    )
    return probed if chosen else trained, Probe(kept=seen.kept, value=value, fitted=fitted, chosen=chosen)


def _digest(network: nn.Module, head: nn.Linear, folder: ModelFolder) -> str:
    """Stands for all that features follow from but the images: weights without the last layer's, code, libraries."""
    digest = hashlib.sha256(f"{torch.__version__} {torchvision.__version__}".encode())
    for module in (architectures, embeddings, export, heads):
        digest.update(Path(str(module.__file__)).read_bytes())
    digest.update((folder.folder / "model.py").read_bytes())
    own = {id(parameter) for parameter in head.parameters()}
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if id(tensor) not in own:
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
