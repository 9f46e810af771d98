"""When to train, as a pure function."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labelloop.model_config import Retrain
from labelloop.policy import MAX_BACKOFF, Decision, decide, due_at
from labelloop.records import Failure, Head, Trained
from tests import examples

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
POLICY = Retrain(at=[100, 500, 1000], factor=2.0, cooldown_minutes=30, failure_backoff_minutes=10)


def trained(count: int, *, minutes_ago: float = 1_000) -> Trained:
    ended_at = (NOW - timedelta(minutes=minutes_ago)).isoformat()
    return Trained(digest="d", n_annotations=count, job_name="job-1", ended_at=ended_at)


def failure(count: int, *, consecutive: int = 1, minutes_ago: float = 10_000) -> Failure:
    ended_at = (NOW - timedelta(minutes=minutes_ago)).isoformat()
    return Failure(digest="d", n_annotations=count, job_name="job-1", reason="why", ended_at=ended_at, consecutive=consecutive)


def ask(head: Head, count: int, *, asked: bool = False, policy: Retrain = POLICY) -> Decision:
    return decide(policy, head, count, NOW, asked=asked)


def until(minutes: float) -> str:
    """How a reason ends that is over then."""
    return f", until {(NOW + timedelta(minutes=minutes)).isoformat(timespec='seconds')}"


@pytest.mark.parametrize(
    ("last", "due"),
    [
        (None, 100),
        (1, 100),
        (99, 100),
        (100, 500),
        (499, 500),
        (500, 1000),
        (999, 1000),
        (1000, 2000),
        (1500, 3000),
        (3000, 6000),
    ],
)
def test_due_at(last: int | None, due: int) -> None:
    assert due_at(POLICY, last) == due


def test_a_small_factor_still_asks_for_one_more() -> None:
    assert due_at(Retrain(at=[10], factor=1.0001), 10) == 11


@pytest.mark.parametrize(
    ("last", "count", "train"),
    [(None, 99, False), (None, 100, True), (100, 499, False), (100, 500, True), (1000, 1999, False), (1000, 2000, True)],
)
def test_it_trains_when_the_count_is_reached(last: int | None, count: int, train: bool) -> None:
    decision = ask(Head(model="digits", trained=trained(last) if last else None), count)
    assert decision.train is train
    assert f"{count:,}" in decision.reason
    assert f"{decision.due_at:,}" in decision.reason


def test_a_running_training_is_waited_for_even_when_asked() -> None:
    head = Head(model="digits", running=examples.job("job-7"))
    for asked in (False, True):
        decision = ask(head, 10_000, asked=asked)
        assert not decision.train
        assert decision.reason == "job-7 is running"


def test_the_cooldown_is_waited_for_and_named() -> None:
    decision = ask(Head(model="digits", trained=trained(100, minutes_ago=29)), 500)
    assert not decision.train
    assert decision.reason.startswith("cooling down")
    assert decision.reason.endswith(until(1))
    assert ask(Head(model="digits", trained=trained(100, minutes_ago=30)), 500).train


@pytest.mark.parametrize(
    ("consecutive", "minutes"), [(1, 10), (2, 20), (3, 40), (6, 320), (8, 1280), (9, 24 * 60), (500, 24 * 60)]
)
def test_the_wait_after_failures_doubles_up_to_a_day(consecutive: int, minutes: int) -> None:
    just_before = Head(model="digits", failure=failure(100, consecutive=consecutive, minutes_ago=minutes - 0.5))
    decision = ask(just_before, 101)
    assert not decision.train
    assert decision.reason.endswith(until(0.5))
    assert ask(Head(model="digits", failure=failure(100, consecutive=consecutive, minutes_ago=minutes)), 101).train


def test_the_longer_of_two_waits_counts() -> None:
    head = Head(model="digits", trained=trained(100, minutes_ago=1), failure=failure(500, consecutive=3, minutes_ago=1))
    assert ask(head, 501).reason.endswith(until(39))


def test_asking_overrides_counts_and_waits_but_needs_annotations() -> None:
    head = Head(model="digits", trained=trained(100, minutes_ago=1), failure=failure(100, minutes_ago=1))
    assert ask(head, 101, asked=True).train
    assert ask(Head(model="digits"), 1, asked=True).train
    nothing = ask(Head(model="digits"), 0, asked=True)
    assert (nothing.train, nothing.reason) == (False, "nothing is annotated")


counts = st.integers(0, 10**6)
minutes = st.floats(0, 525_600)
policies = st.builds(
    Retrain,
    at=st.lists(st.integers(1, 10**5), min_size=1, max_size=5, unique=True).map(sorted),
    factor=st.floats(1, 1000, exclude_min=True),
    cooldown_minutes=minutes,
    failure_backoff_minutes=minutes,
)
heads = st.builds(
    Head,
    model=st.just("digits"),
    running=st.none() | st.just(examples.job()),
    trained=st.none() | st.builds(trained, st.integers(1, 10**6), minutes_ago=minutes),
    failure=st.none() | st.builds(failure, counts, consecutive=st.integers(1, 10**6), minutes_ago=minutes),
)


@given(policies, heads, counts, st.booleans())
def test_it_never_trains_beside_a_running_job_or_on_nothing(policy: Retrain, head: Head, count: int, asked: bool) -> None:
    decision = ask(head, count, asked=asked, policy=policy)
    assert not (decision.train and (head.running or count == 0))
    assert decision.reason
    if decision.train and not asked:
        assert count >= decision.due_at


@given(policies, heads, counts)
def test_waiting_long_enough_with_enough_annotations_always_trains(policy: Retrain, head: Head, count: int) -> None:
    decision = ask(head, count, policy=policy)
    enough = max(decision.due_at, 1)
    later = NOW + max(timedelta(minutes=policy.cooldown_minutes), MAX_BACKOFF)
    assert decide(policy, head, enough, later).train is (head.running is None)


@given(policies, st.none() | st.integers(1, 10**6))
def test_what_is_due_strictly_rises(policy: Retrain, last: int | None) -> None:
    due = due_at(policy, last)
    assert due >= 1
    if last is not None:
        assert due > last
        assert due >= due_at(policy, last - 1 or None)
    assert due_at(policy, due) > due
