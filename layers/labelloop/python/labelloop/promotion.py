"""The promotion gate: whether a challenger takes over, and the taking over.

`judge` decides from the evaluation report alone. `Promoter` acts on it step by step, each step harmless to repeat: unpack,
swap the pointer, note the decision, move the aliases, announce.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import zlib
from collections.abc import Callable

import msgspec

from labelloop import artifacts
from labelloop.artifacts import Bucket, Champions
from labelloop.errors import ModelError
from labelloop.ledger import Ledger
from labelloop.records import METRIC_TITLES, Champion, Evaluation, Promotion, Verdict, now
from labelloop.registry import Registry

_MAX_MODEL_BYTES = 2 * 2**30


def judge(evaluation: Evaluation, champion_version: int | None) -> tuple[Verdict, str]:
    """Promote or keep, and why. `champion_version` serves now; None when nothing does.

    The challenger takes over when its value on the holdout is not lower than the champion's on the same images.
    """
    challenger, champion = evaluation.challenger, evaluation.champion
    metric, images = METRIC_TITLES[challenger.metric], len(evaluation.holdout)
    if champion_version is None:
        return "promote", f"the first version: {metric} {challenger.value:.1%} on {images} holdout images"
    if champion is None or champion.version != champion_version:
        compared = f"version {champion.version}" if champion else "no champion"
        return "keep", f"it was compared with {compared}, but version {champion_version} serves now; train again to compare"
    versus = f"{challenger.value:.1%} against version {champion.version}'s {champion.value:.1%}"
    comparison = f"{versus} on {images} holdout images"
    if challenger.value >= champion.value:
        return "promote", f"not worse: {metric} {comparison}"
    return "keep", f"worse: {metric} {comparison}"


class Promoter:
    """Decides about completed trainings. `announce(promotion)` tells the others."""

    def __init__(self, bucket: Bucket, ledger: Ledger, registry: Registry, announce: Callable[[Promotion], None]) -> None:
        self._bucket, self._ledger, self._registry, self._announce = bucket, ledger, registry, announce
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
            self._ledger.record_promotion(promotion)
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
        except ModelError as error:
            return _refusal(model, job_name, str(error))
        return self._take(onnx, evaluation)

    def _take(self, onnx: bytes, evaluation: Evaluation) -> Promotion:
        """Judge a version and, when it won, let it serve."""
        model, version = evaluation.model, evaluation.challenger.version
        champion, tag = self._champions.read_tagged(model)
        if champion is not None and champion.version == version:  # a crash came between the swap and the ledger's note
            verdict, reason = judge(evaluation, evaluation.champion.version if evaluation.champion else None)
        else:
            verdict, reason = judge(evaluation, champion.version if champion else None)
            self._bucket.put(artifacts.onnx_key(model, version), onnx)
            self._bucket.put(artifacts.evaluation_key(model, version), msgspec.json.encode(evaluation))
            if verdict == "promote":
                self._champions.swap(_pointer(evaluation), tag=tag)
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
        )

    def _publish(self, promotion: Promotion) -> None:
        """Tell the registry and everybody else; of a version that no longer serves, not as the champion."""
        model, version = promotion.model, promotion.version
        if version:
            self._registry.tag(model, version, {"verdict": promotion.verdict, "verdict_reason": promotion.reason})
            champion = self._champions.read(model)
            if promotion.verdict == "keep":
                self._registry.set_alias(model, "challenger", version)
            elif champion is not None and champion.version == version:
                self._registry.set_alias(model, "champion", version)
        self._announce(promotion)


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


def _pointer(evaluation: Evaluation) -> Champion:
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
    )
