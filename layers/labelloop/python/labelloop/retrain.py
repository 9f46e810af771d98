"""Reconcile: compare what is annotated with what was trained, and act.

Level-triggered: a webhook, a schedule and the end of a job only say when to look. Each step can be lost or done twice and
heals with the next look: the snapshot is content-addressed, the ledger's claim is conditional, the job's name is unique.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from labelloop import artifacts, shadow, snapshot_index
from labelloop.acceptance import NONE_SEEN, Acceptance
from labelloop.artifacts import Bucket, Champions
from labelloop.errors import ConflictError
from labelloop.label_studio.client import LabelStudioClient
from labelloop.launcher import Launcher, job_name
from labelloop.ledger import Ledger
from labelloop.model_config import ModelConfigs, ModelFolder, config_digest
from labelloop.policy import Decision, decide
from labelloop.promotion import judge_live
from labelloop.records import (
    Answer,
    Counted,
    Failure,
    Head,
    Job,
    LeftOut,
    NothingNew,
    Trained,
    Training,
    TrainingStatus,
    now,
)
from labelloop.snapshot_index import SnapshotIndex

_PROMOTION_GRACE = timedelta(seconds=30)  # `promote` hears of a job's end at the same time
_RECALL_AGAIN = timedelta(hours=1)  # what `promote` fails at stays in its queue for some four
_READING_SECONDS = 180.0  # of Label Studio, in one look; the rest of the function's time is for what comes after
_REASONS = 5  # why annotated tasks were left out, the commonest: there may be one for each
_TRIES = 5  # of a look that another one got ahead of
ASKED = "START_TRAINING"  # Label Studio's button
SCHEDULE = "SCHEDULE"
TRAINING_FAILED = "training failed"  # in the log, where the stage's dashboard counts it


@dataclass(frozen=True)
class Outcome:
    """What a reconcile did: the job it started, or why it did not. `remembered`: one was asked for, and comes later.

    `annotated`: tasks, None where nobody counted. `acceptance`: of annotations that were read for the first time. `left_out`:
    of a training that was due by the count alone. `nothing_new`: of one that was due, with the same annotations as before.
    """

    started: str | None
    reason: str
    remembered: bool = False
    annotated: int | None = field(default=None, compare=False)
    acceptance: Acceptance = field(default=NONE_SEEN, compare=False)
    left_out: LeftOut | None = field(default=None, compare=False)
    nothing_new: NothingNew | None = field(default=None, compare=False)


class Reconciler:
    """Keeps every model's training in step with its annotations. `recall_promotion` asks `promote` to look at a job again."""

    def __init__(
        self,
        stage: str,
        configs: ModelConfigs,
        artifacts_bucket: Bucket,
        ledger: Ledger,
        label_studio: LabelStudioClient,
        launcher: Launcher,
        recall_promotion: Callable[[str, str], None],
        *,
        log: Callable[..., None],
    ) -> None:
        self._stage, self._configs, self._bucket, self._ledger = stage, configs, artifacts_bucket, ledger
        self._label_studio, self._launcher, self._recall_promotion = label_studio, launcher, recall_promotion
        self._log = log

    def reconcile(self, model: str, *, asked: bool = False) -> Outcome:
        """Bring the ledger up to date with SageMaker and start a training if one is due. Raises `LabelloopError`."""
        for _ in range(_TRIES - 1):
            try:
                return self._look(model, asked=asked)
            except ConflictError:  # another reconcile was first: look at what it left
                time.sleep(random.uniform(0.02, 0.2))
        return self._look(model, asked=asked)

    def has_answered(self, model: str, request: str) -> bool:
        """Whether a request has come to something: its message may be delivered again."""
        return self._ledger.answer(model, request) is not None

    def answer(self, model: str, request: str, outcome: Outcome) -> None:
        """Tell whoever made a request and waits what came of it."""
        self._ledger.record_answer(
            Answer(
                model=model,
                request=request,
                started=outcome.started,
                reason=outcome.reason,
                remembered=outcome.remembered,
                at=now(),
            )
        )

    def _look(self, model: str, *, asked: bool) -> Outcome:
        self._follow_shadow(model)
        head = self._settle(model, self._ledger.head(model))
        asked = asked or head.asked
        busy = self._busy(model, head)
        if busy:
            if asked and not head.asked:  # somebody pressed Start Training: once there is room for it
                self._ledger.remember(head, asked=True)
            return Outcome(None, busy, remembered=asked)
        outcome = self._train_if_due(model, head, asked=asked)
        found = outcome.left_out, outcome.nothing_new
        if outcome.started is None and (head.asked or (head.left_out, head.nothing_new) != found):
            self._ledger.remember(head, asked=False, left_out=outcome.left_out, nothing_new=outcome.nothing_new)
        return outcome

    def _follow_shadow(self, model: str) -> None:
        """Score what annotators have answered of a version in shadow; have `promote` look where that or anything ends its run."""
        begun = [promotion for promotion in self._ledger.promotions(model).values() if promotion.verdict == "shadow"]
        if not begun:
            return
        running = shadow.running(begun, Champions(self._bucket).read(model))
        if running is not None and running.shadow is not None:
            folder, project = self._configs[model], self._ledger.project(model)
            pairs = shadow.score(folder, project, running.version, running.decided_at, self._ledger, self._label_studio)
            if judge_live(running.shadow, pairs)[0] == "shadow":
                begun.remove(running)
        for promotion in begun:
            self._recall(model, promotion.job_name, promotion.decided_at)

    def _recall(self, model: str, job_name: str, since: str) -> None:
        """Have `promote` look at a job again, once an hour; what it was asked before `since` was something else."""
        asked = self._ledger.recalled_at(model, job_name)
        if asked is None or asked < since or _age(asked) > _RECALL_AGAIN:
            self._recall_promotion(model, job_name)
            self._ledger.note_recall(model, job_name, now())

    def _settle(self, model: str, head: Head) -> Head:
        """Find out what became of the running job; start it when it was claimed and never started."""
        job = head.running
        if job is None:
            return head
        state = self._launcher.state(job.job_name)
        if state is None:
            self._launcher.start(self._configs[model].config, job, Champions(self._bucket).read(model))
            return head
        if not state.ended:
            return head
        ended_at = now()
        if state.status == "Completed":
            trained = Trained(digest=job.digest, n_annotations=job.n_annotations, job_name=job.job_name, ended_at=ended_at)
            after = msgspec.structs.replace(head, trained=trained, failure=None)
            return self._ledger.finish(head, after, Training(job=job, status="completed", ended_at=ended_at))
        reason = state.failure or f"the job was {state.status.lower()}"
        failure = Failure(
            digest=job.digest,
            n_annotations=job.n_annotations,
            job_name=job.job_name,
            reason=reason,
            ended_at=ended_at,
            consecutive=head.failure.consecutive + 1 if head.failure else 1,
            no_machine=state.no_machine,
        )
        status: TrainingStatus = "failed" if state.status == "Failed" else "stopped"
        after = msgspec.structs.replace(head, failure=failure)
        finished = self._ledger.finish(
            head, after, Training(job=job, status=status, ended_at=ended_at, failure=reason, no_machine=state.no_machine)
        )
        message = "no machine for a training" if state.no_machine else TRAINING_FAILED  # the first comes again by itself
        self._log(message, model=model, job_name=job.job_name, reason=reason)
        return finished

    def _busy(self, model: str, head: Head) -> str | None:
        """Why no training may start now, whatever is due; None when one may."""
        if head.running:
            return f"{head.running.job_name} is running"
        if head.trained and self._ledger.promotion(model, head.trained.job_name) is None:
            # The next challenger meets whoever wins this one. Asking again heals an end that `promote` never saw.
            if _age(head.trained.ended_at) > _PROMOTION_GRACE:
                self._recall(model, head.trained.job_name, head.trained.ended_at)
            return f"waiting for the promotion gate to decide about {head.trained.job_name}"
        return None

    def _train_if_due(self, model: str, head: Head, *, asked: bool) -> Outcome:
        folder = self._configs[model]
        project = self._ledger.project(model)
        tally = self._label_studio.tally(project)
        decision = self._decide(model, head, tally.tasks, asked=asked)
        if not decision.train:
            return Outcome(None, decision.reason, annotated=tally.tasks)
        annotated = Counted(
            tasks=tally.tasks,
            annotations=tally.annotations,
            changed_at=tally.changed_at,
            made_with=f"{snapshot_index.FORMAT}/{config_digest(folder.config, folder.label_config)}",
        )
        known = head.nothing_new
        if known and known.annotated == annotated and not asked:  # what there is need not be read to know it
            return Outcome(None, known.reason, annotated=tally.tasks, left_out=head.left_out, nothing_new=known)

        with (
            tempfile.TemporaryDirectory() as scratch,
            snapshot_index.opened(self._bucket, folder, project, Path(scratch), log=self._log) as index,
        ):
            whole = index.catch_up(self._label_studio, seconds=_READING_SECONDS, log=self._log)
            manifest = Path(scratch) / "manifest.jsonl"
            outcome = self._train_what_is_new(head, folder, index, tally.tasks, manifest, asked=asked)
            # What is committed late may bear the same time as the latest change.
            settled = whole and tally.changed_at is not None and _age(tally.changed_at) > snapshot_index.OVERLAP
            same = NothingNew(annotated=annotated, reason=outcome.reason) if outcome.started is None and settled else None
            return replace(outcome, annotated=tally.tasks, acceptance=index.acceptance, nothing_new=same)

    def _train_what_is_new(
        self, head: Head, folder: ModelFolder, index: SnapshotIndex, annotated: int, manifest: Path, *, asked: bool
    ) -> Outcome:
        model = folder.config.name
        with manifest.open("wb") as rows:
            snapshot = index.freeze(rows, f"s3://{self._bucket.name}/{artifacts.manifest_key(model, '{digest}')}")
        decision = self._decide(model, head, snapshot.n_annotations, asked=asked)
        if not decision.train:  # some annotated tasks cannot be trained on
            reasons = dict(Counter(snapshot.skipped).most_common(_REASONS))
            left_out = LeftOut(annotated=annotated, usable=snapshot.n_annotations, reasons=reasons)
            return Outcome(None, f"{decision.reason}; left out: {reasons}", left_out=left_out)
        tries = [training for training in self._ledger.trainings(model) if training.job.digest == snapshot.digest]
        # Who asks may have changed the config since; nobody else's look trains the same again.
        alike = [one for one in tries if not asked or one.job.code == self._launcher.code]
        trained = next((one.job.job_name for one in alike if self._has_trained(one)), None)
        if trained is not None:  # perhaps not the last: a label may be changed and changed back
            return Outcome(None, f"{trained} has trained the same annotations")
        failure = head.failure
        if failure and failure.digest == snapshot.digest and not failure.no_machine and not asked:
            return Outcome(None, f"{failure.job_name} failed with the same annotations; any change of them allows another try")
        self._bucket.upload(artifacts.manifest_key(model, snapshot.digest), manifest)

        champion = Champions(self._bucket).read(model)
        job = Job(
            job_name=job_name(self._stage, model, snapshot.digest, len(tries) + 1),
            digest=snapshot.digest,
            n_annotations=snapshot.n_annotations,
            attempt=len(tries) + 1,
            started_at=now(),
            snapshot=snapshot,
            champion_version=champion.version if champion else None,
            shortages=sum(training.no_machine for training in tries),
            code=self._launcher.code,
        )
        self._ledger.claim(head, job)
        self._launcher.start(folder.config, job, champion)
        return Outcome(job.job_name, decision.reason)

    def _has_trained(self, training: Training) -> bool:
        """Whether it came to a version: the gate refuses an archive that is damaged or missing."""
        if training.status != "completed":
            return False
        promotion = self._ledger.promotion(training.job.snapshot.model, training.job.job_name)
        return promotion is None or promotion.version > 0

    def _decide(self, model: str, head: Head, n_annotations: int, *, asked: bool) -> Decision:
        return decide(self._configs[model].config.retrain, head, n_annotations, datetime.now(UTC), asked=asked)


def _age(moment: str) -> timedelta:
    return datetime.now(UTC) - datetime.fromisoformat(moment)


class Watchdog:
    """Watches over the webhooks of one Label Studio, which switches off one that fails; training then waits for the schedule."""

    def __init__(self, ledger: Ledger, label_studio: LabelStudioClient) -> None:
        self._ledger, self._label_studio = ledger, label_studio

    def __call__(self, model: str) -> str | None:
        """Switch the model's webhook on where it is off; what a person should know, None when all is well.

        One that is missing is not made: it carries the backend's password. Raises `NotSetUpError`, `ServiceError`.
        """
        found = self._label_studio.webhooks(self._ledger.project(model))
        ours = [hook for hook in found if urlsplit(hook.url).path.endswith(f"/{model}/webhook")]
        if not ours:
            return f"Label Studio has no webhook for {model}; run: labelloop setup-label-studio-project {model}"
        off = [hook for hook in ours if not hook.is_active]
        for hook in off:
            self._label_studio.switch_on(hook)
        return f"the webhook was switched off and is on again: {', '.join(hook.url for hook in off)}" if off else None
