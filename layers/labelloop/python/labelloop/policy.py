"""When to train: one pure function of the policy and the state, so that events only decide when it is asked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime, timedelta

from labelloop.model_config import Retrain
from labelloop.records import Head
from labelloop.wording import counted

MAX_BACKOFF = timedelta(hours=24)


@dataclass(frozen=True)
class Decision:
    """`train` now or not, and why; `due_at` is the count of annotations."""

    train: bool
    reason: str
    due_at: int


def due_at(policy: Retrain, trained: int | None) -> int:
    """The count of annotations at which the next training is due, after one with `trained` annotations."""
    if trained is None:
        return policy.at[0]
    for count in policy.at:
        if count > trained:
            return count
    return max(trained + 1, math.ceil(trained * policy.factor))


def decide(policy: Retrain, head: Head, n_annotations: int, now: datetime, *, asked: bool = False) -> Decision:
    """Decide about a training with `n_annotations` annotated images now.

    `asked`: a person pressed Start Training, which overrides counts and waiting times, but not a running training.
    """
    due = due_at(policy, head.trained.n_annotations if head.trained else None)
    if head.running:
        return Decision(False, f"{head.running.job_name} is running", due)
    if n_annotations == 0:
        return Decision(False, "nothing is annotated", due)
    if asked:
        return Decision(True, f"asked for, with {counted(n_annotations, 'annotation')}", due)
    if n_annotations < due:
        return Decision(False, f"{counted(n_annotations, 'annotation')} of {due:,}", due)

    earliest: list[tuple[datetime, str]] = []
    if head.trained:
        ended = datetime.fromisoformat(head.trained.ended_at)
        earliest.append((ended + timedelta(minutes=policy.cooldown_minutes), "cooling down after the last training"))
    if head.failure:
        doubled = policy.failure_backoff_minutes * 2 ** min(head.failure.consecutive - 1, 20)
        wait = min(timedelta(minutes=doubled), MAX_BACKOFF)
        why = f"AWS had no machine for {head.failure.job_name}" if head.failure.no_machine else "waiting after a failed training"
        earliest.append((datetime.fromisoformat(head.failure.ended_at) + wait, why))
    for moment, reason in sorted(earliest, reverse=True):
        if now < moment:
            return Decision(False, f"{reason}, until {moment.isoformat(timespec='seconds')}", due)
    return Decision(True, f"{counted(n_annotations, 'annotation')}, due at {due:,}", due)
