"""Embeddings are those that serving gives, and centroids are the kinds of images in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from labelloop.records import ProblemTypeName
from tests.examples import DIGITS, model_card
from tests.training.models import config_of
from tests.training.test_heads import small_fcos
from training_jobs.embeddings import centroids, embed
from training_jobs.export import export, to_network


def classifier() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, len(DIGITS.classes)))


def test_images_are_embedded_as_serving_does_it(tmp_path: Path) -> None:
    network, pixels = classifier(), np.random.default_rng(0).integers(0, 256, (300, 16, 16, 1), dtype=np.uint8)
    found = embed(network, "classification", pixels)
    assert found.shape == (300, 5)
    model, _ = export(network, model_card(), pixels, tmp_path / "model.onnx")
    np.testing.assert_allclose(found, model.run_whole(pixels)[-1], rtol=1e-4, atol=1e-6)


def test_a_detectors_embedding_is_the_mean_of_its_features() -> None:
    config = config_of("detection", mode="L", width=96, height=96)
    torch.manual_seed(0)
    network = small_fcos(config).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 96, 96, 1), dtype=np.uint8)
    kind: ProblemTypeName = "detection"
    found = embed(network, kind, pixels)
    with torch.no_grad():
        features = network.get_submodule("backbone")((to_network(torch.from_numpy(pixels)) - 0.5) / 0.25)
    assert found.shape == (3, 32)
    np.testing.assert_allclose(found, features.mean(dim=(2, 3)), rtol=1e-4, atol=1e-6)


def test_centroids_tell_kinds_of_images_apart() -> None:
    """Three heaps give three centroids, and an image's cluster is that of its heap."""
    random = np.random.default_rng(0)
    heaps = random.normal(size=(3, 7)).astype(np.float32) * 10
    images = np.concatenate([heap + random.normal(size=(50, 7)).astype(np.float32) * 0.1 for heap in heaps])
    found = centroids(images, 3, seed=0)
    centres = np.frombuffer(found, dtype=np.float16).reshape(3, 7).astype(np.float32)
    nearest = [int(((centres - image) ** 2).sum(axis=1).argmin()) for image in images]
    assert [len(set(nearest[start : start + 50])) for start in (0, 50, 100)] == [1, 1, 1]
    assert len(set(nearest)) == 3
    assert np.abs(centres[nearest[::50]] - heaps).max() < 0.2
    assert centroids(images, 3, seed=0) == found


@pytest.mark.parametrize(("images", "expected"), [(np.zeros((9, 4)), 1), (np.eye(4), 4), (np.eye(4) * 1e6, 4)])
def test_there_are_no_more_centroids_than_different_images(images: np.ndarray, expected: int) -> None:  # type: ignore[type-arg]
    found = np.frombuffer(centroids(images.astype(np.float32), 8, seed=2**40), dtype=np.float16).reshape(-1, 4)
    assert len(found) == expected
    assert np.isfinite(found).all()
