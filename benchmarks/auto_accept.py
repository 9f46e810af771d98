"""Whether auto-accept keeps what it promises: the threshold from annotated images, the precision on all others.

    uv run python -m benchmarks.auto_accept [--data digits] [--precision 0.99] [--wrong 0] [--seeds 5] [--json FILE]

Every seed draws 1,000 annotated images; threshold, training and out-of-fold models are the training job's own. The images left
are the tasks that wait. Then the same tasks drift, as when a camera fails: how precise is what would be accepted of them, and how
many of the audits (a tenth of it, in an order of chance) does it take until auto-accept turns itself off?
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.annotated import Unseen, annotate, look, model_folder, said_of, table
from benchmarks.labels import Images, images
from labelloop import problem_types
from labelloop.auto_accept import FALSE_ALARM, evidence
from labelloop.records import Region
from training_jobs.calibration import accept_from
from training_jobs.dataset import Pixels

COUNT = 1000  # images annotated
AUDIT = 0.1  # of what would be accepted, config.yaml's default
_NOISE = 60  # standard deviation, of 255

DRIFTS: dict[str, Callable[[Pixels], Pixels]] = {
    "none": lambda pixels: pixels,
    "inverted": lambda pixels: 255 - pixels,
    "noisy": lambda pixels: _noisy(pixels),
    "shifted by a quarter": lambda pixels: np.roll(pixels, pixels.shape[2] // 4, axis=2),
    "turned by 90°": lambda pixels: np.rot90(pixels, axes=(1, 2)),
}


class Accepted(msgspec.Struct, frozen=True):
    """Of the waiting tasks, drifted or not: how many there are, would be accepted, and accepted rightly.

    `off_after`: audits after which auto-accept turns itself off; None where it stays on.
    """

    drift: str
    tasks: int
    accepted: int
    right: int
    off_after: int | None


class Kept(msgspec.Struct, frozen=True):
    """One seed. `threshold`: None where no certainty would do."""

    data: str
    seed: int
    threshold: float | None
    accepted: list[Accepted]


def measure(name: str, seed: int, precision: float, wrong: float) -> Kept:
    data = images(name)
    with tempfile.TemporaryDirectory() as scratch:
        folder = model_folder(data, Path(scratch))
        annotated = annotate(data, folder, count=COUNT, wrong=wrong, seed=seed)
        unseen = look(folder, annotated.dataset, Path(scratch))
    threshold = accept_from(unseen.rows, unseen.candidates, precision, unseen.card)
    tasks = (
        [] if threshold is None else [accept(unseen, data, annotated.waiting, drift, threshold, precision) for drift in DRIFTS]
    )
    return Kept(name, seed, threshold, tasks)


def accept(unseen: Unseen, data: Images, waiting: list[int], drift: str, threshold: float, precision: float) -> Accepted:
    kind, card = problem_types.of(unseen.card.problem_type), unseen.card
    said = said_of(unseen, np.ascontiguousarray(DRIFTS[drift](data.pixels[waiting])))
    right = [
        kind.agrees(kind.chosen(found, card), [Region(label=data.labels[number])])
        for number, found in zip(waiting, said, strict=True)
        if kind.certainty(found, card) >= threshold
    ]
    return Accepted(drift, len(waiting), len(right), sum(right), off_after(random.Random(0).sample(right, len(right)), precision))


def off_after(right: Sequence[bool], precision: float) -> int | None:
    """Audits, in their order, until they speak against the promise."""
    audited = right[: round(AUDIT * len(right))]
    for count in range(1, len(audited) + 1):
        hits = sum(audited[:count])
        if evidence(hits, count - hits, precision) >= 1 / FALSE_ALARM:
            return count
    return None


def _noisy(pixels: Pixels) -> Pixels:
    noise = np.random.default_rng(0).normal(0, _NOISE, pixels.shape)
    return (pixels + noise).clip(0, 255).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["digits", "textures"], default="digits")
    parser.add_argument("--precision", type=float, default=0.99, help="what config.yaml promises (default: %(default)s)")
    parser.add_argument("--wrong", type=float, default=0.0, help="share of the annotations that are wrong (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    figures = [measure(options.data, seed, options.precision, options.wrong) for seed in range(options.seeds)]
    rows = [["seed", "threshold", "images", "tasks", "accepted", "right", "off after audits"]]
    for one in figures:
        threshold = "none" if one.threshold is None else f"{one.threshold:.4f}"
        rows += [[str(one.seed), threshold, *cells] for cells in map(_cells, one.accepted)] or [
            [str(one.seed), threshold, *"–––––"]
        ]
    for drift in DRIFTS:
        of = [accepted for one in figures for accepted in one.accepted if accepted.drift == drift]
        if of:
            tasks, count, right = (sum(values) for values in zip(*((a.tasks, a.accepted, a.right) for a in of), strict=True))
            rows.append(["all", "", *_cells(Accepted(drift, tasks, count, right, None))[:-1], ""])
    print(table(rows))
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(figures)))


def _cells(one: Accepted) -> list[str]:
    share = f" ({one.right / one.accepted:.2%})" if one.accepted else ""
    accepted = f"{one.accepted} ({one.accepted / one.tasks:.0%})"
    return [one.drift, str(one.tasks), accepted, f"{one.right}{share}", str(one.off_after or "–")]


if __name__ == "__main__":
    main()
