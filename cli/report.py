"""The facts of `labelloop report`: `labelloop status`, and what the versions' evaluation reports and the bill add to it."""

from __future__ import annotations

import datetime
from collections import Counter

import msgspec

from cli import cost, training_job
from cli.deployment import Deployment
from cli.status import Status, read_status
from infra_cdk.stage_facts import read_facts
from labelloop.errors import LabelloopError
from labelloop.model_config import ModelConfig, ModelConfigs, ModelFolder
from labelloop.records import Evaluation, Interval, LabelsSaved, now
from training_jobs import calibration, paired, problem
from training_jobs.calibration import Bin

CONFIDENCE = 0.95  # of all intervals of a version's own figures, both bounds together
_PRICED = "prod"  # the stage that is priced where the deployed one is the laptop's


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What a version's evaluation report says of it. `metric`: on the holdout; its interval, as of `acceptance`, is of 95 %.

    None where there is no report any more, or nothing was measured. `acceptance`: pre-annotations that annotators kept.
    """

    version: int
    metric: Interval | None
    acceptance: Interval | None
    labels_saved: LabelsSaved | None


class PerClass(msgspec.Struct, frozen=True, kw_only=True):
    """A class on the champion's holdout; `value`: recall, F1 or average precision, None where no image shows the class."""

    name: str
    images: int
    value: float | None


class ChampionReport(msgspec.Struct, frozen=True, kw_only=True):
    """The champion on its holdout. `confusion[i][j]`: images of class i taken for class j; of classification only.

    `reliability`: scores against truth.
    """

    version: int
    holdout_images: int
    classes: list[PerClass]
    confusion: list[list[int]] | None
    calibration_error: float | None
    reliability: list[Bin]


class Turnaround(msgspec.Struct, frozen=True, kw_only=True):
    """Of the last training that made a version, seconds by part, from the start of its job to the verdict."""

    job_name: str
    version: int
    annotations: int
    seconds: dict[str, float]


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """US dollars, as `labelloop cost MODEL` has them for a stage on AWS with this model alone. Nothing of it was measured there.

    `idle`: a month, after allowances; the others before them. `minutes`: of a training, the longest that the config allows.
    `region`: whose prices these are; `stage_region`: where the stage lies, as far as stages.yaml says.
    """

    stage: str
    region: str
    stage_region: str | None
    checked: datetime.date
    idle: float
    training: float
    thousand_predictions: float
    always_on: float
    images: int
    instance: str
    spot: bool
    minutes: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All that the page shows. `problems`: what could not be read, besides the status's own."""

    at: str
    status: Status
    versions: list[Measured]
    champion: ChampionReport | None
    turnaround: Turnaround | None
    cost: Estimate | None
    problems: list[str]


def read_report(deployment: Deployment, configs: ModelConfigs, folder: ModelFolder) -> Report:
    """Raises what `read_status` raises. A service that is away costs its own figures, and `problems` says so."""
    reader = _Reader(deployment, configs, folder)
    return Report(
        at=now(),
        status=reader.status,
        versions=reader.versions(),
        champion=reader.champion(),
        turnaround=reader.turnaround(),
        cost=reader.cost(),
        problems=reader.problems,
    )


class _Reader:
    def __init__(self, deployment: Deployment, configs: ModelConfigs, folder: ModelFolder) -> None:
        self._deployment, self._configs, self._folder = deployment, configs, folder
        self.problems: list[str] = []
        self._evaluations: dict[int, Evaluation | None] = {}
        self.status = read_status(deployment, folder)

    def versions(self) -> list[Measured]:
        found = []
        for row in self.status.versions:
            evaluation = self._evaluation(row.version) if row.metric else None
            found.append(
                Measured(
                    version=row.version,
                    metric=_interval(evaluation, row.value) if evaluation else None,
                    acceptance=paired.share(row.acceptance.kept, row.acceptance.shown, CONFIDENCE) if row.acceptance else None,
                    labels_saved=evaluation.labels_saved if evaluation else None,
                )
            )
        return found

    def champion(self) -> ChampionReport | None:
        champion = self.status.champion
        evaluation = self._evaluation(champion.version) if champion else None
        if evaluation is None:
            return None
        scores, images = evaluation.challenger, _images(evaluation)
        return ChampionReport(
            version=scores.version,
            holdout_images=len(evaluation.holdout),
            classes=[PerClass(name=name, images=images[name], value=scores.per_class.get(name)) for name in evaluation.classes],
            confusion=scores.confusion,
            calibration_error=evaluation.calibration_error,
            reliability=calibration.reliability(evaluation),
        )

    def turnaround(self) -> Turnaround | None:
        """Where SageMaker does not tell of the job any more, the phases that it has noted itself."""
        promotions = self._deployment.ledger.promotions(self.status.model).values()
        last = max((one for one in promotions if one.metric), key=lambda one: one.version, default=None)
        if last is None:
            return None
        try:
            seconds = training_job.turnaround(training_job.description(last.job_name), last)
        except LabelloopError as error:
            self.problems.append(str(error))
            seconds = last.timing.seconds if last.timing else {}
        return Turnaround(job_name=last.job_name, version=last.version, annotations=last.n_annotations, seconds=seconds)

    def cost(self) -> Estimate | None:
        config = self._folder.config
        try:
            return _estimate(self._configs, config, self._deployment.stage, self.status.tasks)
        except LabelloopError as error:
            self.problems.append(str(error))
            return None

    def _evaluation(self, version: int) -> Evaluation | None:
        if version not in self._evaluations:
            self._evaluations[version] = None
            try:
                self._evaluations[version] = self._deployment.champions.evaluation(self.status.model, version)
            except LabelloopError as error:
                self.problems.append(str(error))
        return self._evaluations[version]


def _interval(evaluation: Evaluation, value: float) -> Interval | None:
    """About the value that was recorded: where images were erased since, the others still tell how sure it is."""
    truths = [image.truth for image in evaluation.holdout]
    if not truths:
        return None
    found = [image.challenger for image in evaluation.holdout]
    about = problem.of(evaluation.problem_type).interval(truths, found, evaluation.classes, CONFIDENCE)
    return Interval(value=value, low=min(about.low, value), high=max(about.high, value))


def _images(evaluation: Evaluation) -> Counter[str]:
    """Holdout images by the classes that they show."""
    return Counter(name for image in evaluation.holdout for name in {region.label for region in image.truth})


def _estimate(configs: ModelConfigs, config: ModelConfig, stage: str, tasks: int | None) -> Estimate:
    stage = _PRICED if stage == "local" else stage
    prices = cost.PriceTable.read("us-east-1")
    usage = cost.Usage() if tasks is None else cost.Usage(images=tasks)
    facts = read_facts(stage)
    bills = cost.report([config], cost.synthesize(configs, [config.name], stage, facts), usage, prices, stage, facts.region)
    return Estimate(
        stage=stage,
        region=bills.region,
        stage_region=bills.stage_region,
        checked=bills.checked,
        idle=bills.idle.total,
        training=bills.units[f"a training of {config.name}"].total,
        thousand_predictions=bills.units["1,000 predictions"].total,
        always_on=bills.alternative.total,
        images=usage.images,
        instance=config.training.instance_type,
        spot=config.training.spot,
        minutes=config.training.max_runtime_minutes,
    )
