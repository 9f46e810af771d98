"""The demo's data sets: the same every time, no image twice, and boxes that fit the digits exactly."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
from collections import Counter
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
from PIL import Image

from cli import examples
from cli.examples import Example, ExampleModel, digit_detector
from labelloop import imaging, problem_types
from labelloop.dataset import split_of
from labelloop.label_studio.payloads import Annotation
from labelloop.model_config import ModelConfigs

MODELS: tuple[ExampleModel, ...] = get_args(ExampleModel)
_FINGERPRINT = f"""
import hashlib
from cli import examples
print(hashlib.sha256("".join(f"{{e.sha256}}{{e.truth}}" for m in {MODELS} for e in examples.load(m)).encode()).hexdigest())
"""


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> ExampleModel:
    chosen: ExampleModel = request.param
    return chosen


@pytest.fixture(scope="module")
def loaded() -> dict[ExampleModel, list[Example]]:
    return {name: examples.load(name) for name in MODELS}


@pytest.fixture(scope="module")
def data(model: ExampleModel, loaded: dict[ExampleModel, list[Example]]) -> list[Example]:
    return loaded[model]


def test_another_process_makes_the_same_data(loaded: dict[ExampleModel, list[Example]]) -> None:
    here = "".join(f"{e.sha256}{e.truth}" for data in loaded.values() for e in data)
    there = subprocess.run([sys.executable, "-c", _FINGERPRINT], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == hashlib.sha256(here.encode()).hexdigest()


def test_no_image_and_no_name_stands_twice(data: list[Example]) -> None:
    assert len({example.sha256 for example in data}) == len({example.name for example in data}) == len(data) > 500


def test_every_image_decodes_as_ingest_demands(data: list[Example]) -> None:
    for example in data:
        assert imaging.inspect(example.image).format == "PNG"


def test_every_class_is_in_every_split(model: ExampleModel, data: list[Example]) -> None:
    config = ModelConfigs.find()[model].config
    labels: dict[str, Counter[str]] = {"train": Counter(), "validation": Counter(), "test": Counter()}
    images: Counter[str] = Counter()
    for example in data:
        split = split_of(example.sha256, config.splits)
        images[split] += 1
        labels[split].update(region.label for region in example.truth)
    assert all(set(seen) == set(config.classes) for seen in labels.values())
    assert 0.15 < images["test"] / len(data) < 0.25
    assert 0.6 < images["train"] / len(data) < 0.8


def test_the_config_trains_at_counts_that_the_data_reach(model: ExampleModel, data: list[Example]) -> None:
    assert ModelConfigs.find()[model].config.retrain.at[-1] <= len(data)


def test_an_annotator_can_submit_the_truth(model: ExampleModel, data: list[Example]) -> None:
    """What goes to Label Studio comes back as the same regions, to a millionth of the image."""
    folder = ModelConfigs.find()[model]
    problem_type = problem_types.of(folder.config.problem_type)
    for example in data[:50]:
        result = problem_type.result(example.truth, folder.label_config, imaging.upright_size(example.image))
        back = problem_type.annotated(msgspec.convert({"id": 1, "result": result}, Annotation), folder.label_config)
        assert [region.label for region in back] == [region.label for region in example.truth]
        for read, true in zip(back, example.truth, strict=True):
            assert read.box == (None if true.box is None else pytest.approx(true.box, abs=1e-6))


@pytest.fixture(scope="module")
def scenes() -> list[digit_detector.Scene]:
    return list(digit_detector.scenes())


def test_boxes_are_shares_of_the_image(scenes: list[digit_detector.Scene]) -> None:
    for scene in scenes:
        for region in scene.truth:
            assert region.box is not None
            left, top, right, bottom = region.box
            assert 0 <= left < right <= 1
            assert 0 <= top < bottom <= 1


def test_all_ink_lies_in_the_boxes_and_reaches_their_four_sides(scenes: list[digit_detector.Scene]) -> None:
    """Ink is what differs from the ground."""
    for scene in scenes:
        ink = (scene.image != scene.ground).any(axis=2)
        outside = ink.copy()
        for region in scene.truth:
            inside = _cut(ink, region.box)
            assert all(side.any() for side in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
            _cut(outside, region.box)[:] = False
        assert not outside.any()


def test_digits_do_not_touch_each_other(scenes: list[digit_detector.Scene]) -> None:
    for scene in scenes:
        free = np.ones(scene.image.shape[:2], dtype=bool)
        for region in scene.truth:
            place = _cut(free, region.box)
            assert place.all()
            place[:] = False


def test_digits_differ_in_number_size_and_polarity(scenes: list[digit_detector.Scene]) -> None:
    assert {len(scene.truth) for scene in scenes} == {2, 3, 4}
    heights = [region.box[3] - region.box[1] for scene in scenes for region in scene.truth if region.box]
    assert max(heights) > 1.5 * min(heights)
    lighter = [
        _cut(scene.image, region.box).mean() > _cut(scene.ground, region.box).mean() for scene in scenes for region in scene.truth
    ]
    assert 0.25 < np.mean(lighter) < 0.75


def test_every_scan_is_in_one_image_only(scenes: list[digit_detector.Scene]) -> None:
    from sklearn.datasets import load_digits

    seen = Counter(region.label for scene in scenes for region in scene.truth)
    assert seen == Counter(str(label) for label in load_digits().target)


def test_the_files_are_the_scenes(scenes: list[digit_detector.Scene], loaded: dict[ExampleModel, list[Example]]) -> None:
    for example, scene in zip(loaded["digit_detector"], scenes, strict=True):
        assert example.truth == scene.truth
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(example.image))), scene.image)


def _cut(pixels: np.ndarray[Any, Any], box: tuple[float, float, float, float] | None) -> np.ndarray[Any, Any]:
    assert box is not None
    left, top, right, bottom = (round(corner * digit_detector.SIZE) for corner in box)
    return pixels[top:bottom, left:right]
