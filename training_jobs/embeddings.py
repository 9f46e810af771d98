"""What a network sees in images, as vectors, and the kinds of images that come of it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans
from threadpoolctl import threadpool_limits
from torch import nn

from labelloop.inference import Model
from labelloop.records import ProblemTypeName
from training_jobs import problem
from training_jobs.dataset import Pixels
from training_jobs.export import to_network

type Embeddings = np.ndarray[Any, np.dtype[np.float32]]

_EXAMINED = 2_000  # embeddings that are clustered; more of them would hardly move the centres
_RUNS_AT_ONCE = 4
_LARGEST = float(np.finfo(np.float16).max)


def embed(network: nn.Module, kind: ProblemTypeName, pixels: Pixels) -> Embeddings:
    """The embeddings that serving would give, float32 `[N, D]`, of images uint8 `[N, height, width, channels]`.

    The network, trained, is moved to the GPU where there is one, and left in evaluation mode. Raises `ConfigError` when the
    network has no embedding to give.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    heads = problem.of(kind).heads(network).to(device).eval()
    with torch.inference_mode():
        batches = [heads.examine(to_network(batch.to(device)))[-1].cpu().numpy() for batch in heads.batches(pixels)]
    return np.concatenate(batches)


def embeddings_of(model: Model, pixels: Pixels) -> Embeddings:
    """As `embed`, by a model file whose embeddings are not quite its network's: an int8 one."""
    with ThreadPoolExecutor(_RUNS_AT_ONCE) as runs:
        return np.concatenate(list(runs.map(lambda image: model.run_whole(image[np.newaxis])[-1], pixels)))


def centroids(embeddings: Embeddings, clusters: int, seed: int) -> bytes:
    """The centres of so many kinds of images (k-means), as a model's card holds them: float16 `[clusters, D]`.

    Fewer where there are fewer different images.
    """
    some = embeddings
    if len(some) > _EXAMINED:
        some = some[np.random.default_rng(seed).choice(len(some), _EXAMINED, replace=False)]
    count = min(clusters, len(np.unique(some, axis=0)))
    with threadpool_limits(1):  # so small a task is slower with several, and many times so beside other work
        found = MiniBatchKMeans(count, n_init=1, random_state=seed % 2**32).fit(some).cluster_centers_
    return bytes(found.clip(-_LARGEST, _LARGEST).astype(np.float16).tobytes())
