"""The records that the steps of the loop hand to each other, as they are written to S3, DynamoDB and queues.

Times are ISO 8601 in UTC. Shares, scores and the values of metrics lie between 0 and 1.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal

import msgspec

ProblemTypeName = Literal["classification", "multilabel", "detection"]
Split = Literal["train", "validation", "test"]
TrainingStatus = Literal["running", "completed", "failed", "stopped"]
Verdict = Literal["promote", "keep"]
Metric = Literal["accuracy", "f1", "map_50"]
Box = tuple[float, float, float, float]  # left, top, right, bottom as shares of the upright image's width and height

METRIC_TITLES: dict[Metric, str] = {
    "accuracy": "accuracy",
    "f1": "F1",  # over the decisions about all classes (micro-averaged)
    "map_50": "mAP@0.5",  # mean over the classes of the average precision at an IoU of 0.5
}


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=False):
    """Unknown fields are ignored on reading, so that an older function can read a newer record."""


class Region(Record, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that an annotator or a model says of an image: a class, and for detection where. Annotators give no score."""

    label: str
    box: Box | None = None
    score: float | None = None


class ManifestRow(Record, frozen=True, kw_only=True):
    """One annotated image of a dataset snapshot. Without regions the annotator found nothing in it."""

    image: str  # s3:// address
    sha256: str
    regions: list[Region]
    split: Split
    annotation: str  # Label Studio's unique_id
    task: int


class Snapshot(Record, frozen=True, kw_only=True):
    """A dataset snapshot; `digest` is the SHA-256 of its manifest, so equal data has equal digests."""

    model: str
    digest: str
    manifest: str  # s3:// address
    n_annotations: int
    n_train: int
    n_validation: int
    n_test: int
    skipped: dict[str, int] = msgspec.field(default_factory=dict)  # reason → annotated tasks left out


class BoxRules(Record, frozen=True, kw_only=True):
    """How a detector's boxes are sifted: shown from this score on, one of those that overlap more than that, the best so many."""

    score_threshold: float
    iou_threshold: float
    max_boxes: int


class ModelCard(Record, frozen=True, kw_only=True):
    """What serving needs to know of an ONNX file; kept in its metadata under the key `labelloop`."""

    model: str
    problem_type: ProblemTypeName
    classes: list[str]
    width: int  # pixels
    height: int  # pixels
    mode: Literal["L", "RGB"]
    oversampling: float  # least size of the decoded JPEG relative to the model's input
    dataset_digest: str
    boxes: BoxRules | None = None  # of a detector


class Champion(Record, frozen=True, kw_only=True):
    """The champion pointer: the one small object that says which version serves."""

    model: str
    version: int
    onnx: str  # key in the artifacts bucket
    sha256: str
    metric: Metric
    value: float  # on the holdout
    n_annotations: int
    promoted_at: str


class Scores(Record, frozen=True, kw_only=True):
    """One model on the holdout.

    `per_class`: recall (classification), F1 (multilabel) or average precision (detection) of the classes that the holdout
    has. `confusion[i][j]`: images of class i taken for class j; classification only.
    """

    metric: Metric
    value: float
    per_class: dict[str, float]
    confusion: list[list[int]] | None
    version: int


class HoldoutImage(Record, frozen=True, kw_only=True):
    """One holdout image: what the annotator and each model say of it. A detector's unsure boxes are there too."""

    sha256: str
    truth: list[Region]
    challenger: list[Region]
    champion: list[Region] | None = None


class Evaluation(Record, frozen=True, kw_only=True):
    """The evaluation report of a training job: challenger and champion on the same holdout, image by image."""

    model: str
    problem_type: ProblemTypeName
    job_name: str
    run_id: str
    dataset_digest: str
    n_annotations: int
    n_train: int
    n_validation: int
    classes: list[str]
    challenger: Scores
    champion: Scores | None
    holdout: list[HoldoutImage]
    onnx_sha256: str
    parity: float  # largest difference of ONNX and torch outputs, relative to each output's scale


class Job(Record, frozen=True, kw_only=True):
    """A training job that the ledger has claimed."""

    job_name: str
    digest: str
    n_annotations: int
    attempt: int
    started_at: str
    snapshot: Snapshot
    champion_version: int | None


class Trained(Record, frozen=True, kw_only=True):
    """The last snapshot that was trained to the end."""

    digest: str
    n_annotations: int
    job_name: str
    ended_at: str


class Failure(Record, frozen=True, kw_only=True):
    """The last training when it failed; gone once one succeeds."""

    digest: str
    n_annotations: int
    job_name: str
    reason: str
    ended_at: str
    consecutive: int


class Head(Record, frozen=True, kw_only=True):
    """The ledger's head of a model. `sequence` counts changes: writing demands the one that was read.

    `asked`: somebody pressed Start Training while no training could start.
    """

    model: str
    sequence: int = 0
    running: Job | None = None
    trained: Trained | None = None
    failure: Failure | None = None
    asked: bool = False


class Training(Record, frozen=True, kw_only=True):
    """One training in the ledger's history: what `retrain` knows of it."""

    job: Job
    status: TrainingStatus
    ended_at: str | None = None
    failure: str | None = None


class Promotion(Record, frozen=True, kw_only=True):
    """What `promote` decided about a version, and why."""

    model: str
    job_name: str
    version: int
    verdict: Verdict
    reason: str
    metric: Metric | None  # None of a training that left nothing to measure
    value: float
    holdout_images: int
    n_annotations: int
    decided_at: str


class TrainingSignal(Record, frozen=True, kw_only=True):
    """A message of the retrain queue. Without a model it means all of them."""

    action: str
    model: str | None = None


class PromoteSignal(Record, frozen=True, kw_only=True):
    """A message of the promote queue."""

    model: str
    job_name: str


class ModelPromoted(Record, frozen=True, kw_only=True):
    """Detail of the event that `promote` emits, and the message of the refresh queue."""

    model: str
    version: int


def now() -> str:
    """The time as the records hold it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def version_string(model: str, version: int | None) -> str:
    """What Label Studio calls a version: `digits v3`; `digits v0` before the first."""
    return f"{model} v{version or 0}"
