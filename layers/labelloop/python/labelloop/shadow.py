"""A version in shadow: it predicts what the champion predicts, nobody is shown it, and annotators' answers score both.

Only images of the holdout count: no version learns from one, or from one that looks the same, and they are asked for at
random. Among the others the champion's least certain come first, and there any other version does better.

Annotators have the champion's prediction before them. A mistake of the champion's that they overlook counts for it, so a
verdict for the version in shadow stands in spite of that, and one against it may come of that: the error is on the safe side.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from itertools import chain

import msgspec

from labelloop import problem_types, proportions
from labelloop.dataset import answer_of_a_person, split_of
from labelloop.label_studio.client import LabelStudioClient
from labelloop.label_studio.payloads import AnnotatedTask
from labelloop.ledger import Ledger
from labelloop.model_config import ModelConfig, ModelFolder
from labelloop.records import Champion, Comparison, Promotion, Scored, ShadowPair, now

_OVERLAP = timedelta(minutes=1)  # between Label Studio's clock and ours, and of its transactions that end out of order


def running(promotions: Iterable[Promotion], champion: Champion | None) -> Promotion | None:
    """The version in shadow: the newest of those beside the champion that serves, if there is any."""
    beside = [one for one in promotions if one.verdict == "shadow" and one.shadow and one.shadow.champion == champion]
    return max(beside, key=lambda one: one.version, default=None)


def counts(group: str | None, config: ModelConfig) -> bool:
    """Whether a task whose image is of this content group tells anything of a version in shadow."""
    return group is not None and split_of(group, config.splits) == "test"


def in_order(pairs: Iterable[ShadowPair]) -> list[ShadowPair]:
    """Those that annotators have answered, as they were scored."""
    scored = [(pair.scored.scored_at, pair.task, pair) for pair in pairs if pair.scored]
    return [pair for *_, pair in sorted(scored, key=lambda one: one[:2])]


def score(
    folder: ModelFolder, project: int, version: int, since: str, ledger: Ledger, label_studio: LabelStudioClient
) -> list[ShadowPair]:
    """Score what annotators have answered of the pairs with a version that runs in shadow `since` then; all its pairs.

    Read are the tasks that changed after the last answer that is scored, so repeating it costs little and changes nothing.
    Raises `ServiceError`.
    """
    pairs = {pair.task: pair for pair in ledger.pairs(folder.config.name, version)}
    if all(pair.scored for pair in pairs.values()):
        return list(pairs.values())
    last = max([since, *(pair.scored.answered_at for pair in pairs.values() if pair.scored)], key=_moment)
    changed = chain.from_iterable(label_studio.annotated_tasks(project, since=_moment(last) - _OVERLAP))
    waiting = [(pairs[task.id], task) for task in changed if task.id in pairs and not pairs[task.id].scored]
    found = [(pair, scored) for pair, task in waiting if (scored := _scored(pair, task, folder))]
    # The earliest answer first: a crash in between then leaves none behind that the next look does not read.
    for pair, scored in sorted(found, key=lambda one: _moment(one[1].answered_at)):
        pairs[pair.task] = msgspec.structs.replace(pair, scored=scored)
        ledger.score_pair(pairs[pair.task])
    return list(pairs.values())


def _scored(pair: ShadowPair, task: AnnotatedTask, folder: ModelFolder) -> Scored | None:
    """Which of the two was right, where a person has annotated the task in a way that can be read."""
    answer = answer_of_a_person(task, pair.sha256, folder)
    if answer is None:
        return None
    annotation, said = answer
    problem_type = problem_types.of(folder.config.problem_type)
    return Scored(
        answered_at=annotation.updated_at,
        scored_at=now(),
        labels=sorted({region.label for region in said}),
        challenger=problem_type.agrees(pair.says, said),
        champion=problem_type.agrees(pair.champion_says, said),
        seen=annotation.seen(pair.model) == pair.champion,
    )


def compare(pairs: Sequence[ShadowPair], confidence: float) -> Comparison:
    """Challenger against champion: the shares of scored pairs, at least one, in which they say what the annotator says.

    A class's figure is of the tasks in which the annotator saw it; the classes' bounds hold all together.
    """
    scored = [pair.scored for pair in pairs if pair.scored]
    classes = sorted({label for one in scored for label in one.labels})
    shown = {name: [one for one in scored if name in one.labels] for name in classes}
    all_classes = proportions.together(confidence, len(classes))
    won, lost = _differ(scored)
    return Comparison(
        classes=classes,
        images=len(scored),
        challenger=sum(one.challenger for one in scored) / len(scored),
        champion=sum(one.champion for one in scored) / len(scored),
        difference=proportions.proportion(won, lost, len(scored), confidence),
        per_class={name: proportions.proportion(*_differ(some), len(some), all_classes) for name, some in shown.items()},
        won=won,
        lost=lost,
        p_value=proportions.mcnemar(won, lost),
        needed=None,
    )


def _differ(scored: Sequence[Scored]) -> tuple[int, int]:
    """How many only the challenger, and only the champion has right."""
    won = sum(one.challenger and not one.champion for one in scored)
    return won, sum(one.champion and not one.challenger for one in scored)


def _moment(time: str) -> datetime:
    return datetime.fromisoformat(time).astimezone(UTC)
