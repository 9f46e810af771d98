"""Dataset snapshots: what is annotated now, frozen, content-addressed and split for ever."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable

import msgspec

from labelloop import problem_types
from labelloop.errors import AnnotationError, ImageError
from labelloop.label_studio.label_config import LabelConfig
from labelloop.label_studio.payloads import AnnotatedTask
from labelloop.model_config import ModelConfig, Splits
from labelloop.records import ManifestRow, Snapshot, Split


def split_of(sha256: str, splits: Splits) -> Split:
    """The split of an image: a function of its content (hex SHA-256) and the config's seed, so that it never moves.

    The test split is the holdout. Changing the shares moves only images across the changed border.
    """
    hashed = hashlib.sha256(f"{splits.seed}:{sha256}".encode()).digest()
    position = int.from_bytes(hashed[:8]) / 2**64
    if position < splits.test:
        return "test"
    if position >= 1 - splits.validation:
        return "validation"
    return "train"


def rows(
    tasks: Iterable[AnnotatedTask], config: ModelConfig, label_config: LabelConfig
) -> tuple[list[ManifestRow], dict[str, int]]:
    """The manifest's rows, ordered by content hash, and how many annotated tasks were left out for which reason.

    One row an image: of several tasks with the same content the one annotated last counts.
    """
    problem_type = problem_types.of(config.problem_type)
    kept: dict[str, tuple[tuple[str, str], ManifestRow]] = {}
    skipped: Counter[str] = Counter()
    for task in tasks:
        annotation = task.latest
        if annotation is None:
            continue
        try:
            regions = problem_type.annotated(annotation, label_config)
            image, sha256 = task.image(label_config.data_key), task.content_hash
        except (AnnotationError, ImageError) as error:
            skipped[str(error)] += 1
            continue
        strange = next((region.label for region in regions if region.label not in config.classes), None)
        if strange is not None:
            skipped[f"the class {strange!r} is not in config.yaml"] += 1
            continue
        row = ManifestRow(
            image=image,
            sha256=sha256,
            regions=regions,
            split=split_of(sha256, config.splits),
            annotation=annotation.unique_id,
            task=task.id,
        )
        before = kept.get(sha256)
        if before is not None:
            skipped["another task shows the same image"] += 1
        moment = (annotation.updated_at, annotation.unique_id)  # the id decides between equal times, whatever the order
        if before is None or before[0] < moment:
            kept[sha256] = (moment, row)
    return [kept[sha256][1] for sha256 in sorted(kept)], dict(skipped)


def snapshot(model: str, rows: list[ManifestRow], skipped: dict[str, int], *, uri_of: str) -> tuple[Snapshot, bytes]:
    """Freeze rows into a snapshot and its manifest (JSON lines). `uri_of` is the manifest's address with `{digest}` in it."""
    manifest = b"".join(msgspec.json.encode(row) + b"\n" for row in rows)
    digest = hashlib.sha256(manifest).hexdigest()
    counts = Counter(row.split for row in rows)
    frozen = Snapshot(
        model=model,
        digest=digest,
        manifest=uri_of.format(digest=digest),
        n_annotations=len(rows),
        n_train=counts["train"],
        n_validation=counts["validation"],
        n_test=counts["test"],
        skipped=skipped,
    )
    return frozen, manifest
