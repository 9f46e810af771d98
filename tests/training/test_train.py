"""Whole training jobs: the container's own command on real scanned digits, against a real MLflow server."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from cli.examples import Example, digits
from labelloop.inference import Model
from labelloop.launcher import COMMAND
from labelloop.records import ManifestRow, Region
from labelloop.registry import Registry
from tests.examples import brightness_model
from tests.training.conftest import EPOCHS, job_environment
from tests.training.opt_ml import REPOSITORY, OptMl, manifest_rows
from training_jobs.job import STOPPED

Run = Callable[[OptMl], int]


@pytest.fixture(scope="module")
def images() -> list[Example]:
    return random.Random(0).sample(digits.load(), 80)


@pytest.fixture(scope="module")
def rows(images: list[Example]) -> list[ManifestRow]:
    """A snapshot in which nothing is known of one class: it has no training image."""
    return [row for row in manifest_rows(images) if (row.split, row.regions[0].label) != ("train", "0")]


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, images: list[Example], rows: list[ManifestRow], mlflow_url: str, configs: Path
) -> OptMl:
    """A job that ran as in the container: the code unzipped, start.sh, a process of its own."""
    folder = tmp_path_factory.mktemp("job")
    job = OptMl(folder).lay_out(images, rows, job_name="job-finished")
    (folder / "input/data/code").mkdir()
    with zipfile.ZipFile(folder / "input/data/code/code.zip", "w") as code:
        for name, root in (
            ("labelloop", REPOSITORY / "layers/labelloop/python/labelloop"),
            ("training_jobs", REPOSITORY / "training_jobs"),
        ):
            for file in root.rglob("*"):
                if file.is_file() and "__pycache__" not in file.parts:
                    code.write(file, f"{name}/{file.relative_to(root)}")
        for file in (configs / "digits").iterdir():
            if file.is_file():
                code.write(file, f"model_configs/digits/{file.name}")
    done = subprocess.run(
        ["bash", "-c", COMMAND.replace("/opt/ml", str(folder))],
        cwd=folder,
        env=job_environment(job, mlflow_url),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"epoch {EPOCHS} of {EPOCHS}: loss " in done.stdout
    return job


def test_how_far_a_job_is_can_be_asked(finished: OptMl, mlflow_url: str) -> None:
    registry = Registry(mlflow_url)
    assert registry.epoch("digits", "job-finished") == EPOCHS
    assert registry.epoch("digits", "job-unknown") is None
    assert registry.epoch("no-such-model", "job-finished") is None


def test_the_report_is_what_the_exported_model_says(finished: OptMl, images: list[Example], rows: list[ManifestRow]) -> None:
    report, model = finished.evaluation, Model(finished.onnx)
    data = {digit.sha256: digit.image for digit in images}
    holdout = [row for row in rows if row.split == "test"]
    assert [(image.sha256, image.truth) for image in report.holdout] == [(row.sha256, row.regions) for row in holdout]
    assert [image.challenger for image in report.holdout] == [_shown(model, data[row.sha256]) for row in holdout]
    right = sum(image.challenger[0].label == image.truth[0].label for image in report.holdout)
    assert (report.problem_type, report.challenger.metric) == ("classification", "accuracy")
    assert report.challenger.value == right / len(holdout)
    confusion = report.challenger.confusion
    assert confusion is not None
    assert sum(map(sum, confusion)) == len(holdout)
    assert sum(confusion[number][number] for number in range(10)) == right
    for name, recall in report.challenger.per_class.items():
        of_class = [image.challenger[0].label for image in report.holdout if image.truth[0].label == name]
        assert recall == of_class.count(name) / len(of_class)
    assert set(report.challenger.per_class) == {row.regions[0].label for row in holdout}
    assert (report.n_annotations, report.n_train + report.n_validation + len(holdout)) == (len(rows), len(rows))
    assert report.champion is None
    assert 0 <= report.parity <= 1e-3


def test_the_model_file_carries_its_card(finished: OptMl) -> None:
    card = Model(finished.onnx).card
    assert (card.model, card.problem_type, card.mode, card.classes) == (
        "digits",
        "classification",
        "L",
        finished.evaluation.classes,
    )
    assert card.dataset_digest == finished.evaluation.dataset_digest
    (logits,) = Model(finished.onnx).run(np.zeros((3, card.height, card.width, 1), dtype=np.uint8))
    assert logits.shape == (3, 10)


def test_mlflow_holds_the_run_and_the_version(finished: OptMl, mlflow: MlflowClient) -> None:
    report = finished.evaluation
    run = mlflow.get_run(report.run_id)
    assert run.info.status == "FINISHED"
    assert mlflow.get_experiment(run.info.experiment_id).name == "digits"
    assert run.data.tags["dataset_digest"] == report.dataset_digest
    assert run.data.params["n_train"] == str(report.n_train)
    assert run.data.params["learning_rate"] == "0.004"
    assert [metric.step for metric in mlflow.get_metric_history(report.run_id, "validation_accuracy")] == list(
        range(1, EPOCHS + 1)
    )
    kept = {file.path for file in mlflow.list_artifacts(report.run_id)}
    assert kept == {"model.onnx", "manifest.jsonl", "evaluation.json", "evaluation.html", "confusion.json", "confusion.png"}
    version = mlflow.get_model_version("digits", str(report.challenger.version))
    assert version.run_id == report.run_id
    assert version.tags == {
        "n_annotations": str(report.n_annotations),
        "dataset_digest": report.dataset_digest,
        "metric": "accuracy",
        "accuracy": str(report.challenger.value),
        "job_name": "job-finished",
        "holdout_images": str(len(report.holdout)),
        "precision": "float32",
        "precision_reason": f"{report.n_validation} validation images cannot show that int8 is not worse by 2 points; "
        "it takes 133",
    }


def test_the_report_and_mlflow_say_what_the_time_went_to(finished: OptMl, mlflow: MlflowClient, rows: list[ManifestRow]) -> None:
    timing = finished.evaluation.timing
    assert timing is not None
    assert list(timing.seconds) == ["read", "decode", "build", "fit", "export", "int8", "out-of-fold", "evaluate", "record"]
    assert timing.decoded == len(rows)  # nothing is kept where nothing says where
    assert timing.images_per_second is not None
    assert timing.waiting is not None
    metrics = mlflow.get_run(finished.evaluation.run_id).data.metrics
    assert metrics["seconds_fit"] == timing.seconds["fit"] > 0
    assert (metrics["images_per_second"], metrics["waiting"]) == (timing.images_per_second, timing.waiting)


def test_a_restarted_job_registers_once(finished: OptMl, run_here: Run, mlflow: MlflowClient) -> None:
    before = finished.evaluation
    (finished.folder / "model/evaluation.json").unlink()
    assert run_here(finished) == 0
    again = finished.evaluation
    assert again == msgspec.structs.replace(before, onnx_sha256=again.onnx_sha256, timing=again.timing)
    versions = [
        version for version in mlflow.search_model_versions("name = 'digits'") if version.tags["job_name"] == "job-finished"
    ]
    assert len(versions) == 1
    experiment = mlflow.get_run(before.run_id).info.experiment_id
    assert len(mlflow.search_runs([experiment], "tags.job_name = 'job-finished'")) == 1


def test_the_same_snapshot_trains_the_same_and_the_champion_sees_what_its_card_says(
    finished: OptMl, images: list[Example], rows: list[ManifestRow], run_here: Run, tmp_path: Path
) -> None:
    champion = brightness_model()
    assert Model(champion).card.width != Model(finished.onnx).card.width
    job = OptMl(tmp_path).lay_out(images, rows, job_name="job-champion", champion=(7, champion))
    assert run_here(job) == 0
    report, data = job.evaluation, {digit.sha256: digit.image for digit in images}
    assert _logits(job, images).tobytes() == _logits(finished, images).tobytes()
    assert report.challenger.value == finished.evaluation.challenger.value
    assert [image.champion for image in report.holdout] == [
        _shown(Model(champion), data[image.sha256]) for image in report.holdout
    ]
    assert report.champion is not None
    assert report.champion.version == 7
    assert report.champion.value == sum(
        image.champion is not None and image.champion[0].label == image.truth[0].label for image in report.holdout
    ) / len(report.holdout)
    assert report.challenger.version > finished.evaluation.challenger.version


def test_only_training_rows_are_learnt_from(
    finished: OptMl, images: list[Example], rows: list[ManifestRow], run_here: Run, tmp_path: Path
) -> None:
    """Every other answer is wrong, and the weights stay the same."""

    def spoilt(row: ManifestRow) -> ManifestRow:
        wrong = [Region(label=str((int(row.regions[0].label) + 1) % 10))]
        return row if row.split == "train" else msgspec.structs.replace(row, regions=wrong)

    job = OptMl(tmp_path).lay_out(images, [spoilt(row) for row in rows], job_name="job-spoilt")
    assert run_here(job) == 0
    assert _logits(job, images).tobytes() == _logits(finished, images).tobytes()
    assert job.evaluation.challenger.value < finished.evaluation.challenger.value


def test_a_stopped_job_leaves_a_checkpoint_and_goes_on_to_the_same_weights(
    finished: OptMl, images: list[Example], rows: list[ManifestRow], run_here: Run, mlflow_url: str, configs: Path, tmp_path: Path
) -> None:
    job = OptMl(tmp_path).lay_out(images, rows, job_name="job-stopped")
    with subprocess.Popen(
        [sys.executable, "-m", "training_jobs"],
        cwd=REPOSITORY,
        env=job_environment(job, mlflow_url, configs),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("epoch 1 of"):
                    process.send_signal(signal.SIGTERM)
                    break
            rest = process.stdout.read()
            assert process.wait(timeout=60) == STOPPED
        finally:
            process.kill()
    stopped_at = re.search(r"step (\d+) of (\d+) is saved", rest)
    assert stopped_at is not None
    assert int(stopped_at[1]) < int(stopped_at[2])
    assert job.failure is None
    assert not (tmp_path / "model/evaluation.json").exists()

    assert run_here(job) == 0
    assert _logits(job, images).tobytes() == _logits(finished, images).tobytes()


def test_a_failed_job_ends_with_1_and_its_reason_in_the_log(mlflow_url: str, tmp_path: Path) -> None:
    job = OptMl(tmp_path)
    ended = subprocess.run(
        [sys.executable, "-m", "training_jobs"],
        cwd=REPOSITORY,
        env=job_environment(job, mlflow_url),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 1
    assert ended.stdout.startswith("the hyperparameters cannot be read: ")
    assert job.failure == ended.stdout.strip()


def test_a_dead_mlflow_server_fails_the_job(
    images: list[Example], rows: list[ManifestRow], run_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    job = OptMl(tmp_path).lay_out(images, rows, job_name="job-without-mlflow")
    assert run_here(job) == 1
    assert job.failure is not None
    assert job.failure.startswith("MLflow does not do its part: ")
    assert not (tmp_path / "model/evaluation.json").exists()


def test_the_images_lack_nothing_that_is_pinned_otherwise() -> None:
    """requirements.txt and pyproject.toml pin the same versions."""
    pins = re.findall(r"^([\w.-]+)==([\w.]+)", (REPOSITORY / "training_jobs/requirements.txt").read_text(), re.MULTILINE)
    project = dict(re.findall(r'^  "([\w.-]+)==([\w.]+)"', (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE))
    assert len(pins) > 5
    assert dict(pins) == {name: project.get(name) for name, _ in pins}


def _logits(job: OptMl, images: list[Example]) -> np.ndarray[Any, np.dtype[np.float32]]:
    model = Model(job.onnx)
    (logits,) = model.run(np.stack([model.pixels(digit.image) for digit in images]))
    return logits


def _shown(model: Model, image: bytes) -> list[Region]:
    return model.candidates(model.pixels(image))[:1]
