"""The training job: load → build → fit → export → evaluate → record.

`python -m training_jobs.train` runs in the container; docs/architecture.md ("A training job") has its contract.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import importlib.util
import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec
from torch import Tensor, nn

from labelloop.errors import ConfigError, LabelloopError
from labelloop.inference import Model
from labelloop.model_config import ModelConfig, ModelConfigs, ModelFolder
from labelloop.records import Evaluation, HoldoutImage, ModelCard
from labelloop.settings import Settings
from training_jobs import classification, dataset
from training_jobs.dataset import Dataset
from training_jobs.export import export
from training_jobs.fit import Epoch, fit, make_repeatable
from training_jobs.job import TrainingJob, exit_when_stopped, report_failure
from training_jobs.tracking import Run

log = logging.getLogger("training_jobs")


def train(job: TrainingJob, models: ModelConfigs) -> Evaluation:
    """Train one model on one snapshot; leave `model.onnx` and `evaluation.json`, and a registered version in MLflow."""
    folder = models[job.model]
    config = folder.config
    champion = load_champion(job)
    card = model_card(job, config)
    data = dataset.load(job, config, card)
    log.info(
        "%s: %d images to train on, %d to validate, %d held out", job.model, len(data.train), len(data.validation), len(data.test)
    )

    make_repeatable(config.hyperparameters.seed)
    network, augment = build(folder)
    with Run(job) as run:
        run.parameters(parameters(job, config, data))
        network = fit(network, data, config, augment, job.checkpoint, lambda epoch: note(epoch, run))
        challenger, parity = export(network, card, data.test.pixels, job.onnx)
        evaluation = evaluate(job, config, data, challenger, champion, parity)
        return record(job, evaluation, run)


def load_champion(job: TrainingJob) -> Model | None:
    """The reigning champion, loaded as serving does. Raises `ModelError`."""
    return Model(job.champion.read_bytes()) if job.champion else None


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
    )


def build(folder: ModelFolder) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The network and the augmentation of the model's own `model.py`. Raises `ConfigError` when it lacks either."""
    with importlib.resources.as_file(folder.folder / "model.py") as file:
        spec = importlib.util.spec_from_file_location(f"model_configs.{folder.config.name}.model", file)
        if spec is None or spec.loader is None or not file.is_file():
            raise ConfigError(file, "no such file; it defines build_model(config) and augmentation(config)")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    for name in ("build_model", "augmentation"):
        if not callable(getattr(module, name, None)):
            raise ConfigError(file, f"defines no function {name}(config)")
    return module.build_model(folder.config), module.augmentation(folder.config)


def parameters(job: TrainingJob, config: ModelConfig, data: Dataset) -> dict[str, object]:
    """What MLflow lists beside the run."""
    return {
        **msgspec.structs.asdict(config.hyperparameters),
        **{f"image_{name}": value for name, value in msgspec.structs.asdict(config.image).items()},
        "architecture": config.architecture.name,
        "weights": config.architecture.weights,
        "n_annotations": job.n_annotations,
        "n_train": len(data.train),
        "n_validation": len(data.validation),
        "n_test": len(data.test),
        "champion_version": job.champion_version or "",
    }


def note(epoch: Epoch, run: Run) -> None:
    """Every epoch to MLflow, some to the job's log."""
    validation = {} if epoch.validation is None else {"validation_accuracy": epoch.validation}
    run.metrics(epoch.number, {"loss": epoch.loss, "learning_rate": epoch.learning_rate, **validation})
    if epoch.notable:
        measured = "" if epoch.validation is None else f"  validation accuracy {epoch.validation:.1%}"
        log.info("epoch %d of %d: loss %.3f%s  (%.1f s)", epoch.number, epoch.of, epoch.loss, measured, epoch.seconds)


def evaluate(
    job: TrainingJob, config: ModelConfig, data: Dataset, challenger: Model, champion: Model | None, parity: float
) -> Evaluation:
    """The report on challenger and champion over the holdout; run and version are not known yet.

    Both run as they serve, each on the images as its own card wants them.
    """
    rows, classes = data.test.rows, config.classes
    taken_for = classification.predict(challenger, data.test.pixels)
    before = classification.predict(champion, dataset.decode(rows, job, config, champion.card)) if champion else None
    return Evaluation(
        model=job.model,
        job_name=job.name,
        run_id="",
        dataset_digest=job.digest,
        n_annotations=job.n_annotations,
        n_train=len(data.train),
        n_validation=len(data.validation),
        classes=classes,
        challenger=classification.scores(rows, taken_for, classes, version=0),
        champion=classification.scores(rows, before, classes, version=job.champion_version or 0) if before else None,
        holdout=[
            HoldoutImage(
                sha256=row.sha256, label=row.label, challenger=taken_for[number], champion=before[number] if before else None
            )
            for number, row in enumerate(rows)
        ],
        onnx_sha256=hashlib.sha256(job.onnx.read_bytes()).hexdigest(),
        parity=parity,
    )


def record(job: TrainingJob, evaluation: Evaluation, run: Run) -> Evaluation:
    """Keep everything in MLflow, register the version, and leave the completed report, last of all."""
    challenger = evaluation.challenger
    run.metrics(0, {"accuracy": challenger.accuracy, "parity": evaluation.parity})
    with tempfile.TemporaryDirectory() as scratch:
        confusion, plot = Path(scratch, "confusion.json"), Path(scratch, "confusion.png")
        confusion.write_bytes(msgspec.json.encode({"classes": evaluation.classes, "confusion": challenger.confusion}))
        title = f"{challenger.accuracy:.1%} of {len(evaluation.holdout)} holdout images"
        classification.confusion_plot(challenger, evaluation.classes, title).savefig(plot)
        run.keep(job.onnx, job.manifest, confusion, plot)
    version = run.register(
        {
            "n_annotations": evaluation.n_annotations,
            "dataset_digest": evaluation.dataset_digest,
            "accuracy": challenger.accuracy,
            "job_name": evaluation.job_name,
            "holdout_images": len(evaluation.holdout),
        }
    )
    numbered = msgspec.structs.replace(challenger, version=version)
    complete = msgspec.structs.replace(evaluation, run_id=run.id, challenger=numbered)
    job.evaluation.write_bytes(msgspec.json.format(msgspec.json.encode(complete)))
    run.keep(job.evaluation)
    log.info(
        "version %d of %s: accuracy %.1f %% on %d holdout images",
        version,
        job.model,
        100 * challenger.accuracy,
        len(evaluation.holdout),
    )
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
