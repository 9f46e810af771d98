"""Which task annotators get next: its place in the queue that Label Studio hands out.

With uncertainty sampling Label Studio takes the unlabelled tasks that have a prediction of the version shown and that nobody
has open in a label stream. Of these it hands out one of the `cluster` from which the annotator has done the fewest tasks of
all time (each counts for the largest cluster among its predictions; those without one are a cluster of their own), and within
that the one of the lowest `score`. Predictions that come through the ML backend lose their cluster; the REST API keeps it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from labelloop.dataset import position, split_of
from labelloop.model_config import ModelConfig
from labelloop.records import ModelCard

if TYPE_CHECKING:
    import numpy as np

Stream = Literal["active", "control", "holdout"]


class Place(NamedTuple):
    """Score and cluster of a task's prediction: what Label Studio orders by. The score lies between 0 and 1."""

    score: float
    cluster: int | None


def stream_of(group: str, config: ModelConfig) -> Stream:
    """The stream of a content group (hex SHA-256), for ever the same with the same config.

    The active tasks are asked for in the strategy's order. Those of the holdout and of the control share come at random,
    whatever the model thinks of them: the one measures versions, the other the strategy.
    """
    if split_of(group, config.splits) == "test":
        return "holdout"
    return "control" if position("queue control", group) < config.queue.control else "active"


def place(
    config: ModelConfig, card: ModelCard, group: str, certainty: float, embedding: np.ndarray[Any, np.dtype[np.float32]]
) -> Place:
    """Where a task stands that the card's model predicts with this certainty; `embedding` is float32 `[D]`.

    Random tasks get the certainty at a fixed random position among those of images that the model has not seen
    (`card.certainties`), so that they stand between the active ones at their natural share. Taking turns between clusters
    would spoil that (where the model is sure of a whole cluster, every random task in it would come first), so with
    `diverse` they have clusters of their own, as many as their share.
    """
    stream, queue = stream_of(group, config), config.queue
    if queue.strategy == "random":
        return Place(_drawn(card, group), None)
    clusters = _centroids(card, len(embedding)) if queue.strategy == "diverse" else None
    if stream == "active":
        return Place(certainty, None if clusters is None else _nearest(clusters, embedding))
    if clusters is None:
        return Place(_drawn(card, group), None)
    own = _random_clusters(config, len(clusters))
    return Place(_drawn(card, group), len(clusters) + int(position("queue cluster", group) * own))


def _random_clusters(config: ModelConfig, active: int) -> int:
    """How many clusters hold holdout and control, so that turns between all fall to them as often as is their share."""
    holdout = config.splits.test
    share = holdout + (1 - holdout) * config.queue.control
    return max(1, round(active * share / (1 - share)))


def _drawn(card: ModelCard, group: str) -> float:
    """The quantile of the card's certainties at the group's position; the position itself where none were measured."""
    at = position("queue score", group)
    if len(card.certainties) < 2:
        return at
    whole, part = divmod(at * (len(card.certainties) - 1), 1)
    low, high = card.certainties[int(whole) : int(whole) + 2]
    return low + part * (high - low)


def _centroids(card: ModelCard, dimensions: int) -> np.ndarray[Any, np.dtype[np.float32]] | None:
    """The card's centroids, float32 `[clusters, D]`; None of a version that has none."""
    import numpy as np

    if not card.centroids:
        return None
    return np.frombuffer(card.centroids, dtype=np.float16).reshape(-1, dimensions).astype(np.float32)


def _nearest(centroids: np.ndarray[Any, np.dtype[np.float32]], embedding: np.ndarray[Any, np.dtype[np.float32]]) -> int:
    return int(((centroids - embedding) ** 2).sum(axis=1).argmin())
