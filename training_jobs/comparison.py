"""Challenger against champion, image by image, on the classes that both know."""

from __future__ import annotations

from collections.abc import Sequence

from labelloop import problem_types, proportions
from labelloop.records import Comparison, GateRules, ManifestRow, ModelCard, Region
from training_jobs import paired, problem


def compare(
    rows: Sequence[ManifestRow],
    challenger: Sequence[Sequence[Region]],
    champion: Sequence[Sequence[Region]],
    ours: ModelCard,
    theirs: ModelCard,
    rules: GateRules,
) -> Comparison | None:
    """What the holdout's `rows` tell of the two: from what is kept of each one's candidates, and its card.

    Where a class was added or removed, annotations of the others are left aside, and with them an image of which nothing
    else could be said; a guess of such a class is wrong where the annotator did not make it, too. None where the two share
    no class, or no image shows one that they share.
    """
    kind = problem.of(ours.problem_type)
    shared = [name for name in ours.classes if name in theirs.classes]
    compared = [number for number, row in enumerate(rows) if kind.comparable(row.regions, shared)]
    truths = [[region for region in rows[number].regions if region.label in shared] for number in compared]
    if not any(truths):
        return None
    new, old = (
        [_of_shared(found[number], rows[number].regions, shared) for number in compared] for found in (challenger, champion)
    )
    difference = kind.difference(truths, new, old, shared, rules.confidence)
    right = list(zip(_right(truths, new, ours), _right(truths, old, theirs), strict=True))
    won, lost = right.count((True, False)), right.count((False, True))
    return Comparison(
        classes=shared,
        images=len(compared),
        challenger=difference.challenger,
        champion=difference.champion,
        difference=difference.total,
        per_class=difference.per_class,
        won=won,
        lost=lost,
        p_value=proportions.mcnemar(won, lost) if ours.problem_type == "classification" else None,
        needed=paired.needed(difference.total, len(compared), rules.margin, rules.confidence),
    )


def _of_shared(found: Sequence[Region], truth: Sequence[Region], shared: Sequence[str]) -> list[Region]:
    """Without what the annotator said, too, of a class that only one of the models knows."""
    aside = {region.label for region in truth} - set(shared)
    return [region for region in found if region.label not in aside]


def _right(truths: Sequence[Sequence[Region]], found: Sequence[Sequence[Region]], card: ModelCard) -> list[bool]:
    """Whether what is shown of each image is what the annotator said of it."""
    kind = problem_types.of(card.problem_type)
    return [kind.agrees(truth, kind.chosen(regions, card)) for truth, regions in zip(truths, found, strict=True)]
