"""torchvision's networks: which suit, what they start from, and what is refused. Nothing is downloaded but from this machine."""

from __future__ import annotations

import functools
import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models, tv_tensors
from torchvision.models import MobileNet_V3_Large_Weights, ResNet50_Weights
from torchvision.ops import FrozenBatchNorm2d

from labelloop.errors import ConfigError
from labelloop.records import ProblemTypeName
from tests.training.models import config_of, write_folder
from training_jobs import architectures, network

S3 = "s3://weights/state.pt"
DETECTORS = architectures.suitable("detection")
SMALL_BACKBONES = ["ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"]

Network = Any


@pytest.fixture(autouse=True)
def downloads(tmp_path: Path) -> Iterator[Path]:
    """torch's folder for downloads, empty."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    yield tmp_path / "hub/checkpoints"
    torch.hub.set_dir(before)


def saved(state: object, folder: Path) -> Path:
    torch.save(state, folder / "state.pt")
    return folder / "state.pt"


def changed(state: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Another network's weights, of the same form."""
    generator = torch.Generator().manual_seed(seed)
    for value in state.values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator))
    return state


@pytest.mark.parametrize("problem_type", ["classification", "multilabel", "detection"])
def test_the_default_suits(problem_type: ProblemTypeName) -> None:
    assert architectures.DEFAULTS[problem_type] in architectures.suitable(problem_type)


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "densenet121", "convnext_tiny", "regnet_x_400mf"]
)
def test_the_last_layer_is_the_config_s(name: str) -> None:
    built = architectures.build(config_of("classification", architecture=name), None)
    assert built(torch.rand(4, 3, 48, 64)).shape == (4, 3)


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors_take_images_as_they_are(name: str) -> None:
    built: Network = architectures.build(config_of("detection", architecture=name, width=96, height=64), None)
    batch, _ = built.transform([torch.rand(3, 64, 96)])
    assert batch.image_sizes == [(64, 96)]


@pytest.mark.parametrize(
    ("problem_type", "values", "key", "message"),
    [
        ("classification", {"architecture": "resnet81"}, "architecture.name", "did you mean 'resnet18'"),
        ("classification", {"architecture": "inception_v3"}, "architecture.name", "auxiliary classifiers"),
        ("classification", {"architecture": "fcos_resnet50_fpn"}, "architecture.name", "mobilenet_v3_large"),
        ("detection", {"architecture": "resnet18"}, "architecture.name", ", ".join(DETECTORS)),
        ("detection", {"architecture": "ssd300_vgg16"}, "architecture.name", ", ".join(DETECTORS)),
        ("multilabel", {"architecture": "resnet18", "mode": "L"}, "image.mode", "write RGB"),
        ("classification", {"architecture": "vit_b_16"}, "image", "images of 64 × 48 pixels: Wrong image height! Expected 224"),
        ("classification", {"architecture": "alexnet"}, "image", "images of 64 × 48 pixels"),
        ("detection", {"architecture": DETECTORS[-1], "batch_size": 1}, "image", "batches of 1 image of"),
    ],
)
def test_what_does_not_suit_is_refused(problem_type: ProblemTypeName, values: dict[str, object], key: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        architectures.check(config_of(problem_type, **values))
    assert (error.value.where, error.value.key) == ("config.yaml", key)
    assert message in str(error.value)


def test_no_weights_are_asked_for() -> None:
    assert architectures.fetch(config_of("classification", architecture="resnet18"), None) is None


def test_weights_of_s3_come_from_the_channel(tmp_path: Path) -> None:
    config = config_of("classification", architecture="resnet18", weights=S3)
    file = saved({}, tmp_path)
    assert architectures.fetch(config, file) == file
    for missing in (None, tmp_path / "other.pt"):
        with pytest.raises(ConfigError, match="is not in the job's weights channel"):
            architectures.fetch(config, missing)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server's address and folder."""
    folder = tmp_path / "server"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_address[1]}", folder
        served.shutdown()
        thread.join()


@pytest.mark.parametrize("problem_type", ["classification", "detection"])
def test_imagenet_weights_are_downloaded_once_and_by_their_hash(
    problem_type: ProblemTypeName, server: tuple[str, Path], downloads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file's name holds its hash; a detector's are its backbone's."""
    address, folder = server
    name, weights = {
        "classification": ("mobilenet_v3_large", MobileNet_V3_Large_Weights.DEFAULT),
        "detection": ("retinanet_resnet50_fpn_v2", ResNet50_Weights.IMAGENET1K_V1),
    }[problem_type]
    config = config_of(problem_type, architecture=name, weights="imagenet")
    content = b"weights"
    good = f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    for file in (good, "net-00000000.pth"):
        (folder / file).write_bytes(content)

    monkeypatch.setattr(weights.value, "url", f"{address}/{good}")
    assert architectures.fetch(config, None) == downloads / good
    (folder / good).unlink()
    assert (downloads / good).read_bytes() == content
    assert architectures.fetch(config, None) == downloads / good

    for wrong, reason in (("net-00000000.pth", "invalid hash value"), ("net-11111111.pth", "404")):
        monkeypatch.setattr(weights.value, "url", f"{address}/{wrong}")
        with pytest.raises(ConfigError, match=reason) as error:
            architectures.fetch(config, None)
        assert f"put the file {wrong} into S3 and write weights: s3://bucket/{wrong}" in str(error.value)
        assert not (downloads / wrong).exists()


def test_a_dead_network_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MobileNet_V3_Large_Weights.DEFAULT.value, "url", "http://127.0.0.1:9/mobilenet-5c1a4163.pth")
    with pytest.raises(ConfigError, match=r"cannot be downloaded .* put the file mobilenet-5c1a4163.pth into S3") as error:
        architectures.fetch(config_of("multilabel", architecture="mobilenet_v3_large", weights="imagenet"), None)
    assert error.value.key == "architecture.weights"


@pytest.mark.parametrize("classes", [1000, 7])
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "resnet18"])
def test_a_classifier_starts_from_all_but_the_head(name: str, classes: int, tmp_path: Path) -> None:
    state = changed(models.get_model(name, weights=None, num_classes=classes).state_dict())
    config = config_of("classification", architecture=name, weights=S3)
    built: Network = architectures.build(config, saved(state, tmp_path))
    loaded = built[1].state_dict()
    differs = {key for key, value in loaded.items() if value.shape != state[key].shape or not torch.equal(value, state[key])}
    head = "fc" if name == "resnet18" else "classifier.3"
    assert differs == {f"{head}.weight", f"{head}.bias"}


def test_densenet_s_old_names_are_known(tmp_path: Path) -> None:
    """As in the files that torchvision publishes."""
    state = changed(models.densenet121(weights=None).state_dict())
    old = {key.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): value for key, value in state.items()}
    assert old.keys() != state.keys()
    config = config_of("classification", architecture="densenet121", weights=S3)
    built: Network = architectures.build(config, saved(old, tmp_path))
    assert all(torch.equal(value, state[key]) for key, value in built[1].features.state_dict(prefix="features.").items())


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_starts_from_a_whole_detector_but_the_head(name: str, tmp_path: Path) -> None:
    """The published files are of networks that torchvision builds like this."""
    published: Network = models.get_model(name, weights=None, weights_backbone=None, num_classes=91)
    state = changed(published.state_dict())
    before = torch.hub.get_dir()
    built: Network = architectures.build(config_of("detection", architecture=name, weights="coco"), saved(state, tmp_path))
    loaded = built.state_dict()
    differs = {key for key, value in loaded.items() if value.shape != state[key].shape or not torch.equal(value, state[key])}
    assert differs
    assert all(".classification_head." in key or ".box_predictor." in key for key in differs)
    assert all(value.shape != state[key].shape for key, value in loaded.items() if key in differs)
    frozen = any(isinstance(layer, FrozenBatchNorm2d) for layer in built.modules())
    assert frozen == (name in ("fasterrcnn_mobilenet_v3_large_320_fpn", "fcos_resnet50_fpn"))
    assert torch.hub.get_dir() == before


@pytest.mark.parametrize("classes", [1000, 7])
@pytest.mark.parametrize("name", SMALL_BACKBONES)
def test_a_detector_starts_from_a_classifier(name: str, classes: int, tmp_path: Path, downloads: Path) -> None:
    state = changed(models.mobilenet_v3_large(weights=None, num_classes=classes).state_dict())
    config = config_of("detection", architecture=name, weights="imagenet")
    built: Network = architectures.build(config, saved(state, tmp_path))
    known = {(tuple(value.shape), value.flatten()[0].item()) for value in state.values() if value.ndim == 4}
    convolutions = [value for key, value in built.backbone.state_dict().items() if value.ndim == 4 and ".extra." not in key]
    of_the_file = [value for value in convolutions if (tuple(value.shape), value.flatten()[0].item()) in known]
    assert len(of_the_file) == len(known)  # the whole backbone, with its full tail
    assert built.transform.image_mean == [0.485, 0.456, 0.406]
    assert not downloads.exists()


def test_pretrained_backbones_are_frozen_as_torchvision_does(tmp_path: Path) -> None:
    state = changed(models.mobilenet_v3_large(weights=None).state_dict())
    config = config_of("detection", architecture="fasterrcnn_mobilenet_v3_large_320_fpn", weights="imagenet")
    built = architectures.build(config, saved(state, tmp_path))
    assert any(isinstance(layer, FrozenBatchNorm2d) for layer in built.modules())
    assert not all(parameter.requires_grad for parameter in built.parameters())


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('code of the file ran')",))


@pytest.mark.parametrize("problem_type", ["classification", "detection"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (Malicious(), "cannot be loaded safely"),
        (nn.Linear(1, 1), "cannot be loaded safely"),
        (b"no weights at all", "cannot be loaded safely"),
        ({"state_dict": {"a": torch.zeros(1)}}, "holds no state dict"),
        ({}, "holds no state dict"),
        ({"a": torch.zeros(1)}, "conv1.weight is missing"),
    ],
    ids=["code", "module", "rubbish", "nested", "empty", "other"],
)
def test_what_is_no_state_dict_is_refused(content: object, reason: str, problem_type: ProblemTypeName, tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    name = "resnet18" if problem_type == "classification" else "fcos_resnet50_fpn"
    with pytest.raises(ConfigError, match=reason) as error:
        architectures.build(config_of(problem_type, architecture=name, weights=S3), file)
    assert (error.value.where, error.value.key) == ("config.yaml", "architecture.weights")


@pytest.mark.parametrize("spoil", ["missing", "shape", "unknown"])
@pytest.mark.parametrize(
    ("problem_type", "name", "layer"),
    [
        ("classification", "resnet18", "layer1.0.conv1.weight"),
        ("detection", "ssdlite320_mobilenet_v3_large", "backbone.extra.0.0.0.weight"),
    ],
)
def test_what_does_not_fit_is_named(problem_type: ProblemTypeName, name: str, layer: str, spoil: str, tmp_path: Path) -> None:
    nothing = {"weights": None, **({"weights_backbone": None} if problem_type == "detection" else {})}
    state = models.get_model(name, **nothing).state_dict()
    if spoil == "missing":
        del state[layer]
    elif spoil == "shape":
        state[layer] = torch.zeros(1, 2)
    else:
        state["backbone.layer9.weight"] = torch.zeros(1)
    said = {"missing": f"{layer} is missing", "shape": f"{layer} is [1, 2] instead of", "unknown": "layer9.weight is not known"}
    weights = "coco" if problem_type == "detection" else S3
    with pytest.raises(ConfigError) as error:
        architectures.build(config_of(problem_type, architecture=name, weights=weights), saved(state, tmp_path))
    assert said[spoil] in str(error.value)


@pytest.mark.parametrize("given", [True, False])
def test_weights_are_never_left_out_in_silence(given: bool, tmp_path: Path) -> None:
    config = config_of("classification", architecture="resnet18", weights="none" if given else "imagenet")
    with pytest.raises(ConfigError, match=r"architecture\.weights"):
        architectures.build(config, saved({}, tmp_path) if given else None)


@pytest.mark.parametrize("problem_type", ["classification", "multilabel"])
def test_augmentation_keeps_the_form_of_a_batch(problem_type: ProblemTypeName) -> None:
    images = torch.rand(6, 3, 48, 64)
    after = architectures.augmentation(config_of(problem_type))(images.clone())
    assert after.shape == images.shape
    assert not torch.equal(after, images)
    assert after.min() >= 0
    assert after.max() <= 1


def test_augmentation_moves_boxes_with_their_image() -> None:
    """The white rectangle is where its box is."""
    torch.manual_seed(0)
    augment = architectures.augmentation(config_of("detection"))
    image = torch.zeros(3, 48, 64)
    image[:, 20:28, 10:30] = 1
    for _ in range(10):
        boxes = tv_tensors.BoundingBoxes([[10.0, 20.0, 30.0, 28.0]], format="XYXY", canvas_size=(48, 64))
        after, target = augment(tv_tensors.Image(image), {"boxes": boxes, "labels": torch.tensor([1])})
        rows, columns = torch.where(after[0] > 0.3)
        seen = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert (target["boxes"][0] - seen).abs().max() < 2


def test_a_model_of_its_own_may_have_any_name(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "multilabel", mode="L")["tiny_multilabel"]
    network.check(folder)
    built, _ = network.untrained(write_folder(tmp_path / "2", "multilabel", weights=S3)["tiny_multilabel"])
    assert built(torch.rand(2, 3, 48, 64)).shape == (2, 3)


@pytest.mark.parametrize(
    ("values", "key"),
    [({"weights": "imagenet"}, "architecture.weights"), ({"architecture": "ssd300_vgg16"}, "architecture.name")],
)
def test_a_folder_s_contradictions_are_found_without_a_download(values: dict[str, object], key: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "multilabel", **values)["tiny_multilabel"]
    with pytest.raises(ConfigError) as error:
        network.untrained(folder)
    assert error.value.key == key
