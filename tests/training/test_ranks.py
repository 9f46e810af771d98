"""Training jobs of two ranks, as on a machine with two GPUs: torchrun by the container's own start, and gloo in place of NCCL."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cli.examples import Example, digits
from labelloop.errors import ConfigError, StorageError
from labelloop.inference import Model
from labelloop.model_config import ModelConfigs
from tests.examples import DIGITS, model_card
from tests.training.conftest import job_environment
from tests.training.models import rectangles, write_folder
from tests.training.opt_ml import REPOSITORY, OptMl, manifest_rows, model_configs
from tests.training.test_train import Run
from training_jobs import ranks
from training_jobs.dataset import Dataset, Examples
from training_jobs.fit import fit
from training_jobs.network import build

# Nothing in it is random or counted over a batch, so that however a batch is shared the same is learnt.
PLAIN = """
import os, signal
from torch import nn


def build_model(config, weights):
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, len(config.classes)), )


def augmentation(config):
    def same(images):
        {second}
        return images
    return same
"""


@pytest.fixture(scope="module")
def images() -> list[Example]:
    return random.Random(0).sample(digits.load(), 100)


def folder(root: Path, *, second: str = "pass") -> Path:
    """The digits' config with a plain network and batches of an odd size; `second` is what the second rank does in every step."""
    model_configs(root, epochs=4)
    file = root / "digits/config.yaml"
    file.write_text(file.read_text().replace("batch_size: 32", "batch_size: 15"))
    only = f'if os.environ.get("RANK") == "1": {second}'
    (root / "digits/model.py").write_text(PLAIN.format(second=only))
    return root


def start(job: OptMl, mlflow_url: str, configs: Path) -> subprocess.Popen[str]:
    """The container's own start on a machine that tells of two GPUs."""
    tools = job.folder / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "nvidia-smi").write_text('#!/bin/sh\necho "GPU 0: one"\necho "GPU 1: another"\n')
    (tools / "nvidia-smi").chmod(0o755)
    environment = job_environment(job, mlflow_url, configs)
    return subprocess.Popen(
        ["bash", "training_jobs/start.sh"],
        cwd=REPOSITORY,
        env={**environment, "PATH": f"{tools}{os.pathsep}{environment['PATH']}", "TMPDIR": str(tools)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> str:
    with process:
        try:
            said, _ = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun takes its ranks along
            raise
    return said


def logits(job: OptMl, images: list[Example]) -> np.ndarray[Any, np.dtype[np.float32]]:
    model = Model(job.onnx)
    (found,) = model.run(np.stack([model.pixels(digit.image) for digit in images]))
    return found


def test_two_ranks_learn_what_one_does_also_when_stopped_on_the_way(
    images: list[Example], run_here: Run, mlflow_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs, rows = folder(tmp_path / "configs"), manifest_rows(images)
    job = OptMl(tmp_path / "two").lay_out(images, rows, job_name="job-two-ranks")
    process = start(job, mlflow_url, configs)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 1 of"):
            process.send_signal(signal.SIGTERM)
            break
    stopped = ended(process)
    assert process.returncode != 0
    assert len(re.findall(r"step \d+ of 120 is saved", stopped)) == 1, stopped
    assert job.failure is None

    process = start(job, mlflow_url, configs)
    said = ended(process)
    assert process.returncode == 0, said
    assert "epoch 4 of 4" in said
    assert "epoch 1 of 4" not in said
    assert "out-of-fold model 2 of" in said
    assert not list((job.folder / "tools").rglob("*.npy"))

    alone = OptMl(tmp_path / "one").lay_out(images, rows, job_name="job-one-rank")
    monkeypatch.setenv("LABELLOOP_MODEL_CONFIGS", str(configs))
    assert run_here(alone) == 0
    np.testing.assert_allclose(logits(job, images), logits(alone, images), atol=1e-4)
    shared, own = ({suspect.task: suspect.quality for suspect in one.evaluation.suspects} for one in (job, alone))
    assert shared == pytest.approx(own, abs=1e-4)  # by out-of-fold models, which were trained by two as well
    assert own


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        ('raise ValueError("no memory left")', "ValueError: no memory left"),
        ("os.kill(os.getpid(), signal.SIGKILL)", r".*[Cc]onnection"),
    ],
    ids=["fails", "is killed"],
)
def test_a_rank_that_ends_takes_the_job_along(
    second: str, reason: str, images: list[Example], mlflow_url: str, tmp_path: Path
) -> None:
    job = OptMl(tmp_path / "job").lay_out(images, manifest_rows(images), job_name="job-lost-rank")
    process = start(job, mlflow_url, folder(tmp_path / "configs", second=second))
    said = ended(process)
    assert process.returncode != 0
    assert job.failure is not None, said
    assert re.match(reason, job.failure)
    assert not list(job.folder.glob("model/*"))


def test_two_ranks_train_a_detector(mlflow_url: str, tmp_path: Path) -> None:
    configs = write_folder(tmp_path / "configs", "detection")
    config = configs["tiny_detection"].config
    images = rectangles(60, "detection")
    job = OptMl(tmp_path / "job").lay_out(
        images, manifest_rows(images, config), job_name="job-two-ranks-detection", model="tiny_detection"
    )
    process = start(job, mlflow_url, tmp_path / "configs")
    said = ended(process)
    assert process.returncode == 0, said
    assert "epoch 2 of 2" in said
    assert job.evaluation.challenger.metric == "map_50"


def test_a_batch_has_to_be_enough_for_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "count", lambda: 64)
    network, augment = build(ModelConfigs(REPOSITORY / "model_configs")["digits"], None)
    nothing = Examples([], np.empty((0, 8, 8, 1), np.uint8))
    with pytest.raises(ConfigError, match="32 images cannot be shared by the 64 GPUs") as raised:
        fit(network, Dataset(nothing, nothing, nothing), DIGITS, model_card(), augment, tmp_path / "checkpoint.pt", print)
    assert raised.value.key == "hyperparameters.batch_size"


def test_a_disk_without_room_for_the_other_ranks_images_is_said_so_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "count", lambda: 2)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100_000_000))
    images = Examples([], np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (2_000, 320, 320, 1), (0, 0, 0, 0)))
    with pytest.raises(StorageError, match=r"take 0\.2 GB, 0\.1 GB are free in .*; raise training\.volume_gb"):
        ranks.share(ranks.Shared(images, DIGITS, model_card(), tmp_path / "checkpoint.pt"))


def test_images_are_copied_for_the_other_ranks_once_however_many_models_learn_from_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def broadcast(sent: tuple[ranks.Shared, Path | None]) -> None:
        given.append(sent[1] and np.load(sent[1]))

    monkeypatch.setattr(ranks, "count", lambda: 2)
    monkeypatch.setattr(ranks, "any_of", lambda *, flag: flag)
    monkeypatch.setattr(ranks, "_broadcast", broadcast)
    rows: list[Any] = [None] * 4
    one, other = (Examples(rows, np.full((4, 8, 8, 1), value, np.uint8)) for value in (1, 2))
    for examples in (one, one.part([0, 2]), one.part([1]), other):
        ranks.share(ranks.Shared(examples, DIGITS, model_card(), tmp_path / "checkpoint.pt"))
    assert [None if pixels is None else pixels.max() for pixels in given] == [1, None, None, 2]
