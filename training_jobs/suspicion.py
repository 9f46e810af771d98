"""Annotations to look at again: those that models which never saw them contradict."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from labelloop import problem_types
from labelloop.records import ManifestRow, ModelCard, Region, Suspect
from training_jobs import problem

_SPARE = 2  # times the limit of the review tab, from which people's settled cases are taken out


def suspects(rows: Sequence[ManifestRow], candidates: Sequence[Sequence[Region]], card: ModelCard, limit: int) -> list[Suspect]:
    """Annotations that are probably wrong, the worst first, at most twice as many as `limit`.

    `candidates`: all that a model which never saw the image took into consideration, read as `card` says, for each of `rows`.
    """
    problem_type = problem_types.of(card.problem_type)
    if not limit or not rows:
        return []
    quality = problem.of(card.problem_type).label_quality(rows, candidates, card)
    order = [number for number in np.argsort(quality.scores, kind="stable") if quality.wrong[number]]
    return [
        Suspect(
            task=rows[number].task,
            annotation=rows[number].annotation,
            sha256=rows[number].sha256,
            quality=float(quality.scores[number]),
            given=rows[number].regions,
            suggested=problem_type.chosen(candidates[number], card),
        )
        for number in order[: _SPARE * limit]
    ]
