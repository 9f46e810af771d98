"""Predictions for unlabelled tasks, made before anybody opens them: what the queue is ordered by.

A worker makes it so that every unlabelled task of a range has one prediction of the loop's, the champion's. It looks, does
one thing, and looks again until there is nothing left to do, for annotators and promotions go on meanwhile: whoever overtook
whom, the last look is right.

Tasks that somebody asked predictions of (Retrieve Predictions) and that `predict` had no time for come here, too, labelled ones
among them. Those get the champion's prediction beside what they have, as Label Studio itself would have stored it.

Of the holdout's images a version in shadow is asked, too, for the ledger alone (`labelloop.shadow`), and the champion's
embeddings are compared with those that it was measured on (`labelloop.drift`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial

from labelloop import auto_accept, drift, shadow
from labelloop.artifacts import Champions
from labelloop.errors import LabelloopError, LabelStudioError, ModelError, ServiceError
from labelloop.label_studio.client import LabelStudioClient, StoredPrediction, StoredTask
from labelloop.label_studio.payloads import Prediction, PredictTask
from labelloop.ledger import Ledger
from labelloop.predict import Predicted, TaskPredictor
from labelloop.records import Champion, Drift, Served, ShadowPair, TaskRange, now, version_string

SETTLED = timedelta(minutes=15)  # how long a page is taken to stay open; the longest delay of a message in SQS
_ROUNDS = 8
_REQUESTS = 4  # at once; Label Studio on SQLite writes one at a time anyway
_SAME = 1e-6  # scores that differ less come from the same model


@dataclass
class Prelabelled:
    """What became of a range. `unsettled`: tasks with a superfluous prediction that somebody may have open; look again later."""

    version: str | None = None  # None: there is no champion yet
    tasks: int = 0
    written: int = 0
    deleted: int = 0
    unsettled: int = 0
    accepted: int = 0
    in_shadow: int = 0  # tasks that a version in shadow was asked about
    drift: Drift | None = None  # None where nothing was measured


class Prelabeller:
    """Works ranges off. `log(message, **fields)` is told of each task that cannot be predicted."""

    def __init__(
        self,
        champions: Champions,
        ledger: Ledger,
        label_studio: LabelStudioClient,
        predictor: TaskPredictor,
        *,
        log: Callable[..., None],
    ) -> None:
        self._champions, self._ledger, self._label_studio, self._predictor = champions, ledger, label_studio, predictor
        self._log = log

    def __call__(self, tasks: TaskRange) -> Prelabelled:
        """Predict a range's tasks; repeating it changes nothing. Raises `NotSetUpError`, `ModelError`, `ServiceError`.

        A task whose image is broken keeps the predictions that it has.
        """
        project, outcome = self._ledger.project(tasks.model), Prelabelled()
        champion: Champion | None = None
        found: dict[int, Predicted | LabelloopError] = {}
        for _ in range(_ROUNDS):
            before, champion = champion, self._champions.read(tasks.model)
            if champion is None:
                return outcome
            if before is not None and champion.sha256 != before.sha256:
                found.clear()
            outcome.version = version_string(tasks.model, champion.version)
            listed = self._list(project, tasks)
            outcome.tasks = len(listed)
            new = [task for task in listed if task.task.id not in found]
            if new:  # takes its time: annotators go on, so look again before writing
                answers = self._predictor.predict(champion, [task.task for task in new])
                found.update({task.task.id: answer for task, answer in zip(new, answers, strict=True)})
                continue
            predicted = [(task, answer) for task in listed if isinstance(answer := found[task.task.id], Predicted)]
            if not self._settle(project, champion, predicted, outcome):
                self._report(listed, found)
                if predicted:  # else the model need not be loaded
                    outcome.accepted = self._accept(project, champion, predicted)
                    told = [(task.task, answer) for task, answer in predicted if self._tells(task, champion)]
                    outcome.drift = self._measure_drift(champion, told)
                    outcome.in_shadow = self._ask_in_shadow(champion, told)
                return outcome
        raise LabelStudioError(f"Label Studio does not keep the predictions of tasks {tasks.after} to {tasks.upto}")

    def _list(self, project: int, tasks: TaskRange) -> list[StoredTask]:
        if tasks.asked is None:
            return self._label_studio.unlabelled_tasks(project, tasks.after, tasks.upto)
        return self._label_studio.tasks_with_ids(project, tasks.asked)

    def _accept(self, project: int, champion: Champion, predicted: Sequence[tuple[StoredTask, Predicted]]) -> int:
        """Let sure predictions become annotations, where the config asks for it; how many did."""
        folder, card = self._predictor.folder(champion), self._predictor.card(champion)
        pairs = [(listed.task, answer) for listed, answer in predicted if not listed.begun]
        return auto_accept.accept(folder, card, champion.version, project, self._ledger, self._label_studio, pairs)

    def _tells(self, listed: StoredTask, champion: Champion) -> bool:
        """Whether a task is a random one that no version has learnt from."""
        known = isinstance(listed.task.meta, dict) and bool(listed.task.meta.get("sha256"))
        return known and not listed.begun and shadow.counts(listed.task.group, self._predictor.folder(champion).config)

    def _measure_drift(self, champion: Champion, told: Sequence[tuple[PredictTask, Predicted]]) -> Drift | None:
        reference = self._predictor.card(champion).drift
        if reference is None or not told:
            return None
        served = [
            Served(
                task=task.id,
                sha256=task.meta["sha256"],
                certainty=answer.certainty,
                place=drift.place(reference, answer.embedding),
            )
            for task, answer in told
        ]
        return self._ledger.change_drift(champion.model, champion.version, partial(drift.follow, reference, served))

    def _ask_in_shadow(self, champion: Champion, told: Sequence[tuple[PredictTask, Predicted]]) -> int:
        """Note what champion and a version in shadow say of tasks, where there is one; of how many.

        A damaged one is no reason to keep the champion's predictions waiting.
        """
        running = shadow.running(self._ledger.promotions(champion.model).values(), champion)
        if running is None or running.shadow is None:
            return 0
        try:
            answers = self._predictor.predict(running.shadow.challenger, [task for task, _ in told])
        except ModelError as error:
            self._log("not run in shadow", version=running.version, reason=str(error))
            return 0
        pairs = [
            ShadowPair(
                model=champion.model,
                version=running.version,
                champion=champion.version,
                task=task.id,
                sha256=task.meta["sha256"],
                says=answer.regions,
                champion_says=shown.regions,
                noted_at=now(),
            )
            for (task, shown), answer in zip(told, answers, strict=True)
            if isinstance(answer, Predicted)
        ]
        self._ledger.note_pairs(pairs)
        failed = next((answer for answer in answers if isinstance(answer, ServiceError)), None)
        if failed is not None:
            raise failed
        return len(pairs)

    def _settle(
        self,
        project: int,
        champion: Champion,
        predicted: Sequence[tuple[StoredTask, Predicted]],
        outcome: Prelabelled,
    ) -> bool:
        """Write and delete what is not as it should be; whether there was anything to do."""
        version = version_string(champion.model, champion.version)
        writes: list[Callable[[], None]] = []
        deletions: list[Callable[[], None]] = []
        outcome.unsettled = 0
        for task, answer in predicted:
            wanted, cluster = Prediction(answer.result, answer.place.score, version), answer.place.cluster
            ours = [
                stored
                for stored in task.predictions
                if stored.made_by == version or (not task.begun and _is_ours(stored, champion.model))
            ]
            stale = [stored for stored in ours if not _says(stored, wanted, cluster)]
            writes += [partial(self._label_studio.change_prediction, project, stored, wanted, cluster) for stored in stale]
            if not ours:
                writes.append(partial(self._label_studio.add_prediction, project, task.task.id, wanted, cluster))
            # An editor that has a superfluous one open could not submit any more: it goes when nobody has it open.
            superfluous = ours[1:] if not stale else []
            settled = [stored for stored in superfluous if _is_settled(stored)]
            deletions += [partial(self._label_studio.delete_prediction, stored.id) for stored in settled]
            outcome.unsettled += len(settled) < len(ours) - 1
        outcome.written += len(writes)
        outcome.deleted += len(deletions)
        self._send([*writes, *deletions])
        return bool(writes or deletions)

    def _send(self, requests: list[Callable[[], None]]) -> None:
        """All of them, a few side by side. What fails is seen by the next look, as long as any went well."""
        with ThreadPoolExecutor(_REQUESTS) as pool:
            errors = [error for error in pool.map(_error_of, requests) if error]
        if errors and len(errors) == len(requests):
            raise errors[0]

    def _report(self, listed: Sequence[StoredTask], found: dict[int, Predicted | LabelloopError]) -> None:
        """Tell of tasks without a prediction. Raises the first `ServiceError` among them: another time it may go well."""
        errors = [(task.task.id, answer) for task in listed if isinstance(answer := found[task.task.id], LabelloopError)]
        for number, error in errors:
            self._log("not predicted", task=number, reason=str(error))
        for _, error in errors:
            if isinstance(error, ServiceError):
                raise error


def _is_ours(stored: StoredPrediction, model: str) -> bool:
    """Whether a version of the model made it; all others are somebody else's."""
    return re.fullmatch(rf"{re.escape(model)} v\d+", stored.made_by) is not None


def _says(stored: StoredPrediction, wanted: Prediction, cluster: int | None) -> bool:
    """Whether a stored prediction is the wanted one; the result follows from the version."""
    return (
        (stored.made_by, stored.cluster) == (wanted.model_version, cluster)
        and stored.score is not None
        and abs(stored.score - wanted.score) < _SAME
    )


def _is_settled(stored: StoredPrediction) -> bool:
    return datetime.now(UTC) - datetime.fromisoformat(stored.updated_at) >= SETTLED


def _error_of(request: Callable[[], None]) -> LabelStudioError | None:
    try:
        request()
    except LabelStudioError as error:
        if error.status != 404:  # deleted meanwhile, as its task was
            return error
    return None
