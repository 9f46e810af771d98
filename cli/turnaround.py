"""From the annotation that decides to the version that serves: what each part of the loop takes of that time."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from labelloop.records import Promotion

TRAINING = ("probe", "fit", "out-of-fold")  # phases of the job that are training itself; the rest is what the loop adds


def turnaround(
    job: Mapping[str, Any], promotion: Promotion, *, annotated_at: datetime | None = None, served_at: datetime | None = None
) -> dict[str, float]:
    """Seconds by part, in their order; their sum is the whole. `job` is SageMaker's description of the training job.

    Without `annotated_at` it begins with the job, without `served_at` it ends with the verdict.
    """
    began = {each["Status"]: each["StartTime"] for each in reversed(job["SecondaryStatusTransitions"])}  # of each the first
    decided_at, phases = datetime.fromisoformat(promotion.decided_at), promotion.timing.seconds if promotion.timing else {}
    running = _seconds(began["Training"], began["Uploading"])
    parts = {
        **({"queue": _seconds(annotated_at, job["CreationTime"])} if annotated_at else {}),
        "machine and channels": _seconds(job["CreationTime"], began["Training"]),
        "start of the process": running - sum(phases.values()),
        **phases,
        "upload of the model": _seconds(began["Uploading"], job["TrainingEndTime"]),
        "gate": _seconds(job["TrainingEndTime"], decided_at),
        **({"Label Studio told": _seconds(decided_at, served_at)} if served_at else {}),
    }
    return {part: round(seconds, 2) for part, seconds in parts.items()}


def said(parts: Mapping[str, float]) -> str:
    """For a person: the whole, what of it is not training, and all parts."""
    whole, training = sum(parts.values()), sum(parts.get(phase, 0.0) for phase in TRAINING)
    each = ", ".join(f"{part} {seconds:.1f}" for part, seconds in parts.items())
    return f"{whole:.0f} s from the deciding annotation, {whole - training:.0f} s of it beyond training: {each}"


def _seconds(since: datetime, until: datetime) -> float:
    return (until - since).total_seconds()
