"""Streams and places, and what Label Studio makes of them."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any, Literal

import msgspec
import numpy as np
import pytest

from labelloop.active_learning import Place, place, stream_of
from labelloop.dataset import split_of
from labelloop.model_config import ModelConfig, Queue
from labelloop.records import ModelCard
from tests import examples

GROUPS = [examples.sha256(f"group {number}") for number in range(6000)]
CENTROIDS = np.array([[0, 0], [10, 0], [0, 10], [10, 10]], dtype=np.float16)
NOWHERE = np.zeros(2, dtype=np.float32)


def config(strategy: Literal["uncertainty", "diverse", "random"], control: float = 0.1) -> ModelConfig:
    return msgspec.structs.replace(examples.DIGITS, queue=Queue(strategy=strategy, control=control))


def card(*certainties: float, centroids: np.ndarray[Any, Any] | None = CENTROIDS) -> ModelCard:
    content = b"" if centroids is None else centroids.tobytes()
    return msgspec.structs.replace(examples.model_card(), certainties=list(certainties), centroids=content)


def of_stream(stream: str, settings: ModelConfig) -> list[str]:
    return [group for group in GROUPS if stream_of(group, settings) == stream]


def test_streams_have_their_shares_and_the_holdout_is_the_test_split() -> None:
    settings = config("uncertainty", control=0.25)
    counts = Counter(stream_of(group, settings) for group in GROUPS)
    assert counts["holdout"] / len(GROUPS) == pytest.approx(0.2, abs=0.02)
    assert counts["control"] / len(GROUPS) == pytest.approx(0.8 * 0.25, abs=0.02)
    assert {split_of(group, settings.splits) for group in of_stream("holdout", settings)} == {"test"}
    validation = [group for group in GROUPS if split_of(group, settings.splits) == "validation"]
    of_those = Counter(stream_of(group, settings) for group in validation)
    assert of_those["control"] / len(validation) == pytest.approx(0.25, abs=0.05), "independent of the split"


def test_a_larger_control_share_keeps_those_that_were_in_it() -> None:
    small, large = (set(of_stream("control", config("diverse", share))) for share in (0.1, 0.3))
    assert small < large
    assert not of_stream("control", config("diverse", 0))


def test_an_active_task_stands_where_the_model_is_as_unsure() -> None:
    settings = config("uncertainty")
    group = of_stream("active", settings)[0]
    assert place(settings, card(0.5, 1.0), group, 0.37, NOWHERE) == Place(0.37, None)


def test_diverse_gives_active_tasks_the_nearest_cluster() -> None:
    settings = config("diverse")
    group = of_stream("active", settings)[0]
    for number, centre in enumerate(CENTROIDS):
        assert place(settings, card(), group, 0.37, centre.astype(np.float32) + 1) == Place(0.37, number)
    assert place(settings, card(centroids=None), group, 0.37, NOWHERE).cluster is None


# With 4 active clusters: 28 % of the tasks are random, so 2 of 6 clusters are; 40 %, so 3 of 7.
@pytest.mark.parametrize(
    ("strategy", "control", "clusters"), [("uncertainty", 0.1, {None}), ("diverse", 0.1, {4, 5}), ("diverse", 0.25, {4, 5, 6})]
)
@pytest.mark.parametrize("stream", ["control", "holdout"])
def test_what_the_model_thinks_moves_no_random_task(
    strategy: Literal["uncertainty", "diverse"], control: float, clusters: set[int | None], stream: str
) -> None:
    settings, cluster_of = config(strategy, control), set()
    for group in of_stream(stream, settings)[:200]:
        places = {
            place(settings, card(0.2, 0.4, 1.0), group, certainty, embedding.astype(np.float32))
            for certainty in (0.0, 0.5, 1.0)
            for embedding in CENTROIDS
        }
        assert len(places) == 1
        cluster_of.add(places.pop().cluster)
    assert cluster_of == clusters


def test_random_tasks_get_scores_like_those_of_images_that_the_model_has_not_seen() -> None:
    settings, quantiles = config("uncertainty"), (0.1, 0.2, 0.8, 0.9, 1.0)
    drawn = [place(settings, card(*quantiles), group, 0.0, NOWHERE).score for group in of_stream("holdout", settings)]
    for share, quantile in zip((0, 0.25, 0.5, 0.75, 1), quantiles, strict=True):
        assert np.quantile(drawn, share) == pytest.approx(quantile, abs=0.05)
    assert 0 <= min(drawn) <= max(drawn) <= 1


@pytest.mark.parametrize("certainties", [(), (0.7,)])
def test_without_measured_certainties_the_score_is_the_position(certainties: tuple[float, ...]) -> None:
    settings = config("random")
    drawn = [place(settings, card(*certainties), group, 0.0, NOWHERE).score for group in GROUPS]
    assert np.quantile(drawn, [0.1, 0.5, 0.9]) == pytest.approx([0.1, 0.5, 0.9], abs=0.03)


def test_the_random_strategy_asks_for_all_tasks_in_one_random_order() -> None:
    settings = config("random")
    places = {group: place(settings, card(0.3, 0.9), group, 0.99, CENTROIDS[3].astype(np.float32)) for group in GROUPS}
    assert {one.cluster for one in places.values()} == {None}
    first = Counter(stream_of(group, settings) for group in sorted(GROUPS, key=lambda group: places[group].score)[:2000])
    assert first["holdout"] / 2000 == pytest.approx(0.2, abs=0.03)
    assert first["control"] / 2000 == pytest.approx(0.08, abs=0.03)


@pytest.mark.parametrize("strategy", ["uncertainty", "diverse"])
@pytest.mark.parametrize("handed_out", [100, 500, 2000])
def test_random_tasks_come_at_their_share_from_the_first_on(strategy: Literal["uncertainty", "diverse"], handed_out: int) -> None:
    """As Label Studio hands out, even where the model is sure of one kind of images and unsure of another."""
    settings, rng = config(strategy), random.Random(0)
    kinds = {group: rng.randrange(4) for group in GROUPS}
    certainty = {group: rng.uniform(0.2 * kind, 0.2 * kind + 0.4) for group, kind in kinds.items()}
    model = card(*np.quantile(list(certainty.values()), np.linspace(0, 1, 101)))
    places = {g: place(settings, model, g, certainty[g], CENTROIDS[kinds[g]].astype(np.float32)) for g in GROUPS}
    seen = Counter(stream_of(group, settings) for group in as_label_studio(places)[:handed_out])
    slack = 3 * (0.28 * 0.72 / handed_out) ** 0.5 + 0.06  # whole clusters: a third for 28 %
    assert (seen["holdout"] + seen["control"]) / handed_out == pytest.approx(0.28, abs=slack)
    assert seen["control"] / handed_out == pytest.approx(0.08, abs=slack)
    if strategy == "uncertainty":
        active = [g for g in as_label_studio(places)[:handed_out] if stream_of(g, settings) == "active"]
        assert [certainty[g] for g in active] == sorted(certainty[g] for g in active)


def as_label_studio(places: dict[str, Place]) -> list[str]:
    """The order for an annotator who has done nothing yet: least worked-in cluster first, then the lowest score."""
    waiting: dict[int | None, list[str]] = {}
    for group in sorted(places, key=lambda group: places[group].score, reverse=True):
        waiting.setdefault(places[group].cluster, []).append(group)
    done: Counter[int | None] = Counter()
    order = []
    while waiting:
        cluster = min(waiting, key=lambda kind: (done[kind], places[waiting[kind][-1]].score))
        order.append(waiting[cluster].pop())
        done[cluster] += 1
        if not waiting[cluster]:
            del waiting[cluster]
    return order
