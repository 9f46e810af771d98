"""What a training job refuses, and the reason it leaves for SageMaker to show."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from cli.examples import Example, digits
from labelloop.records import ManifestRow, Region, Split
from tests.examples import brightness_model
from tests.training.opt_ml import OptMl, manifest_rows

Run = Callable[[OptMl], int]


@dataclass
class Case:
    """A sound job, to be spoilt."""

    job: OptMl
    images: list[Example]
    rows: list[ManifestRow]

    def lay_out(self, champion: tuple[int, bytes] | None = None) -> None:
        self.job.lay_out(self.images, self.rows, job_name="job-refused", champion=champion)

    def image(self, number: int) -> Path:
        return self.job.folder / "input/data/images" / self.rows[number].image.rpartition("/")[2]

    def change(self, number: int, **values: object) -> None:
        self.rows[number] = msgspec.structs.replace(self.rows[number], **values)

    def move(self, before: Split, after: Split) -> None:
        self.rows = [msgspec.structs.replace(row, split=after if row.split == before else row.split) for row in self.rows]


def missing(case: Case) -> None:
    case.lay_out()
    case.image(3).unlink()
    case.image(5).unlink()


def broken(case: Case) -> None:
    data = b"GIF89a but no image"
    (case.job.folder / "input/data/images/odd.png").write_bytes(data)
    case.change(0, image="s3://images/images/digits/odd.png", sha256=Example("", data, []).sha256)
    case.lay_out()


def changed(case: Case) -> None:
    case.lay_out()
    shutil.copy(case.image(1), case.image(2))


def outside(case: Case) -> None:
    case.change(0, image="s3://images/images/digits/../../config/hyperparameters.json")
    case.lay_out()


def another_model(case: Case) -> None:
    case.change(0, image="s3://images/images/faces/a.png")
    case.lay_out()


def unknown_label(case: Case) -> None:
    case.change(0, regions=[Region(label="ten")])
    case.lay_out()


def nothing_to_train(case: Case) -> None:
    case.move("train", "validation")
    case.lay_out()


def no_holdout(case: Case) -> None:
    case.move("test", "validation")
    case.lay_out()


def other_manifest(case: Case) -> None:
    case.lay_out()
    with (case.job.folder / "input/data/manifest/manifest.jsonl").open("ab") as file:
        file.write(b"\n")


def champion_without_version(case: Case) -> None:
    case.lay_out(champion=(1, brightness_model()))
    file = case.job.folder / "input/config/hyperparameters.json"
    file.write_bytes(file.read_bytes().replace(b'"champion_version":"1"', b'"champion_version":""'))


def damaged_champion(case: Case) -> None:
    case.lay_out(champion=(1, b"no ONNX"))


def unknown_model(case: Case) -> None:
    case.lay_out()
    file = case.job.folder / "input/config/hyperparameters.json"
    file.write_bytes(file.read_bytes().replace(b'"digits"', b'"digit"'))


def no_hyperparameters(case: Case) -> None:
    case.lay_out()
    (case.job.folder / "input/config/hyperparameters.json").unlink()


def odd_hyperparameter(case: Case) -> None:
    case.lay_out()
    file = case.job.folder / "input/config/hyperparameters.json"
    file.write_bytes(file.read_bytes().replace(b'"n_annotations":"', b'"n_annotations":"many'))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (
            missing,
            "2 of the snapshot's images cannot be used; put back what was annotated, or delete their tasks in Label Studio: ",
        ),
        (broken, "in Label Studio: s3://images/images/digits/odd.png (task 0) "),
        (changed, "has changed since it was annotated"),
        (outside, "does not lie under images/digits/"),
        (another_model, "s3://images/images/faces/a.png (task 0) does not lie under images/digits/"),
        (unknown_label, "is 'ten'"),
        (nothing_to_train, "none of 40 annotated images falls into the train split"),
        (no_holdout, "accuracy cannot be measured"),
        (other_manifest, "the manifest is not the snapshot"),
        (champion_without_version, "champion_version is empty, but the champion channel holds a model"),
        (damaged_champion, "the ONNX file cannot be loaded"),
        (unknown_model, "did you mean 'digits'?"),
        (no_hyperparameters, "the hyperparameters cannot be read"),
        (odd_hyperparameter, "n_annotations"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_reason_is_left_for_a_person(spoil: Callable[[Case], None], reason: str, run_here: Run, tmp_path: Path) -> None:
    images = digits.load()[:40]
    case = Case(OptMl(tmp_path), images, manifest_rows(images))
    spoil(case)
    assert run_here(case.job) == 1
    assert case.job.failure is not None
    assert reason in case.job.failure
    assert "Traceback" not in case.job.failure
    assert not list(tmp_path.glob("model/*"))


def test_a_bad_config_fails_the_job(run_here: Run, configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(configs / "digits", tmp_path / "configs/digits")
    file = tmp_path / "configs/digits/config.yaml"
    file.write_text(file.read_text().replace("  seed: 0", "  sed: 0"))
    images = digits.load()[:40]
    job = OptMl(tmp_path / "job").lay_out(images, manifest_rows(images), job_name="job-bad-config")
    monkeypatch.setenv("LABELLOOP_MODEL_CONFIGS", str(tmp_path / "configs"))
    assert run_here(job) == 1
    assert job.failure == f"{file}: hyperparameters: unknown key 'sed'; did you mean 'seed'?"


def test_a_model_without_augmentation_fails_the_job(
    run_here: Run, configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(configs / "digits", tmp_path / "configs/digits")
    (tmp_path / "configs/digits/model.py").write_text("def build_model(config, weights): ...\n")
    images = digits.load()[:40]
    job = OptMl(tmp_path / "job").lay_out(images, manifest_rows(images), job_name="job-no-augmentation")
    monkeypatch.setenv("LABELLOOP_MODEL_CONFIGS", str(tmp_path / "configs"))
    assert run_here(job) == 1
    assert job.failure is not None
    assert "model.py: defines no function augmentation(config)" in job.failure


def test_a_gpu_that_torch_cannot_use_fails_the_job(run_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("LABELLOOP_GPU_DRIVER", "470.256.02")
    images = digits.load()[:40]
    job = OptMl(tmp_path).lay_out(images, manifest_rows(images), job_name="job-old-driver")
    assert run_here(job) == 1
    assert job.failure is not None
    assert "cannot use the machine's GPU with its driver 470.256.02" in job.failure


def test_a_long_reason_fits_sagemaker(run_here: Run, tmp_path: Path) -> None:
    images = digits.load()[:40]
    rows = [msgspec.structs.replace(row, regions=[Region(label="x" * 200)]) for row in manifest_rows(images)]
    job = OptMl(tmp_path).lay_out(images, rows, job_name="job-wordy")
    assert run_here(job) == 1
    assert job.failure is not None
    assert job.failure.startswith("40 of the annotations cannot be used, as config.yaml has no such class: ")
    assert len(job.failure) <= 1024
