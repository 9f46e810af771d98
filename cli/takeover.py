"""Let another version serve, on a person's word: `labelloop rollback` and `labelloop promote`.

Swap the pointer, move the registry's alias, announce, note it in the ledger, in this order: the pointer says itself who
moved it and why, and a pointer whose note is missing is one whose command was interrupted. Running it again finishes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import boto3
from rich.console import Console

from cli.deployment import Deployment
from labelloop.errors import ConflictError, ModelError, NotRegisteredError, RequestError
from labelloop.messages import announce
from labelloop.promotion import pointer
from labelloop.records import METRIC_TITLES, Champion, Metric, Takeover, VersionJudged
from labelloop.wording import counted


@dataclass(frozen=True)
class Outcome:
    """`finished`: a command that had been interrupted is done now, and this is its takeover.

    `registered`: MLflow has the version.
    """

    takeover: Takeover
    metric: Metric
    value: float
    n_annotations: int
    finished: bool
    registered: bool


def rollback(deployment: Deployment, model: str, to: int | None, reason: str | None, events: Any = None) -> Outcome:
    """Let an older version serve: `to`, or the one that served before the present one.

    Raises `ModelError` when there is no such version or its files are damaged, `RequestError` when it serves already or
    nothing served before, `ConflictError` when something else took over at the same moment, `ServiceError`.
    """
    takeover = _TakingOver(deployment, model, events)
    if takeover.unfinished and takeover.champion.by == "rollback" and to in (None, takeover.champion.version):
        return takeover.finish()
    before = takeover.champion.version
    return takeover.to(to or takeover.served_before(), "rollback", reason or f"rolled back from version {before}")


def promote(deployment: Deployment, model: str, version: int, reason: str, events: Any = None) -> Outcome:
    """Let any version serve, whatever the gate said of it. Raises as `rollback` does."""
    takeover = _TakingOver(deployment, model, events)
    if takeover.unfinished and version == takeover.champion.version:
        return takeover.finish()
    return takeover.to(version, "promote", reason)


class _TakingOver:
    """A model's pointer as it was found, and the ways to move it."""

    def __init__(self, deployment: Deployment, model: str, events: Any) -> None:
        self._deployment, self._model, self._events = deployment, model, events
        champion, self._tag = deployment.champions.read_tagged(model)
        if champion is None:
            raise RequestError(f"no version of {model} serves yet; the first one takes over by itself when it is trained")
        self.champion = champion
        self._log = deployment.ledger.takeovers(model)

    @property
    def unfinished(self) -> bool:
        """Whether the pointer was moved by a command that came no further."""
        return self.champion.by != "gate" and self.champion.takeover not in self._log

    def served_before(self) -> int:
        """The version that the present one took over from; rollbacks aside, which would lead back again."""
        ways = [one for one in [*self._log, self.champion.takeover] if one.version == self.champion.version]
        before = next((one.before for one in reversed(ways) if one.by != "rollback"), None)
        if before is None:
            raise RequestError(
                f"nothing served before version {self.champion.version} of {self._model}; name a version: "
                f"{self._deployment.command(f'rollback {self._model} --to N')} (there are: {self._versions()})"
            )
        return before

    def to(self, version: int, by: Literal["rollback", "promote"], reason: str) -> Outcome:
        if version == self.champion.version:
            raise RequestError(f"version {version} of {self._model} serves already; there are: {self._versions()}")
        evaluation = self._deployment.champions.evaluation(self._model, version)
        if evaluation is None:
            raise ModelError(f"{self._model} has no version {version} to serve; there are: {self._versions()}")
        successor = pointer(evaluation, before=self.champion.version, by=by, reason=reason)
        self._deployment.champions.onnx(successor)  # it is there, and the one that was evaluated
        if self.unfinished:
            self._publish(self.champion)
        try:
            self._deployment.champions.swap(successor, tag=self._tag)
        except ConflictError:
            raise ConflictError(
                f"another version of {self._model} took over at the same moment; look with "
                f"{self._deployment.command(f'status {self._model}')}, and run the command again if you still want it"
            ) from None
        return _outcome(successor, finished=False, registered=self._publish(successor))

    def finish(self) -> Outcome:
        """Do what an interrupted command left undone."""
        return _outcome(self.champion, finished=True, registered=self._publish(self.champion))

    def _publish(self, champion: Champion) -> bool:
        """Tell the registry, everybody else, and last the ledger; whether the registry has it. Repeating it is harmless."""
        registry, registered = self._deployment.registry, True
        try:
            registry.tag(self._model, champion.version, {"takeover": champion.by, "takeover_reason": champion.reason})
            registry.set_alias(self._model, "champion", champion.version)
        except NotRegisteredError:
            registered = False
        events = self._events or boto3.client("events")
        judged = VersionJudged(model=self._model, version=champion.version)
        announce(events, self._deployment.outputs["EventBus"], "ModelPromoted", judged)
        self._deployment.ledger.record_takeover(champion.takeover)
        return registered

    def _versions(self) -> str:
        return ", ".join(map(str, versions(self._deployment.artifacts.keys(f"models/{self._model}/")))) or "none"


def versions(keys: Sequence[str]) -> list[int]:
    """The versions whose model files are among these keys of the artifacts bucket."""
    found = [key.split("/")[2] for key in keys if key.endswith("/model.onnx")]
    return sorted(int(number) for number in found if number.isdigit())


def _outcome(champion: Champion, *, finished: bool, registered: bool) -> Outcome:
    return Outcome(
        takeover=champion.takeover,
        metric=champion.metric,
        value=champion.value,
        n_annotations=champion.n_annotations,
        finished=finished,
        registered=registered,
    )


def show(outcome: Outcome, console: Console) -> None:
    """What happened, and what follows."""
    takeover = outcome.takeover
    done = "an interrupted command is finished: " if outcome.finished else ""
    was = f" instead of version {takeover.before}" if takeover.before else ""
    measured = f"{METRIC_TITLES[outcome.metric]} {outcome.value:.1%}, {counted(outcome.n_annotations, 'annotation')}"
    for line in (
        f"{done}version {takeover.version} of {takeover.model} serves{was} ({measured})",
        f"reason: {takeover.reason}",
        *(
            []
            if outcome.registered
            else ["MLflow has this version no more, so nothing there says that it serves; it needs nothing of it"]
        ),
        "Label Studio follows by itself: the backend's title first, then the predictions of unlabelled tasks",
        "the next trained version is compared with this one",
    ):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
