"""The training job: load → build → fit → export → evaluate → record.

`python -m training_jobs.train` runs in the container; docs/architecture.md ("A training job") has its contract.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from labelloop import problem_types
from labelloop.errors import ConfigError, LabelloopError
from labelloop.inference import Model
from labelloop.model_config import ModelConfig, ModelConfigs
from labelloop.records import METRIC_TITLES, Evaluation, HoldoutImage, Metric, ModelCard, Region
from labelloop.settings import Settings
from training_jobs import architectures, dataset, network, problem
from training_jobs.dataset import Dataset, Pixels
from training_jobs.export import export
from training_jobs.fit import Epoch, fit, make_repeatable
from training_jobs.job import TrainingJob, exit_when_stopped, report_failure
from training_jobs.tracking import Run

log = logging.getLogger("training_jobs")

_RUNS_AT_ONCE = 4


def train(job: TrainingJob, models: ModelConfigs) -> Evaluation:
    """Train one model on one snapshot; leave `model.onnx` and `evaluation.json`, and a registered version in MLflow."""
    folder = models[job.model]
    config = folder.config
    champion = load_champion(job, config)
    card = model_card(job, config)
    data = dataset.load(job, config, card)
    log.info(
        "%s: %d images to train on, %d to validate, %d held out", job.model, len(data.train), len(data.validation), len(data.test)
    )

    metric = problem_types.of(config.problem_type).metric
    make_repeatable(config.hyperparameters.seed, exact=problem.of(config.problem_type).exact)
    uri = config.architecture.weights_uri
    weights = architectures.fetch(config, job.weights(uri) if uri else None)
    fresh, augment = network.build(folder, weights)
    with Run(job) as run:
        run.parameters(parameters(job, config, data))
        trained = fit(fresh, data, config, card, augment, job.checkpoint, lambda epoch: note(epoch, metric, run))
        challenger, parity = export(trained, card, data.test.pixels, job.onnx)
        evaluation = evaluate(job, config, data, challenger, champion, parity)
        return record(job, evaluation, run)


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


def model_card(job: TrainingJob, config: ModelConfig) -> ModelCard:
    return ModelCard(
        model=config.name,
        problem_type=config.problem_type,
        classes=config.classes,
        width=config.image.width,
        height=config.image.height,
        mode=config.image.mode,
        oversampling=config.image.oversampling,
        dataset_digest=job.digest,
        boxes=config.box_rules,
    )


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


def note(epoch: Epoch, metric: Metric, run: Run) -> None:
    """Every epoch to MLflow, some to the job's log."""
    validation = {} if epoch.validation is None else {f"validation_{metric}": epoch.validation}
    run.metrics(epoch.number, {"loss": epoch.loss, "learning_rate": epoch.learning_rate, **validation})
    if epoch.notable:
        measured = "" if epoch.validation is None else f"  validation {METRIC_TITLES[metric]} {epoch.validation:.1%}"
        log.info("epoch %d of %d: loss %.3f%s  (%.1f s)", epoch.number, epoch.of, epoch.loss, measured, epoch.seconds)


def evaluate(
    job: TrainingJob, config: ModelConfig, data: Dataset, challenger: Model, champion: Model | None, parity: float
) -> Evaluation:
    """The report on challenger and champion over the holdout; run and version are not known yet.

    Both run as they serve, each on the images as its own card wants them.
    """
    rows, classes, kind = data.test.rows, config.classes, problem.of(config.problem_type)
    found = predict(challenger, data.test.pixels)
    before = predict(champion, dataset.decode(rows, job, config, champion.card)) if champion else None
    return Evaluation(
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
    )


def predict(model: Model, pixels: Pixels) -> Sequence[list[Region]]:
    """What is kept of the model's candidates for each image, one image a run, as serving does it."""
    kind = problem.of(model.card.problem_type)
    with ThreadPoolExecutor(_RUNS_AT_ONCE) as runs:
        return [kind.kept(candidates, model.card) for candidates in runs.map(model.candidates, pixels)]


def record(job: TrainingJob, evaluation: Evaluation, run: Run) -> Evaluation:
    """Keep everything in MLflow, register the version, and leave the completed report, last of all."""
    challenger = evaluation.challenger
    metric, value = challenger.metric, challenger.value
    title = METRIC_TITLES[metric]
    run.metrics(0, {metric: value, "parity": evaluation.parity})
    with tempfile.TemporaryDirectory() as scratch:
        caption = f"{title} {value:.1%} on {len(evaluation.holdout)} holdout images"
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
        }
    )
    numbered = msgspec.structs.replace(challenger, version=version)
    complete = msgspec.structs.replace(evaluation, run_id=run.id, challenger=numbered)
    job.evaluation.write_bytes(msgspec.json.format(msgspec.json.encode(complete)))
    run.keep(job.evaluation)
    log.info("version %d of %s: %s %.1f %% on %d holdout images", version, job.model, title, 100 * value, len(evaluation.holdout))
    return complete


def main() -> int:
    """Run the job; whatever fails leaves a reason for a person in the failure file."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(message)s")
    log.setLevel(logging.INFO)
    exit_when_stopped()
    settings = Settings()
    folder = Path(settings.opt_ml)
    try:
        train(TrainingJob.read(folder), ModelConfigs.find(settings))
    except LabelloopError as error:
        log.error("%s", error)
        report_failure(folder, str(error))
        return 1
    except Exception as error:  # the job's edge: SageMaker shows the reason, the log the rest
        log.exception("the training job failed")
        report_failure(folder, f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
