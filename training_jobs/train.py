"""The training job: load → build → fit → export → look at images that were not trained on → evaluate → record.

`python -m training_jobs` runs in the container; docs/architecture.md ("A training job") has its contract.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec

from labelloop import drift, problem_types
from labelloop.errors import ConfigError, LabelloopError
from labelloop.inference import Model
from labelloop.model_config import ModelConfig, ModelConfigs, ModelFolder
from labelloop.promotion import judge
from labelloop.records import (
    METRIC_TITLES,
    Evaluation,
    HoldoutImage,
    Int8,
    LabelsSaved,
    ManifestRow,
    Metric,
    ModelCard,
    Probe,
    Region,
    Split,
    Timing,
)
from labelloop.settings import Settings
from labelloop.wording import counted
from training_jobs import (
    architectures,
    calibration,
    dataset,
    evaluation_page,
    network,
    out_of_fold,
    probe,
    problem,
    quantization,
    ranks,
)
from training_jobs.comparison import compare
from training_jobs.dataset import Dataset, Examples, Pixels
from training_jobs.embeddings import Embeddings, centroids, embed, embeddings_of
from training_jobs.export import export, stamp
from training_jobs.fit import Epoch, fit, make_repeatable
from training_jobs.job import Phases, TrainingJob, exit_when_stopped, report_failure
from training_jobs.labels_saved import labels_saved
from training_jobs.probe import Seen
from training_jobs.suspicion import suspects
from training_jobs.tracking import Run

log = logging.getLogger("training_jobs")

_RUNS_AT_ONCE = 4


def train(job: TrainingJob, models: ModelConfigs) -> Evaluation:
    """Train one model on one snapshot; leave `model.onnx` and `evaluation.json`, and a registered version in MLflow."""
    folder = models[job.model]
    config = folder.config
    champion = load_champion(job, config)
    card, phases = config.card(job.digest), Phases()
    data = dataset.load(job, config, card, phases)
    log.info(
        "%s: %s to train on, %d to validate, %d held out",
        job.model,
        counted(len(data.train), "image"),
        len(data.validation),
        len(data.test),
    )

    phases.begin("build")
    metric = problem_types.of(config.problem_type).metric
    make_repeatable(config.hyperparameters.seed, exact=problem.of(config.problem_type).exact)
    uri = config.architecture.weights_uri
    weights = architectures.fetch(config, job.weights(uri) if uri else None)
    fresh, augment = network.build(folder, weights)
    with Run(job) as run:
        run.parameters(parameters(job, config, data))
        seen = probed = probing = None
        if weights:
            phases.begin("probe")
            seen = probe.look(fresh, folder, card, data.train, job.cache)
            probed = probe.start(fresh, folder, data.train, seen.features) if seen else None
        phases.begin("fit")
        trained = fit(fresh, data, config, card, augment, job.checkpoint, lambda epoch: note(epoch, metric, run, phases))
        if seen and probed:
            trained, probing = probe.better(probed, trained, data, config, card, seen)
        phases.begin("export")
        exported, parity = export(trained, card, data.test.pixels, job.onnx)
        phases.begin("int8")
        served, int8 = quantization.choose(exported, job.onnx, data, config, predict)
        calibrated = stamp(job.onnx, calibrate(served, data))
        phases.begin("out-of-fold")
        unseen = predict_unseen(calibrated, folder, weights, data, job, seen)
        phases.begin("evaluate")
        parts = (data.train.pixels, data.test.pixels)
        train_split, holdout = (
            embeddings_of(served, pixels) if int8.chosen else embed(trained, config.problem_type, pixels) for pixels in parts
        )
        challenger = stamp(job.onnx, inform(calibrated.card, unseen, train_split, holdout, config))
        saved = labels_saved(data.train.rows, train_split, data.test.rows, holdout, config)
        evaluation = evaluate(job, config, data, challenger, champion, unseen, saved, parity, int8, probing)
        phases.begin("record")
        return record(job, evaluation, run, data, phases)


def train_along(job: TrainingJob, models: ModelConfigs) -> None:
    """What all ranks but the first do: learn their part of whatever the first one fits."""
    folder = models[job.model]
    uri = folder.config.architecture.weights_uri
    for examples, config, card, checkpoint in ranks.shared():
        make_repeatable(config.hyperparameters.seed, exact=problem.of(config.problem_type).exact)
        fresh, augment = network.build(folder, architectures.fetch(config, job.weights(uri) if uri else None))
        nothing = Examples([], examples.mapped[:0])
        fit(fresh, Dataset(examples, nothing, nothing), config, card, augment, checkpoint, lambda _: None)


def load_champion(job: TrainingJob, config: ModelConfig) -> Model | None:
    """The reigning champion, loaded as serving does. Raises `ModelError`, and `ConfigError` when it solves another problem."""
    if job.champion is None:
        return None
    champion = Model(job.champion.read_bytes())
    if champion.card.problem_type != config.problem_type:
        raise ConfigError(
            "config.yaml",
            f"is {config.problem_type}, but version {job.champion_version} of {config.name}, which serves, does "
            f"{champion.card.problem_type}; the two cannot be compared, so make a model with another name",
            "problem_type",
        )
    return champion


def parameters(job: TrainingJob, config: ModelConfig, data: Dataset) -> dict[str, object]:
    """What MLflow lists beside the run."""
    rules = config.box_rules
    return {
        **msgspec.structs.asdict(config.hyperparameters),
        **{f"image_{name}": value for name, value in msgspec.structs.asdict(config.image).items()},
        **({f"detection_{name}": value for name, value in msgspec.structs.asdict(rules).items()} if rules else {}),
        "problem_type": config.problem_type,
        "architecture": config.architecture.name,
        "weights": config.architecture.weights,
        "n_annotations": job.n_annotations,
        "n_train": len(data.train),
        "n_validation": len(data.validation),
        "n_test": len(data.test),
        "champion_version": job.champion_version or "",
    }


def note(epoch: Epoch, metric: Metric, run: Run, phases: Phases) -> None:
    """Every epoch to MLflow, some to the job's log."""
    phases.steps(epoch.images, epoch.seconds, epoch.waited)
    validation = {} if epoch.validation is None else {f"validation_{metric}": epoch.validation}
    run.metrics(epoch.number, {"loss": epoch.loss, "learning_rate": epoch.learning_rate, **validation})
    if epoch.notable:
        measured = "" if epoch.validation is None else f"  validation {METRIC_TITLES[metric]} {epoch.validation:.1%}"
        log.info("epoch %d of %d: loss %.3f%s  (%.1f s)", epoch.number, epoch.of, epoch.loss, measured, epoch.seconds)


def calibrate(model: Model, data: Dataset) -> ModelCard:
    """The model's card with the temperature that makes its confidence on the validation split honest."""
    card, validation = model.card, data.validation
    temperature = calibration.temperature(card.problem_type, validation.rows, candidates(model, validation.pixels), card.classes)
    return msgspec.structs.replace(card, temperature=temperature)


@dataclass(frozen=True)
class Unseen:
    """All that models take into consideration for images that they were not trained on: validation split and holdout, and the
    train split where out-of-fold models judged it. The holdout comes last."""

    rows: list[ManifestRow]
    candidates: list[list[Region]]

    def of(self, *splits: Split) -> list[list[Region]]:
        return [found for row, found in zip(self.rows, self.candidates, strict=True) if row.split in splits]


def predict_unseen(
    model: Model, folder: ModelFolder, weights: Path | None, data: Dataset, job: TrainingJob, seen: Seen | None
) -> Unseen:
    """What the model says of validation split and holdout; and, where the config asks for it, others of the train split."""
    rows, found = [*data.validation.rows, *data.test.rows], []
    for examples in (data.validation, data.test):
        found += candidates(model, examples.pixels)
    if folder.config.review.limit or folder.config.auto_accept:
        others = out_of_fold.candidates(folder, weights, data, model.card, job.checkpoint, seen)
        if others is not None:
            rows, found = [*data.train.rows, *rows], [*others, *found]
    return Unseen(rows, found)


def inform(card: ModelCard, unseen: Unseen, train_split: Embeddings, holdout: Embeddings, config: ModelConfig) -> ModelCard:
    """The card with what the queue goes by: how certain the model is as a rule, and what kinds of images there are; and with
    what images that come later are compared with."""
    accept, certainty = config.auto_accept, problem_types.of(card.problem_type).certainty
    return msgspec.structs.replace(
        card,
        certainties=calibration.certainties(card.problem_type, unseen.of("validation", "test"), card),
        centroids=centroids(train_split, config.queue.clusters, config.hyperparameters.seed),
        accept_from=calibration.accept_from(unseen.rows, unseen.candidates, accept.precision, card) if accept else None,
        drift=drift.reference(holdout, [certainty(found, card) for found in unseen.of("test")]),
    )


def evaluate(
    job: TrainingJob,
    config: ModelConfig,
    data: Dataset,
    challenger: Model,
    champion: Model | None,
    unseen: Unseen,
    saved: LabelsSaved | None,
    parity: float,
    int8: Int8,
    probing: Probe | None,
) -> Evaluation:
    """The report on challenger and champion over the holdout; run and version are not known yet.

    Both run as they serve, each on the images as its own card wants them.
    """
    rows, classes, kind, card = data.test.rows, config.classes, problem.of(config.problem_type), challenger.card
    found = [kind.kept(regions, card) for regions in unseen.of("test")]
    before = predict(champion, dataset.decode(rows, job, config, champion.card, Phases()).pixels) if champion else None
    report = Evaluation(
        model=job.model,
        problem_type=config.problem_type,
        job_name=job.name,
        run_id="",
        dataset_digest=job.digest,
        n_annotations=job.n_annotations,
        n_train=len(data.train),
        n_validation=len(data.validation),
        classes=classes,
        challenger=kind.scores(rows, found, classes, version=0),
        champion=kind.scores(rows, before, classes, version=job.champion_version or 0) if before else None,
        champion_annotations=job.champion_annotations,
        holdout=[
            HoldoutImage(
                sha256=row.sha256,
                truth=row.regions,
                challenger=found[number],
                champion=before[number] if before else None,
            )
            for number, row in enumerate(rows)
        ],
        onnx_sha256=hashlib.sha256(job.onnx.read_bytes()).hexdigest(),
        parity=parity,
        int8=int8,
        probe=probing,
        gate=config.gate,
        comparison=compare(rows, found, before, card, champion.card, config.gate) if champion and before else None,
        calibration_error=calibration.calibration_error(config.problem_type, rows, unseen.of("test"), classes),
        labels_saved=saved,
        accept_from=card.accept_from,
        suspects=suspects(unseen.rows, unseen.candidates, card, config.review.limit),
    )
    verdict, reason = judge(report, job.champion_version)
    return msgspec.structs.replace(report, verdict=verdict, reason=reason)


def candidates(model: Model, pixels: Pixels) -> list[list[Region]]:
    """All that the model takes into consideration for each image, one image a run, as serving does it."""
    with ThreadPoolExecutor(_RUNS_AT_ONCE) as runs:
        return list(runs.map(model.candidates, pixels))


def predict(model: Model, pixels: Pixels) -> list[list[Region]]:
    """What is kept of the model's candidates for each image."""
    kind = problem.of(model.card.problem_type)
    return [kind.kept(found, model.card) for found in candidates(model, pixels)]


def record(job: TrainingJob, evaluation: Evaluation, run: Run, data: Dataset, phases: Phases) -> Evaluation:
    """Keep everything in MLflow, register the version, and leave the completed report, last of all."""
    challenger = evaluation.challenger
    metric, value = challenger.metric, challenger.value
    title, held_out = METRIC_TITLES[metric], counted(len(evaluation.holdout), "holdout image")
    error = {} if evaluation.calibration_error is None else {"calibration_error": evaluation.calibration_error}
    run.metrics(0, {metric: value, "parity": evaluation.parity, **error, **quantization.figures(evaluation.int8)})
    with tempfile.TemporaryDirectory() as scratch:
        caption = f"{title} {value:.1%} on {held_out}"
        plot = problem.of(evaluation.problem_type).plot(challenger, evaluation.classes, caption, Path(scratch))
        run.keep(job.onnx, job.manifest, *plot)
    version = run.register(
        {
            "n_annotations": evaluation.n_annotations,
            "dataset_digest": evaluation.dataset_digest,
            "metric": metric,
            metric: value,
            "job_name": evaluation.job_name,
            "holdout_images": len(evaluation.holdout),
            **quantization.tags(evaluation.int8),
            **({"linear_probe": "serves" if evaluation.probe.chosen else "the fit began with it"} if evaluation.probe else {}),
        }
    )
    numbered = msgspec.structs.replace(challenger, version=version)
    timing = phases.timing(data.decoded)
    run.metrics(0, timing_metrics(timing))
    complete = msgspec.structs.replace(evaluation, run_id=run.id, challenger=numbered, timing=timing)
    with tempfile.TemporaryDirectory() as scratch:
        page = Path(scratch) / "evaluation.html"
        evaluation_page.write(complete, page)
        run.keep(page)
    job.evaluation.write_bytes(msgspec.json.format(msgspec.json.encode(complete)))
    run.keep(job.evaluation)
    log.info("%s: %s", complete.verdict, complete.reason)
    log.info("version %d of %s: %s %.1f %% on %s", version, job.model, title, 100 * value, held_out)
    return complete


def timing_metrics(timing: Timing) -> dict[str, float]:
    """What MLflow draws over the runs of a model."""
    speed = {"images_per_second": timing.images_per_second, "waiting": timing.waiting}
    return {
        **{f"seconds_{phase}": seconds for phase, seconds in timing.seconds.items()},
        **{name: value for name, value in speed.items() if value is not None},
        "decoded": timing.decoded,
    }


def main() -> int:
    """Run the job; whatever fails leaves a reason for a person in the failure file. The process's exit status."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(message)s")
    settings = Settings()
    if settings.rank == 0:
        log.setLevel(logging.INFO)
        exit_when_stopped()
    folder = Path(settings.opt_ml)
    try:
        ranks.check_gpu(settings)
        with ranks.joined(settings):
            (train if settings.rank == 0 else train_along)(TrainingJob.read(folder, settings.cache), ModelConfigs.find(settings))
    except SystemExit as stopped:
        if settings.ranks > 1 and isinstance(stopped.__context__, Exception):  # torchrun stops all, for they lost one of them
            return failed(folder, stopped.__context__)
        raise
    except Exception as error:  # noqa: BLE001 - the job's edge
        return failed(folder, error)
    return 0


def failed(folder: Path, error: Exception) -> int:
    """Leave the reason for SageMaker to show, and the rest in the log; the process's exit status."""
    if isinstance(error, LabelloopError):
        log.error("%s", error)
        report_failure(folder, str(error))
    else:
        log.error("the training job failed", exc_info=error)
        report_failure(folder, f"{type(error).__name__}: {error}")
    return 1
