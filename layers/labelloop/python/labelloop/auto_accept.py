"""Auto-accept: predictions that are sure enough become annotations by themselves, until an audit says that they are not right.

A version accepts from the certainty on at which its training found predictions as precise as config.yaml promises
(`ModelCard.accept_from`). Only images of the train split and of the queue's active stream are accepted: what versions are
measured and calibrated on, and the control share, is annotated by people alone. A share of the sure ones is left to people,
whose answers are compared with the predictions; when they speak against the promise, the version accepts nothing more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from labelloop import problem_types
from labelloop.active_learning import stream_of
from labelloop.dataset import answer_of_a_person, position, split_of
from labelloop.label_studio.client import LabelStudioClient
from labelloop.label_studio.payloads import AnnotatedTask, PredictTask, model_annotation_id
from labelloop.ledger import Ledger
from labelloop.model_config import ModelConfig, ModelFolder
from labelloop.predict import Predicted
from labelloop.records import Audit, ModelCard, TurnedOff, now
from labelloop.wording import counted

FALSE_ALARM = 0.05  # the most likely that a version as precise as promised is ever turned off
_WORSE = (2, 4, 8, 16, 32)  # times the promised odds of an error: what the evidence is sought for
_LOOK_SECONDS = 60.0  # least time between two comparisons with people's answers, which are read from Label Studio


@dataclass(frozen=True)
class AutoAcceptState:
    """How auto-accept stands with a version. `waiting`: audits that nobody has annotated yet; `off`: why it is off, or None.

    `accepted`: annotations of any version's that nobody has changed or confirmed since.
    """

    accepted: int
    right: int
    audited: int
    waiting: int
    off: str | None


def accept(
    folder: ModelFolder,
    card: ModelCard,
    version: int,
    project: int,
    ledger: Ledger,
    label_studio: LabelStudioClient,
    predicted: Iterable[tuple[PredictTask, Predicted]],
    *,
    look_seconds: float = _LOOK_SECONDS,
) -> int:
    """Annotate the sure ones among unlabelled tasks with the version's predictions; how many it annotated.

    Repeating it changes nothing: Label Studio keeps one annotation of the model's for each image. Where a person submits at
    the same time there are two, of which the person's counts. Raises `ServiceError`.
    """
    config, rules = folder.config, folder.config.auto_accept
    if rules is None or card.accept_from is None or not _speaks_of_the_same(card, config):
        return 0
    sure = [_Sure(*pair) for pair in predicted if pair[1].certainty >= card.accept_from and _is_open_to_it(pair[0], config)]
    if not sure or not _is_on(folder, version, project, ledger, label_studio, look_seconds):
        return 0
    ledger.note_audits([_audit(one, config.name, version) for one in sure if _is_audited(one.group, rules.audit)])
    return sum(
        label_studio.annotate_once(one.task.id, one.predicted.result, model_annotation_id(project, one.sha256))
        for one in sure
        if not _is_audited(one.group, rules.audit)
    )


def _speaks_of_the_same(card: ModelCard, config: ModelConfig) -> bool:
    """Whether the version knows the config's classes, and no others: snapshots leave out what is annotated with another."""
    return set(card.classes) == set(config.classes) and card.problem_type == config.problem_type


def summary(folder: ModelFolder, version: int, ledger: Ledger, tasks: Sequence[AnnotatedTask]) -> AutoAcceptState | None:
    """How it stands with the version that serves; None where config.yaml has no auto_accept. `tasks`: the annotated ones."""
    rules = folder.config.auto_accept
    if rules is None:
        return None
    by_id = {task.id: task for task in tasks}
    audits = [_compared(audit, by_id.get(audit.task), folder) for audit in ledger.audits(folder.config.name, version)]
    off = ledger.turned_off(folder.config.name, version)
    accepted = sum(task.latest is not None and task.latest.by_model for task in tasks)
    answered = [audit.right for audit in audits if audit.right is not None]
    return AutoAcceptState(accepted, sum(answered), len(answered), len(audits) - len(answered), off.reason if off else None)


def evidence(right: int, wrong: int, promise: float) -> float:
    """How much more likely audits are with a precision below `promise` than with it: a mean of likelihood ratios.

    With a precision of at least `promise` it is a supermartingale that starts at 1, so it ever reaches 1 / p with
    probability p at most, however often one looks (Ville's inequality). A binomial tail would have to be looked at once.
    """
    odds = (1 - promise) / promise
    ratios = []
    for times in _WORSE:
        error = times * odds / (1 + times * odds)
        ratios.append(wrong * math.log(error / (1 - promise)) + right * math.log((1 - error) / promise))
    return math.fsum(math.exp(min(ratio, 700.0)) for ratio in ratios) / len(ratios)


@dataclass(frozen=True)
class _Sure:
    """A task whose prediction is sure enough, with the image's hashes."""

    task: PredictTask
    predicted: Predicted

    @property
    def group(self) -> str:
        return self.task.group or ""

    @property
    def sha256(self) -> str:
        return str(self.task.meta["sha256"])


def _is_open_to_it(task: PredictTask, config: ModelConfig) -> bool:
    if task.group is None or not task.meta.get("sha256"):
        return False
    return stream_of(task.group, config) == "active" and split_of(task.group, config.splits) == "train"


def _is_audited(group: str, share: float) -> bool:
    return position("audit", group) < share


def _audit(one: _Sure, model: str, version: int) -> Audit:
    predicted = one.predicted.regions
    return Audit(model=model, version=version, task=one.task.id, sha256=one.sha256, predicted=predicted, noted_at=now())


def _is_on(
    folder: ModelFolder, version: int, project: int, ledger: Ledger, label_studio: LabelStudioClient, look_seconds: float
) -> bool:
    model, rules = folder.config.name, folder.config.auto_accept
    if rules is None or ledger.turned_off(model, version) is not None:
        return False
    if not ledger.claim_audit_look(model, version, look_seconds):
        return True
    audits = _look(folder, version, project, ledger, label_studio)
    audited, right = len(audits), sum(audits)
    if evidence(right, audited - right, rules.precision) < 1 / FALSE_ALARM:
        return True
    those = counted(audited, "audited prediction")
    reason = f"people agree with {right} of {those}: too few for a precision of {rules.precision:.1%}"
    ledger.turn_off(TurnedOff(model=model, version=version, right=right, audited=audited, reason=reason, at=now()))
    return False


def _look(folder: ModelFolder, version: int, project: int, ledger: Ledger, label_studio: LabelStudioClient) -> list[bool]:
    """Compare what was annotated meanwhile; the outcomes of all audits that have one."""
    audits = ledger.audits(folder.config.name, version)
    waiting = [audit.task for audit in audits if audit.right is None]
    annotated = {task.id: task for task in label_studio.annotations_of(project, waiting)}
    outcomes = []
    for audit in audits:
        compared = _compared(audit, annotated.get(audit.task), folder)
        if compared != audit:
            ledger.record_audit(compared)
        if compared.right is not None:
            outcomes.append(compared.right)
    return outcomes


def _compared(audit: Audit, task: AnnotatedTask | None, folder: ModelFolder) -> Audit:
    """The audit with its outcome, where a person has annotated the task in a way that can be read."""
    answer = answer_of_a_person(task, audit.sha256, folder)
    if audit.right is not None or answer is None:
        return audit
    _, said = answer
    return msgspec.structs.replace(audit, right=problem_types.of(folder.config.problem_type).agrees(audit.predicted, said))
