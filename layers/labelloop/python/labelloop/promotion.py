"""The promotion gate: whether a challenger takes over, and the taking over.

`judge` decides from the evaluation report alone. `Promoter` acts on it step by step, each step harmless to repeat: unpack,
swap the pointer, note takeover and decision, move the aliases, announce. A version that runs in shadow first is unpacked and
noted; once annotators' answers decide, or its time is over, the same steps follow.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import zlib
from collections.abc import Callable, Sequence

import msgspec

from labelloop import artifacts, shadow
from labelloop.artifacts import Bucket, Champions
from labelloop.errors import ModelError, NotRegisteredError
from labelloop.ledger import Ledger
from labelloop.records import (
    METRIC_TITLES,
    Champion,
    Comparison,
    Evaluation,
    GateRules,
    Interval,
    Promotion,
    Shadow,
    ShadowPair,
    TakenOverBy,
    Verdict,
    now,
)
from labelloop.registry import Registry
from labelloop.wording import counted

_MAX_MODEL_BYTES = 2 * 2**30
_NAMED = 5  # classes
_LET_SERVE = "it was let serve by hand before annotators' answers to its run in shadow decided"


def judge(evaluation: Evaluation, champion_version: int | None) -> tuple[Verdict, str]:
    """What the evaluation report allows, and why. `champion_version` serves now; None when nothing does.

    keep: evidently worse, or one class is, by more than it may be. promote: evidently better, or evidently not worse by more
    than the margin and trained on more annotations. undecided: the holdout is too small to tell; the champion goes on serving.
    shadow: promote, but its rules want it to run in shadow first.
    """
    challenger, champion, comparison = evaluation.challenger, evaluation.champion, evaluation.comparison
    if champion_version is None:
        images = counted(len(evaluation.holdout), "holdout image")
        measured = f"{METRIC_TITLES[challenger.metric]} {challenger.value:.1%} on {images}{_untold(evaluation)}"
        return "promote", f"the first version: {measured}"
    if champion is None or champion.version != champion_version:
        compared = f"version {champion.version}" if champion else "no champion"
        return "keep", f"it was compared with {compared}, but version {champion_version} serves now; train again to compare"
    if comparison is None:
        return "undecided", (
            f"nothing can be compared: no holdout image shows a class that version {champion_version} knows, too; "
            f"labelloop promote {evaluation.model} lets it serve all the same"
        )
    verdict, reason = _weigh(
        comparison,
        evaluation.gate,
        _versus(evaluation, comparison, champion_version),
        evaluation.n_annotations,
        evaluation.champion_annotations,
    )
    if verdict == "undecided":
        return verdict, f"{reason}; {_remedy(comparison)}"
    if verdict == "promote" and evaluation.gate.shadow:
        answered = f"annotators have answered {counted(evaluation.gate.shadow, 'task')}"
        return "shadow", f"{reason}; first it runs in shadow, until {answered}"
    return verdict, reason


def _untold(evaluation: Evaluation) -> str:
    """The classes of which the holdout tells nothing, where there are any."""
    classes = [name for name in evaluation.classes if name not in evaluation.challenger.per_class]
    if not classes:
        return ""
    more = f" and {len(classes) - _NAMED} more" if len(classes) > _NAMED else ""
    return f", which tell nothing of {', '.join(classes[:_NAMED])}{more}"


def judge_live(running: Shadow, pairs: Sequence[ShadowPair]) -> tuple[Verdict, str, Comparison | None]:
    """What annotators' answers allow a version in shadow, and why; `shadow` while they do not decide.

    They are looked at when `rules.shadow` are there, then when twice as many are, and so on, each time with half the chance
    of error that is left, so that all looks together keep to the confidence.
    """
    rules, champion, challenger = running.rules, running.champion, running.challenger
    scored = shadow.in_order(pairs)
    looks = 0
    while rules.shadow << looks <= len(scored):
        looks += 1
    if not looks:
        return "shadow", f"annotators have answered {len(scored):,} of {counted(rules.shadow, 'task')}", None
    looked_at = scored[: rules.shadow << (looks - 1)]
    comparison = shadow.compare(looked_at, 1 - (1 - rules.confidence) / 2**looks)
    seen = sum(pair.scored is not None and pair.scored.seen for pair in looked_at)
    versus = (
        f"in shadow right about {comparison.challenger:.1%} of {counted(comparison.images, 'task')} "
        f"against version {champion.version}'s {comparison.champion:.1%}, {in_points(comparison.difference)}; "
        f"alone right about {comparison.won:,} against "
        f"{comparison.lost:,}; annotators had version {champion.version}'s predictions before them in {seen:,}"
    )
    verdict, reason = _weigh(comparison, rules, versus, challenger.n_annotations, champion.n_annotations)
    return "shadow" if verdict == "undecided" else verdict, reason, comparison


def _weigh(comparison: Comparison, rules: GateRules, versus: str, annotations: int, before: int | None) -> tuple[Verdict, str]:
    """The rules, for a challenger that was trained on so many annotations and a champion that was on `before`."""
    if comparison.difference.high < 0:
        return "keep", f"worse: {versus}"
    fallen = _fallen(comparison, rules)
    if fallen:
        name, change = fallen
        allowed = f"class_floor allows {100 * rules.class_floor:.3g}"
        return "keep", f"the class {name} falls too far, {in_points(change)}; {allowed}: {versus}"
    if comparison.difference.low > 0:
        return "promote", f"better: {versus}"
    if comparison.difference.low > -rules.margin and before is not None and annotations > before:
        return "promote", (
            f"not worse by more than {100 * rules.margin:.3g} points, and trained on {counted(annotations, 'annotation')} "
            f"instead of {before:,}: {versus}"
        )
    return "undecided", f"not enough evidence: {versus}"


def not_worse(comparison: Comparison, rules: GateRules) -> bool:
    """Whether the challenger is evidently not worse by more than the margin, not evidently worse, and no class falls too far."""
    difference = comparison.difference
    return difference.low > -rules.margin and difference.high >= 0 and _fallen(comparison, rules) is None


def _versus(evaluation: Evaluation, comparison: Comparison, champion_version: int) -> str:
    shared = len(comparison.classes)
    classes = "" if shared == len(evaluation.classes) else f" of the {counted(shared, 'class', 'classes')} that both know"
    return (
        f"{METRIC_TITLES[evaluation.challenger.metric]} {comparison.challenger:.1%} against version {champion_version}'s "
        f"{comparison.champion:.1%} on {counted(comparison.images, 'holdout image')}{classes}, {in_points(comparison.difference)}"
    )


def _fallen(comparison: Comparison, rules: GateRules) -> tuple[str, Interval] | None:
    """Of the classes that evidently lost, and more than they may, the one that lost most."""
    fallen = [
        (name, change) for name, change in comparison.per_class.items() if change.value < -rules.class_floor and change.high < 0
    ]
    return min(fallen, key=lambda item: item[1].value, default=None)


def _remedy(comparison: Comparison) -> str:
    if comparison.needed is None:
        return "it was trained on no more annotations, so it would have to be evidently better"
    return f"about {counted(comparison.needed, 'holdout image')} would decide at this difference"


def in_points(difference: Interval) -> str:
    """A difference and its interval in percentage points: `+3.1 points (+0.4 to +5.9)`."""
    value, low, high = (f"{100 * number:+.1f}" for number in (difference.value, difference.low, difference.high))
    return f"{value} points ({low} to {high})"


class Promoter:
    """Decides about completed trainings. `announce(promotion)` tells the others; `count(promotion)` is called once a training.

    `log(message, **fields)` is told of a version that MLflow has no more.
    """

    def __init__(
        self,
        bucket: Bucket,
        ledger: Ledger,
        registry: Registry,
        announce: Callable[[Promotion], None],
        count: Callable[[Promotion], None] = lambda _: None,
        *,
        log: Callable[..., None],
    ) -> None:
        self._bucket, self._ledger, self._registry = bucket, ledger, registry
        self._announce, self._count, self._log = announce, count, log
        self._champions = Champions(bucket)

    def decide(self, model: str, job_name: str) -> Promotion | None:
        """Decide about the version that a job trained; None when the job left no model, or none yet.

        Repeating it repeats no decision. A damaged archive is kept from serving for good. Raises `ConflictError` when
        another promotion came first, `ServiceError`.
        """
        promotion = self._ledger.promotion(model, job_name)
        if promotion is None:
            promotion = self._decide(model, job_name)
            if promotion is None:
                return None
            mine, promotion = promotion, self._ledger.record_promotion(promotion)
            if promotion == mine:
                self._count(promotion)
        elif promotion.shadow is not None and promotion.verdict == "shadow":
            promotion = self._look_at_shadow(promotion, promotion.shadow)
        self._publish(promotion)
        return promotion

    def _decide(self, model: str, job_name: str) -> Promotion | None:
        archive = self._bucket.get(artifacts.training_archive_key(model, job_name))
        if archive is None:
            training = self._ledger.training(model, job_name)
            completed = training is not None and training.status == "completed"
            # The next training waits for a decision about every completed one.
            return _refusal(model, job_name, "the job completed, but its archive is missing") if completed else None
        try:
            onnx, evaluation = unpack(archive)
            _check_owner(evaluation, model, job_name)
            self._check_number(evaluation)
        except ModelError as error:
            return _refusal(model, job_name, str(error))
        return self._take(onnx, evaluation)

    def _check_number(self, evaluation: Evaluation) -> None:
        """The registry numbers versions, and one that was set up anew begins with 1 again."""
        version = evaluation.challenger.version
        known = self._champions.evaluation(evaluation.model, version)
        if known is not None and known.onnx_sha256 != evaluation.onnx_sha256:
            raise ModelError(
                f"MLflow calls it version {version}, as it did {known.job_name}'s model; its registry must count on from the "
                "versions that there are: docs/stages.md#from-the-app-to-a-server"
            )

    def _take(self, onnx: bytes, evaluation: Evaluation) -> Promotion:
        """Judge a version and, when it won, let it serve."""
        model, version = evaluation.model, evaluation.challenger.version
        running: Shadow | None = None
        champion, tag = self._champions.read_tagged(model)
        if champion is not None and self._has_served(version, champion):  # a crash came between the swap and the ledger's note
            verdict, reason = judge(evaluation, evaluation.champion.version if evaluation.champion else None)
            if champion.version == version and champion.by == "gate":
                self._ledger.record_takeover(champion.takeover)
            if verdict == "shadow":
                verdict, reason = "undecided", _LET_SERVE
        else:
            before = champion.version if champion else None
            verdict, reason = judge(evaluation, before)
            self._bucket.put(artifacts.onnx_key(model, version), onnx)
            self._bucket.put(artifacts.evaluation_key(model, version), msgspec.json.encode(evaluation))
            if verdict == "promote":
                successor = pointer(evaluation, before=before, by="gate", reason=reason)
                self._champions.swap(successor, tag=tag)
                self._ledger.record_takeover(successor.takeover)
            elif verdict == "shadow" and champion is not None:
                successor = pointer(evaluation, before=before, by="gate", reason=reason)
                running = Shadow(challenger=successor, champion=champion, rules=evaluation.gate)
        return Promotion(
            model=model,
            job_name=evaluation.job_name,
            version=version,
            verdict=verdict,
            reason=reason,
            metric=evaluation.challenger.metric,
            value=evaluation.challenger.value,
            holdout_images=len(evaluation.holdout),
            n_annotations=evaluation.n_annotations,
            decided_at=now(),
            difference=evaluation.comparison.difference if evaluation.comparison else None,
            calibration_error=evaluation.calibration_error,
            labels_saved=evaluation.labels_saved,
            suspects=len(evaluation.suspects),
            timing=evaluation.timing,
            shadow=running,
        )

    def _look_at_shadow(self, promotion: Promotion, running: Shadow) -> Promotion:
        """Let a version that ran in shadow serve, or end its run, when it is time."""
        model, version = promotion.model, promotion.version
        verdict, reason, live = judge_live(running, self._ledger.pairs(model, version))
        promotions = self._ledger.promotions(model).values()
        champion, tag = self._champions.read_tagged(model)
        now_running = shadow.running(promotions, champion)
        if champion is not None and self._has_served(version, champion):
            # A crash came between the swap and the notes, or a person was faster.
            if champion.version == version and champion.by == "gate":
                self._ledger.record_takeover(champion.takeover)
            if verdict != "promote":
                verdict, reason = "undecided", _LET_SERVE
        elif now_running is None or now_running.job_name != promotion.job_name:
            verdict, reason = "undecided", _why_over(champion, running, now_running, reason)
        elif verdict == "promote":
            successor = msgspec.structs.replace(running.challenger, promoted_at=now(), reason=reason)
            self._champions.swap(successor, tag=tag)
            self._ledger.record_takeover(successor.takeover)
        elif verdict == "shadow":
            return promotion
        ended = msgspec.structs.replace(promotion, verdict=verdict, reason=reason, live=live, decided_at=now())
        return self._ledger.end_shadow(ended)

    def _has_served(self, version: int, champion: Champion) -> bool:
        """Whether a version serves or has served. Then it takes over no more: whoever moved the pointer away from it meant to."""
        takeovers = (champion.takeover, *self._ledger.takeovers(champion.model))
        return any(version in (takeover.version, takeover.before) for takeover in takeovers)

    def _publish(self, promotion: Promotion) -> None:
        """Tell the registry and everybody else. A version that was deleted in MLflow has all it needs to serve in S3."""
        if promotion.version:
            try:
                self._tell_registry(promotion)
            except NotRegisteredError as error:
                self._log("not in MLflow", model=promotion.model, version=promotion.version, reason=str(error))
        self._announce(promotion)

    def _tell_registry(self, promotion: Promotion) -> None:
        """Of a version that no longer serves, not as the champion."""
        model, version = promotion.model, promotion.version
        self._registry.tag(model, version, {"verdict": promotion.verdict, "verdict_reason": promotion.reason})
        champion = self._champions.read(model)
        if promotion.verdict != "promote":
            self._registry.set_alias(model, "challenger", version)
        elif champion is not None and champion.version == version:
            self._registry.set_alias(model, "champion", version)


def _why_over(champion: Champion | None, running: Shadow, newer: Promotion | None, so_far: str) -> str:
    """Why a run in shadow has ended before it decided."""
    if newer is not None:
        return f"version {newer.version} runs in shadow in its place; {so_far}"
    serves = f"version {champion.version} serves" if champion else "nothing serves"
    return f"it ran in shadow beside version {running.champion.version}, but {serves} since; {so_far}"


def _check_owner(evaluation: Evaluation, model: str, job_name: str) -> None:
    if (evaluation.model, evaluation.job_name) != (model, job_name):
        raise ModelError(f"the archive of {job_name} holds a report on {evaluation.job_name} of {evaluation.model}")


def _refusal(model: str, job_name: str, reason: str) -> Promotion:
    """The decision about an archive that cannot be used; its version is 0, for it never became one that could serve."""
    return Promotion(
        model=model,
        job_name=job_name,
        version=0,
        verdict="keep",
        reason=reason,
        metric=None,
        value=0.0,
        holdout_images=0,
        n_annotations=0,
        decided_at=now(),
    )


def unpack(archive: bytes) -> tuple[bytes, Evaluation]:
    """The ONNX file and the evaluation report of a model.tar.gz. Raises `ModelError`."""
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
            files = {name: _member(tar, name) for name in ("model.onnx", "evaluation.json")}
    except (tarfile.TarError, zlib.error, EOFError, OSError, KeyError) as error:
        raise ModelError(f"the model archive is damaged: {error}") from error
    try:
        evaluation = msgspec.json.decode(files["evaluation.json"], type=Evaluation)
    except ValueError as error:  # no JSON, not UTF-8, or not of the type
        raise ModelError(f"the evaluation report cannot be read: {error}") from error
    if hashlib.sha256(files["model.onnx"]).hexdigest() != evaluation.onnx_sha256:
        raise ModelError("the model file is not the one that was evaluated: its SHA-256 differs")
    return files["model.onnx"], evaluation


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    """One file of an archive, which may call it `./name`."""
    found = next((entry for entry in tar.getmembers() if entry.name.removeprefix("./") == name and entry.isfile()), None)
    if found is None:
        raise KeyError(f"it holds no {name}")
    if found.size > _MAX_MODEL_BYTES:
        raise ModelError(f"{name} has {found.size} bytes")
    content = tar.extractfile(found)
    if content is None:
        raise KeyError(f"{name} is no file")
    return content.read()


def pointer(evaluation: Evaluation, *, before: int | None, by: TakenOverBy, reason: str) -> Champion:
    """The champion pointer that lets a report's challenger serve from now on."""
    version = evaluation.challenger.version
    return Champion(
        model=evaluation.model,
        version=version,
        onnx=artifacts.onnx_key(evaluation.model, version),
        sha256=evaluation.onnx_sha256,
        metric=evaluation.challenger.metric,
        value=evaluation.challenger.value,
        n_annotations=evaluation.n_annotations,
        promoted_at=now(),
        before=before,
        by=by,
        reason=reason,
    )
