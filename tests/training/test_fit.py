"""Training itself: what the digits' own config learns, and what it makes of checkpoints."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection

from cli.examples import Example, digits
from labelloop import imaging
from labelloop.dataset import split_of
from labelloop.model_config import ModelConfig
from tests.examples import CONFIGS, DIGITS, model_card
from tests.training.opt_ml import manifest_rows
from training_jobs.dataset import Dataset, Examples
from training_jobs.export import to_network
from training_jobs.fit import Epoch, Feed, HalfPrecision, fit, half_precision_backbone, make_repeatable, threads
from training_jobs.heads import Logits
from training_jobs.job import STOPPED
from training_jobs.network import build


def examples(chosen: Sequence[Example]) -> Examples:
    chosen = sorted(chosen, key=lambda digit: digit.sha256)  # as in a manifest
    size = DIGITS.image
    images = [imaging.decode(digit.image, width=size.width, height=size.height, mode=size.mode) for digit in chosen]
    pixels = np.asarray([np.asarray(image) for image in images], dtype=np.uint8).reshape(-1, size.height, size.width, 1)
    return Examples(manifest_rows(chosen), pixels)


def trained(config: ModelConfig, train: Sequence[Example], checkpoint: Path, epochs: list[Epoch] | None = None) -> nn.Module:
    make_repeatable(config.hyperparameters.seed, exact=True)
    network, augment = build(CONFIGS["digits"], None)
    data = Dataset(train=examples(train), validation=examples([]), test=examples([]))
    report = (epochs if epochs is not None else []).append
    return fit(network, data, config, model_card(), augment, checkpoint, report)


def short(**values: int) -> ModelConfig:
    """The digits' config for an epoch of 30 steps, or as `values` say."""
    return msgspec.structs.replace(
        DIGITS, hyperparameters=msgspec.structs.replace(DIGITS.hyperparameters, **{"epochs": 1} | values)
    )


def test_a_hundred_annotations_are_enough_for_a_first_version(tmp_path: Path) -> None:
    """Measured on every holdout image of the data set, of which training saw none."""
    everything = digits.load()
    annotated = [digit for digit in random.Random(1).sample(everything, 100) if split_of(digit.sha256, DIGITS.splits) == "train"]
    holdout = examples([digit for digit in everything if split_of(digit.sha256, DIGITS.splits) == "test"])
    assert len(annotated) < 80
    network = trained(DIGITS, annotated, tmp_path / "checkpoint.pt")
    with torch.inference_mode():
        best = network(to_network(torch.from_numpy(holdout.pixels))).argmax(dim=1)
    right = [DIGITS.classes[number] == row.regions[0].label for number, row in zip(best.tolist(), holdout.rows, strict=True)]
    assert sum(right) / len(right) >= 0.93


@pytest.mark.parametrize("left", [b"no checkpoint", b"", "another config"])
def test_a_checkpoint_of_no_use_is_left(left: bytes | str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    few = digits.load()[:5]  # fewer than a batch
    expected = trained(short(), few, tmp_path / "expected.pt")
    file = tmp_path / "checkpoint.pt"
    if isinstance(left, bytes):
        file.write_bytes(left)
    else:
        trained(short(seed=1), few, file)
    epochs: list[Epoch] = []
    network = trained(short(), few, file, epochs)
    assert [epoch.number for epoch in epochs] == [1]
    assert "starts anew" in caplog.text
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in network.state_dict().items())


def test_a_finished_checkpoint_is_not_trained_again(tmp_path: Path) -> None:
    few = digits.load()[:5]
    first = trained(short(), few, tmp_path / "checkpoint.pt")
    epochs: list[Epoch] = []
    again = trained(short(), few, tmp_path / "checkpoint.pt", epochs)
    assert epochs == []
    assert all(torch.equal(value, first.state_dict()[key]) for key, value in again.state_dict().items())


def test_told_to_stop_while_the_last_epoch_is_measured_a_training_ends_all_the_same(tmp_path: Path) -> None:
    few = examples(digits.load()[:5])
    data = Dataset(train=few, validation=examples([]), test=examples([]))
    network, augment = build(CONFIGS["digits"], None)
    with pytest.raises(SystemExit) as ended:
        fit(
            network, data, short(), model_card(), augment, tmp_path / "checkpoint.pt",
            lambda _: os.kill(os.getpid(), signal.SIGTERM),
        )  # fmt: skip
    assert ended.value.code == STOPPED
    epochs: list[Epoch] = []
    trained(short(), digits.load()[:5], tmp_path / "checkpoint.pt", epochs)
    assert epochs == [], "all of it was saved"


@pytest.mark.parametrize(("count", "augmented"), [(5, 60 - 1), (160, 60 - 25), (640, 0)])
def test_the_last_five_rounds_over_the_images_go_without_augmentation(count: int, augmented: int, tmp_path: Path) -> None:
    given: list[int] = []

    def augment(images: Tensor) -> Tensor:
        given.append(len(images))
        return images

    network, _ = build(CONFIGS["digits"], None)
    data = Dataset(train=examples(digits.load()[:count]), validation=examples([]), test=examples([]))
    fit(network, data, short(epochs=2), model_card(), augment, tmp_path / "checkpoint.pt", lambda _: None)
    assert given == [32] * augmented


def test_batch_norm_serves_with_the_statistics_of_images_as_they_serve(tmp_path: Path) -> None:
    """Whatever augmentation made of them on the way, and however slowly a network's own statistics follow."""
    few, slow = examples(digits.load()[:40]), nn.BatchNorm1d(64, momentum=0.001)
    data, network = Dataset(train=few, validation=few, test=examples([])), nn.Sequential(nn.Flatten(), slow, nn.Linear(64, 10))
    trained = fit(network, data, short(), model_card(), lambda images: images + 3, tmp_path / "checkpoint.pt", lambda _: None)
    norm, state, expected = trained.get_submodule("1"), trained.state_dict(), to_network(torch.from_numpy(few.pixels)).flatten(1)
    assert torch.allclose(state["1.running_mean"], expected.mean(0), atol=0.02)
    assert torch.allclose(state["1.running_var"], expected.var(0), atol=0.02)
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.momentum == slow.momentum


def test_batches_come_whole_and_in_order_also_when_nobody_takes_them_all() -> None:
    pixels = np.arange(40, dtype=np.uint8).reshape(10, 2, 2, 1)
    feed = Feed(Examples([], pixels), torch.device("cpu"))
    numbers = torch.randint(0, 10, (7, 3))
    came = list(feed.batches(numbers))
    assert [images.tolist() for images in came] == [pixels[batch.numpy()].tolist() for batch in numbers]
    assert next(iter(feed.batches(numbers))).tolist() == pixels[numbers[0].numpy()].tolist()
    assert list(feed.batches(numbers[:0])) == []
    assert feed.waited > 0


def test_a_small_network_gets_one_thread_and_a_large_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its cost alone, whatever else the machine does."""
    monkeypatch.setattr("training_jobs.fit.cores", lambda: 4)
    small, _ = build(CONFIGS["digits"], None)
    assert threads(Logits(small).eval(), DIGITS) == 1
    large = nn.Sequential(nn.Conv2d(1, 256, 3, padding=1), nn.Conv2d(256, 256, 3, padding=1), nn.Flatten(), nn.LazyLinear(10))
    assert threads(Logits(large).eval(), DIGITS) == 4


def test_what_follows_a_network_in_half_precision_is_reckoned_in_full() -> None:
    network = nn.Linear(3, 2)
    half = HalfPrecision(network, "cpu")
    images = torch.rand(4, 3)
    outputs = half(images)
    assert outputs.dtype == torch.float32
    assert not torch.equal(outputs, network(images))  # the layer itself was not
    assert torch.allclose(outputs, network(images), atol=0.02)
    outputs.sum().backward()
    assert network.weight.grad is not None
    assert network.weight.grad.dtype == torch.float32


def test_a_detector_reckons_its_boxes_in_full() -> None:
    """In bfloat16 a box between 301.2 and 302.6 is none: both sides lie at 302."""
    images = [torch.rand(3, 320, 320)]
    thin = [{"boxes": torch.tensor([[301.2, 200.2, 302.6, 212.9]]), "labels": torch.tensor([1])}]

    def losses(of: nn.Module) -> list[Tensor]:
        torch.manual_seed(0)
        return list(of(images, thin).values())

    torch.manual_seed(0)
    detector = detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=320, max_size=320
    ).train()
    whole = losses(detector)
    assert not all(map(torch.isfinite, losses(HalfPrecision(detector, "cpu"))))
    half_precision_backbone(detector, "cpu")
    halved = losses(detector)
    assert all(map(torch.isfinite, halved))
    assert all(loss.dtype == torch.float32 for loss in halved)
    assert halved != whole  # the backbone itself is not
    sum(halved, torch.zeros(())).backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(("side", "at_once"), [(8, 256), (224, 256), (600, 35), (3000, 1)])
def test_the_larger_the_images_the_fewer_are_measured_at_once(side: int, at_once: int) -> None:
    pixels = np.empty((257, side, side, 1), dtype=np.uint8)  # nobody touches them
    batches = list(Logits(nn.Identity()).batches(pixels))
    assert [len(batch) for batch in batches][:1] == [at_once]
    assert sum(map(len, batches)) == 257
