"""Wrong labels found: annotations flipped on purpose, and where the review list has them.

    uv run python -m benchmarks.label_errors [--data digits faces] [--seeds 3] [--json FILE]

Every seed draws other images and flips 5 % of their labels, in all splits. Training, out-of-fold models and ranking are the
training job's own. *Found in the first 10 %*: flips among the worst tenth of all annotated images; *listed*: what the review
tab would show without its limit. The network and the hyperparameters are the digits'.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.annotated import annotate, look, model_folder, table
from benchmarks.labels import images
from training_jobs import problem
from training_jobs.suspicion import suspects

WRONG = 0.05  # of the labels
COUNT = 1000  # images annotated, where there are as many


class Found(msgspec.Struct, frozen=True):
    """One seed. `first_tenth`, `first_twentieth`: shares of the flips among that part of the images, ranked worst first.

    Of the list: its length, the share of it that was flipped, and of the flips that is on it.
    """

    data: str
    seed: int
    images: int
    flipped: int
    first_tenth: float
    first_twentieth: float
    listed: int
    precision: float
    recall: float
    training_s: float
    out_of_fold_s: float


def measure(name: str, seed: int) -> Found:
    data = images(name)
    with tempfile.TemporaryDirectory() as scratch:
        folder = model_folder(data, Path(scratch))
        annotated = annotate(data, folder, count=COUNT, wrong=WRONG, seed=seed)
        unseen = look(folder, annotated.dataset, Path(scratch))
    quality = problem.of(unseen.card.problem_type).label_quality(unseen.rows, unseen.candidates, unseen.card)
    flipped = np.array([row.sha256 in annotated.flipped for row in unseen.rows])
    ranked = flipped[np.argsort(quality.scores, kind="stable")]
    listed = [suspect.sha256 for suspect in suspects(unseen.rows, unseen.candidates, unseen.card, len(unseen.rows))]
    hits = len(annotated.flipped.intersection(listed))
    return Found(
        data=name,
        seed=seed,
        images=len(ranked),
        flipped=len(annotated.flipped),
        first_tenth=float(ranked[: len(ranked) // 10].sum() / flipped.sum()),
        first_twentieth=float(ranked[: len(ranked) // 20].sum() / flipped.sum()),
        listed=len(listed),
        precision=hits / len(listed) if listed else 0.0,
        recall=hits / len(annotated.flipped),
        training_s=round(unseen.training_s, 1),
        out_of_fold_s=round(unseen.out_of_fold_s, 1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=["digits", "faces", "textures"], default=["digits", "faces"])
    parser.add_argument("--seeds", type=int, default=3, help="runs on each data set (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    figures = [measure(name, seed) for name in options.data for seed in range(options.seeds)]
    titles = ["data", "seed", "images", "flipped", "in the first 10 %", "in the first 5 %", "listed", "precision", "recall"]
    rows = [
        [
            *(str(value) for value in (one.data, one.seed, one.images, one.flipped)),
            *(f"{value:.0%}" for value in (one.first_tenth, one.first_twentieth)),
            str(one.listed),
            *(f"{value:.0%}" for value in (one.precision, one.recall)),
            f"{one.out_of_fold_s:.0f} / {one.training_s:.0f}",
        ]
        for one in figures
    ]
    print(table([[*titles, "seconds: out-of-fold / training"], *rows]))
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(figures)))


if __name__ == "__main__":
    main()
