"""The records that the steps of the loop hand to each other, as they are written to S3, DynamoDB and queues.

Times are ISO 8601 in UTC. Shares, scores and the values of metrics lie between 0 and 1.
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache
from typing import Annotated, Literal

import msgspec

from labelloop.wording import counted

ProblemTypeName = Literal["classification", "multilabel", "detection"]
Split = Literal["train", "validation", "test"]
TrainingStatus = Literal["running", "completed", "failed", "stopped"]
Verdict = Literal["promote", "keep", "undecided", "shadow"]
TakenOverBy = Literal["gate", "rollback", "promote"]
Metric = Literal["accuracy", "f1", "map_50"]
Box = tuple[float, float, float, float]  # left, top, right, bottom as shares of the upright image's width and height

METRIC_TITLES: dict[Metric, str] = {
    "accuracy": "accuracy",
    "f1": "F1",  # over the decisions about all classes (micro-averaged)
    "map_50": "mAP@0.5",  # mean over the classes of the average precision at an IoU of 0.5
}


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=False, gc=False):
    """Unknown fields are ignored on reading, so that an older function can read a newer record.

    Frozen, of plain data: there are no cycles that the garbage collector would have to look for.
    """


class Region(Record, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that an annotator or a model says of an image: a class, and for detection where. Annotators give no score."""

    label: str
    box: Box | None = None
    score: float | None = None


class ManifestRow(Record, frozen=True, kw_only=True, omit_defaults=True):
    """One annotated image of a dataset snapshot. Without regions the annotator found nothing in it."""

    image: str  # s3:// address
    sha256: str
    group: str  # SHA-256 of the first image that looked the same; what split and queue go by
    regions: list[Region]
    split: Split
    annotation: str  # Label Studio's unique_id
    task: int
    seen: int | None = None  # the version whose prediction the annotator saw; 0 of an order without a model
    by_model: bool = False  # auto-accepted
    erased_at: str | None = None  # of a row that `labelloop erase` emptied; hash, group and split are what is left of it

    @classmethod
    def read(cls, manifest: bytes) -> list[ManifestRow]:
        """The rows of a manifest. Raises `msgspec.MsgspecError`."""
        return [msgspec.json.decode(line, type=cls) for line in manifest.splitlines()]

    def emptied(self, at: str) -> ManifestRow:
        """What an erasure leaves of it: enough to tell which versions learnt from the image, and nothing of the image."""
        return ManifestRow(
            image="", sha256=self.sha256, group=self.group, regions=[], split=self.split, annotation="", task=0, erased_at=at
        )


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


class DriftReference(Record, frozen=True, kw_only=True):
    """What a version saw in the images of its holdout, for comparison with those that come later.

    `axes`: float32 `[D, d]`, onto which an embedding is laid, and `centre`: float32 `[d]`, what is then subtracted: so laid, the
    holdout's have mean 0 and covariance 1. `counts`: how many have a certainty below the first of `edges`, the second, …, above.
    """

    images: int
    axes: bytes
    centre: bytes
    edges: list[float]
    counts: list[int]


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
    temperature: Annotated[float, msgspec.Meta(gt=0)] = 1.0  # that logits are divided by; fitted on the validation split
    certainties: list[float] = []  # quantiles, evenly spaced, of the certainty on images that were not trained on
    centroids: bytes = b""  # float16 [clusters, embedding], of the training images
    accept_from: float | None = None  # certainty from which predictions are as precise as auto_accept promises
    drift: DriftReference | None = None  # None where the holdout is too small


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
    before: int | None = None  # the version that it took over from
    by: TakenOverBy = "gate"
    reason: str = ""

    @property
    def takeover(self) -> Takeover:
        """How it came to serve, as the ledger's log has it."""
        return Takeover(
            model=self.model, version=self.version, before=self.before, by=self.by, reason=self.reason, at=self.promoted_at
        )


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


class Interval(Record, frozen=True, kw_only=True):
    """An estimate and its confidence interval."""

    value: float
    low: float
    high: float


class GateRules(Record, frozen=True, kw_only=True):
    """What the promotion gate goes by: see config.yaml's section `promotion`."""

    margin: float
    class_floor: float
    confidence: float
    shadow: int = 0


class Comparison(Record, frozen=True, kw_only=True):
    """Challenger against champion, paired image by image, on what both can say: their shared classes.

    `difference` and `per_class`: challenger minus champion, in the metric and in each class's figure; the classes' bounds hold
    all together. `won` and `lost`: images that only the challenger, only the champion has right. `p_value`: McNemar's exact
    test; None where a bootstrap gives the interval. `needed`: holdout images with which the same difference would decide; None
    where it has.
    """

    classes: list[str]
    images: int
    challenger: float
    champion: float
    difference: Interval
    per_class: dict[str, Interval]
    won: int
    lost: int
    p_value: float | None
    needed: int | None


class LabelsSaved(Record, frozen=True, kw_only=True):
    """Labels from the queue's active part against labels from its random control share, for the same accuracy.

    `share`: 1 - active / control labels; `control`: labels of the control share it rests on.
    """

    share: Interval
    control: int


class Suspect(Record, frozen=True, kw_only=True):
    """An annotation that a model which never saw it disagrees with. `quality`: 0 (surely wrong) to 1."""

    task: int
    annotation: str  # Label Studio's unique_id
    sha256: str
    quality: float
    given: list[Region]
    suggested: list[Region]


class Int8(Record, frozen=True, kw_only=True):
    """Whether a version's file is its int8 form, and why, as measured on the training machine.

    `ms_float`, `ms_int8`: milliseconds of a run on one image with one thread; `difference`: of the metric, int8 minus float,
    on the validation split. None where it was not measured.
    """

    chosen: bool
    reason: str
    ms_float: float | None = None
    ms_int8: float | None = None
    difference: Interval | None = None
    cpu: str = ""


class Probe(Record, frozen=True, kw_only=True):
    """The linear probe that a training began with: the metric on the validation split, of it and of the fitted network.

    None where the split is too small to measure anything. `chosen`: it serves, since it was better. `kept`: images whose
    features an earlier job had kept.
    """

    kept: int
    value: float | None
    fitted: float | None
    chosen: bool


class HoldoutImage(Record, frozen=True, kw_only=True):
    """One holdout image: what the annotator and each model say of it. A detector's unsure boxes are there too."""

    sha256: str
    truth: list[Region]
    challenger: list[Region]
    champion: list[Region] | None = None


class Timing(Record, frozen=True, kw_only=True):
    """What a training job took, since its last start where it was interrupted. `seconds` by phase, in their order.

    `images_per_second`: of the fit's steps; `waiting`: the share of their time that went by until images were there; None where
    no epoch was left to do.
    `decoded`: images that had to be decoded; the snapshot's others had been by earlier jobs.
    """

    seconds: dict[str, float]
    images_per_second: float | None
    waiting: float | None
    decoded: int

    @property
    def text(self) -> str:
        """For a person, in one line."""
        phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.seconds.items())
        speed = "" if self.images_per_second is None else f"; {self.images_per_second:,.0f} images/s"
        waiting = "" if self.waiting is None else f", {self.waiting:.1%} of it waiting for images"
        return f"{sum(self.seconds.values()):.0f} s: {phases}{speed}{waiting}; {counted(self.decoded, 'image')} decoded"


class Shard(Record, frozen=True, kw_only=True):
    """The note beside a file of arrays that training jobs keep: SHA-256 of the images, in order, and of the file."""

    images: list[str]
    sha256: str


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
    parity: float  # largest difference of ONNX (float) and torch outputs, relative to each output's scale
    gate: GateRules
    comparison: Comparison | None  # None without a champion, or where the two share no class or no image
    calibration_error: float | None  # expected, over the holdout; None where it cannot be measured
    labels_saved: LabelsSaved | None
    accept_from: float | None
    suspects: list[Suspect]  # the worst first
    champion_annotations: int | None = None  # that the champion was trained on
    int8: Int8 | None = None  # None in reports of before it was tried
    probe: Probe | None = None  # None where training starts from no weights, or the network does not end in a linear layer
    verdict: Verdict = "undecided"  # of the gate, if nothing else takes over meanwhile
    reason: str = ""
    timing: Timing | None = None


class Job(Record, frozen=True, kw_only=True):
    """A training job that the ledger has claimed."""

    job_name: str
    digest: str
    n_annotations: int
    attempt: int
    started_at: str
    snapshot: Snapshot
    champion_version: int | None
    shortages: int = 0  # attempts on this snapshot that AWS had no machine for
    code: str = ""  # address of the training code, configs and networks; other content has another one


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
    no_machine: bool = False  # AWS had none to spare: nothing is wrong with the job, which is tried again


class LeftOut(Record, frozen=True, kw_only=True):
    """Why a training that was due by the count of annotated tasks did not start: only `usable` of them could be trained on.

    `reasons`: number of tasks by reason, the commonest ones.
    """

    annotated: int
    usable: int
    reasons: dict[str, int]


class Counted(Record, frozen=True, kw_only=True):
    """What a snapshot is frozen of: Label Studio's counts of tasks and annotations, the latest change, and how rows are made."""

    tasks: int
    annotations: int
    changed_at: str | None
    made_with: str


class NothingNew(Record, frozen=True, kw_only=True):
    """Why a snapshot of what was `annotated` was not trained."""

    annotated: Counted
    reason: str


class Head(Record, frozen=True, kw_only=True):
    """The ledger's head of a model. `sequence` counts changes: writing demands the one that was read.

    `asked`: somebody pressed Start Training while no training could start. `left_out`, `nothing_new`: what the last look found,
    if it did.
    """

    model: str
    sequence: int = 0
    running: Job | None = None
    trained: Trained | None = None
    failure: Failure | None = None
    asked: bool = False
    left_out: LeftOut | None = None
    nothing_new: NothingNew | None = None


class Training(Record, frozen=True, kw_only=True):
    """One training in the ledger's history: what `retrain` knows of it."""

    job: Job
    status: TrainingStatus
    ended_at: str | None = None
    failure: str | None = None
    no_machine: bool = False  # as in `Failure`


class Shadow(Record, frozen=True, kw_only=True):
    """What a version runs in shadow with: the pointer that would let it serve, the one that it runs beside, the rules.

    It is over as soon as another pointer than `champion` stands, or a newer version runs in shadow beside it.
    """

    challenger: Champion
    champion: Champion
    rules: GateRules


class Promotion(Record, frozen=True, kw_only=True):
    """What `promote` decided about a version, and why. The verdict `shadow` stands until a later one takes its place.

    `live`: what annotators' answers told of a version that ran in shadow.
    """

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
    difference: Interval | None = None  # to the champion of then
    calibration_error: float | None = None
    labels_saved: LabelsSaved | None = None
    suspects: int = 0
    timing: Timing | None = None
    shadow: Shadow | None = None  # None of a version that never ran in shadow
    live: Comparison | None = None


class Takeover(Record, frozen=True, kw_only=True):
    """A change of the champion pointer: by the gate, or by a person with `labelloop rollback` or `labelloop promote`."""

    model: str
    version: int
    before: int | None
    by: TakenOverBy
    reason: str
    at: str


class ReviewCase(Record, frozen=True, kw_only=True):
    """An annotation that annotators are asked to look at again. Settled by any answer of theirs, for good.

    `annotated_at`: when the annotation was last changed, as it stood when the case was raised.
    """

    model: str
    project: int
    sha256: str
    task: int
    annotation: str  # Label Studio's unique_id
    annotated_at: str
    version: int  # whose training raised it
    quality: float
    suggested: list[Region]
    raised_at: str
    settled_at: str | None = None


class Audit(Record, frozen=True, kw_only=True):
    """A task that auto-accept leaves to people, to compare their answer with the prediction. `right`: None until there is one."""

    model: str
    version: int
    task: int
    sha256: str
    predicted: list[Region]
    noted_at: str
    right: bool | None = None


class Scored(Record, frozen=True, kw_only=True):
    """What an annotator's answer says of two predictions.

    `answered_at` is Label Studio's time; `labels`: the answer's classes; `seen`: the annotator had the champion's prediction
    before them.
    """

    answered_at: str
    scored_at: str
    labels: list[str]
    challenger: bool
    champion: bool
    seen: bool


class ShadowPair(Record, frozen=True, kw_only=True):
    """What a version in shadow and the champion said of a task before anybody annotated it. `scored`: None until then."""

    model: str
    version: int  # in shadow
    champion: int
    task: int
    sha256: str
    says: list[Region]
    champion_says: list[Region]
    noted_at: str
    scored: Scored | None = None


class Served(Record, frozen=True, kw_only=True):
    """An image of the holdout that a version has predicted: where its embedding lies on the reference's axes."""

    task: int
    sha256: str
    certainty: float
    place: list[float]


class Drift(Record, frozen=True, kw_only=True):
    """The newest images of the holdout that a version has predicted, by task, and how far they are from those it was
    measured on: 1 is what chance gives. None while they are too few."""

    served: list[Served]
    embedding: float | None = None
    confidence: float | None = None

    @property
    def figures(self) -> dict[str, float]:
        """Those that are known, by name."""
        both = {"embedding": self.embedding, "confidence": self.confidence}
        return {name: figure for name, figure in both.items() if figure is not None}


class TurnedOff(Record, frozen=True, kw_only=True):
    """That auto-accept has turned itself off for a version, and on what evidence."""

    model: str
    version: int
    right: int
    audited: int
    reason: str
    at: str


class ErasedImage(Record, frozen=True, kw_only=True):
    """What is kept of an image that was erased: hashes and length of its file, by which what is left of it is found again.

    `versions`: those whose snapshot had it, in whichever split.
    """

    sha256: str
    md5: str | None  # None where its file was gone already
    size: int | None  # bytes
    versions: list[int]


class Erasure(Record, frozen=True, kw_only=True):
    """That images were erased everywhere: `by` whom, and why. `finished_at`: None while something may be left of them.

    `snapshots`: digest of each that had one of them → SHA-256 of what its manifest is since.
    """

    model: str
    at: str
    by: str
    reason: str
    images: list[ErasedImage]
    snapshots: dict[str, str] = {}
    finished_at: str | None = None


class TrainingSignal(Record, frozen=True, kw_only=True):
    """A message of the retrain queue. Without a model it means all of them. `request`: of somebody who waits for an answer."""

    action: str
    model: str | None = None
    request: str | None = None


class Answer(Record, frozen=True, kw_only=True):
    """What `retrain` did with a request: the job that it started, or why none, and whether it starts one when there is room."""

    model: str
    request: str
    started: str | None
    reason: str
    remembered: bool
    at: str


class PromoteSignal(Record, frozen=True, kw_only=True):
    """A message of the promote queue."""

    model: str
    job_name: str


class VersionJudged(Record, frozen=True, kw_only=True):
    """Detail of the events that `promote` emits, and the message of the refresh queue."""

    model: str
    version: int


class TaskRange(Record, frozen=True, kw_only=True, omit_defaults=True):
    """A message of the prelabel queue: predict the unlabelled tasks whose ids lie above `after`, up to `upto`.

    `asked`: instead of all of these just the tasks with these ids, labelled or not, because somebody asked for their predictions.
    """

    model: str
    after: int
    upto: int
    asked: list[int] | None = None


def now() -> str:
    """The time as the records hold it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def version_string(model: str, version: int | None) -> str:
    """What Label Studio calls a version: `digits v3`; `digits v0` before the first."""
    return f"{model} v{version or 0}"


@lru_cache  # a snapshot asks it for every task, and hears of a few versions
def version_number(model: str, version: str) -> int | None:
    """The number in a version string of the model; None of anybody else's."""
    name, _, number = version.rpartition(" v")
    return int(number) if name == model and number.isdecimal() else None
