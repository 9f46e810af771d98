"""What a version in shadow comes to: versions of known quality, annotators who overlook mistakes, the verdict as in the loop.

    uv run python -m benchmarks.shadow [--tries N]

Mistakes of the two versions are independent, which tells least. An annotator who overlooks a mistake of the champion's
submits it.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter

import msgspec
import numpy as np

from benchmarks.annotated import table
from labelloop.promotion import judge_live
from labelloop.records import Champion, GateRules, Scored, Shadow, ShadowPair, Verdict

CHAMPION = 0.9  # share of images that it is right about
RULES = GateRules(margin=0.02, class_floor=0.1, confidence=0.95, shadow=200)
LOOKS = 5  # at 200, 400, … tasks
CELLS = [(points, overlooked) for points in (-5, -3, 0, 3, 6) for overlooked in (0.0, 0.2, 0.5)]


def decide(random: np.random.Generator, points: float, overlooked: float) -> tuple[Verdict, int]:
    """The verdict about a challenger that is truly `points` better, and the tasks that it took."""
    most = RULES.shadow << (LOOKS - 1)
    challenger, champion = (random.random(most) < share for share in (CHAMPION + points / 100, CHAMPION))
    passed = ~champion & (random.random(most) < overlooked)  # annotators submit the champion's mistake
    outcomes = list(zip((challenger & ~passed).tolist(), (champion | passed).tolist(), strict=True))
    pairs = [_pair(task, *outcome) for task, outcome in enumerate(outcomes)]
    for look in range(LOOKS):
        tasks = RULES.shadow << look
        verdict, _, _ = judge_live(_RUN, pairs[:tasks])
        if verdict != "shadow":
            return verdict, tasks
    return "shadow", most


def _pair(task: int, challenger: bool, champion: bool) -> ShadowPair:
    return msgspec.structs.replace(_PAIR, task=task, scored=_SCORED[challenger, champion])


_FIRST = Champion(
    model="m", version=1, onnx="", sha256="", metric="accuracy", value=0, n_annotations=1, promoted_at="", reason=""
)
_RUN = Shadow(challenger=msgspec.structs.replace(_FIRST, version=2, n_annotations=2), champion=_FIRST, rules=RULES)
_PAIR = ShadowPair(model="m", version=2, champion=1, task=0, sha256="", says=[], champion_says=[], noted_at="")
_SCORED = {
    (challenger, champion): Scored(
        answered_at="", scored_at="", labels=["a"], challenger=challenger, champion=champion, seen=True
    )
    for challenger in (False, True)
    for champion in (False, True)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=200, help="runs of each cell")
    tries = parser.parse_args().tries
    rows = [["truly, points", "overlooked", "promote", "keep", "undecided", "tasks, median"]]
    for points, overlooked in CELLS:
        random = np.random.default_rng(0)
        found = [decide(random, points, overlooked) for _ in range(tries)]
        counts = Counter(verdict for verdict, _ in found)
        shares = [f"{counts[verdict] / tries:.1%}" for verdict in ("promote", "keep", "shadow")]
        rows.append([f"{points:+d}", f"{overlooked:.0%}", *shares, f"{statistics.median(tasks for _, tasks in found):,.0f}"])
    print(table(rows))


if __name__ == "__main__":
    main()
